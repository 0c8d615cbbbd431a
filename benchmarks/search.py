"""Ways to choose lengths: evaluations, tokens against the exact minimum, misses and time.

    python -m benchmarks.search --model runs/quickstart [--targets 0.02,0.03,...] -o DIR

Held-out embedded clips at twice the model's resolution or so, cut into its tiles, each tile a clip
of its own. Every method codes all of them to every target; what is checked is what the stored file
decodes to. `published` is the paper's binary search as its authors run it: a forward pass over the
whole context of the block for every length that is tried. Rows are written as they come. See
RESULTS.md.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.machine import describe_machine
from benchmarks.table import table
from elastictok_jax.data import media
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.layers.attention.api import SequenceLayout
from elastictok_jax.masking import keep_mask
from elastictok_jax.models.elastictok.model import build_elastictok_model
from elastictok_jax.pixels import pixels_to_float
from elastictok_jax.tokenizer.api import ElasticTokenizer
from elastictok_jax.tokenizer.block_codec import CodedBlock
from elastictok_jax.tokenizer.goal import Goal
from elastictok_jax.tokenizer.search import SEARCHES
from elastictok_jax.tokenizer.tiling import TileGrid
from elastictok_jax.tokenizer.tokens import Tokens

METHODS = ("full", "binned", "binary", "hybrid", "verified_regression", "regression")
AGAINST_PUBLISHED = 0.04  # target


def held_out_clips(
    tokenizer: ElasticTokenizer, *, rows: int, columns: int, most: int
) -> dict[str, Any]:
    """Name to uint8 [T, H, W, 3] of the held-out embedded files, cropped to whole tiles and to
    `most` frames."""
    side = tokenizer.config.video.resolution
    clips = {}
    for path in sorted((EMBEDDED / "heldout").iterdir()):
        count = min(most, media.probe(path).frames)
        frames = media.read_frames(path, count=count, side=rows * side)
        width = min(columns, frames.shape[2] // side) * side
        clips[path.stem] = media.center_crop(frames, height=rows * side, width=width)
    return clips


def code_all(
    tokenizer: ElasticTokenizer, clips: dict[str, np.ndarray], goal: Goal
) -> tuple[list[tuple[np.ndarray, TileGrid, list[CodedBlock]]], float]:
    """Blocks of every clip, and the seconds that they took."""
    start, coded = time.perf_counter(), []
    for clip in clips.values():
        grid = TileGrid(clip.shape[:3], tokenizer.geometry)
        policies = [tokenizer.threshold(goal) for _ in range(grid.tiles)]
        coded.append((clip, grid, tokenizer.code(clip, grid, policies, metric="mse")))
    return coded, time.perf_counter() - start


def stored_errors(tokenizer: ElasticTokenizer, clip: np.ndarray, tokens: Tokens) -> np.ndarray:
    """float64 [N]: error of each block as decoded from a stored file, by numpy alone."""
    with tempfile.TemporaryDirectory() as folder:
        tokens.save(Path(folder) / "clip.etok")
        decoded = tokenizer.decode(Tokens.load(Path(folder) / "clip.etok"))
    side, frames = tokenizer.config.video.resolution, tokenizer.config.video.frames_per_block
    error = ((decoded.astype(np.float64) - clip) / 127.5) ** 2
    rows, columns = clip.shape[1] // side, clip.shape[2] // side
    return np.asarray(
        [
            error[t : t + frames, y * side : (y + 1) * side, x * side : (x + 1) * side].mean()
            for t in range(0, len(clip), frames)
            for y in range(rows)
            for x in range(columns)
        ]
    )


def measure(
    tokenizer: ElasticTokenizer, clips: dict[str, np.ndarray], *, search: str, target: float
) -> dict[str, Any]:
    """What a search makes of all clips at one target, per block, and its seconds."""
    coded, seconds = code_all(tokenizer, clips, Goal(max_mse=target, search=search))
    blocks = [block for _, _, some in coded for block in some]
    errors = np.concatenate(
        [
            stored_errors(tokenizer, clip, tokenizer.tokens(some, grid, fps=0.0))
            for clip, grid, some in coded
        ]
    )
    met = np.asarray([block.met for block in blocks])
    # The file's error is summed in another order: a rounding apart at most.
    assert (errors[met] <= target * (1 + 1e-6)).all() and (errors[~met] > target * (1 - 1e-6)).all()
    return {
        "lengths": np.asarray([len(block.codes) for block in blocks]),
        "met": met,
        "evaluations": np.asarray([block.evaluations for block in blocks]),
        "encoder_passes": np.asarray([block.encoder_passes for block in blocks]),
        "seconds": seconds,
    }


def all_tokens_meet(
    tokenizer: ElasticTokenizer, clips: dict[str, np.ndarray], *, lengths: np.ndarray, target: float
) -> np.ndarray:
    """bool [N]: whether all tokens meet the target, after earlier blocks as `lengths` has them."""
    meets, start = [], 0
    for clip in clips.values():
        grid = TileGrid(clip.shape[:3], tokenizer.geometry)
        some = lengths[start : start + grid.blocks * grid.tiles]
        start += len(some)
        policies = [Probe(some[tile :: grid.tiles], target) for tile in range(grid.tiles)]
        tokenizer.code(clip, grid, policies, metric="mse")
        meets.append(np.stack([policy.meets for policy in policies], axis=1).reshape(-1))
    return np.concatenate(meets)


class Probe:
    """Keeps given lengths, and notes whether all tokens would have met a target."""

    def __init__(self, lengths: np.ndarray, target: float) -> None:
        self._lengths, self._target = iter(lengths.tolist()), target
        self.meets: list[bool] = []

    def keep(self, block) -> CodedBlock:
        self.meets.append(block.measure(block.tokens_per_block).error <= self._target)
        return block.keep(next(self._lengths))


def published_way(
    tokenizer: ElasticTokenizer, clip: np.ndarray, *, target: float
) -> dict[str, float]:
    """The paper's binary search, with a whole pass over the context of a block for each length.

    The context is `tokenizer.window_blocks`, as in ours. The last probe is kept whether it met the
    target or not.
    """
    model, params = build_elastictok_model(tokenizer.config), tokenizer.params
    per_block, window = tokenizer.tokens_per_block, tokenizer.window_blocks
    places = SequenceLayout(
        jnp.arange(window * per_block, dtype=jnp.int32),
        jnp.ones((1, window * per_block), jnp.int32),
        per_block,
    )

    @jax.jit
    def error_of(patches_SD, lengths_W, newest):
        keep = keep_mask(lengths_W[None], tokens_per_block=per_block)
        target_1SD = pixels_to_float(patches_SD)[None]
        output: Any = model.apply({"params": params}, target_1SD, keep, places)
        error_S = jnp.mean((jnp.clip(output.reconstruction, -1, 1) - target_1SD) ** 2, axis=(0, 2))
        return jax.lax.dynamic_slice_in_dim(error_S, newest * per_block, per_block).mean()

    grid = TileGrid(clip.shape[:3], tokenizer.geometry)
    blocks_met = probes = count = 0
    blocks, _ = grid.cut(clip)
    patches = tokenizer.codec.pack(blocks).reshape(grid.tiles, -1, tokenizer.geometry.input_values)
    error_of(patches[0, : window * per_block], np.ones(window, np.int32), 0)  # compiles
    start = time.perf_counter()
    for tile in patches:
        chosen: list[int] = []
        for block in range(grid.blocks):
            first = max(0, block + 1 - window)
            seen = tile[first * per_block : (first + window) * per_block]
            seen = np.pad(seen, [(0, window * per_block - len(seen)), (0, 0)])
            low, high = tokenizer.min_tokens, per_block
            while low < high:
                middle = (low + high) // 2
                lengths = np.ones(window, np.int32)
                lengths[: block - first + 1] = [*chosen[first:], middle]
                error = float(error_of(seen, lengths, block - first))
                probes += 1
                low, high = (low, middle) if error <= target else (middle + 1, high)
            chosen.append(middle)
            blocks_met += error <= target
            count += 1
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "evaluations": probes / count, "met": blocks_met / count}


def compare(
    tokenizer: ElasticTokenizer, clips: dict[str, np.ndarray], targets: list[float]
) -> Iterator[dict[str, Any]]:
    """A row for each method and target."""
    methods = [m for m in METHODS if tokenizer.router is not None or not SEARCHES[m].needs_router]
    short = {
        name: clip[: 4 * tokenizer.config.video.frames_per_block] for name, clip in clips.items()
    }
    for target in targets:
        exact: dict[str, Any] = {}
        for method in methods:
            if target == targets[0]:
                measure(tokenizer, short, search=method, target=target)  # compiles
            result = measure(tokenizer, clips, search=method, target=target)
            lengths, met = result["lengths"], result["met"]
            exact = exact or result
            meets = all_tokens_meet(tokenizer, clips, lengths=lengths, target=target)
            both = met & exact["met"]
            yield {
                "target": target,
                "search": method,
                "blocks": len(met),
                "met": float(met.mean()),
                "missed though all tokens meet it": int((meets & ~met).sum()),
                "missed though full meets it": int((exact["met"] & ~met).sum()),
                "tokens/block": float(lengths.mean()),
                "tokens over full": float(lengths[both].sum() / exact["lengths"][both].sum() - 1),
                "count error": float(
                    np.mean(
                        np.abs(lengths - exact["lengths"])[exact["met"]]
                        / exact["lengths"][exact["met"]]
                    )
                ),
                "evaluations/block": float(result["evaluations"].mean()),
                "encoder passes/block": float(result["encoder_passes"].mean()),
                "ms/block": 1e3 * result["seconds"] / len(met),
            }


def against_published(
    tokenizer: ElasticTokenizer, clip: np.ndarray, *, target: float, window: int
) -> Iterator[dict[str, Any]]:
    """Seconds for one clip by turns: the published way, and each of ours."""
    trained = tokenizer.window_blocks
    tokenizer.window_blocks = window
    for turn in range(3):
        published = published_way(tokenizer, clip, target=target)
        yield {"window": window, "turn": turn, "search": "published", **published, "ratio": 1.0}
        for search in ("binary", "hybrid"):
            result = measure(tokenizer, {"clip": clip}, search=search, target=target)
            if turn == 0:  # compiled by now
                result = measure(tokenizer, {"clip": clip}, search=search, target=target)
            yield {
                "window": window,
                "turn": turn,
                "search": search,
                "seconds": result["seconds"],
                "evaluations": float(result["evaluations"].mean()),
                "met": float(result["met"].mean()),
                "ratio": published["seconds"] / result["seconds"],
            }
    tokenizer.window_blocks = trained


def spending(
    tokenizer: ElasticTokenizer, clips: dict[str, np.ndarray], budgets: list[float]
) -> Iterator[dict[str, Any]]:
    """Error of all held-out clips coded within a budget against the same tokens for every block."""
    for budget in budgets:
        spent = tokenizer.encode(list(clips.values()), budget=budget)
        assert isinstance(spent, list)
        total = sum(t.num_tokens for t in spent)
        blocks = sum(len(t.codes) for t in spent)
        even = np.full(blocks, total // blocks)
        even[: total % blocks] += 1
        split = np.split(even, np.cumsum([len(t.codes) for t in spent])[:-1])
        uniform: list[Any] = [
            tokenizer.encode(clip, tokens=lengths.tolist())
            for clip, lengths in zip(clips.values(), split, strict=True)
        ]
        assert sum(t.num_tokens for t in uniform) == total
        asked = round(budget * blocks * tokenizer.tokens_per_block)
        yield {
            "budget": budget,
            "tokens asked": asked,
            "tokens used": total,
            "mse, spent": float(np.mean(np.concatenate([t.mse for t in spent]))),
            "mse, uniform": float(np.mean(np.concatenate([t.mse for t in uniform]))),
        }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Evaluations a block against tokens over the minimum, a point for each method and target."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for method in dict.fromkeys(row["search"] for row in rows):
        some = [row for row in rows if row["search"] == method]
        x = [row["evaluations/block"] for row in some]
        y = [100 * row["tokens over full"] for row in some]
        axes.plot(x, y, "o", label=method)
    axes.set_xscale("log")
    axes.set_xlabel("evaluations a block")
    axes.set_ylabel("tokens over the exact minimum, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="a training workdir or an exported folder")
    parser.add_argument("--targets", default="0.02,0.03,0.04,0.06")
    parser.add_argument("--windows", default="4,8,24", help="blocks of context, against published")
    parser.add_argument("--budgets", default="0.25,0.5")
    parser.add_argument("--rows", type=int, default=2, help="of tiles that a frame is cut into")
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--frames", type=int, default=64, help="of a clip, at most")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    tokenizer = ElasticTokenizer.from_pretrained(args.model)
    one_tile = held_out_clips(tokenizer, rows=1, columns=1, most=96)["bbb_kite"]
    clips = held_out_clips(tokenizer, rows=args.rows, columns=args.columns, most=args.frames)
    targets = [float(target) for target in args.targets.split(",")]
    windows = [int(window) for window in args.windows.split(",")]
    parts: dict[str, Iterable[dict[str, Any]]] = {
        "published": itertools.chain.from_iterable(
            against_published(tokenizer, one_tile, target=AGAINST_PUBLISHED, window=window)
            for window in windows
        ),
        "searches": compare(tokenizer, clips, targets),
        "budgets": spending(tokenizer, clips, [float(b) for b in args.budgets.split(",")]),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe_machine(), **{part: [] for part in parts}}
    for part, rows in parts.items():
        for row in rows:
            results[part].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            (args.output / "search.json").write_text(json.dumps(results, indent=2) + "\n")
        if part == "searches":
            draw(results[part], args.output / "search.png")
        print(table(results[part]), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
