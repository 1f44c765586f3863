"""Robust, budgeted routing in a training loop of one's own, on a transformers MoE, in five places.

Two made-up domains, one rare and harder. Run it with: python examples/own_training_loop.py
"""

import torch
import torch.nn.functional as F

from drgr.ambiguity import KL, DomainLosses, domain_sums
from drgr.budgets import TokenBudget
from drgr.integrations.transformers import attach
from drgr.models import tiny_olmoe
from drgr.routing import QuantileBalancing, max_violation

NUM_DOMAINS, BATCH, LENGTH, VOCABULARY = 2, 16, 32, 64
SHARES = torch.tensor([0.9, 0.1])


def draw(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Counting sequences: domain 0 in steps of one, domain 1 in steps of seven from the top."""
    domain = torch.multinomial(SHARES, BATCH, replacement=True, generator=generator)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    ahead = torch.arange(LENGTH + 1) * torch.where(domain == 0, 1, -7).unsqueeze(1)
    return (start + ahead) % VOCABULARY, domain


def main(steps: int = 60) -> None:
    """Trains, and prints what each domain and the budget ended at."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_olmoe(
        vocabulary_size=VOCABULARY, hidden_size=32, expert_size=32, num_layers=2, seed=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # 1. One to four experts a token, two on average over the batch, never an assignment more.
    routing = attach(
        model,
        budget=TokenBudget(minimum=1, maximum=4, average=2),
        controller=lambda experts, device: QuantileBalancing(experts, device=device),
    )
    domain_losses = DomainLosses(NUM_DOMAINS, smoothing=0.9)

    for step in range(steps):
        tokens, domain = draw(generator)
        # 2. Record what every layer decides in this forward pass.
        with routing.record() as layers:
            logits = model(input_ids=tokens[:, :-1]).logits
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

        # 3. Worst-case weights of the domains, as factors on their tokens.
        sums, counts = domain_sums(losses, domain, NUM_DOMAINS)
        domain_losses.update(sums, counts)
        worst = domain_losses.weights(KL(), penalty=1.0, nominal=SHARES)
        factors = (worst.weights / SHARES).to(losses)
        objective = (losses * factors[domain].unsqueeze(1)).mean()

        objective.backward()
        optimizer.step()
        optimizer.zero_grad()
        # 4. Show the batch to the controllers, 5. then move the prices.
        routing.observe(layers)
        routing.update()
        if (step + 1) % 20 == 0:
            estimate = [round(loss, 2) for loss in domain_losses.estimate.tolist()]
            spend = sum(int(layer.selection.spend) for layer in layers)
            limit = sum(int(layer.selection.limit) for layer in layers)
            balance = max(float(max_violation(layer.plan.expert_load)) for layer in layers)
            print(
                f"step {step + 1}: losses {estimate}, weights {worst.weights.tolist()}, "
                f"spend {spend} of {limit}, MaxVio {balance:.2f}"
            )


if __name__ == "__main__":
    main()
