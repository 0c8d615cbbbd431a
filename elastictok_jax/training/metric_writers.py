"""Writes metrics to JSONL, to the console and, with extras installed, to TensorBoard and wandb."""

import contextlib
import importlib.util
import json
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from tqdm import tqdm

from elastictok_jax.errors import UsageError, first_line
from elastictok_jax.storage.atomic import replacing


class MetricWriter:
    """Writes scalars and pictures by step.

    On resume, `metrics.jsonl` is truncated to the restored step, so that it has one line per logged
    step however often the run was killed.
    """

    def __init__(
        self,
        workdir: Path,
        config: ml_collections.ConfigDict,
        *,
        start_step: int,
        wandb_run: Any = None,
    ):
        self.path = workdir / "metrics.jsonl"
        _cut_back(self.path, start_step)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")
        self._others: dict[str, Any] = {}  # by name; one that fails is not used again
        if config.train.tensorboard:
            with self._used("TensorBoard"):
                self._others["TensorBoard"] = _open_tensorboard(workdir, start_step=start_step)
        if wandb_run is not None:
            self._others["wandb"] = wandb_run

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one JSONL line, and the same values to the other sinks."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if "TensorBoard" in self._others:
            with self._used("TensorBoard"):
                for name, value in values.items():
                    self._others["TensorBoard"].add_scalar(name, value, step)
        if "wandb" in self._others:
            with self._used("wandb"):
                self._others["wandb"].log(values, step=step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Writes a uint8 picture to TensorBoard and wandb."""
        if "TensorBoard" in self._others:
            with self._used("TensorBoard"):
                self._others["TensorBoard"].add_image(name, image_HWC, step, dataformats="HWC")
        if "wandb" in self._others:
            with self._used("wandb"):
                import wandb

                self._others["wandb"].log({name: wandb.Image(image_HWC)}, step=step)

    def close(self) -> None:
        self._file.close()
        if "TensorBoard" in self._others:
            with self._used("TensorBoard"):
                self._others["TensorBoard"].close()
        if "wandb" in self._others:
            with self._used("wandb"):
                self._others["wandb"].finish()

    @contextlib.contextmanager
    def _used(self, name: str) -> Iterator[None]:
        """Drops a sink that fails inside, with a note: it must not end the run."""
        try:
            yield
        except Exception as error:  # other packages raise all kinds
            self._others.pop(name, None)
            print(
                f"note: {name} failed ({first_line(error)}): metrics go on to {self.path} alone",
                file=sys.stderr,
                flush=True,
            )


class ConsoleWriter:
    """Prints to stderr: a progress bar and lines on a terminal, only lines elsewhere."""

    def __init__(self, *, total: int, start: int):
        self._total = total
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Prints the metrics of a logged step in one line."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.line(f"step {step}/{self._total}  {text}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def own_line(self, text: str) -> None:
        """Prints a line that concerns this process alone."""
        self.line(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class SilentWriter:
    """Replaces MetricWriter and Console in all processes but the first, which writes for all."""

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
        """Prints a line that concerns this process alone."""
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


_START = b'{"step": '  # how each line starts


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Returns the lines of a `metrics.jsonl`, each with a "step"; [] if there is no such file.

    Leaves out lines that are not metrics, such as the last one of a killed process or one that
    another program wrote; a note on stderr gives their number.
    """
    try:
        raw = path.read_bytes().split(b"\n")
    except (FileNotFoundError, IsADirectoryError):
        return []
    lines, bad = [], 0
    for number, line in enumerate(raw, start=1):
        values = _parsed(line)
        if values is None and line and number < len(raw):  # the last one may be cut off by a kill
            bad += 1
            # One of our lines may follow text that was cut off before its newline.
            values = _parsed(line[max(0, line.rfind(_START)) :])
        if values is not None:
            lines.append(values)
    if bad:
        print(f"note: {bad} lines of {path} are not metrics: left out", file=sys.stderr)
    return lines


def _parsed(line: bytes) -> dict[str, float] | None:
    """Returns the numbers of one line, or None if it is not a line of metrics."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not _is_count(values.get("step")) or values["step"] < 0:
        return None
    return {name: x for name, x in values.items() if type(x) is float or _is_count(x)}


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _cut_back(path: Path, step: int) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder: move it away, as the metrics go there")
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def metric_writers_take_pictures(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a sink takes pictures; all processes have to take part in drawing them."""
    return bool(config.train.tensorboard or config.train.wandb_project)


def require_sinks(config: ml_collections.ConfigDict) -> None:
    """Checks that the packages of the configured sinks are installed.

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


def open_wandb(workdir: Path, config: ml_collections.ConfigDict) -> Any:
    """Starts or resumes the wandb run of `workdir`; returns None if the config asks for none.

    Raises:
      UsageError: if wandb does not start, for example without a login.
    """
    if not config.train.wandb_project:
        return None
    kept = workdir / "wandb_run_id"
    try:
        name = kept.read_text(encoding="utf-8").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        name = ""
    if not re.fullmatch(r"[\w-]+", name):
        name = uuid.uuid4().hex[:8]
        kept.write_text(name, encoding="utf-8")
    try:
        import wandb

        return wandb.init(
            project=config.train.wandb_project,
            id=name,
            name=config.name,
            dir=str(workdir),
            config=config.to_dict(),
            resume="allow",
        )
    except Exception as error:  # wandb's own, for network and login, and whatever a version breaks
        raise UsageError(
            f"train.wandb_project = {config.train.wandb_project}: wandb does not start "
            f"({first_line(error)}): run `wandb login`, set WANDB_MODE=offline, or leave it out"
        ) from error
