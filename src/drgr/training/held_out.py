"""Domain losses on freshly drawn held-out sequences, for the adversary."""

from typing import Any

import torch
from torch import Tensor

from drgr.ambiguity import domain_sums
from drgr.budgets.flops import FlopModel, forward_flops
from drgr.collectives import rank, sum_over_processes, world_size
from drgr.data import Corpus, draw_batch
from drgr.evaluation import token_losses
from drgr.integrations.transformers import Attachment
from drgr.training.step import StepSettings


def held_out_sums(
    attachment: Attachment,
    corpus: Corpus,
    settings: StepSettings,
    flops: FlopModel,
    *,
    step: int,
    windows: int,
) -> tuple[Tensor, Tensor, float]:
    """Measures every domain on ``windows`` random sequences of the validation split.

    Tokens route as in evaluation: by themselves, at the frozen batch price.

    Args:
        attachment: The attached model; its training mode is restored afterwards.
        corpus: Where the sequences come from.
        settings: Sequence length, seed, precision and processes.
        flops: What the model costs.
        step: Determines the draw, together with the seed.
        windows: Sequences of each domain.

    Returns:
        Loss sums in nats and token counts by domain, shapes ``(G,)``, on the CPU, over all
        processes; and the FLOPs that were spent, over all processes.
    """
    model = attachment.model
    device = next(model.parameters()).device
    num_domains = len(corpus.domains)
    num_rows = num_domains * windows
    batch = draw_batch(
        corpus,
        split="validation",
        step=step,
        seed=settings.seed,
        weights=torch.full((num_domains,), 1 / num_domains, dtype=torch.float64).numpy(),
        batch_size=num_rows,
        sequence_length=settings.sequence_length,
    )
    # There may be fewer rows than processes.
    mine = torch.arange(num_rows)[rank(settings.group) :: world_size(settings.group)]
    sums = torch.zeros(3, num_domains, dtype=torch.float64, device=device)
    chunk = max(1, settings.batch_size // (settings.accumulation * world_size(settings.group)))
    was_training = model.training
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None),
    ):
        for rows in mine.split(chunk) if len(mine) else ():
            domain = batch.domain[rows].to(device)
            with attachment.from_source(domain), attachment.record() as records:
                output: Any = model(input_ids=batch.input_ids[rows].to(device), use_cache=False)
            losses = token_losses(output.logits, batch.labels[rows].to(device))
            loss_sums, num_tokens = domain_sums(losses, domain, num_domains)
            sums[0] += loss_sums
            sums[1] += num_tokens
            sums[2, 0] += torch.stack([routing.selection.spend for routing in records]).sum()
    model.train(was_training)
    loss_sums, num_tokens, assignments = sum_over_processes(sums, settings.group).cpu()
    spent = forward_flops(
        flops,
        tokens=num_rows * settings.sequence_length,
        sequence_length=settings.sequence_length,
        assignments=float(assignments[0]),
    )
    return loss_sums, num_tokens.long(), spent
