"""Options and output that several verbs share."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from elastictok_jax.errors import UsageError
from elastictok_jax.paths import expand_input_path, local_path, local_text

OVERRIDE = "--config."


def _option_type(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wraps `read` for `type=`, so that argparse prints the message of its UsageError."""

    def typed(text: str) -> Any:
        try:
            return read(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return typed


LOCAL = _option_type(local_path)
LOCAL_TEXT = _option_type(local_text)
INPUT = _option_type(expand_input_path)


def add_goal_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that set how many tokens each block gets."""
    group = parser.add_argument_group("how many tokens", "exactly one of these, but for --search")
    goals = group.add_mutually_exclusive_group(required=True)
    goals.add_argument("--tokens", type=int, metavar="N", help="this many for each block")
    goals.add_argument(
        "--max-mse", type=float, metavar="X", help="as few as keep to this error, [-1, 1] scale"
    )
    goals.add_argument("--min-psnr", type=float, metavar="DB", help="the same, in dB")
    goals.add_argument("--max-lpips", type=float, metavar="X", help="the same, of mean LPIPS")
    goals.add_argument(
        "--budget", type=float, metavar="F", help="this fraction of all, where they help most"
    )
    goals.add_argument("--total-tokens", type=int, metavar="N", help="this many for the clip")
    group.add_argument(
        "--search",
        default="hybrid",
        metavar="NAME",
        help="for the three errors: hybrid (the default), full, binned, binary, regression or "
        "verified_regression",
    )


def goal_from_options(args: argparse.Namespace):
    """Returns the `Goal` that the options of `add_goal_options` state."""
    from elastictok_jax.tokenizer.goal import GOALS, Goal

    return Goal(**{name: getattr(args, name) for name in GOALS}, search=args.search)


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose the model and how much of a clip is coded."""
    parser.add_argument(
        "--model", type=LOCAL_TEXT, required=True, help="a workdir or an exported folder"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        help="resize the shortest side to this (default: keep it)",
    )
    parser.add_argument(
        "--fps",
        type=float,
        metavar="F",
        help="frames per second to sample from a video, by time; the rate of standard input",
    )
    parser.add_argument("--max-frames", type=int, metavar="N", help="read no more than this")


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that identify this process among several."""
    group = parser.add_argument_group(
        "several processes",
        "not needed on TPU pods, under Slurm and under Open MPI; can also be set by the variables "
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


def print_if_json_option(results: Any, args: argparse.Namespace) -> None:
    """Prints `results` as JSON if `--json` is given."""
    if args.json:
        print(json.dumps(results, indent=2))


def split_command_line(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Splits a command line into its other words and {KEY: VALUE} of `--config.KEY=VALUE`.

    Raises:
      UsageError: if one has no `=VALUE`.
    """
    words: list[str] = []
    overrides: dict[str, str] = {}
    for word in argv:
        if word.startswith(OVERRIDE):
            key, equals, value = word.removeprefix(OVERRIDE).partition("=")
            if not equals:
                raise UsageError(f"{word} has no value: write {word}=VALUE")
            overrides[key] = value
        else:
            words.append(word)
    return words, overrides
