"""What a run has done so far, and how that is saved and restored."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from drgr.collectives import rank, world_size
from drgr.errors import NonFiniteLossError
from drgr.training.adversary import DomainWeights
from drgr.training.checkpoint import latest_checkpoint, load_checkpoint, read_step, save_checkpoint
from drgr.training.run_directory import RunDirectory
from drgr.training.setup import RunObjects
from drgr.training.step_totals import StepTotals


@final
class LoopState:
    """What a run has done so far, and its checkpoints."""

    def __init__(self, run: RunObjects, directory: RunDirectory) -> None:
        self._run = run
        self._directory = directory
        self.step = 0
        self.flops = 0.0
        self.outer_flops = 0.0
        self.seconds = 0.0
        self.share_sums = torch.zeros(len(run.corpus.domains), dtype=torch.float64)
        self.total = self._no_steps()
        self.window = self._no_steps()
        self.window_seconds = 0.0

    def _no_steps(self) -> StepTotals:
        attachment = self._run.attachment
        return StepTotals.zeros(
            num_domains=len(self._run.corpus.domains),
            num_layers=len(attachment.layer_names),
            num_experts=attachment.num_experts,
            num_losses=len(self._run.settings.losses.names),
        )

    def add(
        self, totals: StepTotals, weights: DomainWeights, *, flops: float, seconds: float
    ) -> None:
        """Counts one step."""
        self.step += 1
        self.share_sums += weights.shares
        self.flops += flops
        self.seconds += seconds
        self.window_seconds += seconds
        self.total.add_(totals)
        self.window.add_(totals)

    def close_window(self) -> None:
        """Starts a new window after a record was written."""
        self.window = self._no_steps()
        self.window_seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Training tokens per second of the window so far, over all processes."""
        return float(self.window.num_tokens.sum()) / max(self.window_seconds, 1e-9)

    def save(self) -> None:
        """Writes a checkpoint from the first process; all processes wait for it."""
        if rank() == 0:
            save_checkpoint(
                self._directory.checkpoints,
                step=self.step,
                state=self._state_dict(),
                fingerprint=self._fingerprint,
                keep=self._run.config.training.keep,
            )
        if world_size() > 1:
            dist.barrier()

    def load_latest(self) -> bool:
        """Restores the last whole checkpoint; returns whether there was one."""
        path = latest_checkpoint(self._directory.checkpoints)
        if path is None:
            return False
        state: Any = load_checkpoint(path, fingerprint=self._fingerprint)
        run = self._run
        run.attachment.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.attachment.load_state_dict(state["routing"])
        run.settings.losses.load_state_dict(state["losses"])
        run.adversary.load_state_dict(state["adversary"])
        if run.experts is not None:
            run.experts.load_state_dict(state["experts"])
        if run.outer is not None:
            run.outer.load_state_dict(state["outer"])
        torch.set_rng_state(state["rng"])
        if run.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.flops, self.seconds = state["flops"], state["seconds"]
        self.outer_flops, self.share_sums = state["outer_flops"], state["share_sums"]
        self.window_seconds = state["window_seconds"]
        self.total, self.window = StepTotals(**state["total"]), StepTotals(**state["window"])
        self.step = read_step(path)
        return True

    def not_finite(
        self, what: str, loss_sums: Tensor, *, step: int, domains: Sequence[str] | None = None
    ) -> NonFiniteLossError:
        """Describes a loss that is not finite, by kind, domain and step, and what is left.

        Args:
            what: Which loss: ``"training"``, ``"held-out"`` and so on.
            loss_sums: Sums by domain, shape ``(G,)``; if all are finite, the gradient was not.
            step: The step that could not be taken, counted from 1; or the last one taken.
            domains: Their names, ``G`` of them; by default those of training.
        """
        names = self._run.corpus.domains if domains is None else domains
        named = zip(names, loss_sums.tolist(), strict=True)
        broken = [name for name, loss_sum in named if not math.isfinite(loss_sum)]
        where = f"{what} loss of domain {', '.join(broken)}" if broken else "gradient"
        path = latest_checkpoint(self._directory.checkpoints)
        return NonFiniteLossError(
            f"the {where} is not finite at step {step}; last good checkpoint: "
            f"{'none was written yet' if path is None else path}; look at the data of that domain, "
            f"or lower training.learning_rate or training.clip_norm, and train in another run "
            f"directory"
        )

    @property
    def _fingerprint(self) -> str:
        corpus, sampling = self._run.corpus, self._run.adversary.base_sampling
        return self._run.config.fingerprint([corpus.fingerprint, sampling.tolist()])

    def _state_dict(self) -> Any:
        run = self._run
        return {
            "model": run.attachment.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "routing": run.attachment.state_dict(),
            "losses": run.settings.losses.state_dict(),
            "adversary": run.adversary.state_dict(),
            "experts": None if run.experts is None else run.experts.state_dict(),
            "outer": None if run.outer is None else run.outer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if run.device.type == "cuda" else None,
            "flops": self.flops,
            "outer_flops": self.outer_flops,
            "share_sums": self.share_sums,
            "seconds": self.seconds,
            "window_seconds": self.window_seconds,
            "total": self.total.to_dict(),
            "window": self.window.to_dict(),
        }


def by_name(domains: Sequence[str], counts: Tensor) -> dict[str, int]:
    """Pairs the names of domains with counts, shape ``(G,)``."""
    return {name: int(count) for name, count in zip(domains, counts, strict=True)}
