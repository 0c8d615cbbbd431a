"""Report whether an experiment fits a TPU pod, and how fast it could be; needs no TPU."""

import argparse

from elastictok_jax.cli.options import print_if_json_option

EPILOG = (
    "any config key: --config.KEY=VALUE, e.g. --config.mesh.fsdp=4; "
    "exit status 1 if it does not fit"
)
TAKES_CONFIG = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    parser.add_argument("--topology", required=True, help="chip and shape in chips: v4:8x8x4")
    parser.add_argument("--slices", type=int, default=1, help="how many pods of that shape")
    parser.add_argument("--json", action="store_true", help="print the results")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from elastictok_jax.aot.report import compile_experiment, report_text
    from elastictok_jax.aot.topology import describe_topology
    from elastictok_jax.config import apply_overrides
    from elastictok_jax.experiment_registry import get_experiment

    config = get_experiment(args.experiment)
    apply_overrides(config, overrides)
    topology = describe_topology(args.topology, slices=args.slices)
    results = compile_experiment(config, topology)
    if args.json:
        print_if_json_option(results, args)
    else:
        print(report_text(results))
    parts = (results, results["encode"], results["decode"])
    return 0 if all(part["fits"] for part in parts) else 1
