"""Learns one ridge penalty per feature by the gradient of the held-out loss through the fit.

The first 10 of 100 features matter, and there are 60 samples: one penalty for all cannot tell them
apart, a hundred of them can. Run it with: python examples/hypergradient.py
"""

import torch
from torch import Tensor

from drgr.bilevel import CG, hypergradient

NUM_FEATURES = 100
NUM_USEFUL = 10
NUM_STEPS = 60


def main() -> None:
    """Prints how the held-out loss falls, and what became of the penalties."""
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.zeros(NUM_FEATURES)
    coefficients[:NUM_USEFUL] = 1.0

    def sample(size: int) -> tuple[Tensor, Tensor]:
        features = torch.randn(size, NUM_FEATURES, generator=generator)
        return features, features @ coefficients + torch.randn(size, generator=generator)

    (features, target), (held_out, held_out_target), (test, test_target) = map(
        sample, (60, 60, 1000)
    )

    def inner_loss(log_penalty: Tensor, weights: Tensor) -> Tensor:
        fit = (features @ weights - target).square().mean()
        return (fit + (log_penalty.exp() * weights.square()).sum()) / 2

    def outer_loss(_log_penalty: Tensor, weights: Tensor) -> Tensor:
        return (held_out @ weights - held_out_target).square().mean()

    def fitted(log_penalty: Tensor) -> Tensor:
        hessian = features.T @ features / len(features) + log_penalty.exp().diag()
        solution: Tensor = torch.linalg.solve(hessian, features.T @ target / len(features))
        return solution

    log_penalty = torch.full((NUM_FEATURES,), -2.0)
    optimizer = torch.optim.Adam([log_penalty], lr=0.2)
    start = None
    for step in range(NUM_STEPS):
        weights = fitted(log_penalty)
        found = hypergradient(
            outer_loss, inner_loss, log_penalty, weights, solver=CG(rtol=1e-3), start=start
        )
        start = found.auxiliary  # the next solve begins where this one ended
        log_penalty.grad = found.grads
        optimizer.step()
        if step % 10 == 0 or step == NUM_STEPS - 1:
            error = (test @ fitted(log_penalty) - test_target).square().mean()
            print(
                f"step {step:2d}: held-out loss {found.outer_loss:.3f}, test {error:.3f}, "
                f"{found.num_hvps} products, residual {found.residual:.0e}, {found.status}"
            )
    useful, useless = log_penalty.exp().split([NUM_USEFUL, NUM_FEATURES - NUM_USEFUL])
    print(f"median penalty: useful {useful.median():.3f}, useless {useless.median():.3f}")


if __name__ == "__main__":
    main()
