"""Where metrics go: JSONL always, TensorBoard and wandb by extra, and the console."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import ml_collections
import numpy as np
from tqdm import tqdm

from elastictok_jax.errors import UsageError


class MetricWriter:
    """Writes scalars and pictures by step.

    On resume, `metrics.jsonl` is cut back to the restored step, so that it ends up with one line
    a logged step however often the run was killed.
    """

    def __init__(self, workdir: Path, config: ml_collections.ConfigDict, *, start_step: int):
        self.path = workdir / "metrics.jsonl"
        _cut_back(self.path, start_step)
        self._file = self.path.open("a", buffering=1)
        self._tensorboard = None
        if config.train.tensorboard:
            self._tensorboard = _open_tensorboard(workdir, start_step=start_step)
        self._wandb = _open_wandb(workdir, config) if config.train.wandb_project else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One JSONL line, and the same values to the other sinks."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """A uint8 picture to TensorBoard and wandb."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, image_HWC, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image_HWC)}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


class Console:
    """A progress bar on a terminal, plain lines in a log."""

    def __init__(self, *, total: int, start: int):
        self._total = total
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a logged step, on the bar or as one line."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.line(f"step {step}/{self._total}  {text}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def own_line(self, text: str) -> None:
        """What concerns this process alone."""
        self.line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Silent:
    """The MetricWriter and Console of all processes but the first, which speaks for them."""

    def __init__(self, name: str):
        self._name = name

    def advance(self) -> None:
        pass

    def scalars(self, step: int, values: dict[str, float]) -> None:
        pass

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def own_line(self, text: str) -> None:
        """What concerns this process alone."""
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _cut_back(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


def shows_pictures(config: ml_collections.ConfigDict) -> bool:
    """Whether pictures have anywhere to go; drawing them takes all processes."""
    return bool(config.train.tensorboard or config.train.wandb_project)


def require_sinks(config: ml_collections.ConfigDict) -> None:
    """Sees that the packages of the sinks that are asked for are installed.

    Raises:
      UsageError: naming the extra to install.
    """
    asked = {
        "tensorboardX": ("train.tensorboard", "tensorboard", config.train.tensorboard),
        "wandb": ("train.wandb_project", "wandb", config.train.wandb_project),
    }
    for package, (key, extra, wanted) in asked.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise UsageError(f"{key} needs the extra: pip install 'elastictok_jax[{extra}]'")


def _open_tensorboard(workdir: Path, *, start_step: int):
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)


def _open_wandb(workdir: Path, config: ml_collections.ConfigDict):
    import wandb

    kept = workdir / "wandb_run_id"  # a resumed run goes on in the same one
    if not kept.exists():
        kept.write_text(wandb.util.generate_id())
    return wandb.init(
        project=config.train.wandb_project,
        id=kept.read_text().strip(),
        name=config.name,
        dir=str(workdir),
        config=config.to_dict(),
        resume="allow",
    )
