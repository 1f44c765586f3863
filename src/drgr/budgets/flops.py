"""FLOPs of a transformer with experts: a linear model of what a batch costs.

One multiply-add is two FLOPs. Matrix products alone are counted: no norms, activations, softmax,
rotary positions, biases or embedding look-ups, whose cost is memory traffic rather than arithmetic.
"""

from dataclasses import dataclass, fields

from drgr._checks import check_not_negative

FORWARD_PASSES_PER_STEP = 3  # the forward pass, and two products of its size in the backward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopModel:
    """Forward cost of one model, in FLOPs, split by what it is proportional to.

    Attributes:
        dense_per_token: Everything that runs on each token: projections, routers, dense and shared
            feed-forward layers, output head.
        per_assignment: One expert on one token, in one layer.
        attention_per_pair: One query token against one key position (scores and values), summed
            over heads and layers. Pairs that a causal or a sliding mask hides are counted.
        head_per_token: The output head's part of ``dense_per_token``.

    Raises:
        ValueError: If a field is negative or not finite, or the head costs more than all that runs
            on a token.
    """

    dense_per_token: float
    per_assignment: float
    attention_per_pair: float
    head_per_token: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_not_negative(field.name, getattr(self, field.name))
        if self.head_per_token > self.dense_per_token:
            raise ValueError(
                f"head_per_token must be at most dense_per_token = {self.dense_per_token}, "
                f"got {self.head_per_token}; dense_per_token includes the head"
            )


def forward_flops(
    model: FlopModel, *, tokens: int, sequence_length: int, assignments: float
) -> float:
    """Counts one forward pass over a batch of equally long sequences, without a cache.

    The count is ``tokens * dense + assignments * expert + tokens * sequence_length * pair``. A
    causal mask does not halve the last term: eager and masked attention compute every pair. A
    kernel that skips masked blocks does about half of that term.

    Args:
        model: Costs of the model.
        tokens: Token positions in the batch, padding included: sequences x ``sequence_length``.
        sequence_length: Positions of one (padded) sequence.
        assignments: Pairs (token, expert) that run, summed over the MoE layers; an average is fine.

    Returns:
        FLOPs of the pass.

    Raises:
        ValueError: If a count is negative or not finite.

    References:
        Kaplan et al., Scaling Laws for Neural Language Models, 2020, section 2.1 (arXiv
        2001.08361) counts dense transformers in this way.

    Examples:
        >>> costs = FlopModel(dense_per_token=100.0, per_assignment=10.0, attention_per_pair=1.0)
        >>> forward_flops(costs, tokens=8, sequence_length=4, assignments=16)
        992.0
    """
    check_not_negative("tokens", tokens)
    check_not_negative("sequence_length", sequence_length)
    check_not_negative("assignments", assignments)
    dense = tokens * model.dense_per_token
    experts = assignments * model.per_assignment
    attention = tokens * sequence_length * model.attention_per_pair
    return dense + experts + attention


def training_flops(
    model: FlopModel,
    *,
    tokens: int,
    sequence_length: int,
    assignments: float,
    gradient_checkpointing: bool = False,
) -> float:
    """Counts forward and backward of one batch, every parameter being trained.

    The backward pass of a product computes two products of the same size, one for each factor, so
    a step costs three forward passes. Gradient checkpointing runs the layers forward once more,
    though not the head; the count is then an upper bound, because the recomputation may stop
    before a layer's last product. Attention kernels that keep no scores recompute them in the
    backward pass: half a forward of the attention term, not counted here.

    Args:
        model: Costs of the model.
        tokens: Token positions in the batch, padding included.
        sequence_length: Positions of one (padded) sequence.
        assignments: Pairs (token, expert) that run in one forward pass, summed over the MoE layers.
        gradient_checkpointing: Whether every decoder layer is recomputed in the backward pass.

    Returns:
        FLOPs of the step, without the optimizer's.

    Raises:
        ValueError: If a count is negative or not finite.

    Examples:
        >>> costs = FlopModel(dense_per_token=100.0, per_assignment=10.0, attention_per_pair=1.0)
        >>> training_flops(costs, tokens=8, sequence_length=4, assignments=16)
        2976.0
    """
    forward = forward_flops(
        model, tokens=tokens, sequence_length=sequence_length, assignments=assignments
    )
    repeated = forward - tokens * model.head_per_token if gradient_checkpointing else 0.0
    return FORWARD_PASSES_PER_STEP * forward + repeated
