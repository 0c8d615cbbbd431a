"""Lists the images and videos of a folder, a glob or a path."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastictok_jax.data import media
from elastictok_jax.errors import UsageError
from elastictok_jax.paths import path_text

# Files that are still being written, whatever they hold so far.
UNFINISHED_SUFFIXES = frozenset({".part", ".partial", ".crdownload", ".download", ".tmp"})


@dataclass
class Listing:
    """Files to read below one folder.

    Attributes:
      root: the folder; files: sorted by the bytes of their names.
      unreadable: why a folder, link or file cannot be opened, by its path.
      ignored: the number of files of each suffix that are neither images nor videos.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)

    def name(self, file: Path) -> str:
        """Returns a file's path below `root`, the same under every locale."""
        return path_text(file.relative_to(self.root).as_posix())


def list_media(path: str | Path) -> Listing:
    """Lists the images and videos of a folder (recursively), a glob or one file.

    A path that exists is never read as a glob. Links are followed, and each folder is visited
    once, by its real path if that is below the same root. Hidden files and folders are skipped.
    An unknown suffix does not matter if the content is known.

    Raises:
      UsageError: if nothing is there, or nothing that can be read.
    """
    text = os.fspath(path)
    if os.path.isfile(text):
        listing = Listing(Path(text).parent, [Path(text)])
        media.file_kind(text)
        return listing
    if os.path.lexists(text):
        if not os.path.isdir(text):
            raise UsageError(f"{path} cannot be read: give a file, a folder or a glob")
        listing = Listing(Path(text))
        found = _walk_files([listing.root], listing)
    elif glob.has_magic(text):
        head, pattern = _split_glob(Path(text))
        listing = Listing(head)
        found = _matches(head, pattern, listing)
    else:
        raise UsageError(
            f"data folder {path} does not exist: give a folder, a file, a glob, a prepared data "
            "set, embedded or synthetic"
        )
    for file in sorted(set(found), key=os.fsencode):
        _sort_in(file, listing)
    if not (listing.files or listing.unreadable):
        there = f" ({listing_ignored_text(listing.ignored)})" if listing.ignored else ""
        raise UsageError(f"data folder {path} holds no image or video that can be read{there}")
    return listing


def listing_ignored_text(ignored: Counter[str] | dict[str, int]) -> str:
    """Formats counts of ignored files by suffix, most first: "3 .txt, 1 without suffix"."""
    counts = sorted(ignored.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in counts)


def _sort_in(file: Path, listing: Listing) -> None:
    if any(part.startswith(".") for part in file.relative_to(listing.root).parts):
        return
    suffix = file.suffix.lower()
    known = suffix in media.IMAGE_SUFFIXES | media.VIDEO_SUFFIXES
    try:
        mode = os.stat(file).st_mode
    except OSError as error:  # most likely a broken link
        if known:
            listing.unreadable[path_text(file)] = f"cannot be read ({error.strerror})"
        else:
            listing.ignored[path_text(suffix)] += 1
        return
    if stat.S_ISREG(mode) and (known or (suffix not in UNFINISHED_SUFFIXES and _is_media(file))):
        listing.files.append(file)
    else:
        listing.ignored[path_text(suffix)] += 1


def _is_media(file: Path) -> bool:
    try:
        return bool(media.file_kind(file))
    except media.MediaError:
        return False


def _walk_files(roots: list[Path], listing: Listing) -> Iterator[Path]:
    for folder, files in _walk(roots, listing):
        yield from (folder / name for name in files)


def _walk(roots: list[Path], listing: Listing) -> Iterator[tuple[Path, list[str]]]:
    """Yields each folder below `roots` once, with the names in it that are no folders.

    Links to folders come after all real folders, so that a folder that also has another name
    keeps its own.
    """
    seen: set[tuple[int, int]] = set()
    folders = list(reversed(roots))
    links: list[Path] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            listing.unreadable[path_text(folder)] = f"cannot be read ({error.strerror})"
            continue
        shown = [entry for entry in found if not entry.name.startswith(".")]
        inner = [entry for entry in shown if _is_folder(entry)]
        links += [folder / entry.name for entry in inner if entry.is_symlink()]
        folders += [folder / entry.name for entry in reversed(inner) if not entry.is_symlink()]
        yield folder, [entry.name for entry in shown if entry not in inner]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _split_glob(path: Path) -> tuple[Path, list[str]]:
    """Splits a glob into the folder above all matches and the parts of the pattern below it."""
    parts = list(path.parts)
    head = Path(parts.pop(0)) if path.is_absolute() else Path(".")
    while len(parts) > 1 and (os.path.lexists(head / parts[0]) or not glob.has_magic(parts[0])):
        head /= parts.pop(0)
    return head, parts


def _matches(head: Path, pattern: list[str], listing: Listing) -> Iterator[Path]:
    """Yields the files that match a pattern below `head`, and those in matching folders."""
    if "**" in pattern:
        at = pattern.index("**")
        before, after = pattern[:at], pattern[at + 1 :]
        roots = [path for path in _glob(head, before) if path.is_dir()] if before else [head]
        if not after:
            yield from _walk_files(roots, listing)
            return
        for folder, _ in list(_walk(roots, listing)):
            yield from _matches(folder, after, listing)
        return
    found = _glob(head, pattern)
    yield from (path for path in found if not path.is_dir())
    yield from _walk_files([path for path in found if path.is_dir()], listing)


def _glob(head: Path, pattern: list[str]) -> list[Path]:
    names = glob.glob(os.path.join(glob.escape(os.fspath(head)), *pattern))
    return sorted((Path(name) for name in names), key=os.fsencode)
