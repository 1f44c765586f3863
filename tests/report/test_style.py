import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drgr.report._style import (
    MAX_POINTS,
    domain_styles,
    layer_labels,
    layer_styles,
    plain,
    rounded,
    run_styles,
    short_labels,
    thinned,
)

# Simulation of full dichromacy in linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1).
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    channels = np.array([int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    scaled = np.clip(TO_XYZ @ rgb / np.array([0.9505, 1.0, 1.089]), 0, None)
    x, y, z = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("vision", VISION)
def test_domain_colours_stay_apart(vision):
    colours = [style.colour for style in domain_styles([f"d{i}" for i in range(8)]).values()]
    seen = [lab(VISION[vision] @ linear(colour)) for colour in colours]
    assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 15


@pytest.mark.parametrize("background", ["#ffffff", "#181e27"])
def test_colours_show_on_light_and_dark_cards(background):
    behind = TO_XYZ[1] @ linear(background)
    styles = [*domain_styles([f"d{i}" for i in range(8)]).values()]
    styles += [*run_styles([f"r{i}" for i in range(6)]).values()]
    for style in styles:
        front = TO_XYZ[1] @ linear(style.colour)
        assert (max(front, behind) + 0.05) / (min(front, behind) + 0.05) > 1.9, style


def test_sixteen_domains_look_different():
    styles = domain_styles([f"domain {i}" for i in range(16)])
    assert len({(s.colour, s.dash, s.symbol, s.pattern) for s in styles.values()}) == 16
    assert len({s.key for s in styles.values()}) == 16


def test_keys_hold_nothing_that_a_run_chose():
    assert domain_styles(['"><script>'])['"><script>'].key == "domain-0"


@given(st.lists(st.text(max_size=60), unique=True, max_size=12))
def test_labels_are_short(names):
    labels = short_labels(names)
    assert list(labels) == names
    assert all(0 < len(label) <= 22 + len(" (12)") for label in labels.values())


def test_labels_that_look_alike_are_numbered():
    names = ["x" * 40, "x" * 41, "y"]
    labels = list(short_labels(names).values())
    assert len(set(labels)) == 3
    assert labels[0].endswith("(1)")
    assert labels[2] == "y"


def test_layer_labels():
    names = ["model.layers.0.mlp", "model.layers.12.mlp"]
    assert list(layer_labels(names).values()) == ["layer 0", "layer 12"]
    assert list(layer_labels(["a.0.b.1", "a.0.b.2"]).values()) == ["a.0.b.1", "a.0.b.2"]
    assert list(layer_labels(["a0", "b0"]).values()) == ["a0", "b0"]
    assert list(layer_styles(["only"])) == ["only"]


def test_plain_escapes_markup():
    assert plain("<b>&") == "&lt;b&gt;&amp;"


def test_rounded_keeps_six_digits_and_gaps():
    assert rounded([1.23456789, None, 123456789.0]) == [1.23457, None, 123457000.0]


@given(st.integers(0, 5 * MAX_POINTS))
def test_thinned_keeps_the_ends(count):
    kept = thinned(list(range(count)))
    assert len(kept) == min(count, MAX_POINTS)
    assert kept == sorted(kept)
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
