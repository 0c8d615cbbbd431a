"""Hostile .etok files: each is refused in one clear line, or loads to sound tokens."""

import json
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from safetensors.numpy import load, save

from elastictok_jax.errors import UsageError
from elastictok_jax.tokenizer import etok
from elastictok_jax.tokenizer.tokens import Tokens
from tests.tokenizer.test_tokens import LEVELS, assert_same, make_tokens

SEEDS = 12
MAX_BYTES_A_LOAD = 2**24  # the files themselves have a few hundred
MAX_SECONDS_A_LOAD = 5.0


def test_the_checksum_is_the_documented_one(tmp_path):
    """docs/etok.md, word by word: another program must be able to write a file."""
    make_tokens([2, 1], largest=255).save(tmp_path / "clip.etok")
    arrays, text = split((tmp_path / "clip.etok").read_bytes())
    stated = text.pop("crc32")
    parts = [f"{name}={text[name]};".encode() for name in sorted(text)]
    for name, shape in [("codes", "3"), ("lengths", "2"), ("met", "2"), ("mse", "2")]:
        dtype = {"codes": "uint8", "lengths": "uint8", "met": "bool", "mse": "float32"}[name]
        parts += [f"{name} {dtype} {shape};".encode(), arrays[name].tobytes()]
    assert stated == f"{zlib.crc32(b''.join(parts)):08x}"


# ---- a file taken apart, and put together again with a right checksum


def split(data):
    """Arrays and text of a sound file."""
    (size,) = struct.unpack("<Q", data[:8])
    return load(data), json.loads(data[8 : 8 + size])["__metadata__"]


def seal(arrays, text):
    """A file whose checksum is right, whatever it holds: what an attacker would write."""
    text = {name: value for name, value in text.items() if name != "crc32"}
    return save(arrays, metadata=text | {"crc32": etok.etok_checksum(arrays, text)})


def with_header(data, change):
    """`change` of the header's text; the arrays' bytes stay."""
    (size,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + size].decode())
    return struct.pack("<Q", len(header)) + header.encode() + data[8 + size :]


def with_entry(data, change):
    """The header after `change(its JSON object)`."""

    def edit(header):
        entries = json.loads(header)
        change(entries)
        return json.dumps(entries)

    return with_header(data, edit)


def with_array(data, name, change):
    arrays, text = split(data)
    arrays[name] = change(arrays[name])
    return seal(arrays, text)


def with_text(data, **changed):
    arrays, text = split(data)
    return seal(arrays, text | changed)


def payload(data):
    arrays, _ = split(data)
    return "words" if "words" in arrays else "codes"


def one_changed(value):
    """A change of an array that puts `value` at its first place."""

    def change(array):
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change


def pick(rng, *choices):
    return choices[rng.integers(len(choices))]


# ---- mutations: (sound bytes, generator) -> hostile bytes

HUGE = ("1" * 4000, "1e999", str(2**63), str(-(2**70)))
NOT_SIZES = (*HUGE, "0", "-1", "1.5", "NaN", "null", "true", '"8"', "[8]", "{}", "", "[" * 5000)
NOT_RATES = ("NaN", "Infinity", "-1", "1e999", "null", '"24"', "true", "[" * 5000, "1" * 5000)
NOT_LEVELS = ("[1, 8]", "[0]", "[-8, -8]", "[8.0]", "[true, 8]", "8", "null", '"88"', "[[8]]")


def flip(data, rng, start):
    place = int(rng.integers(start, len(data)))
    changed = data[place] ^ (1 << int(rng.integers(8)))
    return data[:place] + bytes([changed]) + data[place + 1 :]


