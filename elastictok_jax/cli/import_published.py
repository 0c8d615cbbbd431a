"""Import published ElasticTok weights."""

import argparse
import sys

from elastictok_jax.cli.options import LOCAL


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=LOCAL, help="streaming_params or streaming_train_state")
    parser.add_argument("--config", type=LOCAL, required=True, help="the model's settings, JSON")
    parser.add_argument("-o", "--output", type=LOCAL, required=True, help="a new folder")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.interop.published import import_published

    import_published(args.file, config_file=args.config, output=args.output)
    print(f"imported into {args.output}", file=sys.stderr)
