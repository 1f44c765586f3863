"""Settings of the outer loop."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from drgr.training.field_types import STRICT, Count, NotNegative, Positive, Share


class NoSolverConfig(BaseModel):
    """The Hessian is left out: DoGE with the identity metric, SAMA with Adam's."""

    model_config = STRICT

    kind: Literal["none"] = "none"


class CGConfig(BaseModel):
    """See :class:`drgr.bilevel.CG`."""

    model_config = STRICT

    kind: Literal["cg"]
    max_steps: Count = 5
    """Hessian-vector products at an outer step; each costs two gradients."""
    rtol: Positive = 1e-2


class NeumannConfig(BaseModel):
    """See :class:`drgr.bilevel.Neumann`."""

    model_config = STRICT

    kind: Literal["neumann"]
    num_terms: Count = 5
    step_size: Positive | None = None
    """Below 2 / largest curvature in the metric of the solve, where the damping is 1; by default
    estimated, with at most 20 products."""


SolverConfig = Annotated[NoSolverConfig | CGConfig | NeumannConfig, Field(discriminator="kind")]


class GatesConfig(BaseModel):
    """Link gates as outer variables: proximal steps that close what does not pay for itself."""

    model_config = STRICT

    rate: Positive = 5.0
    """Step size, in gates per unit of the losses."""
    penalty: NotNegative = 0.02
    """Weight of the group norm, in the unit of the losses."""
    group: Literal["link", "source", "expert"] = "link"
    """What closes together."""


class OuterConfig(BaseModel):
    """The outer loop: variables that follow the hypergradient of held-out losses."""

    model_config = STRICT

    variables: tuple[Literal["mixture", "router", "link-gates"], ...] = ()
    """What the outer level decides; without any there is no outer loop."""
    every: Count = 20
    """Steps between outer steps."""
    begin: Count = 20
    """Steps before the first one, at least 1: the metric is the optimizer's."""
    windows: Count = 1
    """Sequences of each domain, held-out and training ones, at an outer step."""
    update: Literal["gradient", "lookahead"] = "lookahead"
    """How the mixture moves: by a mirror step along the hypergradient, or to the mixture whose
    predicted losses have the least worst case, which holds two gradients a domain in memory."""
    metric: Literal["identity", "adam"] = "adam"
    """What stands for the optimizer in the inner level's response."""
    solver: SolverConfig = NoSolverConfig()
    """How the inner Hessian is inverted; ``lookahead`` takes none."""
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    """What the solver inverts: the Gauss-Newton matrix, which is never negative, or the Hessian."""
    horizon: Positive | None = None
    """Steps that the inner level is taken to respond for; ``every`` by default."""
    rate: Positive = 2.0
    """Step size of the mixture in ``gradient``, in 1 / unit of the losses."""
    anchor_strength: NotNegative = 0.2
    """Price of a mixture's divergence from the anchor, in the unit of the losses."""
    anchor: Literal["adversary", "uniform", "sampling"] = "adversary"
    """The mixture that ``anchor_strength`` holds to, and the one to draw by until gains are known:
    the adversary's weights, so that without gains the held-out adversary decides what is drawn."""
    smoothing: Share = 0.5
    """Share of the old estimate that a new one of gains keeps."""
    learning_rate: Positive = 1e-3
    """Of the router's weights as outer variables, by Adam."""
    gates: GatesConfig = GatesConfig()
