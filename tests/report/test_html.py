import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.report._html import (
    data_script,
    duration,
    flops,
    number,
    percent,
    pretty_json,
    tag,
    text,
)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.content = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append(dict(attrs))

    def handle_data(self, data):
        self.content += data


def read(fragment):
    reader = _Reader()
    reader.feed(fragment)
    reader.close()
    return reader


# HTML itself turns carriage returns into newlines and drops NUL and lone surrogates.
texts = st.text(st.characters(exclude_categories=("Cs", "Cc")))


@given(texts, texts)
def test_any_text_survives_as_text(content, attribute):
    reader = read(tag("p", text(content), attributes={"title": attribute}))
    assert reader.tags == ["p"]
    assert reader.content == content
    assert reader.attributes == [{"title": attribute}]


@given(st.text())
def test_embedded_json_cannot_end_its_script(content):
    script = data_script(json.dumps({"a": content}), style="figure-data")
    reader = read(script)
    assert reader.tags == ["script"]
    assert json.loads(reader.content) == {"a": content}
    assert script.count("<") == 2


def test_closing_script_in_json():
    script = data_script(json.dumps("</script><!-- &amp;"), style="x")
    assert script.lower().count("</script") == 1
    assert json.loads(read(script).content) == "</script><!-- &amp;"


def test_pretty_json_keeps_letters():
    assert pretty_json({"a": "\u00e9"}) == '{\n  "a": "\u00e9"\n}'


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(1234567), "1,234,567"),
        (number(1.23456, 3), "1.235"),
        (number(None), "\u2013"),
        (percent(0.12345), "12.3\u00a0%"),
        (percent(None), "\u2013"),
        (flops(3.1e13), "31.00 TFLOP"),
        (flops(2.5e18), "2.50 EFLOP"),
        (flops(12.0), "12 FLOP"),
        (flops(None), "\u2013"),
        (duration(4.25), "4.2 s"),
        (duration(181.0), "3 min 01 s"),
        (duration(7384.0), "2 h 03 min"),
        (duration(None), "\u2013"),
    ],
)
def test_formats(shown, expected):
    assert shown == expected
