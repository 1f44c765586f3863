"""From the settings of budget and selection to what builds each layer's selector."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import assert_never, final

from drgr.budgets import TokenBudget, budget_from_flops, layer_counts
from drgr.budgets.flops import FlopModel
from drgr.errors import ConfigError
from drgr.evaluation import ExpertBounds
from drgr.routing import LayerPlace
from drgr.routing.selection import (
    OpenExperts,
    ProgressiveSelector,
    QuantileSelector,
    Selector,
    SelectorFactory,
    SequenceSelector,
    ThresholdSelector,
    TopPSelector,
    layer_budgets,
    sparsification,
)
from drgr.training.routing_config import BudgetConfig, RoutingConfig
from drgr.training.selection_config import (
    BudgetSelectionConfig,
    LayersConfig,
    OpenSelectionConfig,
    ProgressiveConfig,
    SequenceSelectionConfig,
    ThresholdConfig,
    TopPConfig,
)

ROUTED_ALONE = ("open", "top-p", "threshold")
"""Selections in which no other token of a training batch has a say."""

_OPENING_SCORES = ("norm", "relu-rms", "tsallis-hybrid", "stochastic")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetStage:
    """Steps of training that share a budget.

    Attributes:
        begin: Optimizer steps before it.
        budgets: Of each layer; the average is the maximum where nothing holds a mean.
    """

    begin: int
    budgets: tuple[TokenBudget, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunSelection:
    """How the layers of a run select.

    Attributes:
        build: Builds a layer's selector. It raises :class:`~drgr.errors.ConfigError` where the
            settings do not fit the layer.
        bounds: What holds for a token in any layer once training has ended.
        stages: What holds from which step on; the first stage begins at step 0.
    """

    build: SelectorFactory
    bounds: ExpertBounds
    stages: tuple[BudgetStage, ...]


def build_selection(
    config: RoutingConfig, flops: FlopModel, *, num_layers: int, steps: int
) -> RunSelection:
    """Returns how the layers of a run select.

    Args:
        config: The settings.
        flops: What the model costs.
        num_layers: Number of MoE layers.
        steps: Optimizer steps of the run.

    Raises:
        ConfigError: If a budget has no plan, or settings do not fit the number of layers.
    """
    budget = build_budget(config.budget, flops)
    alike = [budget] * num_layers
    smoothing, selection = config.price_smoothing, config.selection
    match selection:
        case BudgetSelectionConfig():
            return _constant(layer_budgets(alike, smoothing=smoothing), alike)
        case TopPConfig() | ThresholdConfig() | SequenceSelectionConfig():
            return _constant(
                lambda place: _alike(selection, budget, smoothing, place),
                alike,
                has_average=_has_average(selection),
            )
        case OpenSelectionConfig():
            return _open(config, alike)
        case LayersConfig():
            budgets = _layer_budgets(config.budget, selection, flops, num_layers)
            return _constant(layer_budgets(budgets, smoothing=smoothing), budgets)
        case ProgressiveConfig():
            return _progressive(selection, budget, smoothing, (num_layers, steps))
        case _:
            assert_never(selection)


def build_budget(config: BudgetConfig, flops: FlopModel) -> TokenBudget:
    """Returns the budget of each layer in experts.

    Raises:
        ConfigError: If bounds in FLOPs leave no whole number of experts.
    """
    if config.unit == "flops":
        try:
            return budget_from_flops(
                minimum=config.minimum,
                maximum=config.maximum,
                average=config.average,
                flops_per_assignment=flops.per_assignment,
            )
        except ValueError as error:
            raise ConfigError(
                f"routing.budget in FLOPs, at {flops.per_assignment:g} an expert: {error}"
            ) from error
    return TokenBudget(
        minimum=int(config.minimum), maximum=int(config.maximum), average=config.average
    )


def _alike(
    config: TopPConfig | ThresholdConfig | SequenceSelectionConfig,
    budget: TokenBudget,
    smoothing: float,
    place: LayerPlace,
) -> Selector:
    """Builds a selector that is the same for every layer."""
    match config:
        case TopPConfig(p=p):
            return TopPSelector(p, minimum=budget.minimum, maximum=budget.maximum)
        case ThresholdConfig():
            return _threshold(config, budget, smoothing, place)
        case SequenceSelectionConfig():
            return SequenceSelector(budget, smoothing=smoothing, device=place.device)
        case _:
            assert_never(config)


def _open(config: RoutingConfig, budgets: Sequence[TokenBudget]) -> RunSelection:
    budget = budgets[0]
    """Returns the selection of the experts that the scorer opens."""
    if config.scores.kind not in _OPENING_SCORES:
        raise ConfigError(
            f"routing.selection open needs routing.scores that open experts, one of "
            f"{', '.join(_OPENING_SCORES)}, got {config.scores.kind}"
        )
    if budget.minimum > 1:
        raise ConfigError(
            f"routing.budget.minimum must be 0 or 1 with routing.selection open, got "
            f"{budget.minimum}; a scorer opens as many experts as it likes"
        )
    selector = partial(OpenExperts, budget.maximum, at_least_best=budget.minimum == 1)
    return _constant(lambda _: selector(), budgets, has_average=False)


def _threshold(
    config: ThresholdConfig, budget: TokenBudget, smoothing: float, place: LayerPlace
) -> Selector:
    if config.level is not None:
        return ThresholdSelector(config.level, minimum=budget.minimum, maximum=budget.maximum)
    return QuantileSelector(
        budget,
        num_experts=place.num_experts if config.per_expert else None,
        smoothing=smoothing,
        device=place.device,
    )


def _has_average(config: TopPConfig | ThresholdConfig | SequenceSelectionConfig) -> bool:
    match config:
        case TopPConfig():
            return False
        case ThresholdConfig():
            return config.level is None
        case SequenceSelectionConfig():
            return True
        case _:
            assert_never(config)


def _layer_budgets(
    config: BudgetConfig, selection: LayersConfig, flops: FlopModel, num_layers: int
) -> tuple[TokenBudget, ...]:
    if selection.averages is None:
        return _shaped_budgets(selection, build_budget(config, flops), num_layers)
    averages = selection.averages
    if len(averages) != num_layers:
        raise ConfigError(
            f"routing.selection.averages must have one entry for each of the {num_layers} MoE "
            f"layers, got {len(averages)}"
        )
    try:
        return tuple(
            build_budget(config.model_copy(update={"average": average}), flops)
            for average in averages
        )
    except (ConfigError, ValueError) as error:
        raise ConfigError(
            f"routing.selection.averages must lie within the bounds of routing.budget, got "
            f"{list(averages)}: {error}"
        ) from error


def _shaped_budgets(
    selection: LayersConfig, budget: TokenBudget, num_layers: int
) -> tuple[TokenBudget, ...]:
    # The validator of the settings leaves neither out.
    shape, total = selection.shape or "uniform", selection.total or 0
    try:
        counts = layer_counts(
            shape,
            num_layers=num_layers,
            total=total,
            # A layer without any expert has no budget.
            minimum=max(1, budget.minimum),
            maximum=budget.maximum,
        )
    except ValueError as error:
        raise ConfigError(f"routing.selection: {error}") from error
    return tuple(replace(budget, average=count) for count in counts)


def _progressive(
    config: ProgressiveConfig, budget: TokenBudget, smoothing: float, extent: tuple[int, int]
) -> RunSelection:
    num_layers, steps = extent
    counts = (config.first,) * num_layers if isinstance(config.first, int) else config.first
    if len(counts) > num_layers:
        raise ConfigError(
            f"routing.selection.first must have at most one entry for each of the {num_layers} MoE "
            f"layers, got {len(counts)}"
        )
    firsts = [TokenBudget(minimum=k, maximum=k, average=k) for k in counts]
    firsts += [budget] * (num_layers - len(firsts))

    def build(place: LayerPlace) -> Selector:
        first = firsts[place.number]
        if place.number < len(counts) and first.maximum > place.num_experts:
            raise ConfigError(
                f"routing.selection.first must be at most the {place.num_experts} experts of a "
                f"layer, got {first.maximum}"
            )
        return ProgressiveSelector(
            sparsification(first, budget, switch_step=config.switch_step),
            maximum=max(first.maximum, budget.maximum),
            smoothing=smoothing,
            device=place.device,
        )

    late = [budget] * num_layers
    return RunSelection(
        build=build,
        # The last step is taken after steps - 1 others.
        bounds=_bounds(firsts if steps - 1 < config.switch_step else late),
        stages=(
            BudgetStage(begin=0, budgets=tuple(firsts)),
            BudgetStage(begin=config.switch_step, budgets=tuple(late)),
        ),
    )


def _constant(
    build: SelectorFactory, budgets: Sequence[TokenBudget], *, has_average: bool = True
) -> RunSelection:
    held = budgets if has_average else [replace(b, average=b.maximum) for b in budgets]
    return RunSelection(
        build=build,
        bounds=_bounds(budgets, has_average=has_average),
        stages=(BudgetStage(begin=0, budgets=tuple(held)),),
    )


def _bounds(budgets: Sequence[TokenBudget], *, has_average: bool = True) -> ExpertBounds:
    return ExpertBounds(
        minimum=min(budget.minimum for budget in budgets),
        maximum=max(budget.maximum for budget in budgets),
        average=sum(budget.average for budget in budgets) / len(budgets) if has_average else None,
    )
