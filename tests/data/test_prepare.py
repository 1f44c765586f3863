import json
import os
import resource
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from drgr.data import open_corpus, prepare_corpus, prose
from drgr.data.archives import Archive
from drgr.data.catalogue import BuiltInDomain
from drgr.data.splits import SPLITS, Caps
from drgr.errors import DataError


class Stop(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def corpora(cache):
    """Every directory that a user could take for a corpus."""
    folder = cache / "corpora"
    return [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []


@pytest.fixture
def prepare(tmp_path):
    def prepare(corpus, *, vocabulary_size=300, cache=tmp_path / "cache", **options):
        return prepare_corpus(corpus, cache=cache, vocabulary_size=vocabulary_size, **options)

    return prepare


@pytest.fixture
def stages():
    """A progress callable that remembers the names of the stages."""

    class Stages(list[str]):
        def __call__(self, stage, done, total):
            assert total is None or 0 <= done <= total
            if stage not in self:
                self.append(stage)

    return Stages()


def test_a_prepared_corpus_is_opened_at_once(prepare, write_domains, stages):
    file = write_domains()
    first = prepare(file, report=stages)
    assert stages == [
        "fetch archives",
        "extract plants",
        "extract stones",
        "make tokenizer",
        "encode",
    ]
    stages.clear()
    assert prepare(file, report=stages) == first
    assert stages == []
    assert open_corpus(first.directory) == first
    assert [path.name for path in first.directory.parent.iterdir()] == [first.directory.name]


def test_other_settings_or_files_make_another_corpus(prepare, write_domains):
    seen = {prepare(write_domains()).directory}
    seen.add(prepare(write_domains(), vocabulary_size=290).directory)
    seen.add(prepare(write_domains('licence = "CC0"')).directory)
    seen.add(prepare(write_domains("test_bytes = 300")).directory)
    seen.add(prepare(write_domains(files={"stones/new.txt": "granite " * 50})).directory)
    assert len(seen) == 5


def test_weights_of_the_domain_file_are_kept(prepare, write_domains):
    file = write_domains("weight = 3\n[domains.more]\nfiles = 'stones/*'\nweight = 0\n")
    file.write_text(file.read_text().replace('"plants/*"', '"plants/*"\nweight = 1'))
    assert prepare(file).declared_weights().tolist() == [0.25, 0.75, 0.0]


def test_a_saved_tokenizer_can_be_used(prepare, write_domains, corpus):
    chosen = prepare(write_domains(), tokenizer=str(corpus.tokenizer_directory))
    assert chosen.vocabulary_size == corpus.vocabulary_size
    assert chosen.manifest["tokenizer"] == str(corpus.tokenizer_directory)


def test_duplicates_do_not_cross_splits(prepare, write_domains):
    copies = {f"plants/copy{n}.txt": f"plants document {n % 3} again " * 40 for n in range(30)}
    entry = prepare(write_domains(files=copies)).manifest["domains"]["plants"]
    assert entry["duplicates_dropped"] == 27
    assert sum(entry["splits"][split]["documents"] for split in SPLITS) == 12 + 3


def test_preparing_stopped_anywhere_continues_to_the_same_corpus(prepare, write_domains, tmp_path):
    file = write_domains()
    reports = []
    expected = prepare(file, cache=tmp_path / "straight", report=lambda *x: reports.append(x))
    for stop in range(len(reports)):
        cache = tmp_path / f"stopped-{stop}"
        seen = []

        def report(*arguments, seen=seen, stop=stop):
            seen.append(arguments)
            if len(seen) > stop:
                raise Stop

        with pytest.raises(Stop):
            prepare(file, cache=cache, report=report)
        assert corpora(cache) == []
        assert prepare(file, cache=cache).fingerprint == expected.fingerprint


def test_killed_at_any_flush_it_leaves_no_half_corpus(
    prepare, write_domains, tmp_path, monkeypatch
):
    file, calls = write_domains(), []
    flush, remove = os.fsync, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(1), flush(descriptor)))
    expected = prepare(file, cache=tmp_path / "straight")
    for stop in range(0, len(calls), 3):
        left = [stop]

        def kill(descriptor, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            flush(descriptor)

        cache = tmp_path / f"killed-{stop}"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", kill)
            patch.setattr(
                shutil, "rmtree", lambda *_, **__: None
            )  # a killed process cleans nothing
            with pytest.raises(Stop):
                prepare(file, cache=cache)
        for path in corpora(cache):
            assert open_corpus(path).fingerprint == expected.fingerprint
        assert prepare(file, cache=cache).fingerprint == expected.fingerprint
        assert list(cache.rglob(".tmp-*")) == []
        remove(cache)


def test_finished_stages_are_not_redone(prepare, write_domains, stages):
    file = write_domains()

    def stop_at_encode(stage, done, total):
        if stage == "encode" and done == 1:
            raise Stop

    with pytest.raises(Stop):
        prepare(file, report=stop_at_encode)
    for path in file.parent.glob("*/*.txt"):
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)  # would change the corpus if it were read again
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    counts = prepare(file).manifest["domains"]["stones"]["splits"]
    assert sum(count["documents"] for count in counts.values()) == 12


