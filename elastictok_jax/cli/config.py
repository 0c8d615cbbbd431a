"""Print the resolved config of an experiment with what each key means, or how two differ."""

import argparse
import json

from elastictok_jax.cli.options import print_if_json_option

EPILOG = "any config key: --config.KEY=VALUE, e.g. --config.model.width=512; they change EXPERIMENT"
TAKES_CONFIG = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    parser.add_argument("--diff", metavar="OTHER", help="another experiment: only keys that differ")
    parser.add_argument("--json", action="store_true", help="print keys and values")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from elastictok_jax.config import apply_overrides, flatten_config, key_docs, resolve_config
    from elastictok_jax.experiment_registry import get_experiment

    def values(experiment: str, changes: dict[str, str]) -> dict:
        config = get_experiment(experiment)
        apply_overrides(config, changes)
        return flatten_config(resolve_config(config))

    ours = values(args.experiment, overrides)
    if args.diff is None:
        found = {key: {"value": value, "doc": doc} for key, value, doc in key_docs(ours)}
        lines = [f"{key} = {json.dumps(x['value'])}  # {x['doc']}" for key, x in found.items()]
    else:
        other = values(args.diff, {})
        found = {
            key: {"value": ours.get(key), "other": other.get(key)}
            for key in sorted(ours.keys() | other.keys())
            if ours.get(key) != other.get(key)
        }
        lines = [
            f"{key}: {json.dumps(x['value'])} -> {json.dumps(x['other'])}"
            for key, x in found.items()
        ]
    if args.json:
        print_if_json_option(found, args)
    else:
        print("\n".join(lines))
