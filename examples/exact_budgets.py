"""Gates and experts that cost exactly what the budget allows, where experts differ in cost.

A router learns which experts are worth their price, through the projection onto the budget; then
the experts that run are selected. Run it with: python examples/exact_budgets.py
"""

import torch
from torch import Tensor

from drgr.budgets import Budget, project, project_entropic, select

TOKENS, WIDTH, STEPS = 256, 16, 40
COSTS = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
BUDGET = Budget(COSTS, per_token=(1.0, 6.0), per_batch=2.5 * TOKENS)


def show(title: str, plans: dict[str, tuple[Tensor, str]], worth: Tensor) -> None:
    """Prints what plans spend, how many tokens they leave outside their bounds, and their worth."""
    print(f"\n{title:<18}{'spend':>9}{'of budget':>11}{'outside':>9}{'worth':>8}")
    for name, (plan, note) in plans.items():
        by_token = plan @ COSTS
        share = by_token.sum() / BUDGET.per_batch
        outside = int(((by_token < 1 - 1e-5) | (by_token > 6 + 1e-5)).sum())
        line = f"{name:<18}{by_token.sum():>9.1f}{share:>11.1%}{outside:>9}"
        print(f"{line}{(plan * worth).sum():>8.1f}  {note}".rstrip())


def learn(tokens: Tensor, worth: Tensor) -> torch.nn.Linear:
    """Trains a router on the worth of its projected gates; every step spends the budget exactly."""
    router = torch.nn.Linear(WIDTH, len(COSTS))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for step in range(STEPS):
        plan = project(router(tokens).sigmoid(), BUDGET)
        loss = -(plan.gates * worth).sum() / TOKENS
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, STEPS - 1):
            print(
                f"step {step + 1}: worth {-loss:.3f} a token, spend {plan.spend:.3f} of "
                f"{BUDGET.per_batch:g}, batch price {plan.batch_price:.3f}"
            )
    return router


def main() -> None:
    """Learns, then compares plans."""
    torch.manual_seed(0)
    tokens = torch.randn(TOKENS, WIDTH)
    skills = torch.randn(WIDTH, len(COSTS)) / WIDTH**0.5
    worth = (tokens @ skills).sigmoid() * COSTS.sqrt()  # what dear experts do is worth more
    router = learn(tokens, worth)

    with torch.no_grad():
        gates = router(tokens).sigmoid()
        soft, scaled = project(gates, BUDGET), project_entropic(gates, BUDGET)
    shrunk = gates * BUDGET.per_batch / (gates @ COSTS).sum()
    soft_plans = {
        "gates": (gates, ""),
        "gates above 0.5": (torch.where(gates > 0.5, gates, 0.0), ""),
        "gates, all scaled": (shrunk, ""),
        "project": (soft.gates, f"batch price {soft.batch_price:.3f}, {soft.status.name}"),
        "project_entropic": (scaled.gates, f"batch price {scaled.batch_price:.3f}"),
    }
    show("soft plan", soft_plans, worth)

    # Whole experts: the score of an assignment is what it is worth, as far as that is known.
    chosen = select(worth, BUDGET)
    certificate = f"batch price {chosen.batch_price:.3f}, gap {chosen.gap:.3f}"
    hard_plans = {
        f"top-{k}": (torch.zeros_like(worth).scatter(1, worth.topk(k).indices, 1.0), "")
        for k in (1, 2)
    }
    show("hard plan", {**hard_plans, "select": (chosen.mask.float(), certificate)}, worth)
    print(f"\ntokens of each selected expert: {chosen.mask.sum(dim=0).tolist()}")
    print(f"one more unit of budget would add a worth of about {chosen.batch_price:.3f}")


if __name__ == "__main__":
    main()
