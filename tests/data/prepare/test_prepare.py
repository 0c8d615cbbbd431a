"""`elastictok prepare`: what is damaged is named, what is killed goes on, and nothing else decides
the result than inputs and options."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from av.video.reformatter import ColorTrc
from PIL import Image

from elastictok_jax import cli
from elastictok_jax.data import media
from elastictok_jax.data.prepare.scenes import SceneCuts
from elastictok_jax.data.sources.file_source import EMBEDDED
from elastictok_jax.data.sources.tfds_records import RecordSource

KITE = EMBEDDED / "heldout" / "bbb_kite.mp4"
PHOTO = EMBEDDED / "heldout" / "photo_chelsea.jpg"
ONE_WORKER = pytest.mark.xdist_group("prepare_many")  # which makes `many` once


def run_prepare(*words) -> int:
    return cli.main(["prepare", *map(str, words)])


def start_prepare(*words, file_kib: int | str = "unlimited") -> subprocess.Popen:
    """Starts the command; `file_kib` bounds the size of its files."""
    python = [sys.executable, "-m", "elastictok_jax", "prepare", *map(str, words)]
    blocks = file_kib if isinstance(file_kib, str) else file_kib * 2  # of 512 bytes
    return subprocess.Popen(
        ["sh", "-c", f'ulimit -f {blocks} && exec "$@"', "sh", *python],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_same(folder: Path, expected: dict[str, bytes]) -> None:
    """Asserts that folders are equal; names the file and place that differ."""
    found = content(folder)
    assert sorted(found) == sorted(expected)
    for name, data in expected.items():
        if found[name] != data:
            at = next(
                (i for i, (a, b) in enumerate(zip(found[name], data, strict=False)) if a != b),
                min(len(found[name]), len(data)),
            )
            near = slice(max(0, at - 150), at + 150)
            raise AssertionError(f"{name}[{at}]: {found[name][near]!r} for {data[near]!r}")


def small_clip(path: Path, *, start: int, count: int = 24, side: int = 48, **options) -> Path:
    frames = media.read_frames(KITE, start=start, count=count, side=side)
    media.write_video(path, frames, fps=24, **options)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Makes a nested folder of every kind of file, suffixes in any case."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "deep" / "Er").mkdir(parents=True)
    photo = Image.open(PHOTO)
    for number, name in enumerate(
        ["a.JPG", "b.jpeg", "deep/c.PNG", "deep/d.webp", "deep/Er/e.BMP", "f.GIF"]
    ):
        photo.crop((number * 5, 0, number * 5 + 90, 80)).save(folder / name)
    small_clip(folder / "g.MP4", start=0)
    small_clip(folder / "deep/h.mkv", start=20)
    small_clip(folder / "deep/i.MOV", start=30)
    frames = [Image.fromarray(f) for f in media.read_frames(KITE, count=6, side=32)]
    frames[0].save(folder / "j.gif", save_all=True, append_images=frames[1:], duration=100)
    (folder / "notes.txt").write_text("not media")
    (folder / ".hidden.jpg").write_bytes(b"not looked at")
    return folder


def test_a_mixed_folder(mixed, tmp_path, capsys):
    assert (
        run_prepare(mixed, "-o", tmp_path / "set", "--resolution", 40, "--jobs", 2, "--json") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["video_clips"], report["skipped"]) == (6, 4, [])
    assert report["video_frames"] == 3 * 24 + 6
    assert json.loads((tmp_path / "set" / "report.json").read_text()) == report
    source = RecordSource(tmp_path / "set", split="train")
    items = {source.name(item): item for item in range(len(source.frames))}
    assert "deep/Er/e.BMP" in items and len(items) == 10
    for name, item in items.items():
        frames = source.read(item, np.arange(source.frames[item]), side=40)
        original = media.resize_shortest(media.read_frames(mixed / name), side=40)
        assert frames.shape == original.shape
        error = np.abs(frames.astype(int) - original).mean()
        assert error == 0 if name.lower().endswith(("png", "bmp", "f.gif")) else error < 9
        assert source.fps[item] == pytest.approx(
            0 if source.frames[item] == 1 else 10 if name == "j.gif" else 24
        )


def test_images_that_need_no_change_are_kept_byte_for_byte(tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(PHOTO, tmp_path / "in" / "plain.jpg")
    turned = Image.open(PHOTO).getexif()
    turned[0x0112] = 6
    Image.open(PHOTO).save(tmp_path / "in" / "turned.jpg", exif=turned)
    assert run_prepare(tmp_path / "in", "-o", tmp_path / "set", "--resolution", 0) == 0
    source = RecordSource(tmp_path / "set", split="train")
    items = {source.name(item): item for item in range(2)}
    assert source.encoded_image(items["plain.jpg"]) == PHOTO.read_bytes()
    upright = source.read(items["turned.jpg"], np.zeros(1, int), side=100)
    original = media.read_frames(PHOTO, side=100)
    assert upright.shape[1:3] == original.shape[2:0:-1]


def test_the_same_frames_are_the_same_bytes_wherever_memory_lies():
    frames = media.read_frames(KITE, count=40, side=96)
    data = media.encode_video_bytes(frames, fps=24, crf=18)
    assert b"mbtree=0" in data  # x264's settings: with it one encoding in a hundred differs
    chance, held = random.Random(0), []
    for _ in range(20):
        held += [np.empty(chance.randrange(1, 200_000), np.uint8) for _ in range(3)]
        assert media.encode_video_bytes(frames, fps=24, crf=18) == data


def test_odd_sizes_come_back_without_their_padding(tmp_path):
    small_clip(tmp_path / "odd.mkv", start=0, side=33, codec="ffv1")
    assert run_prepare(tmp_path / "odd.mkv", "-o", tmp_path / "set") == 0
    source = RecordSource(tmp_path / "set", split="train")
    frames = source.read(0, np.arange(24), side=33)
    assert frames.shape == media.read_frames(tmp_path / "odd.mkv").shape


# ---- the same result, however it is come by


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, list[str], dict[str, bytes]]:
    """Returns a folder, options that give several shards, and the undisturbed result."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(10):
        small_clip(folder / f"{number}.mp4", start=number * 5, count=40, side=200)
        media.write_image(
            folder / f"{number}.png", media.read_frames(KITE, start=number, count=1)[0]
        )
    options = ["--shard-mib", "0.1", "--resolution", "96"]
    target = tmp_path_factory.mktemp("complete") / "set"
    assert run_prepare(folder, "-o", target, "--jobs", 1, *options) == 0
    result = content(target)
    assert len(shard_names(result)) >= 5
    assert not any(name.startswith(".") for name in result)
    return folder, options, result


