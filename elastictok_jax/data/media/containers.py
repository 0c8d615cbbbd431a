"""Checks that the structure of a video file is intact, without decoding it.

Demuxers resynchronize after damage and silently skip the frames in between. This module walks a
container from element to element instead, and verifies its checksums where it has any. It knows
Matroska and WebM (RFC 9559), Ogg (RFC 3533), FLV (Adobe's specification, annex E), RIFF (AVI) and
ASF (WMV).
"""

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

# Matroska element ids.
_EBML, _SEGMENT, _CLUSTER, _BLOCK_GROUP = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0xA0
_CRC32, _VOID = 0xBF, 0xEC
_IN_SEGMENT = frozenset(
    {0x114D9B74, 0x1549A966, 0x1654AE6B, _CLUSTER, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367}
    | {_CRC32, _VOID}
)
_IN_CLUSTER = frozenset({0xE7, 0x5854, 0xA7, 0xAB, 0xA3, _BLOCK_GROUP, 0xAF, _CRC32, _VOID})
_IN_BLOCK_GROUP = frozenset(
    {0xA1, 0xA2, 0x75A1, 0x9B, 0xFA, 0xFB, 0xFD, 0xA4, 0x75A2, 0x8E, 0xC8, _CRC32, _VOID}
)
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def container_fault(path: str) -> str:
    """Returns what is wrong with the structure of the file at `path`; "" if nothing is known."""
    size = os.path.getsize(path)
    if size == 0:
        return ""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        walks = {
            b"\x1a\x45\xdf\xa3": _matroska_fault,
            b"OggS": _ogg_fault,
            b"FLV\x01": _flv_fault,
            b"RIFF": _riff_fault,
            _ASF_HEADER[:4]: _asf_fault,
        }
        walk = walks.get(data[:4])
        return walk(data, size) if walk else ""


# ---- Matroska


class _Broken(Exception):
    """The chain of elements breaks; its argument is the byte offset."""


def _matroska_fault(data: mmap.mmap, size: int) -> str:
    try:
        for identity, start, end in _elements(data, 0, size, allowed=frozenset({_EBML, _SEGMENT})):
            if identity == _SEGMENT:
                _check_segment(data, start, end)
                break  # anything after it holds no frame
    except _Broken as broken:
        return f"damaged at byte {broken.args[0]} of {size}"
    return ""


def _check_segment(data: mmap.mmap, start: int, end: int) -> None:
    for identity, inner, inner_end in _elements(data, start, end, allowed=_IN_SEGMENT):
        _check_crc(data, inner, inner_end)
        if identity == _CLUSTER:
            for block, at, block_end in _elements(data, inner, inner_end, allowed=_IN_CLUSTER):
                if block == _BLOCK_GROUP:
                    _check_crc(data, at, block_end)
                    for _ in _elements(data, at, block_end, allowed=_IN_BLOCK_GROUP):
                        pass


def _check_crc(data: mmap.mmap, start: int, end: int) -> None:
    """Checks the CRC-32 that an element may begin with."""
    if data[start : start + 2] == b"\xbf\x84" and end - start >= 6:
        stated = int.from_bytes(data[start + 2 : start + 6], "little")
        with memoryview(data) as view, view[start + 6 : end] as content:
            actual = zlib.crc32(content)
        if actual != stated:
            raise _Broken(start)


def _elements(
    data: mmap.mmap, start: int, end: int, *, allowed: frozenset[int]
) -> Iterator[tuple[int, int, int]]:
    """Yields (id, start, end) of the content of each element in [start, end).

    An element of unknown length, as in a live recording, ends at the first id that it cannot hold.

    Raises:
      _Broken: if an element is not in `allowed`, or exceeds what contains it.
    """
    at = start
    while at < end:
        identity, content = _vint(data, at, end, keep_marker=True)
        if identity not in allowed:
            raise _Broken(at)
        length, content = _vint(data, content, end, keep_marker=False)
        if length is None:
            stop = _end_of_open(data, content, end) if identity == _CLUSTER else end
        else:
            stop = content + length
        if stop > end:
            raise _Broken(at)
        yield identity, content, stop
        at = stop


def _end_of_open(data: mmap.mmap, start: int, end: int) -> int:
    """Returns where a cluster of unknown length ends: at the first element it cannot hold."""
    at = start
    while at < end:
        identity, content = _vint(data, at, end, keep_marker=True)
        if identity not in _IN_CLUSTER:
            return at
        length, content = _vint(data, content, end, keep_marker=False)
        if length is None:
            raise _Broken(at)
        at = content + length
    return at


def _vint(data: mmap.mmap, at: int, end: int, *, keep_marker: bool) -> tuple[int | None, int]:
    """Returns a number of variable length, None if all its bits are set, and its end."""
    first = data[at] if at < end else 0
    width = 9 - first.bit_length()
    if first == 0 or at + width > end:
        raise _Broken(at)
    value = int.from_bytes(data[at : at + width], "big")
    if keep_marker:
        return value, at + width
    bits = (1 << 7 * width) - 1
    return (None if value & bits == bits else value & bits), at + width


