"""What attaching costs: a training step with budget, prices and adversary against one without.

All variants run interleaved in one process on the same batches; times are CPU seconds, which other
work on the machine disturbs least, or wall seconds with an accelerator. ``unattached`` is
transformers' own model with grouped_mm experts, the same optimizer and the same number of experts a
token; ``attached`` is everything that ``drgr train`` does in a step, the adversary's held-out
passes and record keeping included; ``attached, no held-out passes`` leaves those passes out, which
are compute bought for robustness rather than overhead; ``unattached, sparse experts`` runs the
unattached model with this package's expert code, so that the cost of routing alone can be told from
the gain of that code.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import describe_source, write_result
from benchmarks.timing import now
from benchmarks.training_runs import opened_corpus, stepper
from drgr.data import draw_batch
from drgr.evaluation import token_losses
from drgr.integrations.transformers.experts import IMPLEMENTATION, register
from drgr.recipes import demo
from drgr.training import RunConfig, build_run, override

LIMIT = 1.05


def unattached_step(
    config: RunConfig, corpus: Any, *, implementation: str
) -> Callable[[int], None]:
    """Returns a plain training step of the same model, optimizer and batches."""
    run = build_run(config, corpus)
    run.attachment.detach()
    model: Any = run.attachment.model
    model.set_experts_implementation(implementation)
    autocast = run.settings.autocast
    weights = run.adversary.weights.sampling.numpy()
    model.train()

    def step(number: int) -> None:
        batch = draw_batch(
            corpus,
            step=number,
            seed=0,
            weights=weights,
            batch_size=config.training.batch_size,
            sequence_length=config.data.sequence_length,
        )
        run.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.device.type, autocast, enabled=autocast is not None):
            logits = model(input_ids=batch.input_ids.to(run.device), use_cache=False).logits
            loss = token_losses(logits, batch.labels.to(run.device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.clip_norm)
        run.optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", default="drgr-8")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--set", action="append", default=[], help="settings of the demo recipe")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="steps of each variant in a round")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    parser.add_argument("--allow-dirty", action="store_true")
    arguments = parser.parse_args()
    environment = describe_source(allow_dirty=arguments.allow_dirty)
    config = override(demo(), [f"data.corpus={arguments.corpus}", *arguments.set])
    corpus = opened_corpus(config, cache=arguments.cache)
    register()
    variants = {
        "unattached": unattached_step(config, corpus, implementation="grouped_mm"),
        "unattached, sparse experts": unattached_step(
            config, corpus, implementation=IMPLEMENTATION
        ),
        "attached": stepper(build_run(config, corpus), held_out=True),
        "attached, no held-out passes": stepper(build_run(config, corpus), held_out=False),
    }
    seconds = measure(variants, rounds=arguments.rounds, steps=arguments.steps)
    ratios = {
        name: [mine / base for mine, base in zip(times, seconds["unattached"], strict=True)]
        for name, times in seconds.items()
    }
    summary = {
        name: {
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for name, values in ratios.items()
    }
    write_result(
        arguments.output,
        environment,
        {
            "claim": f"the attached step takes at most {LIMIT} times the unattached one",
            "holds": summary["attached"]["median"] <= LIMIT,
            "ratio_to_unattached": summary,
            "seconds_per_step": seconds,
            "config": config.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
        },
    )
    for name, values in summary.items():
        print(f"{name:<32}{values['median']:.3f} [{values['lowest']:.3f}, {values['highest']:.3f}]")
    print(arguments.output)


def measure(
    variants: dict[str, Callable[[int], None]], *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Times the variants in turn, after one round that is not counted; seconds per step."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, step in variants.items():
            started = now()
            for offset in range(steps):
                step(number * steps + offset)
            if number:
                seconds[name].append((now() - started) / steps)
    return seconds


if __name__ == "__main__":
    main()
