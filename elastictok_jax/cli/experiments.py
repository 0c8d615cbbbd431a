"""List the registered experiments."""

import argparse
import json

WITHOUT_JAX = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.experiment_registry import experiment_names

    names = experiment_names()
    print(json.dumps(names) if args.json else "\n".join(names))
