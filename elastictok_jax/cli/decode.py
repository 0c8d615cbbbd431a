"""Decode an .etok file into a picture or a video."""

import argparse
import sys

from elastictok_jax.cli.options import LOCAL, LOCAL_TEXT, print_if_json_option


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=LOCAL, help="an .etok file")
    parser.add_argument(
        "-o",
        "--output",
        type=LOCAL,
        required=True,
        help="a .png or .jpg, an .mp4, an .mkv (lossless), or pictures frame-%%05d.png",
    )
    parser.add_argument(
        "--model", type=LOCAL_TEXT, required=True, help="the model that made the tokens"
    )
    parser.add_argument(
        "--window-blocks", type=int, metavar="N", help="maximum of blocks that see each other"
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frame rate of the video (default: as in the tokens)",
    )
    parser.add_argument("--json", action="store_true", help="print the results")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.tokenizer.file_codec import decode_file

    results = decode_file(
        args.input,
        model=args.model,
        output=args.output,
        window_blocks=args.window_blocks,
        fps=args.fps,
    )
    print(f"{args.output}: {results['frames']} frames", file=sys.stderr)
    print_if_json_option(results, args)
