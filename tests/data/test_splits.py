import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.data.splits import SPLITS, Caps, DocumentSpool, Span, assign_splits
from drgr.errors import DataError

span_lists = st.lists(
    st.tuples(st.binary(min_size=4, max_size=4), st.integers(1, 500)),
    min_size=3,
    unique_by=lambda x: x[0],
).map(lambda pairs: [Span(digest, 0, length) for digest, length in pairs])
sizes = st.none() | st.integers(1, 2000)


@given(span_lists, sizes, sizes, sizes)
def test_splits_are_disjoint_non_empty_and_within_caps(spans, train, validation, test):
    caps = Caps(train=train, validation=validation, test=test)
    splits = assign_splits(spans, caps=caps)
    digests = [span.digest for split in SPLITS for span in splits[split]]
    assert len(set(digests)) == len(digests)
    assert set(digests) <= {span.digest for span in spans}
    for split in SPLITS:
        size = sum(span.length for span in splits[split])
        assert splits[split]
        assert all(span.length > 0 for span in splits[split])
        assert size <= (getattr(caps, split) or size)


@given(span_lists)
def test_without_caps_nothing_is_lost(spans):
    splits = assign_splits(spans, caps=Caps())
    assert sorted(span for split in SPLITS for span in splits[split]) == sorted(spans)


@given(span_lists, st.randoms())
def test_the_order_of_the_files_does_not_matter(spans, random):
    shuffled = list(spans)
    random.shuffle(shuffled)
    assert assign_splits(shuffled, caps=Caps()) == assign_splits(spans, caps=Caps())


def test_a_cap_is_filled_by_shortening_one_document():
    spans = [Span(bytes([n]), 100 * n, 100) for n in range(100)]
    splits = assign_splits(spans, caps=Caps(train=1234, validation=250, test=None))
    lengths = {split: [span.length for span in splits[split]] for split in SPLITS}
    assert lengths == {
        "test": [100] * 10,
        "validation": [100, 100, 50],
        "train": [100] * 12 + [34],
    }


def test_held_out_splits_hold_a_tenth_of_the_bytes():
    spans = [Span(n.to_bytes(2, "big"), 0, 10) for n in range(1000)]
    splits = assign_splits(spans, caps=Caps())
    assert [len(splits[split]) for split in SPLITS] == [800, 100, 100]


@pytest.fixture
def spool(tmp_path):
    with DocumentSpool(tmp_path / "spool") as spool:
        yield spool


def test_duplicates_and_blanks_are_counted_not_kept(spool):
    for text in ("one", " one\n", "", " \n", "two", "one"):
        spool.add(text)
    assert [spool.read(span) for span in spool.spans] == [b"one", b"two"]
    assert (spool.duplicates, spool.blank, spool.size) == (2, 2, 6)


def test_a_forgotten_source_leaves_no_trace(spool):
    for text in ("one", "two", "three"):
        spool.add(text)
    spool.forget_after(1)
    for text in ("two", "four"):
        spool.add(text)
    assert [spool.read(span) for span in spool.spans] == [b"one", b"two", b"four"]
    assert spool.duplicates == 0
    spool.forget_after(0)
    assert spool.size == 0


@pytest.mark.parametrize(
    ("length", "content"), [(1, "a"), (2, "a"), (3, "a"), (4, "a\u65e5"), (5, "a\u65e5b")]
)
def test_a_shortened_document_ends_between_characters(spool, length, content):
    spool.add("a\u65e5b")
    spool.add("next")
    assert spool.read(spool.spans[0]._replace(length=length)).decode() == content


def test_lone_surrogates_are_refused(spool):
    with pytest.raises(DataError, match=r"lone surrogate .* at character 2; correct it"):
        spool.add("ab\ud800")


def test_the_spool_file_is_removed(tmp_path):
    with DocumentSpool(tmp_path / "spool") as spool:
        spool.add("one")
    assert list(tmp_path.iterdir()) == []
