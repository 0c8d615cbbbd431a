"""Packs pieces of clips into rows of N blocks by best fit; no block is lost or left empty."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class PackedClip:
    """A run of consecutive blocks of one item.

    Attributes:
      feed: index of the source split; item: index in its source; epoch: complete passes over the
        split before this one.
      start: its first block in the item; blocks: their number.
    """

    feed: int
    item: int
    epoch: int
    start: int
    blocks: int

    def cut(self, blocks: int) -> tuple["PackedClip", "PackedClip"]:
        """Returns the first `blocks` blocks, and the rest."""
        rest = dataclasses.replace(self, start=self.start + blocks, blocks=self.blocks - blocks)
        return dataclasses.replace(self, blocks=blocks), rest


def pack_clips(
    clips: Sequence[PackedClip], *, rows: int, row_blocks: int, rng: np.random.Generator
) -> list[list[PackedClip]]:
    """Packs `clips` into `rows` rows of `row_blocks` blocks, in random order.

    Clips longer than a row are cut into full rows; what is shorter is placed by best fit, longest
    first; only what then fits nowhere is cut once more, to fill the gaps. Pieces of one clip stay
    in order from row to row.

    Args:
      clips: rows x row_blocks blocks in total.
    """
    assert sum(clip.blocks for clip in clips) == rows * row_blocks
    full: list[tuple[float, list[PackedClip]]] = []  # with the sort key of the row
    short: list[PackedClip] = []
    after: list[float] = []  # for each of `short`, the key of the row that must come before it
    for clip in clips:
        rest = clip
        keys = np.sort(rng.random(clip.blocks // row_blocks))
        for key in keys:
            piece, rest = rest.cut(row_blocks)
            full.append((key, [piece]))
        if rest.blocks:
            short.append(rest)
            after.append(keys[-1] if len(keys) else 0.0)
    mixed = rows - len(full)
    parts = _best_fit([clip.blocks for clip in short], rows=mixed, row_blocks=row_blocks, rng=rng)
    keys = rng.random(mixed)
    for index, places in enumerate(parts):
        for row, _ in places:
            keys[row] = max(keys[row], after[index])
    packed: list[list[PackedClip]] = [[] for _ in range(mixed)]
    for rest, places in zip(short, parts, strict=True):
        for row, blocks in sorted(places, key=lambda place: (keys[place[0]], place[0])):
            piece, rest = rest.cut(blocks)  # noqa: PLW2901
            packed[row].append(piece)
    for contents in packed:
        rng.shuffle(contents)  # type: ignore[arg-type]
    ordered = [(key, 0, contents) for key, contents in full]
    ordered += [(keys[index], 1 + index, contents) for index, contents in enumerate(packed)]
    return [contents for _, _, contents in sorted(ordered, key=lambda entry: entry[:2])]


def _best_fit(
    sizes: list[int], *, rows: int, row_blocks: int, rng: np.random.Generator
) -> list[list[tuple[int, int]]]:
    """Returns the places [(row, blocks)] of each size, several where it had to be cut.

    Places the longest first, each into the fullest row that has room for it; see `pack_clips`.
    """
    by_room: dict[int, list[int]] = {row_blocks: list(range(rows))} if rows else {}
    rooms = sorted(by_room)  # ascending, those in use

    def put(room: int, blocks: int) -> tuple[int, int]:
        row = by_room[room].pop()
        if not by_room[room]:
            del by_room[room]
            rooms.remove(room)
        if room > blocks:
            if room - blocks not in by_room:
                bisect.insort(rooms, room - blocks)
                by_room[room - blocks] = []
            by_room[room - blocks].append(row)
        return row, blocks

    places: list[list[tuple[int, int]]] = [[] for _ in sizes]
    waiting = []
    shuffled = rng.permutation(len(sizes)).tolist()  # breaks ties at random
    for index in sorted(shuffled, key=lambda index: -sizes[index]):
        fitting = bisect.bisect_left(rooms, sizes[index])
        if fitting == len(rooms):
            waiting.append(index)
        else:
            places[index].append(put(rooms[fitting], sizes[index]))
    for index in waiting:
        left = sizes[index]
        while left:
            places[index].append(put(rooms[-1], min(left, rooms[-1])))
            left -= places[index][-1][1]
    return places
