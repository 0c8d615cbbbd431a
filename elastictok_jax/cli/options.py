"""Options and output that several verbs share."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from elastictok_jax.errors import UsageError
from elastictok_jax.paths import input_path, local_path, local_text


def checked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` for `type=`: what its UsageError says is printed as it is."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


LOCAL, LOCAL_TEXT, INPUT = checked(local_path), checked(local_text), checked(input_path)


def add_goal_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how many tokens each block takes."""
    group = parser.add_argument_group("how many tokens", "exactly one of these, but for --search")
    goals = group.add_mutually_exclusive_group(required=True)
    goals.add_argument("--tokens", type=int, metavar="N", help="this many for each block")
    goals.add_argument(
        "--max-mse", type=float, metavar="X", help="as few as keep to this error, [-1, 1] scale"
    )
    goals.add_argument("--min-psnr", type=float, metavar="DB", help="the same, in dB")
    goals.add_argument("--max-lpips", type=float, metavar="X", help="the same, of mean LPIPS")
    goals.add_argument(
        "--budget", type=float, metavar="SHARE", help="this share of all, where they help most"
    )
    goals.add_argument("--total-tokens", type=int, metavar="N", help="so many for the whole clip")
    group.add_argument(
        "--search",
        default="hybrid",
        metavar="NAME",
        help="for the three errors: hybrid (the default), full, binned, binary, regression or "
        "verified_regression",
    )


def goal_of(args: argparse.Namespace):
    """The `Goal` that `add_goal_options` has read."""
    from elastictok_jax.tokenizer.goal import GOALS, Goal

    return Goal(**{name: getattr(args, name) for name in GOALS}, search=args.search)


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """The options that say by what model, and how much of a clip, is coded."""
    parser.add_argument(
        "--model", type=LOCAL_TEXT, required=True, help="a workdir or an exported folder"
    )
    parser.add_argument(
        "--resolution", type=int, metavar="R", help="resize the shortest side; else its own size"
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames a second to take of a video, by time; those that standard input has",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="read no more than this")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which of several processes this one is."""
    group = parser.add_argument_group(
        "several processes",
        "found without these on TPU pods, under Slurm and under Open MPI; or in the variables "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--processes", metavar="N", type=int, help="how many train together")
    group.add_argument("--process", metavar="I", type=int, help="which of them this is, from 0")
    group.add_argument(
        "--initialization-timeout",
        metavar="SECONDS",
        type=int,
        default=300,
        help="how long to wait at the start for the others (%(default)s)",
    )


def print_results(results: Any, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(results, indent=2))