def test_processes_that_prepare_together_wait_for_each_other(prepare, write_domains):
    file, results, reported = write_domains(), [], []

    def work():
        results.append(prepare(file, report=lambda stage, *_: reported.append(stage)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert reported.count("encode") == 3  # one preparation of two domains: 0, 1 and 2 done


BAD = {"stones/bad.txt": b"caf\xe9 " * 40}


def test_an_unreadable_file_stops_the_preparation(prepare, write_domains, tmp_path):
    message = r"domain 'stones': .*bad\.txt cannot be read: byte 3 \(0xe9\)"
    with pytest.raises(DataError, match=message):
        prepare(write_domains(files=BAD))
    assert corpora(tmp_path / "cache") == []
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []


def test_unreadable_files_are_skipped_on_request_and_listed(prepare, write_domains):
    entry = prepare(write_domains(files=BAD), skip_unreadable=True).manifest["domains"]["stones"]
    assert sum(entry["splits"][split]["documents"] for split in SPLITS) == 12
    (skipped,) = entry["skipped"]
    assert "bad.txt cannot be read: byte 3" in skipped


def test_a_file_that_fails_half_way_is_skipped_whole(prepare, write_domains):
    lines = [json.dumps({"text": f"half of {n}"}) for n in range(50)]
    files = {"stones/bad.jsonl": "\n".join([*lines, '{"text": 3}'])}
    entry = prepare(write_domains(files=files), skip_unreadable=True).manifest["domains"]["stones"]
    assert len(entry["skipped"]) == 1
    assert sum(entry["splits"][split]["documents"] for split in SPLITS) == 12


def test_a_domain_without_text_is_named(prepare, write_domains):
    file = write_domains("[domains.empty]\nfiles = 'none/*'", files={"none/a.txt": " \n"})
    with pytest.raises(DataError, match=r"domain 'empty' holds no text; add text to 1 files"):
        prepare(file)


def test_a_domain_whose_files_were_all_skipped_says_so(prepare, write_domains):
    file = write_domains("[domains.bad]\nfiles = 'bad/*'", files={"bad/a.txt": b"\xff"})
    with pytest.raises(DataError, match=r"'bad' holds no text .1 unreadable sources were skipped"):
        prepare(file, skip_unreadable=True)


def test_a_domain_of_two_documents_is_named(prepare, write_domains):
    file = write_domains("[domains.few]\nfiles = 'few/*'", files={"few/a": "one", "few/b": "two"})
    with pytest.raises(DataError, match=r"'few' has 2 distinct documents; .* need at least 3"):
        prepare(file)


def test_a_glob_without_files_is_named_before_anything_is_written(prepare, write_domains, tmp_path):
    with pytest.raises(DataError, match=r"domain 'gone': no file matches .*gone"):
        prepare(write_domains("[domains.gone]\nfiles = 'gone/*'"))
    assert not (tmp_path / "cache").exists()


def test_remote_text_is_read_no_further_than_its_caps_need(prepare, write_domains, tmp_path):
    (tmp_path / "user" / "set").mkdir(parents=True)
    rows = [json.dumps({"text": f"row number {n:05d} of many"}) for n in range(5000)]
    (tmp_path / "user" / "set" / "train.jsonl").write_text("\n".join(rows))
    caps = "train_bytes = 2000\nvalidation_bytes = 250\ntest_bytes = 250"
    seen = []
    corpus = prepare(
        write_domains(f"[domains.far]\ndataset = 'set'\n{caps}"),
        report=lambda *arguments: seen.append(arguments[:2]),
    )
    splits = corpus.manifest["domains"]["far"]["splits"]
    assert [splits[split]["bytes"] for split in SPLITS] == [2000, 250, 250]
    assert max(done for stage, done in seen if stage == "extract far") < 200


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("drgr-9", r"unknown corpus 'drgr-9'; did you mean 'drgr-8'\? Or give the path"),
        ("wikipedia", r"unknown corpus 'wikipedia'; known: drgr-8, drgr-8-pip, drgr-16"),
    ],
)
def test_an_unknown_corpus_names_the_nearest(prepare, name, message):
    with pytest.raises(DataError, match=message):
        prepare(name)


