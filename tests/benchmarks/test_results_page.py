"""Sections of docs/results.md say what the numbers say, and other things of other numbers."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").exists(), reason="the benchmarks are not part of the wheel"
)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def seeds(worst, other=2.0):
    """Three seeds of the domains ``a`` and ``b``, which differ a little and alike everywhere."""
    return {seed: {"a": worst + 0.01 * seed, "b": other + 0.01 * seed} for seed in (1, 2, 3)}


def headline_bits(ours=3.0, bilevel=3.1):
    return {
        "uniform + auxiliary loss": seeds(3.3),
        "as given + auxiliary loss": seeds(4.0),
        "held-out adversary as sampling": seeds(3.2),
        "DRGR": seeds(ours),
        "DRGR + hypergradient mixture": seeds(bilevel),
    }


def text(lines):
    return "\n".join(lines)


class TestSmallHeadline:
    def test_it_has_table_claims_mixtures_and_pairs(self, made_up):
        from benchmarks.results.headline import small

        found = text(small(made_up(headline_bits())))
        assert found.startswith("## The same on two CPU cores\n")
        assert (
            "2 layers of 8 experts, width 96, at most 240 steps of 8 sequences of 128 tokens."
            in found
        )
        assert "DRGR here sets `robustness.losses=train` on top of what all methods share" in found
        assert "| **DRGR** | 3.020 ± 0.010 | 2.520 ± 0.010 | 5.0 | 0 |" in found
        for heading in ("What it was meant to show", "20 random target", "What DRGR differs from"):
            assert f"\n### {heading}" in found
        assert "| held-out adversary as sampling | -0.200 | [-0.200, -0.200] |" in found

    def test_claims_turn_with_the_numbers(self, made_up):
        from benchmarks.results import claims

        def said(result):
            return [line.split("*: ")[1].split(".")[0] for line in claims(result, [1, 2, 3])]

        assert said(made_up(headline_bits())) == ["yes", "yes", "yes", "**no**", "yes", "**no**"]
        worse = made_up(headline_bits(ours=3.4, bilevel=3.3), extra={"DRGR": {"congestion": 3.0}})
        assert said(worse) == ["**no**", "**no**", "**no**", "yes", "yes", "yes"]
        assert "the price on gradient traffic is off." in claims(worse, [1, 2, 3])[3]
        priced = made_up(headline_bits(), extra={"DRGR": {"traffic_price": 0.03}})
        assert "the price on gradient traffic is 0.03." in claims(priced, [1, 2, 3])[3]
        over = made_up(headline_bits(), extra={"DRGR": {"batches_over_budget": 2}})
        assert said(over)[4] == "**no**"
        assert "6 batches in 15 runs" in claims(over, [1, 2, 3])[4]

    def test_claims_without_a_method_are_left_out(self, made_up):
        from benchmarks.results import claims

        bits = headline_bits()
        few = {name: bits[name] for name in ("DRGR", "held-out adversary as sampling")}
        assert len(claims(made_up(few), [1, 2, 3])) == 3

    def test_one_seed_has_no_interval_and_proves_nothing(self, made_up):
        from benchmarks.results.headline import small

        bits = {name: {1: rows[1]} for name, rows in headline_bits().items()}
        found = text(small(made_up(bits)))
        assert "**no**. Against held-out adversary as sampling the difference is -0.200" in found
        assert "| held-out adversary as sampling | -0.200 | one seed |" in found

    def test_seeds_that_were_added_are_told_apart(self, made_up):
        from benchmarks.results.headline import small

        bits = headline_bits()
        assert "were added" not in text(small(made_up(bits)))
        for name, gap in (("held-out adversary as sampling", 0.2), ("DRGR", 0.1)):
            bits[name] = bits[name] | {seed: {"a": 3.0 + gap, "b": 2.0} for seed in (6, 7)}
        for name in bits:
            bits[name] = bits[name] | {
                seed: bits[name].get(seed, {"a": 3.5, "b": 2.0}) for seed in (6, 7)
            }
        found = text(small(made_up(bits)))
        assert "Seeds from 6 on were added when the results of the others were known" in found
        assert (
            "On these 2 alone the difference from held-out adversary as sampling is -0.100 bits "
            "per byte, interval [-0.100, -0.100], and the mean is -7.3% from" in found
        )

    def test_methods_without_a_finished_run_are_named(self, made_up):
        from benchmarks.results.headline import small

        found = text(small(made_up(headline_bits(), failed=("DoGE",))))
        assert "Without a finished run: DoGE." in found
        assert "| DoGE" not in found


class TestMedium:
    def test_it_has_table_claims_and_pairs(self, made_up):
        from benchmarks.results.medium import section

        found = text(section(made_up(headline_bits())))
        assert found.startswith("## The size of the GPU comparison")
        assert "All 3 seeds finished. 2 layers of 8 experts" in found
        assert "| **DRGR** | 3.020 ± 0.010 | 2.520 ± 0.010 | 5.0 | 0 |" in found
        assert "- *Mean at most 1 % above uniform sampling*: yes." in found
        assert "| held-out adversary as sampling | -0.200 | [-0.200, -0.200] |" in found

    def test_whether_a_second_expert_pays_turns_with_the_numbers(self, made_up):
        from benchmarks.results.medium import second_expert

        assert second_expert(made_up(headline_bits())) == []
        (better,) = second_expert(made_up(headline_bits() | {"DRGR, one expert": seeds(2.9)}))
        assert (
            "FLOPs*: **no**. With one expert throughout, and more steps, DRGR has 2.920" in better
        )
        assert better.endswith("on average, so the recipe `drgr` has one.")
        (worse,) = second_expert(made_up(headline_bits() | {"DRGR, one expert": seeds(3.1)}))
        assert "FLOPs*: yes. With one expert throughout, and more steps, DRGR has 3.120" in worse
        assert worse.endswith("on average.")


class TestMixtures:
    def test_against_a_loop_over_mixtures(self, made_up):
        from benchmarks.results.mixtures import losses_under_mixtures

        bits = {"DRGR": {1: {"b": 1.0, "a": 3.0, "c": 2.0}, 2: {"a": 2.0, "b": 2.0, "c": 2.0}}}
        found = losses_under_mixtures(made_up(bits), "DRGR", [1, 2]).numpy()
        assert found.shape == (2, 20)
        draws = np.random.default_rng(0).dirichlet([1.0, 1.0, 1.0], size=20)
        for number, (a, b, c) in enumerate(draws):
            assert found[0, number] == pytest.approx(3 * a + b + 2 * c)
        np.testing.assert_allclose(found[1], 2.0)

    def test_the_sentence_turns_with_the_numbers(self, made_up):
        from benchmarks.results.mixtures import mixture_lines

        ahead = mixture_lines(made_up(headline_bits(ours=2.5)), [1, 2, 3])[-1]
        assert "fewest bits per byte of all methods on 20 of 20 mixtures" in ahead
        assert "fewer than uniform + auxiliary loss on 20; " in ahead
        assert ahead.endswith("number 1 of 5.")
        behind = mixture_lines(made_up(headline_bits(ours=5.0)), [1, 2, 3])[-1]
        assert "on 0 of 20 mixtures, and fewer than uniform + auxiliary loss on 0; " in behind
        assert behind.endswith("number 5 of 5.")


ABLATION = {
    "DRGR": seeds(3.0),
    "without the adversary": seeds(3.4),
    "with a price": seeds(2.8),
    "chi-square": {1: {"a": 3.2, "b": 2.0}, 2: {"a": 2.9, "b": 2.0}, 3: {"a": 3.0, "b": 2.1}},
}


class TestAblation:
    def test_changes_are_sorted_by_what_they_cost(self, made_up):
        from benchmarks.results.ablation import section

        found = text(section(made_up(ABLATION)))
        assert "| without the adversary | +0.400 | [+0.400, +0.400] | +0.200 |" in found
        order = [found.index(f"| {name} |") for name in list(ABLATION)[1:]]
        assert order[0] < order[2] < order[1]

    def test_sentences_turn_with_the_numbers(self, made_up):
        from benchmarks.results.ablation import section

        found = text(section(made_up(ABLATION)))
        assert (
            "*Worst domain*: worse than DRGR by more than the interval: without the adversary. "
            "Better: with a price. Not told apart: chi-square." in found
        )
        turned = ABLATION | {"DRGR": seeds(3.6), "chi-square": seeds(3.6)}
        found = text(section(made_up(turned)))
        assert "interval: none. Better: without the adversary; with a price." in found


class TestCompute:
    def record(self, made_up, budget_worst=2.9):
        bits = {"fixed 2": seeds(3.0), "fixed 4": seeds(2.9), "budget 2": seeds(budget_worst)}
        bits["budget 1.5"] = seeds(3.2)
        bounds = {
            "fixed 2": (2, 2, 2.0),
            "fixed 4": (4, 4, 4.0),
            "budget 2": (1, 4, 2.0),
            "budget 1.5": (1, 4, 1.5),
        }
        extra = {
            name: {"budget": dict(zip(("minimum", "maximum", "average"), found, strict=True))}
            for name, found in bounds.items()
        }
        return made_up(bits, extra=extra, of_interest="budget 2")

    def test_rows_and_sentences(self, made_up):
        from benchmarks.results.compute import section

        found = text(section(self.record(made_up)))
        assert "| 2 | 3.020 ± 0.010 | 2.920 ± 0.010 | -0.100 | [-0.100, -0.100] |" in found
        assert "| 1.5 |  | 3.220 ± 0.010 |  |  |  | 2.620" in found
        assert "lower worst domain at 1 of 1 averages; by more than its interval it is lower" in (
            found
        )
        assert "lower at 2, higher at none. Of the budgets, 2 experts a token have" in found
        found = text(section(self.record(made_up, budget_worst=3.3)))
        assert "lower worst domain at 0 of 1 averages" in found
        assert "lower at none, higher at 2. Of the budgets, 1.5 experts" in found

    def test_its_figure_is_drawn(self, made_up, monkeypatch, tmp_path):
        from benchmarks.results import compute

        monkeypatch.setattr(compute, "FIGURE", tmp_path / "compute.svg")
        compute.draw(self.record(made_up))
        assert "batch budget" in (tmp_path / "compute.svg").read_text()


class TestUnseen:
    def record(self, made_up, ours):
        bits, extra = {}, {}
        for domain in ("chem", "speech"):
            for method, unseen in (("uniform", 3.5), ("DRGR", ours)):
                name = f"{method}, {domain} unseen"
                bits[name] = seeds(3.0)
                extra[name] = {"unseen": {domain: unseen}}
        return made_up(bits, extra=extra)

    def test_rows_and_sentences(self, made_up):
        from benchmarks.results.unseen import section

        found = text(section(self.record(made_up, ours=3.4)))
        assert "| method | chem unseen | speech unseen | mean of unseen | worst of seen" in found
        assert "| **DRGR** | 3.400 ± 0.000 | 3.400 ± 0.000 | 3.400 | 3.020 |" in found
        assert "Lowest on the unseen domain: chem DRGR, speech DRGR." in found
        assert "DRGR less uniform on what neither saw: -0.100 bits per byte, lower in 6 of 6" in (
            found
        )
        found = text(section(self.record(made_up, ours=3.6)))
        assert "chem uniform, speech uniform." in found
        assert "+0.100 bits per byte, lower in 0 of 6" in found

    def test_what_was_not_run_is_empty(self, made_up):
        from benchmarks.results.unseen import section

        result = self.record(made_up, ours=3.4)
        left = ("DRGR, chem unseen", "uniform, speech unseen")
        result["runs"] = [run for run in result["runs"] if run["method"] not in left]
        found = text(section(result))
        assert "| **DRGR** |  | 3.400 ± 0.000 | 3.400 |" in found
        assert "Without a finished run: DRGR, chem unseen; uniform, speech unseen." in found or (
            "Without a finished run: uniform, speech unseen; DRGR, chem unseen." in found
        )
        assert "DRGR less uniform" not in found


class TestPage:
    def test_sections_without_a_result_are_left_out(self, tmp_path):
        from benchmarks.results.page import Section, page

        (tmp_path / "a.json").write_text(json.dumps({"title": "first"}))
        sections = (
            Section(result="a.json", write=lambda result: ["# " + result["title"], ""]),
            Section(result="b.json", write=lambda _: ["# never"]),
            Section(result="a.json", write=lambda _: ["## again"]),
        )
        assert page(sections, root=tmp_path) == "# first\n\n## again\n"

    def test_a_section_elsewhere_is_imported_when_there_is_a_result(self, tmp_path, monkeypatch):
        from benchmarks.results.page import Section, page, written_by

        module = tmp_path / "section_of_a_test.py"
        module.write_text("def section(result):\n    return ['## ' + result['title']]\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        section = Section(result="a.json", write=written_by(module.stem))
        assert page((section,), root=tmp_path) == "\n"
        assert module.stem not in sys.modules
        (tmp_path / "a.json").write_text(json.dumps({"title": "mine"}))
        assert page((section,), root=tmp_path) == "## mine\n"

    def test_every_section_of_the_page_has_a_writer(self):
        """Sections whose result is still to come name modules that are still to come."""
        from benchmarks.results.page import SECTIONS

        assert len({section.result for section in SECTIONS}) == len(SECTIONS) == 10