def data_start(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


def swap_offsets(entries):
    mse, met = entries["mse"], entries["met"]
    mse["data_offsets"], met["data_offsets"] = met["data_offsets"], mse["data_offsets"]


def one_array(rng):
    return pick(rng, "lengths", "mse", "met")


def cut_blocks(data, rng):
    """One block fewer in some of the arrays alone."""
    return with_array(data, one_array(rng), lambda array: array[:-1])


def set_entry(data, rng, key, value):
    name = pick(rng, one_array(rng), payload(data))
    return with_entry(data, lambda entries: entries[name].update({key: value}))


def codes_outside(data, rng):
    """Beyond the codebook, or not finite; of the coded form, levels that cannot be coded."""
    if payload(data) == "words":
        return with_text(data, levels=pick(rng, "[]", "[64000]", json.dumps([2] * 40)))
    values = split(data)[0]["codes"]
    if values.ndim == 2:
        return with_array(data, "codes", one_changed(pick(rng, np.nan, np.inf)))
    largest = pick(rng, 64_000, 2**31 - 1, 2**31, 2**32 - 1)
    return with_array(data, "codes", lambda codes: one_changed(largest)(codes.astype(np.uint32)))


def wrong_payload(data, rng):
    """Another length, type or number of axes of the codes or words."""
    changes = (
        lambda a: a[:-1],
        lambda a: np.concatenate([a[:2], a[3:]]),
        lambda a: a[:0],
        lambda a: a.astype(np.int64),
        lambda a: a.astype(np.float64),
        lambda a: a[None, None],
        lambda a: np.asarray(a.reshape(-1)[0]),
    )
    return with_array(data, payload(data), pick(rng, *changes))


MUST_BE_REFUSED = {
    "empty": lambda data, rng: b"",
    "truncated": lambda data, rng: data[: rng.integers(len(data))],
    "extended": lambda data, rng: data + rng.bytes(int(rng.integers(1, 500))),
    "random bytes": lambda data, rng: rng.bytes(int(rng.integers(1, 2000))),
    "zeros": lambda data, rng: bytes(int(rng.integers(1, 2000))),
    "content flipped": lambda data, rng: flip(data, rng, data_start(data)),
    "header length": lambda data, rng: (
        struct.pack("<Q", pick(rng, 0, 2**31, 2**40, 2**63, 2**64 - 1, etok.MAX_HEADER_BYTES + 1))
        + data[8:]
    ),
    "header shifted": lambda data, rng: (
        struct.pack("<Q", data_start(data) - 8 + pick(rng, -9, -1, 1, 9)) + data[8:]
    ),
    "header nested": lambda data, rng: with_header(
        data, lambda header: pick(rng, "[", '{"a":') * 2000 + header
    ),
    "header not JSON": lambda data, rng: with_header(
        data,
        lambda header: pick(rng, header.rstrip()[:-1], "null", "[]", "{}", "\0" * 50, 2 * header),
    ),
    "header padded": lambda data, rng: with_header(
        data, lambda header: header + " " * etok.MAX_HEADER_BYTES
    ),
    "array missing": lambda data, rng: with_entry(
        data, lambda entries: entries.pop(pick(rng, one_array(rng), payload(data), "__metadata__"))
    ),
    "array renamed": lambda data, rng: with_header(
        data, lambda header: header.replace(f'"{payload(data)}"', '"\\u001b[31m"')
    ),
    "array extra": lambda data, rng: seal(
        split(data)[0] | {pick(rng, "x", "codes2"): np.zeros(3, np.uint8)}, split(data)[1]
    ),
    "type": lambda data, rng: set_entry(
        data, rng, "dtype", pick(rng, "I8", "F64", "BF16", "C64", "F4", "X", 7, None)
    ),
    "shape": lambda data, rng: set_entry(
        data, rng, "shape", pick(rng, [], [-1], [2**40], [2**63, 2], [10**30], [0], "x", [1, 2, 3])
    ),
    "offsets": lambda data, rng: set_entry(
        data, rng, "data_offsets", pick(rng, [0, 2**62], [-4, 4], [9, 1], [0], [0, 1], "x")
    ),
    "offsets swapped": lambda data, rng: with_entry(data, swap_offsets),
    "text not text": lambda data, rng: with_entry(
        data, lambda entries: entries["__metadata__"].update(frames=pick(rng, 8, None, [], {}))
    ),
    "text changed": lambda data, rng: with_entry(
        data,
        lambda entries: entries["__metadata__"].update({pick(rng, "frames", "fps", "width"): "7"}),
    ),
    "text missing": lambda data, rng: with_entry(
        data,
        lambda entries: entries["__metadata__"].pop(
            pick(rng, "crc32", "coding", "format", "fps", "levels", "fingerprint")
        ),
    ),
    "text extra": lambda data, rng: with_text(data, comment="x" * int(rng.integers(1, 9000))),
    "format": lambda data, rng: with_text(
        data, format=pick(rng, "etok-1", "etok-3", "", "\x1b[2J" * 900)
    ),
    "coding": lambda data, rng: with_text(
        data, coding=pick(rng, "", "zip", "entropy" if payload(data) == "codes" else "plain")
    ),
    "sizes": lambda data, rng: with_text(
        data, **{pick(rng, "frames", "height", "width", "window_blocks"): pick(rng, *NOT_SIZES)}
    ),
    "sizes too large": lambda data, rng: with_text(
        data, frames=str(2**22), height=str(2**12), width=str(2**12)
    ),
    "frame too large": lambda data, rng: with_text(
        data, frames="1", height=str(2 ** int(rng.integers(14, 21))), width=str(2**14)
    ),
    "rates": lambda data, rng: with_text(
        data, **{pick(rng, "fps", "bits_per_token"): pick(rng, *NOT_RATES)}
    ),
    "levels": lambda data, rng: with_text(data, levels=pick(rng, *NOT_LEVELS, *HUGE)),
    "fingerprint": lambda data, rng: with_text(
        data, fingerprint=pick(rng, "", "a b", "\x1b[31m", "f" * 65)
    ),
    "lengths": lambda data, rng: with_array(
        data, "lengths", one_changed(pick(rng, 0, 1, 200, 255))
    ),
    "lengths huge": lambda data, rng: with_array(
        data, "lengths", lambda a: np.full(a.shape, pick(rng, 2**24, 2**31, 2**32 - 1), np.uint32)
    ),
    "lengths of another type": lambda data, rng: with_array(
        data, "lengths", lambda a: a.astype(pick(rng, np.int32, np.int64, np.uint64, np.float32))
    ),
    "mse": lambda data, rng: with_array(
        data, "mse", one_changed(pick(rng, np.nan, np.inf, -np.inf, -1e-9))
    ),
    "met": lambda data, rng: with_array(
        data, "met", lambda a: one_changed(pick(rng, 2, 255))(a.view(np.uint8)).view(np.bool_)
    ),
    "type of mse or met": lambda data, rng: with_array(
        data, pick(rng, "mse", "met"), lambda a: a.astype(pick(rng, np.float64, np.uint8))
    ),
    "blocks": cut_blocks,
    "no blocks": lambda data, rng: seal(
        {
            name: array if name == payload(data) else array[:0]
            for name, array in split(data)[0].items()
        },
        split(data)[1],
    ),
    "axes": lambda data, rng: with_array(data, one_array(rng), lambda a: a[:, None]),
    "payload": wrong_payload,
    "codes outside": codes_outside,
}
MAY_BE_SOUND = {
    "flipped anywhere": lambda data, rng: flip(data, rng, 0),
    "array twice": lambda data, rng: with_header(
        data,
        lambda header: header.replace(
            '{"', '{"mse":' + '{"dtype":"F32","shape":[5],"data_offsets":[0,20]},"', 1
        ),
    ),
    "other levels": lambda data, rng: with_text(
        data, levels=pick(rng, "[8, 8, 8, 5, 5, 6]", "[]", "[64000, 8]", "[256, 256]")
    ),
    "other words": lambda data, rng: with_array(
        data, payload(data), one_changed(int(rng.integers(0, 200)))
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Bytes and tokens of sound files."""
    lengths = [120, 7, 1, 255, 40]
    files = {}
    for name, coding, options in (
        ("plain", "plain", {"levels": LEVELS}),
        ("entropy", "entropy", {"levels": LEVELS}),
        ("vae", "plain", {"dims": 3}),
    ):
        path = tmp_path_factory.mktemp("sound") / f"{name}.etok"
        tokens = make_tokens(lengths, **options)
        tokens.save(path, coding=coding)
        files[name] = path.read_bytes(), tokens
    return files


def load_within_bounds(path):
    """What `Tokens.load` gives, or its error, with its memory and time bounded."""
    start = time.monotonic()
    tracemalloc.start()
    try:
        try:
            result = Tokens.load(path)
        except UsageError as error:
            result = error
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES_A_LOAD
    assert time.monotonic() - start < MAX_SECONDS_A_LOAD
    return result


def assert_clear(error, path):
    message = str(error)
    assert isinstance(error, UsageError)
    assert str(path) in message
    assert message.isprintable()  # one line, and no escapes for the terminal
    assert len(message) < len(str(path)) + 400


def cases(name):
    """Sound files of each kind, with a generator for each mutation of them."""
    for kind in ("plain", "entropy", "vae"):
        for seed in range(SEEDS):
            yield kind, np.random.default_rng([seed, *name.encode(), *kind.encode()])


def test_there_are_enough_mutations():
    assert 3 * SEEDS * (len(MUST_BE_REFUSED) + len(MAY_BE_SOUND)) >= 300


@pytest.mark.parametrize("name", MUST_BE_REFUSED)
def test_hostile_files_are_refused(tmp_path, sound, name):
    path = tmp_path / "clip.etok"
    for kind, rng in cases(name):
        path.write_bytes(MUST_BE_REFUSED[name](sound[kind][0], rng))
        assert_clear(load_within_bounds(path), path)


@pytest.mark.parametrize("name", MAY_BE_SOUND)
def test_changed_files_are_refused_or_sound(tmp_path, sound, name):
    path, again = tmp_path / "clip.etok", tmp_path / "again.etok"
    for kind, rng in cases(name):
        data, tokens = sound[kind]
        path.write_bytes(MAY_BE_SOUND[name](data, rng))
        result = load_within_bounds(path)
        if isinstance(result, Tokens) and name == "flipped anywhere":
            assert_same(result, tokens)  # blanks of the header
        elif isinstance(result, Tokens):
            result.save(again)  # checks that it is sound
            assert_same(Tokens.load(again), result)
        else:
            assert_clear(result, path)


def test_a_file_larger_than_any_is_refused_before_it_is_read(tmp_path, sound):
    path = tmp_path / "clip.etok"
    path.write_bytes(sound["plain"][0])
    os.truncate(path, etok.MAX_FILE_BYTES + 1)  # sparse
    error = load_within_bounds(path)
    assert_clear(error, path)
    assert "more than the" in str(error)


def test_more_tokens_than_coded_words_can_hold_take_no_memory(tmp_path, sound):
    """33,000,000 codes would take 128 MiB; the file has a few hundred bytes."""
    path = tmp_path / "clip.etok"
    data = with_array(sound["entropy"][0], "lengths", lambda a: np.full(5, 6_600_000, np.uint32))
    path.write_bytes(data)
    error = load_within_bounds(path)
    assert_clear(error, path)
    assert "33000000 tokens cannot come from" in str(error)


def test_what_is_no_file_or_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing.etok"):
        assert_clear(load_within_bounds(path), path)
