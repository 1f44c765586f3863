"""Random target mixtures: what a method's losses are where the domains come in other shares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.results.comparison import (
    OURS,
    SIMPLE,
    Json,
    finished,
    mean_and_deviation,
    runs_of,
)
from drgr.evaluation import mixture_losses

COUNT, SEED = 20, 0


def losses_under_mixtures(result: Json, method: str, seeds: Sequence[int]) -> Tensor:
    """Returns the bits per byte of a method under each target mixture.

    The mixtures are the same for all: drawn uniformly from the simplex over the domains in
    alphabetical order. A mixture weighs the bits per byte of the domains.

    Returns:
        Shape ``(len(seeds), COUNT)``, float64.
    """
    rows = []
    for run in runs_of(result, method, seeds):
        bits = [run["bits_per_byte"][name] for name in sorted(run["bits_per_byte"])]
        losses = torch.tensor(bits, dtype=torch.float64)
        rows.append(mixture_losses(losses, num_mixtures=COUNT, seed=SEED))
    return torch.stack(rows)


def mixture_lines(result: Json, seeds: Sequence[int], *, level: str = "##") -> list[str]:
    """Returns the section on random target mixtures."""
    found = {name: losses_under_mixtures(result, name, seeds) for name in finished(result)}
    lines = [
        f"{level} {COUNT} random target mixtures",
        "",
        f"Bits per byte where the test text is a mixture of the domains, {COUNT} of them drawn "
        f"uniformly from all mixtures (Dirichlet, seed {SEED}): computed from the domains' numbers "
        "above, nothing is run anew.",
        "",
        "| method | mean of the mixtures | 90th percentile | worst mixture |",
        "| --- | --: | --: | --: |",
    ]
    for name in sorted(found, key=lambda one: float(found[one].amax(dim=1).mean())):
        losses = found[name]
        parts = (losses.mean(dim=1), losses.quantile(0.9, dim=1), losses.amax(dim=1))
        shown = f"**{name}**" if name == OURS else name
        cells = " | ".join(mean_and_deviation(part.tolist()) for part in parts)
        lines.append(f"| {shown} | {cells} |")
    return [*lines, "", *_sentences(found)] if OURS in found else lines


def _sentences(found: dict[str, Tensor]) -> list[str]:
    """Says on how many mixtures DRGR is ahead."""
    means = {name: losses.mean(dim=0) for name, losses in found.items()}
    others = torch.stack([mean for name, mean in means.items() if name != OURS])
    ahead = int((means[OURS] < others.amin(dim=0)).sum())
    first = f"DRGR has the fewest bits per byte of all methods on {ahead} of {COUNT} mixtures"
    if SIMPLE in means:
        below = int((means[OURS] < means[SIMPLE]).sum())
        first += f", and fewer than {SIMPLE} on {below}"
    worst = {name: float(losses.amax(dim=1).mean()) for name, losses in found.items()}
    rank = sorted(worst, key=worst.__getitem__).index(OURS) + 1
    return [f"{first}; by the worst mixture it is number {rank} of {len(worst)}."]
