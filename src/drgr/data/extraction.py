"""The first stages of a preparation: documents of each domain, deduplicated, split and capped."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from json import dumps
from pathlib import Path

import numpy as np

from drgr.data.archives import Archive
from drgr.data.catalogue import BuiltInDomain
from drgr.data.domain_file import DomainSpec, HubSource
from drgr.data.progress import Progress
from drgr.data.splits import HELD_OUT_SHARE, Caps, DocumentSpool, Split, assign_splits
from drgr.data.storage import Json, read_json, whole_directory, write_json
from drgr.data.user_documents import DocumentSource, document_sources, matching_files
from drgr.errors import DataError

_RECORD = "domain.json"
_REPORT_EVERY = 1000
_FEWEST_DOCUMENTS = 3
# Reading a remote dataset stops when this many times the capped text has been seen.
_SPARE = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPlan:
    """What it takes to extract one domain, built-in or a user's.

    Attributes:
        name: The domain.
        identity: What decides its text; cached text of another identity is not used.
        archives: Pinned archives to fetch first.
        sources: Its sources, given the archive directory.
        caps: Largest splits, in bytes.
        enough: Stop reading after this many bytes of distinct text; ``None`` reads everything.
        licence: For the manifest.
        origin: For the manifest.
        weight: Sampling weight of a user's domain file, or ``None``.
        skip_unreadable: Whether unreadable sources are left out and listed.
    """

    name: str
    identity: Json
    archives: tuple[Archive, ...]
    sources: Callable[[Path], Iterator[DocumentSource]]
    caps: Caps
    enough: int | None
    licence: str
    origin: str
    weight: float | None
    skip_unreadable: bool


def key_of(identity: Json) -> str:
    """Returns twelve hexadecimal digits that stand for ``identity``."""
    return sha256(dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def plan_built_in(domain: BuiltInDomain, caps: Caps) -> DomainPlan:
    """Plans a domain that is read from pinned archives."""

    def sources(archive_directory: Path) -> Iterator[DocumentSource]:
        paths = [archive_directory / archive.file for archive in domain.archives]
        label = ", ".join(archive.file for archive in domain.archives)
        yield DocumentSource(label=label, documents=partial(domain.extract, paths))

    return DomainPlan(
        name=domain.name,
        identity={
            "domain": domain.name,
            "archives": [archive.sha256 for archive in domain.archives],
            "revision": domain.revision,
            "caps": asdict(caps),
        },
        archives=domain.archives,
        sources=sources,
        caps=caps,
        enough=None,
        licence=domain.licence,
        origin=domain.origin,
        weight=None,
        skip_unreadable=False,
    )


def plan_user_domain(spec: DomainSpec, *, skip_unreadable: bool) -> DomainPlan:
    """Plans a domain of a user's domain file.

    Raises:
        DataError: If its globs match no file.
    """
    stamps: list[list[object]] = []
    origin = f"dataset {spec.source.dataset}" if isinstance(spec.source, HubSource) else ""
    if not isinstance(spec.source, HubSource):
        files = matching_files(spec.name, spec.source)
        stamps = [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
        origin = f"{len(files)} files matching {', '.join(spec.source.patterns)}"
    return DomainPlan(
        name=spec.name,
        identity={
            "domain": spec.name,
            "source": asdict(spec.source),
            "files": stamps,
            "caps": asdict(spec.caps),
            "block_bytes": spec.block_bytes,
            "skip_unreadable": skip_unreadable,
        },
        archives=(),
        sources=lambda _: document_sources(spec),
        caps=spec.caps,
        enough=_enough(spec),
        licence=spec.licence,
        origin=origin,
        weight=spec.weight,
        skip_unreadable=skip_unreadable,
    )


def _enough(spec: DomainSpec) -> int | None:
    caps = spec.caps
    if not isinstance(spec.source, HubSource) or None in (caps.train, caps.validation, caps.test):
        return None
    held_out = max(caps.validation or 0, caps.test or 0)
    train = (caps.train or 0) / (1 - 2 * HELD_OUT_SHARE)
    return int(_SPARE * max(train, held_out / HELD_OUT_SHARE))


def extract_domain(
    plan: DomainPlan, text_directory: Path, archive_directory: Path, report: Progress
) -> Path:
    """Extracts one domain, unless its text is there already.

    Args:
        plan: The domain.
        text_directory: Where extracted text is kept, shared by all corpora of a cache.
        archive_directory: Where its archives are.
        report: Told every thousand documents.

    Returns:
        A directory with ``SPLIT.utf8`` (the documents, one after the other), ``SPLIT.npy`` (their
        lengths in bytes) and a record of counts.

    Raises:
        DataError: If a source cannot be read, or the domain has fewer than three documents.
    """
    target = text_directory / f"{plan.name}-{key_of(plan.identity)}"
    if not target.is_dir():
        with (
            whole_directory(target) as folder,
            DocumentSpool(folder / "spool") as spool,
        ):
            skipped = _collect(plan, spool, archive_directory, report)
            _check_documents(plan, spool, skipped)
            _write_splits(plan, spool, folder, skipped)
    return target


def _collect(
    plan: DomainPlan, spool: DocumentSpool, archive_directory: Path, report: Progress
) -> list[str]:
    skipped: list[str] = []
    for source in plan.sources(archive_directory):
        before = len(spool.spans)
        try:
            _collect_source(plan, source, spool, report)
        except DataError as error:
            if not plan.skip_unreadable:
                raise DataError(f"domain {plan.name!r}: {error}") from error
            spool.forget_after(before)
            skipped.append(str(error))
    report(f"extract {plan.name}", len(spool.spans), len(spool.spans))
    return skipped


def _collect_source(
    plan: DomainPlan, source: DocumentSource, spool: DocumentSpool, report: Progress
) -> None:
    for document in source.documents():
        if spool.seen % _REPORT_EVERY == 0:
            report(f"extract {plan.name}", len(spool.spans), None)
        if plan.enough is not None and spool.size >= plan.enough:
            return
        spool.add(document)


def _check_documents(plan: DomainPlan, spool: DocumentSpool, skipped: list[str]) -> None:
    if not spool.spans:
        because = f" ({len(skipped)} unreadable sources were skipped)" if skipped else ""
        raise DataError(f"domain {plan.name!r} holds no text{because}; add text to {plan.origin}")
    if len(spool.spans) < _FEWEST_DOCUMENTS:
        raise DataError(
            f"domain {plan.name!r} has {len(spool.spans)} distinct documents; train, validation "
            f"and test need at least {_FEWEST_DOCUMENTS}: add files, or set a smaller block_bytes "
            "so that long documents are cut"
        )


def _write_splits(plan: DomainPlan, spool: DocumentSpool, folder: Path, skipped: list[str]) -> None:
    record: Json = {"splits": {}, "duplicates_dropped": spool.duplicates}
    record |= {"blank_dropped": spool.blank, "skipped": skipped}
    for split, spans in assign_splits(spool.spans, caps=plan.caps).items():
        lengths = np.empty(len(spans), np.int64)
        with (folder / f"{split}.utf8").open("wb") as stream:
            for index, span in enumerate(spans):
                lengths[index] = stream.write(spool.read(span))
        np.save(folder / f"{split}.npy", lengths, allow_pickle=False)
        record["splits"][split] = {"documents": len(spans), "bytes": int(lengths.sum())}
    write_json(folder / _RECORD, record)


def read_documents(directory: Path, split: Split) -> Iterator[str]:
    """Yields the documents of one split of an extracted domain."""
    lengths = np.load(directory / f"{split}.npy", allow_pickle=False)
    with (directory / f"{split}.utf8").open("rb") as stream:
        for length in lengths.tolist():
            yield stream.read(length).decode("utf-8")


def domain_record(directory: Path) -> Json:
    """Returns the counts of an extracted domain."""
    return read_json(directory / _RECORD, remedy=f"delete {directory} and prepare again")