# ---- Ogg


def _ogg_fault(data: mmap.mmap, size: int) -> str:
    """Checks that pages follow each other without a gap and that their CRC-32 is right."""
    at = 0
    numbers: dict[bytes, int] = {}  # by stream, of its next page
    while at < size:
        head = data[at : at + 27]
        table = data[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
        stop = at + 27 + len(table) + sum(table)
        if head[:4] != b"OggS" or len(table) < head[26] or stop > size:
            return f"damaged at byte {at} of {size}"
        serial, number = head[14:18], int.from_bytes(head[18:22], "little")
        if number != numbers.get(serial, number):
            return f"damaged before byte {at} of {size}: pages are missing"
        numbers[serial] = number + 1
        page = data[at : at + 22] + bytes(4) + data[at + 26 : stop]
        if _ogg_crc(page) != int.from_bytes(head[22:26], "little"):
            return f"damaged at byte {at} of {size}"
        at = stop
    return ""


def _ogg_crc(page: bytes) -> int:
    """Computes Ogg's CRC-32 with zlib's.

    Ogg reverses the bits of each byte and of the result, and inverts nothing.
    """
    other = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{other:032b}"[::-1], 2)


# ---- FLV


def _flv_fault(data: mmap.mmap, size: int) -> str:
    """Checks that each tag is followed by its own length."""
    at = int.from_bytes(data[5:9], "big") + 4
    while at < size:
        length = int.from_bytes(data[at + 1 : at + 4], "big") + 11
        after = data[at + length : at + length + 4]
        if data[at] & 0x1F not in (8, 9, 18) or int.from_bytes(after, "big") != length:
            return f"damaged at byte {at} of {size}"
        at += length + 4
    return ""


# ---- RIFF


def _riff_fault(data: mmap.mmap, size: int) -> str:
    """Checks that chunks follow each other, down to those of the frames."""
    at = 0
    while at + 8 <= size and data[at : at + 4] == b"RIFF":
        stop = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        fault = _chunks_fault(data, at + 12, min(stop, size), size)
        if fault:
            return fault
        at = stop + stop % 2
    return ""


def _chunks_fault(data: mmap.mmap, start: int, end: int, size: int) -> str:
    at = start
    while at + 8 <= end:
        name = data[at : at + 4]
        stop = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if not all(32 <= letter < 127 for letter in name) or stop > end:
            return f"damaged at byte {at} of {size}"
        if name == b"LIST" and data[at + 8 : at + 12] in (b"movi", b"rec "):
            fault = _chunks_fault(data, at + 12, stop, size)
            if fault:
                return fault
        at = stop + stop % 2
    return ""


# ---- ASF


def _asf_fault(data: mmap.mmap, size: int) -> str:
    """Checks that as many data packets of one length and start code follow as the file says."""
    start = int.from_bytes(data[16:24], "little")  # of the data object, right after the header
    properties = data.find(_ASF_PROPERTIES, 0, start)
    if data[start : start + 16] != _ASF_DATA or properties < 0:
        return f"damaged at byte {min(start, size)} of {size}"
    shortest, longest = (
        int.from_bytes(data[properties + at : properties + at + 4], "little") for at in (92, 96)
    )
    count = int.from_bytes(data[start + 40 : start + 48], "little")
    at = start + 50
    if shortest != longest or longest == 0 or data[at] & 0x80 == 0:
        return ""  # no start codes to check
    for number in range(count):
        if data[at : at + 3] != b"\x82\0\0" or at + longest > size:
            return f"damaged in packet {number} of {count}"
        at += longest
    return ""


# ---- what a demuxer does not check


def gif_container_ends_well(path: str) -> bool:
    """Returns whether a GIF's blocks reach its end mark: decoders silently fill what is cut off."""
    data = Path(path).read_bytes()

    def after_color_table(at: int, flags: int) -> int:
        return at + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)

    try:
        at = after_color_table(13, data[10])
        while data[at] != 0x3B:
            if data[at] == 0x2C:  # a frame: descriptor, color table, code size, data
                at = after_color_table(at + 10, data[at + 9]) + 1
            else:  # an extension: mark, label, data
                at += 2
            while data[at]:
                at += data[at] + 1
            at += 1
    except IndexError:
        return False
    return True


def container_announced_bytes(path: str) -> int:
    """Returns the file size that the header of a RIFF (avi) or Matroska file states, else 0."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    start, length = _ebml_length(head, 4)  # the header element, then the segment
    start, length = _ebml_length(head, (start + (length or 0)) + 4)
    return 0 if length is None else start + length


def _ebml_length(data: bytes, at: int) -> tuple[int, int | None]:
    """Returns where an element's content starts and its length, None in a live stream."""
    if at >= len(data) or data[at] == 0:
        return at, None
    width = 9 - data[at].bit_length()
    value_bits = (1 << 7 * width) - 1
    length = int.from_bytes(data[at : at + width], "big") & value_bits
    return at + width, None if length == value_bits else length