def test_a_vocabulary_smaller_than_the_bytes_is_refused(prepare, write_domains):
    with pytest.raises(ValueError, match=r"vocabulary_size must be at least 257 .* got 256"):
        prepare(write_domains(), vocabulary_size=256)


def test_a_full_disk_is_named_and_leaves_nothing(prepare, write_domains, tmp_path):
    files = {f"stones/{n}.txt": f"pebble {n} " * 3000 for n in range(20, 40)}
    file = write_domains(files=files)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write .*stones-\w+.*: File too large; free"):
            prepare(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert corpora(tmp_path / "cache") == []
    assert list((tmp_path / "cache").rglob(".tmp-*")) == []
    assert prepare(file).domains == ("plants", "stones")


def test_an_unusable_cache_is_named(prepare, write_domains, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write .*file/cache: Not a directory; .*cache dir"):
        prepare(write_domains(), cache=tmp_path / "file" / "cache")


@pytest.fixture
def built_in(monkeypatch, write_tar):
    """Puts a tiny archive in the place of drgr-8; returns the path it is fetched from."""
    texts = {f"sotu/data/{n}.txt": f"Address number {n}. " * 30 for n in range(20)}
    path = write_tar(texts, "tiny-1.0.tgz")
    archive = Archive(
        file=path.name,
        sha256=sha256(path.read_bytes()).hexdigest(),
        manager="npm",
        requirement="tiny@1.0",
    )
    domain = BuiltInDomain(
        name="speech", archives=(archive,), extract=prose.speech, licence="CC0", origin="tests"
    )
    caps = Caps(train=2000, validation=300, test=300)
    monkeypatch.setattr("drgr.data.prepare.built_in_domains", lambda _: ((domain,), caps))
    return path


def test_a_built_in_corpus_is_fetched_capped_and_described(prepare, built_in):
    fetched = []

    def client(archive, directory):
        fetched.append(archive.requirement)
        shutil.copy(built_in, directory)

    corpus = prepare("drgr-8", client=client)
    entry = corpus.manifest["domains"]["speech"]
    assert corpus.name == "drgr-8"
    assert [entry["splits"][split]["bytes"] for split in SPLITS] == [2000, 300, 300]
    assert entry["archives"][0]["package"] == "tiny@1.0"
    assert (entry["licence"], entry["origin"], entry["weight"]) == ("CC0", "tests", None)
    prepare("drgr-8", vocabulary_size=280, client=client)
    assert fetched == ["tiny@1.0"]


def test_a_damaged_archive_in_the_cache_is_fetched_again(prepare, built_in, tmp_path):
    cached = tmp_path / "cache" / "archives" / built_in.name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half")
    corpus = prepare("drgr-8", client=lambda _, directory: shutil.copy(built_in, directory))
    assert cached.read_bytes() == built_in.read_bytes()
    assert corpus.domains == ("speech",)


def test_the_committed_fixture_stays_small_and_states_its_provenance(domain_file):
    files = [path for path in Path(domain_file).parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert any(path.name == "PROVENANCE.md" for path in files)
