"""Training on the worst of known groups, where the easy feature is right most of the time only.

The label goes with a strong feature, the background, in 95 of 100 training samples, and with a
weaker one always. A mean loss learns the background and fails where it misleads; worst-case
weights of the four groups do not. Run it with: python examples/group_losses.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drgr.ambiguity import KL, GroupLosses, effective_number

NUM_GROUPS, MICRO_BATCH, STEPS = 4, 128, 200
AGREEMENT = 0.95


def draw(count: int, agreement: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels, and groups: one for each pair of label and background."""
    labels = torch.randint(2, (count,), generator=generator)
    agrees = torch.rand(count, generator=generator) < agreement
    background = torch.where(agrees, labels, 1 - labels)
    features = torch.stack([2.0 * labels - 1, 3.0 * (2.0 * background - 1)], dim=1)
    noise = torch.randn(count, 2, generator=generator)
    return features + noise, labels, 2 * labels + background


def train(groups: GroupLosses | None) -> nn.Module:
    """Trains in steps of two micro-batches, on the mean or on the worst mixture of groups."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        micro_batches = [draw(MICRO_BATCH, AGREEMENT, generator) for _ in range(2)]
        if groups is not None:
            # 1. The groups of the whole step are known before its losses.
            step_counts = groups.count(torch.cat([group for _, _, group in micro_batches]))
        for inputs, labels, group in micro_batches:
            losses = F.cross_entropy(model(inputs), labels, reduction="none")
            if groups is None:
                (losses.mean() / len(micro_batches)).backward()
            else:
                # 2. The objectives of micro-batches add up; their losses are remembered.
                groups(losses, group, step_counts=step_counts).backward()
                groups.accumulate(losses, group)
        if groups is not None:
            # 3. New weights for the next step.
            groups.update()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def main() -> None:
    """Compares the mean with the worst mixture, by group, where backgrounds are random."""
    inputs, labels, group = draw(20_000, 0.5, torch.Generator().manual_seed(2))
    worst_mixture = GroupLosses(NUM_GROUPS, KL(), penalty=0.1, smoothing=0.9)
    for name, groups in {"mean": None, "worst mixture of groups": worst_mixture}.items():
        with torch.enable_grad():
            model = train(groups)
        is_right = (model(inputs).argmax(dim=1) == labels).float()
        accuracies = [is_right[group == g].mean().item() for g in range(NUM_GROUPS)]
        by_group = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        print(f"{name}: accuracy by group {by_group}; worst {min(accuracies):.1%}")
    weights = [round(weight, 3) for weight in worst_mixture.weights.tolist()]
    effective = effective_number(worst_mixture.weights).item()
    print(f"weights of the groups {weights}, effectively {effective:.2f} groups")


if __name__ == "__main__":
    main()
