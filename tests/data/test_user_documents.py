import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drgr.data.domain_file import DomainSpec, FileSource, HubSource
from drgr.data.splits import Caps
from drgr.data.user_documents import document_sources, matching_files
from drgr.errors import DataError

TEXTS = ["one", "caf\u00e9 \u65e5", "three\nlines"]


@pytest.fixture
def read(tmp_path):
    """Reads all documents that a glob inside the temporary folder gives."""

    def read(pattern, *, block_bytes=0, **options):
        source = FileSource(patterns=(str(tmp_path / pattern),), **options)
        spec = DomainSpec(name="d", source=source, caps=Caps(), block_bytes=block_bytes)
        return [text for source in document_sources(spec) for text in source.documents()]

    return read


def lines(texts, field="text"):
    return "".join(json.dumps({field: text, "n": 1}, ensure_ascii=False) + "\n" for text in texts)


def test_several_text_files_are_a_document_each_in_sorted_order(tmp_path, read):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfsecond\r\nline")
    (tmp_path / "a.md").write_text("first\n\nblock")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    assert read("*") == ["first\n\nblock", "second\nline", "third"]


def test_a_lone_text_file_is_divided_at_blank_lines(tmp_path, read):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n  \nthree\n\n\nfour")
    assert [text.strip() for text in read("*.txt")] == ["one\ntwo", "three", "four"]


def test_long_documents_are_cut(tmp_path, read):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("word " * 500)
    blocks = read("*.txt", block_bytes=1024)
    assert [len(block) for block in blocks] == [1020, 1020, 460] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz"])
def test_json_lines_are_read(tmp_path, read, name):
    content = lines(TEXTS, "body").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(name, field="body") == TEXTS


def test_parquet_is_read(tmp_path, read):
    pq.write_table(pa.table({"text": [*TEXTS, None]}), tmp_path / "a.parquet")
    assert read("*.parquet") == [*TEXTS, ""]


def test_the_given_format_goes_before_the_suffix(tmp_path, read):
    (tmp_path / "a[1].json").write_text(lines(TEXTS))
    assert read("*.json", format="jsonl") == TEXTS
    assert read("*.json", format="text") == [lines(TEXTS)]


def test_a_dataset_directory_is_streamed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(lines(TEXTS))
    source = HubSource(dataset=str(tmp_path / "set"))
    (only,) = document_sources(DomainSpec(name="d", source=source, caps=Caps()))
    assert list(only.documents()) == TEXTS
    assert only.label == f"dataset {tmp_path / 'set'} (default, train)"


def test_a_dataset_split_that_does_not_exist_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(lines(TEXTS))
    source = HubSource(dataset=str(tmp_path / "set"), split="dev")
    (only,) = document_sources(DomainSpec(name="d", source=source, caps=Caps()))
    with pytest.raises(DataError, match=r"dataset .*set .default, dev. cannot be read: .*dev"):
        list(only.documents())


def test_a_glob_without_files_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"domain 'd': no file matches .*/\*; correct 'files'"):
        matching_files("d", FileSource(patterns=(str(tmp_path / "*"),)))


def test_overlapping_globs_give_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("x")
    patterns = (str(tmp_path / "**" / "*.txt"), str(tmp_path / "sub" / "*"))
    assert matching_files("d", FileSource(patterns=patterns)) == [tmp_path / "sub" / "a.txt"]


BAD = "fine\n\ncaf\u00e9 ".encode() + b"\xe9 rest"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_text_that_is_not_utf8_is_named_with_its_position(tmp_path, read, alone, pack):
    suffix = ".gz" if pack is gzip.compress else ""
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(BAD))
    if not alone:
        (tmp_path / "a.txt").write_text("good")
    message = r"b\.txt.* cannot be read: byte 12 \(0xe9\) is not valid UTF-8; .*skip_unreadable"
    with pytest.raises(DataError, match=message):
        read("*")


@pytest.mark.parametrize("padding", [0, (1 << 20) - 12, (1 << 20) - 10])
def test_json_lines_that_are_not_utf8_are_named_with_their_position(tmp_path, read, padding):
    start = b'{"text": "'
    content = start + b"x" * padding + "\u65e5".encode() + b'\xe9"}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"byte {len(start) + padding + 3} \(0xe9\) is not"):
        read("a.jsonl")


def test_json_lines_that_end_inside_a_character_are_named(tmp_path, read):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe6\x97')
    with pytest.raises(DataError, match=r"byte 10 \(0xe6\) is not valid UTF-8"):
        read("a.jsonl")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.parquet", "a.jsonl"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_truncated_file_is_named(tmp_path, read, name, alone):
    texts = [f"text {n * n}" for n in range(300)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    (tmp_path / "a.jsonl").write_text(lines(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(texts).encode()))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-40])
    if not alone:
        (tmp_path / f"0{name}").write_bytes(whole)
    with pytest.raises(DataError, match=rf"/{name} cannot be read: .*repair or remove it"):
        read(f"*{name}")


def test_a_missing_field_names_those_there_are(tmp_path, read):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS, "body"))
    with pytest.raises(DataError, match=r"row 0 has no field 'text', only body, n; set 'field'"):
        read("a.jsonl")


def test_a_field_that_is_no_text_is_named(tmp_path, read):
    (tmp_path / "a.jsonl").write_text(lines(TEXTS))
    with pytest.raises(DataError, match=r"field 'n' of row 0 is a int, not text; set 'field'"):
        read("a.jsonl", field="n")


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.tsv.gz"])
def test_ambiguous_suffixes_ask_for_a_format(tmp_path, read, name):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"does not say how to read it; set format to 'jsonl'"):
        read(name)
