"""FLOPs counted two ways, time and memory."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from drgr.budgets import TokenBudget
from drgr.data import Corpus
from drgr.evaluation import AttachedModel, PlainModel
from drgr.evaluation.compute import (
    Latency,
    count_flops,
    flop_model,
    peak_memory,
    probe_batch,
    time_forward,
)
from drgr.integrations.transformers import attach

SEQUENCES, LENGTH = 2, 16
STATUS = Path("/proc/self/status")
DOMAINS = torch.zeros(SEQUENCES, dtype=torch.int64)


def ids():
    return torch.randint(2, 64, (SEQUENCES, LENGTH))


def count(subject):
    return count_flops(subject, flop_model(subject), ids(), DOMAINS)


def implementations(model):
    return [
        (part.config._attn_implementation, part.config._experts_implementation)
        for part in model.modules()
        if hasattr(part, "config")
    ]


def test_both_counts_agree_on_a_plain_model(family, build_family):
    model = build_family(family).eval()
    before = implementations(model)
    counts = count(PlainModel(model))
    assert counts.agrees
    assert counts.assignments == SEQUENCES * LENGTH * 2 * 2
    assert abs(counts.difference) <= 0.02
    assert implementations(model) == before


def test_both_counts_agree_on_an_attached_model(family, build_family):
    """Experts that do not run are in neither count."""
    model = build_family(family).eval()
    plain = count(PlainModel(model))
    attachment = attach(model, budget=TokenBudget(minimum=1, maximum=1, average=1))
    before = implementations(model)
    counts = count(AttachedModel(attachment))
    assert counts.agrees
    assert counts.assignments == plain.assignments // 2
    assert counts.counter < plain.counter
    assert implementations(model) == before


def test_counts_that_disagree_say_so(build_family):
    """A model with a matrix product that its formula does not know."""
    model = build_family("olmoe").eval()
    subject = PlainModel(model)
    costs = flop_model(subject)
    wide = torch.randn(32, 4096)
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] + 0 * (args[0] @ wide).sum(),))
    counts = count_flops(subject, costs, ids(), DOMAINS)
    assert counts.agrees is False
    assert counts.difference < -0.02


def test_a_model_without_a_formula_is_counted_once(build_family):
    model = build_family("olmoe").eval()
    model.odd = nn.Bilinear(3, 4, 5)
    counts = count(PlainModel(model))
    assert counts.formula is None and counts.agrees is None  # noqa: PT018
    assert "to be counted in FLOPs" in counts.reason
    assert counts.counter > 0


def test_percentiles_and_speed_by_hand():
    latency = Latency(seconds=(0.4, 0.1, 0.2, 0.3, 0.5), tokens=60)
    assert latency.percentile(50) == pytest.approx(0.3)
    assert latency.percentile(95) == pytest.approx(0.48)
    assert latency.tokens_per_second == pytest.approx(200)


class Slow:
    """A subject whose first passes are slower."""

    def __init__(self):
        self.calls = 0

    def forward(self, *_):
        time.sleep(0.2 if self.calls < 2 else 0.01)
        self.calls += 1


def test_warm_up_is_left_out():
    subject = Slow()
    latency = time_forward(subject, ids(), DOMAINS, warmup=2, repeats=3)
    assert subject.calls == 5
    assert len(latency.seconds) == 3
    assert min(latency.seconds) >= 0.01
    assert latency.percentile(50) < 0.2
    assert latency.tokens == SEQUENCES * LENGTH
    with pytest.raises(ValueError, match="repeats"):
        time_forward(subject, ids(), DOMAINS, warmup=0, repeats=0)


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_memory_of_the_process_is_what_the_kernel_says():
    found = peak_memory(torch.device("cpu"))
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    assert found.num_bytes == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)
    assert found.kind == "maximum resident set size"


def test_the_probe_has_windows_of_every_domain(corpus: Corpus):
    input_ids, domains = probe_batch(corpus, split="test", batch_size=6, sequence_length=8)
    assert input_ids.shape == (6, 8)
    assert domains.tolist() == [0, 0, 1, 1, 2, 2]
    for row, domain in enumerate(domains.tolist()):
        stream = corpus.tokens("test", corpus.domains[domain]).astype("int64")
        windows = torch.from_numpy(stream)[: len(stream) // 8 * 8].view(-1, 8)
        assert (windows == input_ids[row]).all(dim=1).any()


@pytest.mark.gpu
def test_memory_of_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    found = peak_memory(device)
    assert found.kind == "cuda allocator"
    assert found.num_bytes >= held.numel()