@ONE_WORKER
def test_killed_at_three_random_moments(many, tmp_path):
    folder, options, expected = many
    target = tmp_path / "set"
    words = (folder, "-o", target, "--jobs", 2, *options)
    chance = random.Random(0)
    for done in chance.sample(range(len(shard_names(expected)) - 3), 3):
        running = start_prepare(*words)
        # Some shards on, within the work on the next.
        wait_for(lambda done=done: len(list(target.glob("*array_record*"))) >= done)
        time.sleep(chance.uniform(0.0, 0.3))
        assert running.poll() is None
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    assert run_prepare(*words) == 0
    assert_same(target, expected)


def shard_names(names) -> list[str]:
    return sorted(name for name in names if "array_record" in name)


@ONE_WORKER
@pytest.mark.parametrize("last", ["index.safetensors", "report.json", "gone"])
def test_killed_while_it_ends(many, tmp_path, last, monkeypatch):
    """Stops after each of the last renames in turn, as a kill would."""
    folder, options, expected = many
    target = tmp_path / "set"
    words = (folder, "-o", target, "--jobs", 2, *options)
    replace, rmtree = os.replace, shutil.rmtree

    class Killed(BaseException):
        pass

    def replace_and_stop(source, goal):
        replace(source, goal)
        if Path(goal) == target / last:
            raise Killed

    def remove_half(path, **options):
        if last == "gone" and Path(path).parent == target:
            next(Path(path).glob("*.json")).unlink()
            raise Killed
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_and_stop)
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(Killed):
            run_prepare(*words)
    assert content(target) != expected
    assert run_prepare(*words) == 0
    assert_same(target, expected)


