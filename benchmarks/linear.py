"""Linear transform codes at the bits of an experiment's tokens, on its held-out batches.

    python -m benchmarks.linear EXPERIMENT [--config.KEY=VALUE ...] [--train-batches N]
        [--codecs NAME ...] [--json FILE] [--plot FILE]

The references that a tokenizer has to beat at each number of tokens, from training batches alone:

- `dealt`: the code of `elastictok_jax.layers.linear_code`, whose digits fill the tokens.
- `unquantised`: as many numbers as the tokens have digits, with all their precision.
- `uniform`, `dead zone`: the same coefficients in scalar quantisers of one step (the second one
  rounds towards zero), as many bits a block on average as the tokens have, counted as an ideal
  static entropy coder would: Laplace distributions of the deviations in training.
- `klt`: `dead zone` on the principal components of complete blocks, of which there are as many as
  training blocks.
- `x264`, `av1`, `jpeg`: at the coarsest setting that takes no more bytes; rows of one clip as a
  video, or single frames as JPEG.

MSE is on the [-1, 1] scale. See RESULTS.md.
"""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.table import table
from elastictok_jax.cli import split_command_line
from elastictok_jax.config import apply_overrides, resolve_config
from elastictok_jax.data import media
from elastictok_jax.data.pipeline import read_ahead
from elastictok_jax.data.sources.splits import open_splits
from elastictok_jax.experiment_registry import get_experiment
from elastictok_jax.layers.linear_code import PatchSpectrum, deal_digits, decode_prefixes
from elastictok_jax.models.registry import family_of_config

COMPONENTS = 24  # of a patch
DEAD_ZONE = 1 / 3  # added before rounding down; 1/2 is uniform
FPS = 8.0  # of rows as a video; only its headers depend on it


class Blocks:
    """Blocks of a split: `patches` uint8 [N, L, D], and `clips`, those that follow each other."""

    def __init__(self, config: ml_collections.ConfigDict, *, split: str, batches: int) -> None:
        family = family_of_config(config)
        self.codec, geometry = family.codec, family.codec.geometry
        reader = family.task.reader(open_splits(config), split=split)
        rows, segments = [], []
        for batch in read_ahead(reader, start=0, stop=batches):
            shape = (-1, geometry.window, geometry.inputs)
            rows.append(batch["patches"].reshape(*shape, geometry.input_values))
            segments.append(batch["segment_ids"].reshape(shape)[..., 0])
        rows_RNLD, segments_RN = np.concatenate(rows), np.concatenate(segments)
        self.patches = rows_RNLD[segments_RN != 0]
        self.clips = [
            row[ids == clip]
            for row, ids in zip(rows_RNLD, segments_RN, strict=True)
            for clip in np.unique(ids[ids != 0])
        ]

    @property
    def values(self) -> np.ndarray:
        """float32 [N, L, D] in [-1, 1]."""
        return self.patches.astype(np.float32) / 127.5 - 1.0

    def frames(self) -> list[np.ndarray]:
        """Returns each clip as uint8 [T, R, R, 3]."""
        return [np.concatenate(list(np.asarray(self.codec.unpack(clip)))) for clip in self.clips]


def mse(decoded: np.ndarray, original: np.ndarray) -> float:
    """Mean squared error of values clipped to [-1, 1]."""
    return float(np.mean((np.clip(decoded, -1.0, 1.0) - original) ** 2))


def at_bits(
    train_NC: np.ndarray, test_NC: np.ndarray, *, bits: float, rounding: float
) -> tuple[np.ndarray, float]:
    """Quantises coefficients with the finest step that takes at most `bits` a block on average.

    Returns:
      The decoded coefficients and the bits that they take.
    """
    scales_C = np.maximum(np.mean(np.abs(train_NC), axis=0), 1e-9)
    low, high = 1e-3, 1e3
    for _ in range(40):
        step = math.sqrt(low * high)
        steps = np.sign(test_NC) * np.floor(np.abs(test_NC) / step + rounding)
        used = laplace_bits(steps, scales_C / step, rounding).sum() / len(steps)
        low, high = (step, high) if used > bits else (low, step)
    steps = np.sign(test_NC) * np.floor(np.abs(test_NC) / high + rounding)
    used = laplace_bits(steps, scales_C / high, rounding).sum() / len(steps)
    # Within its step, a Laplace distribution leans to zero.
    lean_C = centroid(scales_C / high, rounding)
    return (steps + np.sign(steps) * lean_C) * high, float(used)


def laplace_bits(steps_NC: np.ndarray, scales_C: np.ndarray, rounding: float) -> np.ndarray:
    """Bits of integers that quantise Laplace distributions of these mean absolute values."""
    edge = 1.0 - rounding  # of the zero's half
    zero_C = -np.expm1(-edge / scales_C)
    magnitudes = np.abs(steps_NC)
    nat = (edge + magnitudes - 1.0) / scales_C - np.log(-np.expm1(-1.0 / scales_C)) + np.log(2.0)
    return np.where(magnitudes == 0, -np.log2(np.maximum(zero_C, 1e-300)), nat / np.log(2.0))


def centroid(scales_C: np.ndarray, rounding: float) -> np.ndarray:
    """Where in a step that is not zero the mean lies, relative to the step's integer."""
    inside = scales_C - 1.0 / np.expm1(np.minimum(1.0 / scales_C, 80.0))
    return inside - rounding


def coarsest_within(size: Callable[[int], int], *, finest: int, coarsest: int, most: float) -> int:
    """The finest setting whose size is at most `most`; sizes fall from `finest` to `coarsest`."""
    step = 1 if coarsest > finest else -1
    low, high = 0, abs(coarsest - finest)
    while low < high:
        middle = (low + high) // 2
        if size(finest + step * middle) <= most:
            high = middle
        else:
            low = middle + 1
    return finest + step * low


