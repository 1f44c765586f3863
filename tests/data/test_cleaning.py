import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.data.cleaning import (
    cut_into_blocks,
    decode,
    drop_repeated_blocks,
    paragraphs,
    text_of_html,
    whole_characters,
)

LONG = "the same words again and again, well over sixty characters in all"


@given(st.text(st.sampled_from("ab \n\n\u00e9\u65e5\U0001f600"), max_size=400), st.integers(4, 64))
def test_blocks_join_to_the_text_and_respect_the_limit(text, limit):
    blocks = list(cut_into_blocks(text, limit))
    assert "".join(blocks) == text
    assert all(0 < len(block.encode()) <= limit for block in blocks)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaaa\n\nb\ncc dd ee", "aaaaa\n\n"),
        ("aaaaa\nbb cc dd ee", "aaaaa\n"),
        ("aaaaa bb", "aaaaa bb"),
        ("aaaaabbcccdddd", "aaaaabbccc"),
        ("aaaa bbccccdddd", "aaaa bbccc"),  # the only space lies in the first half
    ],
)
def test_cut_prefers_blank_line_then_line_then_space_in_the_second_half(text, first):
    assert next(cut_into_blocks(text, 10)) == first


@pytest.mark.parametrize("limit", range(8))
def test_whole_characters_never_cuts_one(limit):
    content = "a\u65e5b\U0001f600".encode()
    end = whole_characters(content, limit)
    content[:end].decode()
    assert limit - 3 <= end <= limit


def test_decode_takes_utf8_then_latin1_and_unifies_line_ends():
    assert decode("\ufeffcaf\u00e9\r\nb\rc\x00 ".encode()) == "caf\u00e9\nb\nc"
    assert decode(b"caf\xe9") == "caf\u00e9"


def test_html_keeps_the_visible_text_only():
    markup = "<title>t</title><style>p{}</style><p>One&nbsp;&amp; two<br>three</p><!-- no -->"
    assert text_of_html(markup).split() == ["One", "&", "two", "three"]
    assert "three" in text_of_html(markup).split("\n")


def test_paragraphs_keep_indentation():
    assert paragraphs("a\n \n\n  b\n  c") == ["a", "  b\n  c"]
    assert paragraphs("\n\n \n") == []


def test_repeated_blocks_are_dropped_whatever_their_quote_marks_and_spaces():
    quoted = "> " + LONG.replace(" again,", "  again,")
    documents = [f"first\n\n{LONG}", f"answer\n\n{quoted}", LONG]
    assert list(drop_repeated_blocks(documents)) == [f"first\n\n{LONG}", "answer"]


def test_short_blocks_are_kept_though_repeated():
    assert list(drop_repeated_blocks(["yes\n\nno", "yes\n\nno"])) == ["yes\n\nno"] * 2
