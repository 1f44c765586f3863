"""Metrics of a run: windows of steps turned into records, and records written down."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, final

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from drgr.evaluation import layer_record, named
from drgr.routing import congestion
from drgr.training.adversary import DomainWeights
from drgr.training.outer_loop import OuterReport
from drgr.training.routing_losses import RoutingLosses
from drgr.training.step_totals import StepTotals

Record = dict[str, Any]


class MetricsSink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Takes one record."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


@final
class JsonLines:
    """Appends records to a file, one a line, each complete on disk before the next.

    Args:
        path: The file.
        last_step: Records of later steps are removed first: a resumed run writes them again.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= last_step]
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        # Unbuffered: what a full disk refused must not come back when the file is closed.
        self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Appends one line."""
        rest = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@final
class TensorBoard:
    """Writes every number of a record as a scalar, under its path within the record.

    Args:
        directory: Where event files go.
        last_step: Scalars of later steps are hidden: a resumed run writes them again.
    """

    def __init__(self, directory: Path, *, last_step: int) -> None:
        self._writer: Any = SummaryWriter(str(directory), purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        """Writes the numbers of one record."""
        for name, value in _scalars(record, str(record["kind"])):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def training_record(
    window: StepTotals,
    *,
    step: int,
    domains: Sequence[str],
    layer_names: Sequence[str],
    prices: Sequence[Tensor | None],
    losses: RoutingLosses,
    weights: DomainWeights,
    near_one_hot: bool,
    links: Tensor | None,
    exchanged: Record,
    cumulative: Record,
) -> Record:
    """Describes the steps since the last record.

    Args:
        window: Totals of these steps.
        step: Steps taken by now.
        domains: Names of the domains.
        layer_names: Names of the MoE layers.
        prices: Frozen batch price of each layer; ``None`` where none was learned.
        losses: The losses of routing.
        weights: The adversary's weights now.
        near_one_hot: Whether the adversary's weights are nearly on one domain.
        links: Which links are open, shape ``(L, G, E)``; ``None`` without link gates.
        exchanged: ``forward`` and ``backward`` bytes of a step under expert parallelism.
        cumulative: ``tokens``, ``flops``, ``outer_flops``, ``seconds``, ``tokens_per_second``,
            ``learning_rate`` and ``domain_tokens`` by now.
    """
    num_layers = len(layer_names)
    opened = [None] * num_layers if links is None else list(links.cpu())
    layers = [
        layer_record(name, load.long())
        | {
            "price": None if price is None else float(price),
            "congestion": congested(traffic, is_open),
            "open_links": None if is_open is None else int(is_open.sum()),
        }
        for name, load, price, traffic, is_open in zip(
            layer_names, window.expert_load, prices, window.traffic, opened, strict=True
        )
    ]
    steps = float(window.steps)
    flows = window.traffic.sum(dim=(0, 2)) / steps
    return {
        "kind": "train",
        "step": step,
        **cumulative,
        "gradient_norm": float(window.gradient_norm) / steps,
        "loss": float(window.loss_sums.sum() / window.num_tokens.sum()),
        "objective": float(window.objective) / steps,
        "auxiliary_loss": float(window.auxiliary) / steps,
        "routing_losses": {
            name: {"value": float(value) / steps, "coefficient": coefficient}
            for name, value, coefficient in zip(
                losses.names, window.routing_losses, losses.coefficients, strict=True
            )
        },
        "domain_loss": named(domains, window.loss_sums / window.num_tokens),
        "sampling": named(domains, weights.sampling),
        "adversary": named(domains, weights.adversary),
        "effective_domains": weights.effective_domains,
        "adversary_gap": weights.gap,
        "near_one_hot": near_one_hot,
        "experts_per_token": named(domains, window.assignments / (window.num_tokens * num_layers)),
        "budget": int(window.limit.sum()),
        "spend": int(window.spend.sum()),
        "batches_over": int(window.over),
        "traffic": named(domains, flows) if bool(flows.any()) else None,
        "exchanged_bytes": exchanged,
        "layers": layers,
    }


def read_validations(path: Path, *, last_step: int) -> list[Record]:
    """Reads the validation records of a metrics file up to a step, which may not exist."""
    records = [json.loads(line) for line in _whole_lines(path)]
    return [one for one in records if one["kind"] == "validation" and one["step"] <= last_step]


def outer_record(report: OuterReport, *, step: int, domains: Sequence[str]) -> Record:
    """Describes an outer step, made before step ``step``."""
    return {
        "kind": "outer",
        "step": step,
        "mixture": named(domains, report.mixture),
        "gain": named(domains, report.gain),
        "scale": report.scale,
        "gap": report.gap,
        "solver": {
            "status": report.status,
            "residual": report.residual,
            "curvature": report.curvature,
            "hvps": report.num_hvps,
        },
        "gradient_norm": report.gradient_norm,
        "links_closed": report.links_closed,
        "flops": report.flops,
    }


def congested(traffic: Tensor, links: Tensor | None) -> float | None:
    """Returns the congestion of a layer's traffic, ``(G, E)``; ``None`` where nothing flowed.

    Links that closed since it was measured are left out, like all closed ones.
    """
    return float(congestion(traffic, links)) if bool(traffic.any()) else None


def _whole_lines(path: Path) -> list[str]:
    """Returns the lines of a file; one that a killed run left unfinished is not among them."""
    if not path.exists():
        return []
    content = path.read_text(encoding="utf-8")
    return content[: content.rfind("\n") + 1].splitlines()


def _scalars(content: Any, path: str) -> list[tuple[str, float]]:
    if isinstance(content, bool) or content is None:
        return []
    if isinstance(content, int | float):
        return [(path, float(content))]
    if isinstance(content, dict):
        parts = [(key, value) for key, value in content.items() if key != "step"]
    elif isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        parts = [(entry["name"], entry) for entry in content]
    else:
        return []
    return [scalar for key, value in parts for scalar in _scalars(value, f"{path}/{key}")]
