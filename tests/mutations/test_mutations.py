"""Over 200 mutated inputs: no traceback, no hang, no wrong frame, nothing lost in silence.

    pytest -m slow -s tests/mutations

prints a line for each input. Those that read as damaged are counted; a sound one must be read.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastictok_jax.data import media
from elastictok_jax.data.sources.tfds_records import RecordSource
from elastictok_jax.errors import UsageError
from tests.mutations.inputs import (
    DAMAGED,
    DAMAGES,
    KINDS,
    SOUND,
    Input,
    footage,
    generator,
    stamped_numbers,
)

pytestmark = pytest.mark.slow

ELASTICTOK = [sys.executable, "-m", "elastictok_jax"]
LIMIT = 600  # seconds until a command counts as hung
STAMPED = {"containers", "varying_rates", "damaged_videos", "turned_videos"}


def run(*words, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    """A command in a process of its own; it must end in order, whatever it was given."""
    command = [*ELASTICTOK, *map(os.fspath, words)]
    result = subprocess.run(command, check=False, input=stdin, capture_output=True, timeout=LIMIT)
    log = result.stderr.decode(errors="replace")
    assert result.returncode in (0, 1, 2), f"{words}: {result.returncode}\n{log}"
    for bad in ("Traceback", "Exception ignored", "Warning"):
        assert bad not in log, f"{words}:\n{log}"
    if result.returncode:
        errors = [line for line in log.splitlines() if line.startswith("elastictok: error: ")]
        assert len(errors) == 1, f"{words}:\n{log}"
    return result


def faults_of(frames: np.ndarray, entry: Input, *, stamped: bool, lossy: float = 0.0) -> str:
    """What is wrong with the frames that were read of an input; "" if nothing."""
    if frames.shape != entry.truth.shape:
        return f"has shape {frames.shape} for {entry.truth.shape}"
    if stamped and stamped_numbers(frames) != list(range(len(frames))):
        return f"frames {stamped_numbers(frames)}"
    errors = frames.astype(np.float32) - entry.truth
    psnr = 10 * np.log10(255**2 / np.square(errors).mean(axis=(1, 2, 3)).clip(1e-9))
    if psnr.min() < entry.psnr - lossy:
        return f"frame {psnr.argmin()} is off: {psnr.min():.1f} dB"
    return ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_read_as_it_is_or_refused_with_a_reason(kind, tmp_path):
    entries = {entry.name: entry for entry in KINDS[kind]()}
    folder = tmp_path / kind
    folder.mkdir()
    for entry in entries.values():
        entry.write(folder / entry.name)
    shutil.copy(media_file("photo_peaks.jpg"), folder)  # something to prepare, whatever is refused
    faults = []

    run("prepare", folder, "-o", tmp_path / "prepared", "--resolution", "0", "--crf", "10")
    report = json.loads((tmp_path / "prepared" / "report.json").read_text())
    refused = {Path(skipped["file"]).name: skipped["reason"] for skipped in report["skipped"]}
    source = RecordSource(tmp_path / "prepared", split="train")
    items = {Path(source.name(item)).name: item for item in range(len(source.frames))}
    lost = entries.keys() - items.keys() - refused.keys()
    faults += [f"{name}: prepare lost it in silence" for name in sorted(lost)]

    for name in sorted(entries.keys() - lost):
        entry = entries[name]
        direct = read_directly(folder / name)
        stamped = kind in STAMPED
        if isinstance(direct, str):
            verdict = "" if entry.state == DAMAGED and name in refused else "refused: " + direct
            print(f"{kind:18} {name:24} refused: {direct.partition(': ')[2][:90]}")
        else:
            frames, fps = direct
            verdict = faults_of(frames, entry, stamped=stamped)
            if not verdict and name in refused:
                verdict = f"prepare refuses it: {refused[name]}"
            if not verdict:
                item = items[name]
                stored = source.read_at_most(item, np.arange(source.frames[item]), side=0)
                verdict = faults_of(stored, entry, stamped=stamped, lossy=2.0)
            if not verdict and entry.fps and abs(fps / entry.fps - 1) > 2e-3:
                verdict = f"{fps} frames a second for {entry.fps}"
            print(f"{kind:18} {name:24} {'read' if not verdict else 'WRONG: ' + verdict}")
        if verdict:
            faults.append(f"{name}: {verdict}")
    assert not faults, "\n".join(faults)


def read_directly(path: Path) -> tuple[np.ndarray, float] | str:
    """All frames and the rate of a file, by `read_frames`; or why it is refused."""
    try:
        facts = media.probe(path)
        return media.read_frames(path), facts.fps
    except UsageError as error:
        assert "\n" not in str(error)
        return str(error)


# ---- names

NAMES = [
    b"c [1]",
    b"what?",
    b"a*b",
    b"{x,y}",
    b"caf\xe9",
    b"\xff\xfe",
    "カフェ".encode(),
    b"$x_1$",
    b"_underscore",
    b"-dash",
    b"new\nline",
    b"100%",
    b" spaced ",
    b"~",
    b"quote'\"",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_and_a_folder_of_any_name_are_found(name, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    folder.mkdir()
    shutil.copy(media_file("bbb_kite.mp4"), folder / os.fsdecode(name + b".mp4"))
    for locale in ("C", "C.UTF-8"):
        output = tmp_path / f"prepared {locale}"
        environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0" if locale == "C" else "1"}
        command = [*ELASTICTOK, "prepare", folder, "-o", output]
        result = subprocess.run(
            command, check=False, env=environment, capture_output=True, timeout=LIMIT
        )
        assert result.returncode == 0, result.stderr
        assert b"1 video clips" in result.stderr, result.stderr
    one, two = (sorted((tmp_path / f"prepared {x}").glob("*record*")) for x in ("C", "C.UTF-8"))
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def media_file(name: str) -> Path:
    return Path(media.__file__).parents[1] / "embedded" / "heldout" / name


# ---- a model, its tokens and its folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A training workdir with two checkpoints."""
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    keys = {"train.steps": 4, "train.checkpoint_every": 2, "train.eval_every": 4}
    keys |= {"evaluation.report": False, "model.width": 16, "model.mlp_width": 32}
    keys |= {"model.encoder_layers": 1, "model.decoder_layers": 1, "model.heads": 1}
    keys |= {"video.resolution": 16, "masking.min_tokens": 1, "data.sequence_blocks": 2}
    keys |= {"evaluation.batches": 1, "evaluation.targets": "(0.1,)", "train.log_every": 1}
    assert run("train", "quickstart", "--workdir", workdir, *options(keys)).returncode == 0
    return workdir


