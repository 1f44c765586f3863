"""How the solve behind a hypergradient ended."""

from enum import Enum


class SolveStatus(Enum):
    """Outcome of a linear solve; ``str`` gives a sentence for people, ``name`` is for programs."""

    CONVERGED = "converged"
    MAX_STEPS = "stopped at the step limit with the residual above tolerance: raise max_steps"
    INACCURATE = (
        "stopped where rounding keeps the residual above tolerance: "
        "take float64, a preconditioner, damping or a larger rtol"
    )
    NEGATIVE_CURVATURE = (
        "stopped at a direction without positive curvature: the inner problem is not at a strict "
        "minimum there; train it further or add damping"
    )
    APPROXIMATE = (
        "approximate, with the residual or the error estimate above tolerance: see both, or take CG"
    )
    DIVERGED = (
        "the series grows: step_size is above 2 / largest curvature; lower it or leave it out"
    )
    NON_FINITE = "the arithmetic overflowed: rescale the losses towards 1"

    def __str__(self) -> str:
        """Returns the sentence."""
        return self.value

    @property
    def succeeded(self) -> bool:
        """Whether the residual is within tolerance."""
        return self is SolveStatus.CONVERGED