@ONE_WORKER
def test_killed_parent_leaves_no_process_and_no_damage(many, tmp_path):
    folder, options, expected = many
    words = (folder, "-o", tmp_path / "set", "--jobs", 2, *options)
    running = start_prepare(*words)
    wait_for(lambda: list((tmp_path / "set" / ".prepare").glob("tmp-*")))
    workers = psutil.Process(running.pid).children(recursive=True)
    running.kill()  # the parent alone
    running.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert run_prepare(*words) == 0
    assert_same(tmp_path / "set", expected)


def wait_for(condition, *, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@ONE_WORKER
def test_two_machines_make_the_same(many, tmp_path, capsys):
    folder, options, expected = many
    words = (folder, "-o", tmp_path / "set", "--jobs", 2, *options)
    assert run_prepare(*words, "--shard", "0/2") == 0
    assert "complete when the other machines" in capsys.readouterr().err
    assert not (tmp_path / "set" / "dataset_info.json").exists()
    train = ["train", "quickstart", "--workdir", str(tmp_path / "run")]
    assert cli.main([*train, f"--config.data.sources.main.path={tmp_path / 'set'}"]) == 2
    assert "is not complete: run the same `elastictok prepare`" in capsys.readouterr().err
    assert run_prepare(*words, "--shard", "1/2") == 0
    assert_same(tmp_path / "set", expected)
    assert run_prepare(*words) == 0
    assert "is complete: nothing to do" in capsys.readouterr().err
    assert_same(tmp_path / "set", expected)


@ONE_WORKER
def test_inputs_elsewhere_globs_and_urls_make_the_same(many, tmp_path):
    folder, options, expected = many
    shutil.copytree(folder, tmp_path / "elsewhere")
    inputs = (tmp_path / "elsewhere", f"file://{folder}", f"file://{folder}/*.*")
    for number, text in enumerate(inputs):
        target = tmp_path / str(number)
        assert run_prepare(text, "-o", target, "--jobs", 2, *options) == 0
        assert_same(target, expected)


@ONE_WORKER
def test_other_options_or_inputs_are_refused(many, tmp_path, capsys):
    folder, options, _ = many
    target = tmp_path / "set"
    words = (folder, "-o", target, "--jobs", 2, *options)
    assert run_prepare(*words, "--shard", "0/2") == 0
    for more, said in (
        (("--crf", 30), "crf 18 -> 30"),
        (("--scene-cuts",), "scene_cuts False -> True"),
        (("--shard-mib", 5), "shard_mib 0.1 -> 5"),
    ):
        capsys.readouterr()
        assert run_prepare(*words, *more) == 2
        assert said in capsys.readouterr().err
    assert run_prepare(KITE, *words) == 2
    assert "inputs 20 -> 21" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    assert run_prepare(folder, "-o", tmp_path / "other") == 2
    assert "holds other files: give a new folder" in capsys.readouterr().err


# ---- damage


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def gif_bomb() -> bytes:
    head = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\x00\x00" + b"\0" * 6
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\x00\x02\x02\x4c\x01\x00"
    return head + frame * 3 + b"\x3b"


def damage(folder: Path, *, clip: bytes, photo: bytes) -> dict[str, str]:
    """Makes ten kinds of damage; returns what the report must say of each."""
    rng = np.random.default_rng(0)
    files = {
        "empty.mp4": (b"", "empty"),
        "cut.jpg": (photo[: len(photo) // 2], "damaged image|truncated"),
        "cut.mp4": (clip[: len(clip) // 2], "truncated|moov"),
        "text.jpg": (b"these are words", "not an image"),
        "video.png": (clip[: len(clip) // 3], "truncated|moov"),
        "picture.mp4": (photo[:40], "not a video|damaged|truncated|no video"),
        "header.png": (png_header(50, 50), "damaged image|truncated"),
        "bomb.png": (png_header(60000, 60000), "pixels"),
        "bomb.gif": (gif_bomb(), "pixels|not a video|damaged|truncated"),
        "noise.mkv": (rng.bytes(5000), "not a video|damaged"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: reason for name, (_, reason) in files.items()}


def real_folder(folder: Path, *, count: int) -> None:
    """Makes a folder of `count` real images and clips, cut from the embedded footage."""
    originals = sorted(EMBEDDED.glob("*/*.mp4"))
    for number in range(count):
        path = originals[number % len(originals)]
        total = media.probe(path).frames
        start = (7 * number) % (total - 12)
        frames = media.read_frames(path, start=start, count=12, side=48)
        if number % 4:
            media.write_image(folder / f"{number:03}.{'jpg' if number % 2 else 'png'}", frames[0])
        else:
            media.write_video(folder / f"{number:03}.mp4", frames, fps=24)


def test_ten_kinds_of_damage_are_named_and_the_rest_is_there(tmp_path, capsys):
    import re

    folder = tmp_path / "in"
    folder.mkdir()
    real_folder(folder, count=12)
    reasons = damage(folder, clip=KITE.read_bytes(), photo=PHOTO.read_bytes())
    (folder / "folder.jpg").mkdir()  # no file at all
    assert run_prepare(folder, "-o", tmp_path / "set", "--jobs", 2) == 0
    shown = capsys.readouterr().err
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    skipped = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert skipped.keys() == reasons.keys()
    for name, pattern in reasons.items():
        assert re.search(pattern, skipped[name]), (name, skipped[name])
        assert f"{name}: {skipped[name]}" in shown
        assert str(tmp_path) not in skipped[name]
    assert (report["images"], report["video_clips"]) == (9, 3)


def test_limits_on_frames_seconds_and_pixels(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    small_clip(folder / "long.mp4", start=0, count=60)
    small_clip(folder / "short.mp4", start=0, count=10)
    for number, (option, value, said) in enumerate(
        [("frames", 30, "more than 30 frames"), ("seconds", 1, "seconds are more than 1")]
    ):
        assert run_prepare(folder, "-o", tmp_path / str(number), f"--max-{option}", value) == 0
        (entry,) = json.loads((tmp_path / str(number) / "report.json").read_text())["skipped"]
        assert entry["file"] == "long.mp4" and said in entry["reason"]
    capsys.readouterr()
    assert run_prepare(folder, "-o", tmp_path / "none", "--max-pixels", 100) == 2
    assert "no input can be used: long.mp4: " in capsys.readouterr().err


def test_what_is_lost_of_a_file_is_reported(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    with av.open(str(folder / "hdr.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p10le"
        stream.codec_context.color_trc = ColorTrc.SMPTE2084
        for frame in np.full((2, 32, 32, 3), 99, np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    pictures[0].save(folder / "moves.webp", save_all=True, append_images=pictures[1:])
    pictures[0].save(folder / "still.gif", "WEBP")  # under another suffix
    assert run_prepare(folder, "-o", tmp_path / "set") == 0
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert (report["images"], report["video_clips"], report["skipped"]) == (2, 1, [])
    losses = {entry["file"]: entry["loss"] for entry in report["lossy"]}
    assert losses.keys() == {"hdr.mp4", "moves.webp"}
    assert losses["hdr.mp4"].startswith("is HDR (PQ), which is read without tone mapping")
    shown = capsys.readouterr().err
    assert all(f"note: {file} {loss}\n" in shown for file, loss in losses.items())


def test_a_strip_stays_as_it_is_and_is_read_at_little_cost(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    media.write_image(folder / "strip.png", np.full((1, 65500, 3), 7, np.uint8))
    assert run_prepare(folder, "-o", tmp_path / "set", "--resolution", 256) == 0
    source = RecordSource(tmp_path / "set", split="train")
    assert source.read(0, np.zeros(1, int), side=64).shape == (1, 64, 16 * 64, 3)
    with pytest.raises(media.MediaError, match=r"record 0: 16x1 scaled to 8000 .* 67108864 pixels"):
        source.read(0, np.zeros(1, int), side=8000)


def busy_worker(running, target: Path, *, killed: int) -> psutil.Process:
    """Waits for the only worker to be busy; the `killed` ones before left their folders."""
    wait_for(lambda: len(list((target / ".prepare").glob("tmp-*/shard"))) == killed + 1)
    time.sleep(0.2)
    found = psutil.Process(running.pid).children()
    return next(p for p in found if "spawn_main" in " ".join(p.cmdline()))


@pytest.fixture
def slow_folder(tmp_path) -> Path:
    """Makes a folder of one clip that takes seconds to transcode, and one that does not."""
    folder = tmp_path / "slow"
    folder.mkdir()
    frames = np.tile(media.read_frames(KITE, count=40, side=360), (12, 1, 1, 1))
    media.write_video(folder / "long.mp4", frames, fps=24, crf=40)
    small_clip(folder / "short.mp4", start=0)
    return folder


@pytest.mark.parametrize("kills", [1, 2])
def test_a_worker_that_is_killed_twice_at_one_file_costs_that(slow_folder, tmp_path, kills):
    target = tmp_path / "set"
    running = start_prepare(slow_folder, "-o", target, "--jobs", 1, "--resolution", 0)
    for killed in range(kills):
        worker = busy_worker(running, target, killed=killed)
        worker.kill()
    _, shown = running.communicate(timeout=120)
    assert running.returncode == 0, shown
    assert shown.count("crashed its process (exit code -9); making its shard again") == kills
    report = json.loads((target / "report.json").read_text())
    assert report["video_clips"] == 3 - kills
    reasons = [entry["reason"] for entry in report["skipped"]]
    assert reasons == ["crashed its process (exit code -9)"] * (kills - 1)


def test_a_file_that_takes_too_long_is_skipped(slow_folder, tmp_path):
    """Suspends the worker while it reads, so that no machine is too fast for this test."""
    target = tmp_path / "set"
    words = (slow_folder, "-o", target, "--jobs", 1, "--resolution", 0, "--timeout", 10)
    running = start_prepare(*words)
    busy_worker(running, target, killed=0).suspend()
    _, shown = running.communicate(timeout=120)
    assert running.returncode == 0, shown
    report = json.loads((target / "report.json").read_text())
    assert report["skipped"] == [{"file": "long.mp4", "reason": "took longer than 10 seconds"}]
    assert report["video_clips"] == 1


@ONE_WORKER
@pytest.mark.parametrize("kib", [4, 60])
def test_a_full_disk_ends_it_and_keeps_what_is_whole(many, tmp_path, kib):
    """Simulates a full disk by a limit on file sizes; with more room, the run resumes."""
    folder, options, expected = many
    target = tmp_path / "set"
    words = (folder, "-o", target, "--jobs", 2, *options)
    running = start_prepare(*words, file_kib=kib)
    _, shown = running.communicate(timeout=120)
    assert running.returncode == 1, shown
    assert f"error: {target} cannot be written (" in shown
    assert "File too large" in shown and "run the same command again" in shown
    assert "making its shard again" not in shown
    assert run_prepare(*words) == 0
    assert_same(target, expected)


def test_bad_use_is_one_line(tmp_path, capsys):
    cases = [
        ((tmp_path / "missing",), "missing does not exist"),
        ((f"{tmp_path}/*.mp4",), "holds no image or video"),
        (("nosuch://bucket/x",), "nosuch://bucket/x"),
        ((KITE, "--shard", "2/2"), "--shard 2/2: write i/n"),
        ((KITE, "--jobs", 0), "--jobs must be greater than 0"),
        ((KITE, "--crf", 99), "--crf in [0, 51]"),
    ]
    try:
        import s3fs  # noqa: F401
    except ImportError:
        cases.append((("s3://bucket/x",), "pip install 'elastictok_jax[s3]'"))
    for words, said in cases:
        assert run_prepare(*words, "-o", tmp_path / "set") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert run_prepare(KITE, "-o", "/proc/nowhere/set") == 2
    assert "/proc/nowhere/set cannot be written" in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name / "same").mkdir(parents=True)
        shutil.copy(PHOTO, tmp_path / name / "same" / "x.jpg")
    inputs = (tmp_path / "a" / "same", tmp_path / "b" / "same")
    assert run_prepare(*inputs, "-o", tmp_path / "set") == 2
    assert "would both be called same/x.jpg" in capsys.readouterr().err


# ---- scene cuts


def test_scene_cuts_split_where_clips_were_joined(tmp_path):
    names = ["bbb_kite", "city_busy", "bbb_static_skyline", "bbb_stream"]
    parts = [
        media.center_crop(
            media.read_frames(EMBEDDED / "heldout" / f"{name}.mp4", count=30, side=64),
            height=64,
            width=64,
        )
        for name in names
    ]
    media.write_video(tmp_path / "joined.mp4", np.concatenate(parts), fps=24)
    assert run_prepare(tmp_path / "joined.mp4", "-o", tmp_path / "set", "--scene-cuts") == 0
    source = RecordSource(tmp_path / "set", split="train")
    assert source.frames.tolist() == [30, 30, 30, 30]
    assert [source.name(n) for n in range(4)] == [
        "joined.mp4",
        "joined.mp4@30",
        "joined.mp4@60",
        "joined.mp4@90",
    ]
    assert len(set(source.place.tolist())) == 1  # all in one split


def test_no_cut_within_the_scenes_of_the_package():
    for path in sorted(EMBEDDED.glob("*/*.mp4")):
        cuts = SceneCuts()
        assert not any([cuts.is_cut(frame) for frame in media.read_frames(path, side=64)]), path


# ---- to the end


@pytest.mark.slow
def test_two_hundred_real_files_a_tenth_damaged_prepare_and_train(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    real_folder(folder, count=180)
    reasons = damage(folder, clip=KITE.read_bytes(), photo=PHOTO.read_bytes())
    (folder / "again").mkdir()
    more = damage(folder / "again", clip=KITE.read_bytes()[:-900], photo=PHOTO.read_bytes())
    assert run_prepare(folder, "-o", tmp_path / "set", "--jobs", 2, "--resolution", 32) == 0
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    skipped = {entry["file"]: entry["reason"] for entry in report["skipped"]}
    assert skipped.keys() == {*reasons, *(f"again/{name}" for name in more)}
    assert (report["images"], report["video_clips"]) == (135, 45)
    options = [
        *("model.width=32", "model.mlp_width=32", "model.encoder_layers=1"),
        *("model.decoder_layers=1", "video.resolution=32", "masking.min_tokens=1"),
        *("train.steps=40", "train.eval_every=40", "evaluation.report=false"),
        f"data.sources.main.path={tmp_path / 'set'}",
    ]
    words = [f"--config.{option}" for option in options]
    assert cli.main(["train", "quickstart", "--workdir", str(tmp_path / "run"), *words]) == 0
    # Straight from the folder too, with damaged files skipped.
    words[-1] = f"--config.data.sources.main.path={folder}"
    assert cli.main(["train", "quickstart", "--workdir", str(tmp_path / "raw"), *words]) == 0
