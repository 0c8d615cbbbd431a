"""Which files a folder, a glob or a path gives: each once, and none lost silently."""

import os
import shutil
import subprocess
import sys

import pytest

from elastictok_jax.data.media import MediaLimits
from elastictok_jax.data.prepare.plan import plan_prepare
from elastictok_jax.data.prepare.transcode import TranscodeSettings
from elastictok_jax.data.sources.file_source import EMBEDDED, FileSource
from elastictok_jax.data.sources.listing import list_media, listing_ignored_text
from elastictok_jax.errors import UsageError

PHOTO = EMBEDDED / "heldout" / "photo_peaks.jpg"
CLIP = EMBEDDED / "heldout" / "bbb_kite.mp4"


def put(path, original=PHOTO):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(original, path)
    return path


def names(path):
    listing = list_media(path)
    return [listing.name(file) for file in listing.files]


@pytest.mark.parametrize(
    "name", ["c [1]", "what?", "a*b", "{x,y}", "[!a]", "**", "-x", "12:30", " "]
)
def test_a_folder_that_exists_is_no_glob(name, tmp_path):
    put(tmp_path / name / "a.jpg")
    put(tmp_path / name / "b" / "c.jpg")
    assert names(tmp_path / name) == ["a.jpg", "b/c.jpg"]
    assert names(f"{tmp_path / name}/*.jpg") == ["a.jpg"]
    assert names(f"{tmp_path / name}/**/c.jpg") == ["b/c.jpg"]


def test_what_does_not_exist_is_a_glob(tmp_path):
    for name in ("c1/a.jpg", "c2/b.jpg", "d/e.jpg"):
        put(tmp_path / name)
    assert names(tmp_path / "c[1-2]" / "*.jpg") == ["c1/a.jpg", "c2/b.jpg"]
    assert names(tmp_path / "c?") == ["c1/a.jpg", "c2/b.jpg"]  # folders, with what is in them
    assert names(f"{tmp_path}/**/*.jpg") == names(tmp_path) == names(f"{tmp_path}/**")
    with pytest.raises(UsageError, match="does not exist"):
        list_media(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no image"):
        list_media(tmp_path / "absent*")


def test_a_linked_folder_is_read_and_each_folder_once(tmp_path):
    put(tmp_path / "far" / "a.jpg")
    data = tmp_path / "data"
    put(data / "own" / "b.jpg")
    (data / "link").symlink_to("../far")
    (data / "again").symlink_to("../far")
    (data / "alias").symlink_to("own")
    (data / "own" / "loop").symlink_to("..")
    (data / "self").symlink_to("self")
    expected = ["again/a.jpg", "own/b.jpg"]
    assert names(data) == names(f"{data}/**/*.jpg") == names(f"{data}/**") == expected


def test_what_cannot_be_opened_is_named(tmp_path):
    put(tmp_path / "a.jpg")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    listing = list_media(tmp_path)
    assert len(listing.files) == 1
    reason = listing.unreadable[str(tmp_path / "gone.mp4")]
    assert reason.startswith("cannot be read (No such file")
    assert FileSource(tmp_path).damaged == [f"{tmp_path / 'gone.mp4'}: {reason}"]


def test_content_decides_where_the_suffix_says_nothing(tmp_path):
    for name in ("noext", "x.JPG_large", "x.jfif", "x.TIFF", "x.weird"):
        put(tmp_path / name)
    for name in ("v", "x.ts", "x.m2ts", "x.wmv", "x.flv", "x.3gp", "x.ogv", "x.mp4v"):
        put(tmp_path / name, CLIP)
    put(tmp_path / "x.mp4.part", CLIP)
    for name in ("notes.txt", "BMW.txt", "README", ".hidden"):
        (tmp_path / name).write_text("BM is how it begins, and GIF or FLV are no more")
    listing = list_media(tmp_path)
    assert len(listing.files) == 13
    assert listing.ignored == {".txt": 2, ".part": 1, "": 1}
    assert listing_ignored_text(listing.ignored) == "2 .txt, 1 without suffix, 1 .part"
    source = FileSource(tmp_path)
    assert not source.damaged
    assert sum(source.is_video) == 8


def test_a_single_file_is_data(tmp_path):
    path = put(tmp_path / "base.mp4", CLIP)
    source = FileSource(path)
    assert [source.name(0), len(source.frames)] == ["base.mp4", 1]
    (tmp_path / "notes.txt").write_text("no media")
    with pytest.raises(UsageError, match=r"notes.txt: unknown suffix"):
        list_media(tmp_path / "notes.txt")


def test_a_name_that_is_not_utf8_is_the_same_under_every_locale(tmp_path):
    for name in (b"caf\xe9.jpg", "カフェ.jpg".encode(), b"\xff.jpg"):
        put(tmp_path / "in" / os.fsdecode(name))
    program = (
        "import sys; from elastictok_jax.data.sources.file_source import FileSource\n"
        "s = FileSource(sys.argv[1])\n"
        "print(ascii([s.name(i) for i in range(3)]), s.place.tolist(), s.fingerprint)"
    )
    told = set()
    for locale, utf8 in (("C", "0"), ("C.UTF-8", "1")):
        environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": utf8}
        command = [sys.executable, "-c", program, os.fspath(tmp_path / "in")]
        told.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(told) == 1
    assert rb"caf\\xe9.jpg" in told.pop()


def test_a_plan_says_what_it_leaves_out(tmp_path):
    put(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    settings = TranscodeSettings(resolution=0, crf=18, scene_cuts=False, limits=MediaLimits())
    plan = plan_prepare([str(tmp_path)], settings=settings, shard_mib=1e-320)
    assert (plan.ignored, list(plan.unreadable)) == ({".txt": 1}, [str(tmp_path / "gone.mp4")])
    assert len(plan.shards) == 1
