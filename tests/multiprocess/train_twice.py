"""Two runs one after the other in one program of several processes: the second starts with the
weights of the first."""

import argparse
from pathlib import Path

from elastictok_jax.config import apply_overrides
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.parallel import distributed
from elastictok_jax.training.loop import train_experiment
from tests.multiprocess.launched import OPTIONS


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--process", "--processes"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    distributed.initialize(
        coordinator=args.coordinator, processes=args.processes, process=args.process
    )
    for name, changes in (
        ("first", {}),
        ("second", {"train.init_from": f"{args.folder / 'first'}@2"}),
    ):
        config = get_experiment("quickstart")
        keys = {"train.steps": 3, "train.checkpoint_every": 1, "evaluation.report": False}
        apply_overrides(config, OPTIONS | keys | changes)
        assert train_experiment(config, workdir=args.folder / name)
    distributed.shutdown()


if __name__ == "__main__":
    main()
