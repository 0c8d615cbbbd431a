"""Draw one training batch, with its clips and keep lengths."""

import argparse
import sys

from elastictok_jax.cli.options import LOCAL, print_if_json_option

EPILOG = "any config key: --config.KEY=VALUE, e.g. --config.data.sequence_blocks=16"
TAKES_CONFIG = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    parser.add_argument("-o", "--output", type=LOCAL, required=True, help="a .png to write")
    parser.add_argument("--batch", type=int, default=0, help="index in a new run, from 0")
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--json", action="store_true", help="print what is in the batch")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.config import apply_overrides
    from elastictok_jax.evaluation.inspect_batch import inspect_data
    from elastictok_jax.experiment_registry import get_experiment

    config = get_experiment(args.experiment)
    apply_overrides(config, overrides)
    results = inspect_data(config, output=args.output, split=args.split, batch=args.batch)
    print(f"batch drawn in {args.output}", file=sys.stderr)
    print_if_json_option(results, args)
