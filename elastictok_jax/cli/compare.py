"""Compare settings, metrics and curves of several runs."""

import argparse
import sys

from elastictok_jax.cli.options import LOCAL, print_if_json_option


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=LOCAL, metavar="RUN", help="a training workdir or a folder of them"
    )
    parser.add_argument("-o", "--output", type=LOCAL, help="folder for tables, curves and a page")
    parser.add_argument("--json", action="store_true", help="print the rows")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.evaluation.compare import (
        compare_held_out_warning,
        compare_runs,
        compared_columns,
    )

    rows = compare_runs(args.runs, output=args.output)
    if other_data := compare_held_out_warning(rows):
        print(f"note: {other_data}", file=sys.stderr)
    if args.json:
        print_if_json_option(rows, args)
    else:
        print(compared_columns(rows))
