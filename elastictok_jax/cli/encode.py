"""Encode an image or a video as an .etok file of tokens."""

import argparse

from elastictok_jax.cli.options import (
    LOCAL,
    LOCAL_TEXT,
    add_clip_options,
    add_goal_options,
    goal_from_options,
    print_if_json_option,
)
from elastictok_jax.errors import UsageError

EPILOG = (
    "a pipe: ffmpeg -i IN -f rawvideo -pix_fmt rgb24 - | elastictok encode - "
    "--size WIDTHxHEIGHT --fps 30 ..., or y4m, which needs neither"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        type=LOCAL_TEXT,
        help="an image or a video; - reads frames from standard input",
    )
    parser.add_argument("-o", "--output", type=LOCAL, required=True, help="an .etok file")
    add_goal_options(parser)
    add_clip_options(parser)
    parser.add_argument("--window-blocks", type=int, metavar="N", help="blocks that see each other")
    parser.add_argument("--compress", action="store_true", help="entropy-code the file")
    parser.add_argument("--size", metavar="WxH", help="size of raw rgb24 frames on standard input")
    parser.add_argument("--json", action="store_true", help="print the results")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.tokenizer.file_codec import encode_file, encode_file_summary

    size = None
    if args.size is not None:
        width, _, height = args.size.partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise UsageError(f"--size {args.size}: write WIDTHxHEIGHT, e.g. 1280x720")
        size = (int(width), int(height))
    results = encode_file(
        args.input,
        model=args.model,
        output=args.output,
        goal=goal_from_options(args),
        resolution=args.resolution,
        max_frames=args.max_frames,
        window_blocks=args.window_blocks,
        coding="entropy" if args.compress else "plain",
        size=size,
        fps=args.fps,
    )
    if args.json:
        print_if_json_option(results, args)
    else:
        print(encode_file_summary(results))
