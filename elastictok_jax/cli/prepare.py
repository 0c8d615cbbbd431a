"""Make a data set to train on from images and videos; run again to resume."""

import argparse
import math
import os
import sys

from elastictok_jax.cli.options import INPUT, LOCAL, print_if_json_option
from elastictok_jax.errors import UsageError

WITHOUT_JAX = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        type=INPUT,
        nargs="+",
        metavar="INPUT",
        help="a folder, file, glob, gs:// or s3:// URL, or another TFDS data set",
    )
    parser.add_argument("-o", "--output", type=LOCAL, required=True, help="the data set's folder")
    parser.add_argument("--resolution", type=int, default=256, help="shortest side; 0 keeps it")
    parser.add_argument("--crf", type=int, default=18, help="x264 quality, lower is better")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--shard", default="0/1", help="i/n: the part of machine i of n")
    parser.add_argument("--shard-mib", type=float, default=256, help="MiB of originals in a shard")
    parser.add_argument("--scene-cuts", action="store_true", help="cut videos where scenes change")
    parser.add_argument("--max-pixels", type=int, default=2**26, help="maximum per frame")
    parser.add_argument("--max-frames", type=int, default=2**21, help="maximum per video")
    parser.add_argument("--max-seconds", type=float, default=86400.0, help="maximum per video")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one original")
    parser.add_argument("--json", action="store_true", help="print report.json")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.data.media import MediaLimits
    from elastictok_jax.data.prepare.supervisor import prepare_data_set, prepare_data_set_summary
    from elastictok_jax.data.prepare.transcode import TranscodeSettings

    index, _, machines = args.shard.partition("/")
    if not (index.isdecimal() and machines.isdecimal() and int(index) < int(machines)):
        raise UsageError(f"--shard {args.shard}: write i/n with 0 <= i < n, e.g. 0/4")
    positive = ("jobs", "shard_mib", "max_pixels", "max_frames", "max_seconds", "timeout")
    for name in positive:
        if not 0 < getattr(args, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be greater than 0, and a number")
    if args.resolution < 0 or not 0 <= args.crf <= 51:
        raise UsageError("--resolution must be 0 or more, and --crf in [0, 51]")
    report = prepare_data_set(
        args.inputs,
        output=args.output,
        settings=TranscodeSettings(
            resolution=args.resolution,
            crf=args.crf,
            scene_cuts=args.scene_cuts,
            limits=MediaLimits(args.max_pixels, args.max_frames, args.max_seconds),
        ),
        jobs=args.jobs,
        machine=(int(index), int(machines)),
        shard_mib=args.shard_mib,
        timeout=args.timeout,
    )
    if "plan" in report:
        print(prepare_data_set_summary(report), file=sys.stderr)
    print_if_json_option(report, args)
