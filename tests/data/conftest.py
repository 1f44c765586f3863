import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from drgr.data import Corpus, prepare_corpus

FIXTURE = Path(__file__).parents[1] / "fixtures" / "corpus" / "domains.toml"


@pytest.fixture(scope="session")
def domain_file() -> Path:
    return FIXTURE


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The committed fixture, prepared once a session."""
    return prepare_corpus(FIXTURE, cache=tmp_path_factory.mktemp("cache"), vocabulary_size=512)


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Writes a compressed tar archive as npm does: every member inside the folder ``package``."""

    def write(
        members: Mapping[str, bytes | str], name: str = "a.tgz", root: str = "package"
    ) -> Path:
        path = tmp_path / name
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            for member, content in members.items():
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{root}/{member}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def write_zip(tmp_path: Path) -> Callable[..., Path]:
    def write(members: Mapping[str, bytes | str], name: str = "a.whl") -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return path

    return write


@pytest.fixture
def write_domains(tmp_path: Path) -> Callable[..., Path]:
    """Writes text files of two domains and the domain file that names them."""

    def write(extra: str = "", files: Mapping[str, str | bytes] | None = None) -> Path:
        contents: dict[str, str | bytes] = {
            f"{name}/{number}.txt": f"{name} document {number} " + f"{name} words {number} " * 60
            for name in ("plants", "stones")
            for number in range(12)
        }
        for name, content in (contents | dict(files or {})).items():
            path = tmp_path / "user" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        file = tmp_path / "user" / "domains.toml"
        file.write_text(
            'name = "garden"\n[domains.plants]\nfiles = "plants/*"\n'
            f'[domains.stones]\nfiles = "stones/*"\n{extra}'
        )
        return file

    return write
