"""List the checkpoints of a run: RUN@STEP and RUN@best name them wherever a MODEL goes."""

import argparse

from elastictok_jax.cli.options import LOCAL, print_if_json_option


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=LOCAL, metavar="RUN", help="a training workdir")
    parser.add_argument("--json", action="store_true", help="print the results")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.training.inspect_run import inspect_run, inspect_run_text

    found = inspect_run(args.folder)
    if args.json:
        print_if_json_option(found, args)
    else:
        print(inspect_run_text(found))
