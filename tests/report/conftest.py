import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

DOMAINS = ("email", "code", "law", "chem", "news", "maths", "poetry", "recipes")


@dataclass
class Page:
    """A parsed report: elements with their attributes and text."""

    elements: list[tuple[str, dict[str, str], list[str]]] = field(default_factory=list)

    def named(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attrs, "".join(text)) for name, attrs, text in self.elements if name == tag]

    def figures(self) -> dict[str, list[dict]]:
        """kind -> plotly figures, in page order."""
        found: dict[str, list[dict]] = {}
        kind = ""
        for name, attrs, text in self.elements:
            if name == "figure":
                kind = attrs["data-kind"]
            if attrs.get("class") == "figure-data":
                found.setdefault(kind, []).append(json.loads("".join(text)))
        return found

    def rows(self, table_class: str) -> list[list[tuple[dict[str, str], str]]]:
        """Rows of cells of every table of a class."""
        rows: list[list[tuple[dict[str, str], str]]] = []
        inside = False
        for name, attrs, text in self.elements:
            if name == "table":
                inside = attrs.get("class") == table_class
            elif inside and name == "tr":
                rows.append([])
            elif inside and name in ("td", "th"):
                rows[-1].append((attrs, "".join(text)))
        return rows


class _Collector(HTMLParser):
    VOID = frozenset(("meta", "link", "br", "img", "input"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self.open: list[tuple[str, dict[str, str], list[str]]] = []

    def handle_starttag(self, tag, attrs):
        element = (tag, {name: value or "" for name, value in attrs}, [])
        self.page.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
        self.open.pop()

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)


@pytest.fixture(scope="session")
def parse() -> Callable[[Path], Page]:
    def parse_file(path: Path) -> Page:
        collector = _Collector()
        collector.feed(path.read_text(encoding="utf-8"))
        collector.close()
        assert not collector.open
        return collector.page

    return parse_file


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


class _Synthetic:
    """Writes the files of a plausible run."""

    def __init__(self, directory, *, domains, layers, experts, steps, seed, robust):
        self.directory, self.domains, self.layers = directory, domains, layers
        self.experts, self.steps, self.robust = experts, steps, robust
        self.random = random.Random(seed)
        self.hardness = [1.25 + 0.16 * index for index in range(len(domains))]
        self.sampling = _softmax([-0.45 * index for index in range(len(domains))])

    def losses(self, step):
        gain = 0.25 if self.robust else 0.0
        middle = sum(self.hardness) / len(self.hardness)
        return [
            2.6 * math.exp(-step / 90) + hard - gain * (hard - middle) + self.random.gauss(0, 0.015)
            for hard in self.hardness
        ]

    def adversary(self, step):
        if not self.robust:
            return [1 / len(self.domains)] * len(self.domains)
        strength = 2.5 * (1 - math.exp(-step / 120))
        return _softmax([strength * loss for loss in self.losses(step)])

    def loads(self, layer, total, spread):
        raw = [
            math.exp(spread * math.sin(1.7 * expert + layer) + self.random.gauss(0, 0.04))
            for expert in range(self.experts)
        ]
        return [round(total * value / sum(raw)) for value in raw]

    def named(self, values):
        return dict(zip(self.domains, values, strict=True))

    def experts_per_token(self, step):
        lean = 0.5 * (1 - math.exp(-step / 150))
        count = len(self.domains)
        return [2.0 + lean * (2 * index / (count - 1) - 1) for index in range(count)]

    def layer_records(self, step):
        records = []
        for index in range(self.layers):
            load = self.loads(index, 20480 // self.layers, 0.15 + 0.7 * math.exp(-step / 60))
            mean = sum(load) / len(load)
            records.append(
                {
                    "name": f"model.layers.{index}.mlp",
                    "load": load,
                    "max_violation": max(load) / mean - 1,
                    "min_violation": min(load) / mean - 1,
                    "mean_violation": sum(abs(count / mean - 1) for count in load) / len(load),
                    "dead_experts": load.count(0),
                    "price": 0.05,
                    "congestion": 1.5 + index + math.exp(-step / 60),
                }
            )
        return records

    def train_record(self, step):
        losses, weights = self.losses(step), self.adversary(step)
        tokens = step * 4096
        return {
            "kind": "train",
            "step": step,
            "tokens": tokens,
            "flops": step * 1.1e11,
            "seconds": step * 0.6,
            "tokens_per_second": 6700.0 + self.random.gauss(0, 60),
            "learning_rate": 0.001,
            "gradient_norm": 0.8,
            "loss": sum(map(lambda a, b: a * b, losses, self.sampling)) * 1.6,
            "objective": sum(map(lambda a, b: a * b, losses, weights)) * 1.6,
            "auxiliary_loss": 0.011,
            "routing_losses": {
                "global-balance": {"value": 1 + 1 / step, "coefficient": 0.01},
                "chunk-sparsity": {"value": 0.5 - step / 1e4, "coefficient": 0.1 + step / 1e4},
            },
            "domain_loss": self.named(losses),
            "domain_tokens": self.named([round(tokens * part) for part in self.sampling]),
            "sampling": self.named(self.sampling),
            "adversary": self.named(weights),
            "effective_domains": 1 / sum(weight**2 for weight in weights),
            "adversary_gap": 1e-12,
            "near_one_hot": False,
            "experts_per_token": self.named(self.experts_per_token(step)),
            "budget": 81920,
            "spend": 81920 - (0 if step % 50 else 37),
            "batches_over": 0,
            "traffic": self.named([0.1 * part for part in weights]),
            "exchanged_bytes": {"forward": 6291456.0, "backward": 12582912.0},
            "layers": self.layer_records(step),
        }

    def validation_record(self, step):
        bits = self.named(self.losses(step))
        worst = max(bits, key=bits.__getitem__)
        return {
            "kind": "validation",
            "step": step,
            "loss": {name: 2.1 * value for name, value in bits.items()},
            "bits_per_byte": bits,
            "experts_per_token": self.named(self.experts_per_token(step)),
            "mean_bits_per_byte": sum(bits.values()) / len(bits),
            "worst_domain": worst,
            "worst_bits_per_byte": bits[worst],
            "budget": 8192,
            "spend": 8100 + self.random.randrange(60),
        }

    def evaluation(self):
        bits = self.named(self.losses(self.steps))
        weights = self.named(self.adversary(self.steps))
        experts = self.named(self.experts_per_token(self.steps))
        tokens = self.named([round(self.steps * 4096 * part) for part in self.sampling])
        worst = max(bits, key=bits.__getitem__)
        layers = []
        for index in range(self.layers):
            by_domain = {
                name: self.loads(index + 3 * position, 4096, 0.9)
                for position, name in enumerate(self.domains)
            }
            load = [sum(counts) for counts in zip(*by_domain.values(), strict=True)]
            mean = sum(load) / len(load)
            layers.append(
                {
                    "name": f"model.layers.{index}.mlp",
                    "load": load,
                    "domain_load": by_domain,
                    "max_violation": max(load) / mean - 1,
                    "min_violation": min(load) / mean - 1,
                    "mean_violation": sum(abs(count / mean - 1) for count in load) / len(load),
                    "dead_experts": load.count(0),
                    "overload_factor": max(load) / mean,
                    "load_percentiles": {"50": 1.0},
                    "routing_entropy": 0.75 - 0.01 * index,
                    "router_similarity": 0.02 * index - 0.01,
                    "congestion_coefficient": {
                        "estimate": 3.25 + index,
                        "lower": 2.0 + index,
                        "upper": 5.5 + index,
                    },
                    "congestion_track": {
                        "first_kink": 100.0,
                        "second_kink": 200.0,
                        "slopes": [0.1, 0.01, -0.02],
                        "error": 0.1,
                        "straight_error": 0.5,
                        "peak_step": 200.0,
                        "peak": 9.0,
                        "three_phases": index == 0,
                    },
                    "congestion": 1.25 + index,
                    "domain_traffic": {
                        name: [1e-4 * count for count in self.loads(index + position, 900, 0.7)]
                        for position, name in enumerate(self.domains)
                    },
                }
            )
        return {
            "split": "test",
            "step": self.steps,
            "flops": self.steps * 1.1e11,
            "tokens_per_second": 6712.5,
            "seconds": self.steps * 0.6,
            "domains": {
                name: {
                    "train_tokens": tokens[name],
                    "test_tokens": 16384,
                    "loss": 2.1 * bits[name],
                    "bits_per_byte": bits[name],
                    "adversarial_weight": weights[name],
                    "experts_per_token": experts[name],
                }
                for name in self.domains
            },
            "mean_bits_per_byte": sum(bits.values()) / len(bits),
            "worst_domain": worst,
            "worst_bits_per_byte": bits[worst],
            "effective_domains": 1 / sum(weight**2 for weight in weights.values()),
            "budget": {
                "unit": "experts",
                "minimum": 1,
                "maximum": 4,
                "average": 2.0,
                "training": {"budget": 2457600, "spend": 2457378, "batches_over": 0},
                "evaluation": {"budget": 65536, "spend": 65012},
            },
            "exchanged_bytes": {"forward": 6291456.0, "backward": 12582912.0},
            "layers": layers,
        }

    def write(self, *, interrupted):
        self.directory.mkdir(parents=True)
        stop = self.steps // 2 if interrupted else self.steps
        lines = []
        for step in range(10, stop + 1, 10):
            lines.append(json.dumps(self.train_record(step)))
            if step % 30 == 0:
                lines.append(json.dumps(self.validation_record(step)))
            if step == 40 and self.robust:
                alarm = {"kind": "alarm", "step": 40, "message": "effective domains fell below 2"}
                lines.append(json.dumps(alarm))
        content = "".join(line + "\n" for line in lines)
        if interrupted:
            content += '{"kind": "train", "step": 160, "tok'
        (self.directory / "metrics.jsonl").write_text(content, encoding="utf-8")
        self.write_json("config.json", self.config())
        self.write_json("environment.json", self.environment())
        if not interrupted:
            self.write_json("evaluation.json", self.evaluation())

    def config(self):
        return {
            "model": {"recipe": "olmoe-tiny", "experts": self.experts, "layers": self.layers},
            "robustness": {"divergence": "kl" if self.robust else "none", "strength": 0.5},
            "training": {"steps": self.steps, "learning_rate": 0.001, "seed": 0},
        }

    def environment(self):
        return {
            "command": f"drgr train demo --output runs/{self.directory.name}",
            "started": "2025-03-01T12:00:00+00:00",
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": True,
            "versions": {"python": "3.11.9", "torch": "2.13.0", "drgr": "0.1.0"},
            "hardware": {"processor": "x86_64", "cores": 2, "accelerator": None},
            "processes": 1,
        }

    def write_json(self, name, content):
        (self.directory / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="session")
def build_run() -> Callable[..., Path]:
    """Returns a function that writes a synthetic run into a directory and returns it."""

    def build(
        directory: Path,
        *,
        domains: Sequence[str] = DOMAINS,
        layers: int = 4,
        experts: int = 8,
        steps: int = 300,
        seed: int = 0,
        robust: bool = True,
        interrupted: bool = False,
    ) -> Path:
        synthetic = _Synthetic(
            directory,
            domains=domains,
            layers=layers,
            experts=experts,
            steps=steps,
            seed=seed,
            robust=robust,
        )
        synthetic.write(interrupted=interrupted)
        return directory

    return build


@pytest.fixture
def make_run(build_run, tmp_path) -> Callable[..., Path]:
    """Like ``build_run``, by name inside of the test's own directory."""

    def make(name: str = "robust", **options) -> Path:
        return build_run(tmp_path / "runs" / name, **options)

    return make
