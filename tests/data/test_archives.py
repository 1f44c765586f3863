import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from drgr.data.archives import Archive, download, fetch_archives
from drgr.errors import DataError

CONTENT = b"what the registry serves"


def archive(file="thing-1.0.tgz", content=CONTENT, manager="npm", requirement="thing@1.0"):
    sha256 = hashlib.sha256(content).hexdigest()
    return Archive(file=file, sha256=sha256, manager=manager, requirement=requirement)


@dataclass
class FakeClient:
    content: bytes = CONTENT
    asked: list[str] = field(default_factory=list)

    def __call__(self, archive, directory):
        self.asked.append(archive.file)
        (directory / archive.file).write_bytes(self.content)


def test_a_missing_archive_is_brought_once_and_reported(tmp_path):
    client, seen = FakeClient(), []
    wanted = [archive("a.tgz"), archive("b.tgz")]
    fetch_archives(wanted, tmp_path / "new", client=client, report=lambda *x: seen.append(x))
    fetch_archives(wanted, tmp_path / "new", client=client)
    assert client.asked == ["a.tgz", "b.tgz"]
    assert (tmp_path / "new" / "a.tgz").read_bytes() == CONTENT
    assert seen == [("fetch archives", done, 2) for done in range(3)]


def test_a_file_with_another_content_is_fetched_again(tmp_path):
    (tmp_path / "thing-1.0.tgz").write_bytes(CONTENT[:5])
    fetch_archives([archive()], tmp_path, client=FakeClient())
    assert (tmp_path / "thing-1.0.tgz").read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_nothing_is_kept(tmp_path):
    with pytest.raises(DataError, match=r"thing-1\.0\.tgz has SHA-256 .* expected .* not kept"):
        fetch_archives([archive()], tmp_path, client=FakeClient(content=b"other"))
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_writes_nothing_is_named(tmp_path):
    with pytest.raises(DataError, match=r"npm reported success but left no thing-1\.0\.tgz"):
        fetch_archives([archive()], tmp_path, client=lambda *_: None)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes a directory with one fake program the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def write(name, script):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return write


def test_npm_packs_into_the_directory_without_running_scripts(tmp_path, program):
    program("npm", 'echo "$@" > arguments; printf ok > thing-1.0.tgz')
    download(archive(), tmp_path)
    expected = f"pack --silent --ignore-scripts --pack-destination {tmp_path} thing@1.0"
    assert (tmp_path / "arguments").read_text().strip() == expected


def test_pip_downloads_wheels_only(tmp_path, program, monkeypatch):
    fake = program("python", 'echo "$@" > arguments; printf ok > thing.whl')
    monkeypatch.setattr(sys, "executable", str(fake))
    download(archive("thing.whl", manager="pip", requirement="thing==1"), tmp_path)
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("-m pip download --no-deps --only-binary=:all:")
    assert arguments.strip().endswith(f"-d {tmp_path} thing==1")


def test_apt_get_downloads_the_pinned_version(tmp_path, program):
    program("apt-get", 'echo "$@" > arguments; printf ok > thing.deb')
    download(archive("thing.deb", manager="apt-get", requirement="thing=1-2"), tmp_path)
    assert (tmp_path / "arguments").read_text().strip() == "download thing=1-2"


@pytest.mark.parametrize(
    ("manager", "message"),
    [
        (
            "npm",
            "npm could not bring thing@1.0 .exit status 7.: no such version; check the network",
        ),
        ("apt-get", "apt-get could not bring .*no such version; run 'apt-get update' first"),
    ],
)
def test_a_failing_client_is_quoted_with_a_remedy(tmp_path, program, manager, message):
    program(manager, "echo no such version >&2; exit 7")
    with pytest.raises(DataError, match=message):
        download(archive(manager=manager), tmp_path)


def test_absent_npm_says_how_to_get_it(tmp_path, program):
    with pytest.raises(DataError, match=r"install Node\.js .*'drgr-8-pip'"):
        download(archive(), tmp_path)


def test_absent_apt_get_is_explained(tmp_path, program):
    with pytest.raises(DataError, match="drgr-16 needs Debian's apt-get, so use 'drgr-8'"):
        download(archive(manager="apt-get"), tmp_path)


def test_absent_pip_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"brought by pip, which .* does not have.*ensurepip"):
        download(archive(manager="pip"), tmp_path)


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*file"):
        fetch_archives([archive()], tmp_path / "file", client=FakeClient())


def test_what_a_killed_fetch_left_is_replaced(tmp_path):
    leftover = tmp_path / ".tmp-thing-1.0.tgz"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    fetch_archives([archive()], tmp_path, client=FakeClient())
    assert [path.name for path in Path(tmp_path).iterdir()] == ["thing-1.0.tgz"]