def codec_mse(clips: Sequence[np.ndarray], *, codec: str, bytes_per_frame: float) -> float | None:
    """MSE of clips by a video codec within the bytes; None if its coarsest takes more."""
    errors = []
    for clip in clips:
        made: dict[int, Any] = {}

        def size(crf: int, clip=clip, made=made) -> int:
            made[crf] = media.recompress(clip, fps=FPS, codec=codec, crf=crf)
            return made[crf].stream_bytes

        most = bytes_per_frame * len(clip)
        crf = coarsest_within(size, finest=0, coarsest=media.COMPARED_CODECS[codec], most=most)
        if size(crf) > most:
            return None
        errors.append(np.mean((made[crf].frames / 127.5 - clip / 127.5) ** 2))
    return float(np.average(errors, weights=[len(clip) for clip in clips]))


def jpeg_mse(clips: Sequence[np.ndarray], *, bytes_per_frame: float) -> float | None:
    """MSE of frames as JPEG, headers left out, within the bytes; None if quality 1 takes more."""
    header = len(_jpeg(np.zeros((8, 8, 3), np.uint8), 50))
    errors = []
    for frame in np.concatenate(list(clips)):

        def size(quality: int, frame=frame) -> int:
            return len(_jpeg(frame, quality)) - header

        quality = coarsest_within(size, finest=95, coarsest=1, most=bytes_per_frame)
        if size(quality) > bytes_per_frame:
            return None
        decoded = np.asarray(Image.open(io.BytesIO(_jpeg(frame, quality))))
        errors.append(np.mean((decoded / 127.5 - frame / 127.5) ** 2))
    return float(np.mean(errors))


def _jpeg(frame: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=quality)
    return file.getvalue()


CODECS: dict[str, Callable[..., float | None]] = {
    "x264": partial(codec_mse, codec="libx264"),
    "av1": partial(codec_mse, codec="libsvtav1"),
    "jpeg": jpeg_mse,
}


def measure(
    config: ml_collections.ConfigDict, *, train_batches: int, codecs: Sequence[str]
) -> list[dict[str, Any]]:
    """A row of MSEs for each operating point of the experiment's evaluation."""
    family = family_of_config(config)
    geometry, code = family.codec.geometry, family.codec.code
    train = Blocks(config, split="train", batches=train_batches)
    held_out = Blocks(config, split="heldout", batches=config.evaluation.batches)
    train_values, values, clips = train.values, held_out.values, held_out.frames()
    patch = config.model.patch
    grid = tuple(
        size // step
        for size, step in zip((geometry.frames, geometry.side, geometry.side), patch, strict=True)
    )
    spectrum = PatchSpectrum.fit(train_values, grid=grid, components=COMPONENTS)
    train_NC, test_NC = spectrum.coefficients(train_values), spectrum.coefficients(values)
    digits = deal_digits(train_NC, levels=code.levels, tokens=geometry.tokens)
    points = [max(1, round(point * geometry.tokens)) for point in family.task.points]
    width = len(code.levels)
    dealt = decode_prefixes(test_NC, digits, token_digits=width, tokens=points)
    order = np.argsort(-np.mean(train_NC**2, axis=0))
    flat_train = train_values.reshape(len(train_values), -1)
    mean = flat_train.mean(axis=0)
    _, _, basis = np.linalg.svd(flat_train - mean, full_matrices=False)
    klt_train, klt_test = ((x.reshape(len(x), -1) - mean) @ basis.T for x in (train_values, values))
    rows = []
    for tokens in points:
        bits = tokens * code.bits
        kept = np.zeros_like(test_NC)
        kept[:, order[: width * tokens]] = test_NC[:, order[: width * tokens]]
        uniform, _ = at_bits(train_NC, test_NC, bits=bits, rounding=0.5)
        dead, _ = at_bits(train_NC, test_NC, bits=bits, rounding=DEAD_ZONE)
        klt, _ = at_bits(klt_train, klt_test, bits=bits, rounding=DEAD_ZONE)
        per_frame = bits / 8 / geometry.frames
        rows.append(
            {
                "tokens": tokens,
                "bits": round(bits),
                "dealt": mse(spectrum.patches(dealt[tokens]), values),
                "unquantised": mse(spectrum.patches(kept), values),
                "uniform": mse(spectrum.patches(uniform), values),
                "dead zone": mse(spectrum.patches(dead), values),
                "klt": mse(klt @ basis + mean, values.reshape(len(values), -1)),
                **{name: CODECS[name](clips, bytes_per_frame=per_frame) for name in codecs},
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws MSE against bits a block, both on log axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in [name for name in rows[0] if name not in ("tokens", "bits")]:
        points = [(row["bits"], row[name]) for row in rows if row[name] is not None]
        if points:
            axes.loglog(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="bits a block", ylabel="MSE on held-out blocks")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    words, overrides = split_command_line(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("experiment")
    parser.add_argument("--train-batches", type=int, default=150, help="that statistics are from")
    parser.add_argument("--codecs", nargs="*", choices=CODECS, default=list(CODECS))
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    args = parser.parse_args(words)
    os.environ.setdefault("SVT_LOG", "1")  # errors alone
    config = get_experiment(args.experiment)
    apply_overrides(config, overrides)
    rows = measure(resolve_config(config), train_batches=args.train_batches, codecs=args.codecs)
    results = {"machine": describe_machine(), "experiment": args.experiment, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)
    print(f"{args.experiment}, {jax.default_backend()} of {results['machine']}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
