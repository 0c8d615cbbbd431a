"""Teach a trained model to predict how many tokens a block needs."""

import argparse
import sys

from elastictok_jax.cli.options import LOCAL_TEXT, print_if_json_option
from elastictok_jax.errors import UsageError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=LOCAL_TEXT,
        help="a training workdir or an exported folder; the router is saved there",
    )
    parser.add_argument("--blocks", type=int, default=2000, help="blocks to measure (%(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.tokenizer.router_training import train_router

    for name in ("blocks", "steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} must be greater than 0")
    results = train_router(args.model, blocks=args.blocks, steps=args.steps)
    print(
        f"router in {args.model}: {100 * results['count_error']:.1f}% error in tokens on data "
        "that it did not learn from",
        file=sys.stderr,
    )
    print_if_json_option(results, args)
