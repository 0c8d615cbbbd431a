"""Draws reconstructions: frames side by side, and the tokens that each block used."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from elastictok_jax.data import media
from elastictok_jax.evaluation.eval_clips import Coded, EvalClip
from elastictok_jax.evaluation.report import figures
from elastictok_jax.evaluation.report.figures import figure_log_ticks, plt
from elastictok_jax.pixels import pixel_mse, pixel_psnr

# Safe for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
FRAMES_SHOWN = 10
STRIP_HEIGHT = 24  # pixels, in the side-by-side video
LABEL_HEIGHT = 14

CodedClip = tuple[EvalClip, list[Coded]]


def draw_side_by_side(
    path: Path,
    coded: Sequence[CodedClip],
    *,
    title: str,
    frames_per_block: int,
    tokens_per_block: int,
    curve: Sequence[dict[str, float]] = (),
) -> None:
    """Writes a PNG: each video over time at each target with its token strip, images, curves."""
    videos = [item for item in coded if len(item[0].frames) > 1]
    images = [item for item in coded if len(item[0].frames) == 1]
    rows = sum(len(results) + 2.1 for _, results in videos)
    rows += (len(images[0][1]) + 1.6 if images else 0) + (2.6 if curve else 0)
    figure = plt.figure(figsize=(12, 1.0 * rows + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=13)
    ratios = [len(results) + 2.1 for _, results in videos]
    ratios += [len(images[0][1]) + 1.6] if images else []
    ratios += [2.6] if curve else []
    parts = list(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0])
    for item in videos:
        _draw_video(parts.pop(0), item, frames_per_block, tokens_per_block)
    if images:
        _draw_images(parts.pop(0), images, tokens_per_block)
    if curve:
        _draw_curves(parts.pop(0), curve, coded)
    figures.save_figure(figure, path, dpi=100)
    plt.close(figure)


def _label(coded: Coded, original: np.ndarray) -> str:
    psnr = pixel_psnr(pixel_mse(original, coded.reconstruction))
    return f"{coded.goal}\n{np.mean(coded.tokens.lengths):.0f} tokens/block\n{psnr:.1f} dB"


def _show(axes, image_HWC: np.ndarray) -> None:
    axes.imshow(image_HWC, interpolation="bicubic")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_video(figure, item: CodedClip, frames_per_block: int, most: int) -> None:
    clip, results = item
    shown = np.linspace(0, len(clip.frames) - 1, FRAMES_SHOWN).round().astype(int)
    grid = figure.add_gridspec(len(results) + 2, FRAMES_SHOWN)
    rows = [("original", clip.frames)]
    rows += [(_label(coded, clip.frames), coded.reconstruction) for coded in results]
    for row, (label, frames) in enumerate(rows):
        for column, index in enumerate(shown):
            axes = figure.add_subplot(grid[row, column])
            _show(axes, frames[index])
            if column == 0:
                colour = "black" if row == 0 else COLOURS[(row - 1) % len(COLOURS)]
                axes.set_ylabel(
                    label, rotation=0, ha="right", va="center", color=colour, fontsize=8
                )
    strip = figure.add_subplot(grid[-1, :])
    for index, coded in enumerate(results):
        use = _over_time(coded.tokens.lengths, coded, frames_per_block).mean(axis=1)
        missed = ~_over_time(coded.tokens.met, coded, frames_per_block).all(axis=1)
        edges = np.arange(len(use) + 1) * frames_per_block
        centres = (edges[:-1] + edges[1:]) / 2
        colour = COLOURS[index % len(COLOURS)]
        strip.stairs(use, edges, color=colour, linewidth=2)
        strip.plot(centres[missed], use[missed], "x", color=colour)
    strip.set_xlim(0, len(clip.frames))
    strip.set_ylim(0, most * 1.08)
    strip.set_ylabel("tokens", fontsize=8)
    name = figures.figure_label(clip.name)
    strip.set_xlabel(f"{name}: tokens used in each block, by frame (x: target missed)", fontsize=8)
    strip.tick_params(labelsize=7)


def _over_time(values: np.ndarray, coded: Coded, frames_per_block: int) -> np.ndarray:
    """Reshapes the values of all blocks to [time, tiles]."""
    return values.reshape(-(-coded.tokens.frames // frames_per_block), -1)


def _draw_images(figure, images: Sequence[CodedClip], most: int) -> None:
    images = images[:FRAMES_SHOWN]
    rows = len(images[0][1]) + 1
    axes = np.asarray(figure.subplots(rows, FRAMES_SHOWN, squeeze=False))
    for unused in axes[:, len(images) :].flat:
        unused.axis("off")
    for column, (clip, results) in enumerate(images):
        _show(axes[0, column], clip.frames[0])
        axes[0, column].set_title(figures.figure_label(clip.name), fontsize=8)
        for row, coded in enumerate(results, start=1):
            _show(axes[row, column], coded.reconstruction[0])
            note = f"{coded.tokens.num_tokens} of {most}" + ("" if coded.tokens.met.all() else " x")
            axes[row, column].set_xlabel(note, fontsize=8, color=COLOURS[(row - 1) % len(COLOURS)])
            if column == 0:
                axes[row, 0].set_ylabel(
                    str(coded.goal), rotation=0, ha="right", va="center", fontsize=8
                )


def _draw_curves(figure, curve: Sequence[dict[str, float]], coded: Sequence[CodedClip]) -> None:
    left, right = figure.subplots(1, 2)
    for name, label in (
        ("mse", "training"),
        ("eval/mse", "held out, most tokens"),
        ("eval/mse_at_0.25", "held out, a quarter"),
    ):
        points = [(line["step"], line[name]) for line in curve if name in line]
        if points:
            left.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
    left.set_yscale("log")
    left.set_xlabel("step", fontsize=8)
    left.set_ylabel("MSE", fontsize=8)
    left.legend(fontsize=8)
    for clip, results in coded:
        use = [float(np.mean(result.tokens.lengths)) for result in results]
        right.plot(
            [result.goal.target for result in results],
            use,
            "o-",
            label=figures.figure_label(clip.name),
            linewidth=1,
        )
    right.set_xscale("log")
    right.set_xlabel("target MSE", fontsize=8)
    right.set_ylabel("mean tokens a block", fontsize=8)
    right.legend(fontsize=6, ncols=2)
    figure_log_ticks(left.yaxis, right.xaxis)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)


def _side_by_side(
    item: CodedClip, *, frames_per_block: int, tokens_per_block: int, scale: int
) -> np.ndarray:
    """Renders original and reconstructions above token strips, uint8 [T, H', W', 3].

    The strips highlight the block of each frame.
    """
    clip, results = item
    panes: list[tuple[str, np.ndarray, Coded | None]] = [("original", clip.frames, None)]
    panes += [
        (f"{coded.goal}: {coded.tokens.num_tokens} tokens", coded.reconstruction, coded)
        for coded in results
    ]
    count, height, width = (clip.frames.shape[0], *clip.frames.shape[1:3])
    height, width = height * scale, width * scale
    pictures = []
    for index in range(count):
        canvas = Image.new(
            "RGB", (width * len(panes), LABEL_HEIGHT + height + STRIP_HEIGHT), "white"
        )
        pen = ImageDraw.Draw(canvas)
        for place, (label, frames, coded) in enumerate(panes):
            left = place * width
            frame = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(frame, (left, LABEL_HEIGHT))
            pen.text((left + 3, 1), label, fill="black")
            if coded is not None:
                use = _over_time(coded.tokens.lengths, coded, frames_per_block).mean(axis=1)
                _draw_strip(
                    pen,
                    use / tokens_per_block,
                    box=(left, LABEL_HEIGHT + height, width),
                    now=index // frames_per_block,
                    colour=COLOURS[(place - 1) % len(COLOURS)],
                )
        pictures.append(np.asarray(canvas))
    return np.stack(pictures)


def _draw_strip(
    pen: ImageDraw.ImageDraw,
    shares: np.ndarray,
    *,
    box: tuple[int, int, int],
    now: int,
    colour: str,
) -> None:
    left, top, width = box
    for block, share in enumerate(shares):
        start = left + width * block / len(shares)
        stop = left + width * (block + 1) / len(shares) - 1
        tall = max(1.0, share * (STRIP_HEIGHT - 2))
        shade = colour if block == now else "#c8c8c8"
        pen.rectangle(
            (start, top + STRIP_HEIGHT - tall, max(start, stop), top + STRIP_HEIGHT), shade
        )


def write_side_by_side(
    path: Path, coded: Sequence[CodedClip], *, frames_per_block: int, tokens_per_block: int
) -> None:
    """Writes the videos of `coded`, concatenated, as one MP4."""
    videos = [item for item in coded if len(item[0].frames) > 1]
    if not videos:
        return
    width = videos[0][0].frames.shape[2] * (len(videos[0][1]) + 1)
    scale = max(1, round(768 / width))
    pictures = [
        _side_by_side(
            item, frames_per_block=frames_per_block, tokens_per_block=tokens_per_block, scale=scale
        )
        for item in videos
    ]
    # Enlarged frames are smooth, so higher quality would only make report.html larger.
    crf = 24 if scale > 1 else 18
    media.write_video(path, np.concatenate(pictures), fps=videos[0][0].fps or 24.0, crf=crf)
