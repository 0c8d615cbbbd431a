"""Show a clip side by side with its tokens."""

import argparse

from elastictok_jax.cli.options import (
    LOCAL,
    LOCAL_TEXT,
    add_clip_options,
    add_goal_options,
    goal_from_options,
    print_if_json_option,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=LOCAL_TEXT, help="an image or a video")
    parser.add_argument("-o", "--output", type=LOCAL, required=True, help="folder for results")
    add_goal_options(parser)
    add_clip_options(parser)
    parser.add_argument("--json", action="store_true", help="print the results")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.evaluation.reconstruct import reconstruct_file

    results = reconstruct_file(
        args.input,
        model=args.model,
        output=args.output,
        goal=goal_from_options(args),
        resolution=args.resolution,
        max_frames=args.max_frames,
        fps=args.fps,
    )
    print_if_json_option(results, args)