def options(keys: dict[str, object]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in keys.items()]


@pytest.fixture(scope="module")
def tokens(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "clip.etok"
    words = ("encode", media_file("bbb_kite.mp4"), "--model", trained, "-o", path)
    assert run(*words, "--tokens", "2", "--resolution", "16", "--max-frames", "16").returncode == 0
    return path


@pytest.mark.parametrize("damage", ["flip", *DAMAGES])
@pytest.mark.parametrize("number", range(4))
def test_damaged_tokens_are_refused(damage, number, trained, tokens, tmp_path):
    data = bytearray(tokens.read_bytes())
    rng = generator(f"{damage} {number}")
    if damage == "flip":
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        mutated = bytes(data)
    else:
        mutated = DAMAGES[damage](data, rng)
    path = tmp_path / "clip.etok"
    path.write_bytes(mutated)
    result = run("decode", path, "--model", trained, "-o", tmp_path / "clip.mp4")
    assert result.returncode == (0 if mutated == tokens.read_bytes() else 2)


LINES = [
    b"\xe9\n",
    b"{",
    b"null\n",
    b"[1, 2]\n",
    b'{"step": "three"}\n',
    b'{"loss": NaN}\n',
    b'"step"\n',
    b"\0" * 4096,
    b'{"step": 1e400, "loss": 1}\n',
    b'{"step": -1, "loss": {}}\n',
]


@pytest.mark.parametrize("line", LINES)
def test_garbage_in_the_log_stops_neither_compare_nor_a_resume(line, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    log = workdir / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], line, *lines[1:], line]))
    compared = run("compare", workdir, "--json")
    assert compared.returncode == 0
    before = json.loads(run("compare", trained, "--json").stdout)
    after = json.loads(compared.stdout)
    assert len(after) == len(before)
    words = json.loads((trained / "config.json").read_text())
    assert words  # the same config: only more steps
    resumed = run("train", "quickstart", "--workdir", workdir, *resume_options(trained))
    assert resumed.returncode == 0
    steps = [entry["step"] for entry in readable_entries(log) if "loss" in entry]
    assert {1, 2, 3, 4, 5, 6} <= set(steps)


