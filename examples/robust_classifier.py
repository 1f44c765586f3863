"""A classifier for a population with a small, different part that nobody has labelled.

One sample in twenty needs another feature than the rest. The mean loss hardly notices them; a worst
case over the samples of each batch does, and the training loop changes in one line. Run it with:
python examples/robust_classifier.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drgr.ambiguity import KL, ChiSquare, CVaR, RobustLoss

RARE_SHARE, BATCH, STEPS = 0.05, 256, 60


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels, and whether a sample is of the rare part.

    The first feature tells the class, but is misleading in the rare part. The second is noise,
    but tells the class there. A line between the classes of both exists.
    """
    is_rare = torch.rand(count, generator=generator) < RARE_SHARE
    labels = torch.randint(2, (count,), generator=generator)
    side = 2.0 * labels - 1
    noise = 3 * torch.rand(count, generator=generator) - 1.5
    first = torch.where(is_rare, -side, 2 * side)
    inputs = torch.stack([first, torch.where(is_rare, 1.5 * side, noise)], dim=1)
    return inputs + 0.2 * torch.randn(count, 2, generator=generator), labels, is_rare


def train(reduce: Callable[[Tensor], Tensor]) -> nn.Module:
    """Trains a linear classifier on ``reduce`` of the losses of each batch."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        inputs, labels, _ = draw(BATCH, generator)
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        # The line that differs: a worst case in place of losses.mean().
        loss = reduce(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    """Compares the mean with worst cases on fresh samples."""
    inputs, labels, is_rare = draw(20_000, torch.Generator().manual_seed(2))
    objectives: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": torch.mean,
        "KL, penalty 0.3": RobustLoss(KL(), penalty=0.3),
        "chi-square, radius 2": RobustLoss(ChiSquare(), radius=2.0),
        "CVaR, worst tenth": RobustLoss(CVaR(0.1)),
    }
    print(f"{'objective':<22}{'all right':>10}{'rare right':>12}{'mean loss':>11}{'worst 5%':>10}")
    for name, objective in objectives.items():
        logits = train(objective)(inputs).detach()
        is_right = (logits.argmax(dim=1) == labels).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        tail = losses.topk(len(losses) // 20).values
        print(
            f"{name:<22}{is_right.mean():>10.1%}{is_right[is_rare].mean():>12.1%}"
            f"{losses.mean():>11.3f}{tail.mean():>10.3f}"
        )


if __name__ == "__main__":
    main()
