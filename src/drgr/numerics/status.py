"""How an iterative computation ended, in words that a user can act on."""

from enum import Enum


class Status(Enum):
    """Outcome of a numerical routine: ``value`` is a sentence for people, ``name`` for programs."""

    CONVERGED = "the error certificate is within tolerance"
    MAX_STEPS = "the iteration reached its step limit with the error certificate above tolerance"
    INACCURATE = (
        "the solver stopped but the error certificate is above tolerance: "
        "the data are too ill-conditioned for this precision"
    )
    INFEASIBLE = "no point satisfies the constraints: loosen a bound"
    NON_FINITE = "the arithmetic overflowed: rescale the data towards 1"

    @property
    def succeeded(self) -> bool:
        """Whether the result meets the documented tolerance."""
        return self is Status.CONVERGED
