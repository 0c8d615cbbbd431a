"""Real bytes of entropy-coded tokens against x264 and AV1 at equal error.

    python -m benchmarks.rate --model MODEL --input CLIP... [--targets MSE...] [--json FILE]

Each clip is scaled to the model's resolution and cropped to whole tiles of it; tokenizer and
codecs get the same frames. See RESULTS.md.
"""

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from benchmarks.table import table
from elastictok_jax import ElasticTokenizer, Tokens
from elastictok_jax.data import media

SHORT_NAMES = {"libx264": "x264", "libsvtav1": "av1"}


def read_clip(path: Path, *, resolution: int, side: int, frames: int | None) -> np.ndarray:
    """uint8 [T, H, W, 3], the shorter of H and W `side`, both multiples of `resolution`."""
    if media.media_kind(path) == "video" and frames is not None:
        frames = min(frames, media.probe(path).frames)
    clip = media.read_frames(path, count=frames, side=side)
    height, width = (length // resolution * resolution for length in clip.shape[1:3])
    return media.center_crop(clip, height=height, width=width)


def error(decoded: np.ndarray, clip: np.ndarray) -> float:
    """Mean squared error on the [-1, 1] pixel scale, one frame at a time in memory."""
    each = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(decoded, clip, strict=True)]
    return float(np.mean(each)) / 127.5**2


def coarsest_within(try_crf: Callable[[int], float], *, coarsest: int, target: float) -> int | None:
    """The highest crf that a bisection finds whose error is at most `target`; None for none."""
    if try_crf(coarsest) <= target:
        return coarsest
    if try_crf(0) > target:
        return None
    good, bad = 0, coarsest
    while bad - good > 1:
        middle = (good + bad) // 2
        if try_crf(middle) <= target:
            good = middle
        else:
            bad = middle
    return good


class Codec:
    """One codec on one clip; remembers what it has tried."""

    def __init__(self, name: str, clip: np.ndarray, *, fps: float) -> None:
        self._name, self._clip, self._fps = name, clip, fps
        self._tried: dict[int, tuple[int, float]] = {}

    def _try(self, crf: int) -> float:
        if crf not in self._tried:
            made = media.recompress(self._clip, fps=self._fps, codec=self._name, crf=crf)
            self._tried[crf] = made.stream_bytes, error(made.frames, self._clip)
        return self._tried[crf][1]

    def at(self, target: float) -> dict[str, Any]:
        """Bytes and error at the coarsest crf whose error is at most `target`."""
        coarsest = media.COMPARED_CODECS[self._name]
        crf = coarsest_within(self._try, coarsest=coarsest, target=target)
        name = SHORT_NAMES[self._name]
        size, mse = (None, None) if crf is None else self._tried[crf]
        return {f"{name}_bytes": size, f"{name}_mse": mse, f"{name}_crf": crf}


def measure_clip(
    tokenizer: ElasticTokenizer, clip: np.ndarray, *, name: str, fps: float, targets: list[float]
) -> list[dict[str, Any]]:
    """A row for each target. The tokenizer's error is that of the decoded entropy-coded file."""
    codecs = [Codec(codec, clip, fps=fps) for codec in media.COMPARED_CODECS]
    rows = []
    for target in targets:
        tokens = tokenizer.encode(clip, max_mse=target, fps=fps)
        assert isinstance(tokens, Tokens)
        tokens = dataclasses.replace(tokens, levels=tuple(tokenizer.config.model.fsq_levels))
        with tempfile.TemporaryDirectory() as folder:
            sizes = {}
            for coding in ("plain", "entropy"):
                path = Path(folder) / f"{coding}.etok"
                tokens.save(path, coding=coding)
                sizes[coding] = path.stat().st_size
            mse = error(tokenizer.decode(Tokens.load(path)), clip)
        row = {
            "clip": name,
            "size": f"{len(clip)}x{clip.shape[1]}x{clip.shape[2]}",
            "max_mse": target,
            "blocks_met": float(tokens.met.mean()),
            "mse": mse,
            "tokens": tokens.num_tokens,
            "nominal_bytes": round(tokens.bits / 8),
            "coded_bytes": tokens.entropy_coded_bits() // 8,
            "plain_etok_bytes": sizes["plain"],
            "etok_bytes": sizes["entropy"],
        }
        for codec in codecs:
            row |= codec.at(mse)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path, required=True, help="a workdir or exported folder")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="images or videos")
    parser.add_argument("--targets", type=float, nargs="+", help="max_mse; default: the config's")
    parser.add_argument("--side", type=int, help="shorter side; default: the model's resolution")
    parser.add_argument("--frames", type=int, help="at most, from the start")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    os.environ.setdefault("SVT_LOG", "1")  # errors alone, and not its settings for each encode
    tokenizer = ElasticTokenizer.from_pretrained(args.model)
    resolution = tokenizer.config.video.resolution
    targets = args.targets or list(tokenizer.config.evaluation.targets)
    rows = []
    for path in args.input:
        clip = read_clip(
            path, resolution=resolution, side=args.side or resolution, frames=args.frames
        )
        fps = media.probe(path).fps or 1.0  # an image
        rows += measure_clip(tokenizer, clip, name=path.name, fps=fps, targets=targets)
    results = {"machine": describe_machine(), "model": args.model.name, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"machine: {results['machine']}; model: {results['model']}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
