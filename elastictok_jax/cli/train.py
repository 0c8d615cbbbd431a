"""Train an experiment; run again to resume."""

import argparse
import sys

from elastictok_jax.cli.options import LOCAL, add_process_options
from elastictok_jax.errors import STOPPED

EPILOG = "any config key: --config.KEY=VALUE, e.g. --config.train.steps=1000"
TAKES_CONFIG = True


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="a registered name or path/file.py[:arg]")
    parser.add_argument("--workdir", type=LOCAL, required=True, help="resumes by itself from here")
    add_process_options(parser)


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    from elastictok_jax.config import apply_overrides
    from elastictok_jax.data.sources.held_out import has_held_out
    from elastictok_jax.experiment_registry import get_experiment
    from elastictok_jax.parallel import distributed
    from elastictok_jax.training.loop import train_experiment

    config = get_experiment(args.experiment)
    apply_overrides(config, overrides)
    distributed.initialize(
        coordinator=args.coordinator,
        processes=args.processes,
        process=args.process,
        timeout=args.initialization_timeout,
    )
    process, processes = distributed.process_place()
    finished = train_experiment(config, workdir=args.workdir)
    distributed.shutdown()
    if not finished:
        return STOPPED
    report = config.evaluation.report and has_held_out(config)
    if report and processes > 1:
        if process == 0:
            output = args.workdir / "reports"
            print(f"report: elastictok evaluate {args.workdir} -o {output}", file=sys.stderr)
    elif report:
        from elastictok_jax.evaluation.evaluate import evaluate_models

        evaluate_models([args.workdir], output=args.workdir / "reports")
    return 0