def resume_options(trained: Path) -> list[str]:
    config = json.loads((trained / "config.json").read_text())
    keys = ("model.width", "model.mlp_width", "model.encoder_layers", "model.decoder_layers")
    keys += ("model.heads", "video.resolution", "masking.min_tokens", "data.sequence_blocks")
    keys += ("evaluation.batches", "train.checkpoint_every", "train.eval_every", "train.log_every")
    values = {key: config[key.split(".")[0]][key.split(".")[1]] for key in keys}
    values |= {"train.steps": 6, "evaluation.report": False, "evaluation.targets": "(0.1,)"}
    return options(values)


def readable_entries(log: Path) -> list[dict]:
    entries = []
    for line in log.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


@pytest.mark.parametrize("number", range(12))
def test_a_torn_newest_checkpoint_leaves_the_one_before(number, trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    rng = generator(f"checkpoint {number}")
    newest = workdir / "checkpoints" / "4"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    torn = files[int(rng.integers(len(files)))]
    tear = ["empty", "gone", "zeros", "half"][number % 4]
    data = torn.read_bytes()
    if tear == "gone":
        torn.unlink()
    else:
        torn.write_bytes(
            {"empty": b"", "zeros": bytes(len(data)), "half": data[: len(data) // 2]}[tear]
        )
    print(f"checkpoint {number}: {tear} {torn.relative_to(newest)}")
    encoded = run(
        *("encode", media_file("bbb_kite.mp4"), "--model", workdir, "-o", tmp_path / "clip.etok"),
        *("--tokens", "2", "--resolution", "16", "--max-frames", "8"),
    )
    assert encoded.returncode == 0
    resumed = run("train", "quickstart", "--workdir", workdir, *resume_options(trained))
    assert resumed.returncode == 0
    assert (workdir / "checkpoints" / "6").is_dir()


# ---- pipes


def y4m(header: bytes, *, frames: int = 8) -> bytes:
    width, height = 32, 16
    picture = bytes(range(256)) * 3
    return (
        header
        + b"\n"
        + b"".join(b"FRAME\n" + picture[: width * height * 3 // 2] for _ in range(frames))
    )


PIPES = {
    "sound": (y4m(b"YUV4MPEG2 W32 H16 F25:1 Ip A1:1 C420jpeg"), 0),
    "mpeg2": (y4m(b"YUV4MPEG2 W32 H16 F25:1 Ip A1:1 C420mpeg2"), 0),
    "paldv": (y4m(b"YUV4MPEG2 W32 H16 F25:1 Ip A1:1 C420paldv"), 0),
    "no_tags": (y4m(b"YUV4MPEG2 W32 H16 F25:1"), 0),
    "empty": (b"", 2),
    "only_header": (b"YUV4MPEG2 W32 H16 F25:1\n", 2),
    "unknown_color": (y4m(b"YUV4MPEG2 W32 H16 F25:1 C999"), 2),
    "no_size": (y4m(b"YUV4MPEG2 F25:1"), 2),
    "huge": (b"YUV4MPEG2 W99999999 H99999999 F25:1\nFRAME\n", 2),
    "negative": (b"YUV4MPEG2 W-32 H16 F25:1\nFRAME\n", 2),
    "rate_zero": (y4m(b"YUV4MPEG2 W32 H16 F0:0"), (0, 2)),
    "superscript": (y4m("YUV4MPEG2 W3² H16 F25:1".encode()), 2),
    "cut": (y4m(b"YUV4MPEG2 W32 H16 F25:1")[:-100], 1),
    "no_frame_word": (y4m(b"YUV4MPEG2 W32 H16 F25:1").replace(b"FRAME", b"BLAME", 3), (1, 2)),
    "long_header": (b"YUV4MPEG2 W32 H16 " + b"X" * 100_000, 2),
}


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_is_read_or_refused(name, trained, tmp_path):
    data, expected = PIPES[name]
    output = tmp_path / "clip.etok"
    result = run("encode", "-", "--model", trained, "-o", output, "--tokens", "2", stdin=data)
    allowed = expected if isinstance(expected, tuple) else (expected,)
    assert result.returncode in allowed, result.stderr
    if result.returncode == 0:
        assert struct.unpack("<Q", output.read_bytes()[:8])[0] > 0


def test_there_are_over_200():
    media_inputs = sum(len(list(inputs())) for inputs in KINDS.values())
    others = len(NAMES) + 4 * (1 + len(DAMAGES)) + len(LINES) + 12 + len(PIPES)
    assert media_inputs + others >= 200
    assert all(entry.state in (SOUND, DAMAGED) for kind in KINDS for entry in KINDS[kind]())
    assert len(footage()) == 40
