"""Worst-case weights of one vector of domain losses under every divergence, at comparable sizes.

Divergences with a second derivative get radii of equal rho / f''(1), which for small radii raise
the value equally; the others are set to about that value. Run it with:
python examples/worst_case_weights.py
"""

import torch

from drgr.ambiguity import (
    KL,
    AlphaDivergence,
    Burg,
    ChiSquare,
    CressieRead,
    CVaR,
    Divergence,
    Hellinger,
    JensenShannon,
    KLCVaR,
    Neyman,
    Spectral,
    TotalVariation,
    WorstCase,
    effective_number,
    worst_case,
)

DOMAINS = ("web", "books", "code", "math", "law", "chat")
LOSSES = torch.tensor([2.1, 2.3, 1.4, 1.9, 2.6, 3.4], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.15, 0.15, 0.1, 0.05, 0.05], dtype=torch.float64)
RELATIVE_RADIUS = 0.15

# Each divergence with f''(1).
SMOOTH: dict[str, tuple[Divergence, float]] = {
    "CressieRead(4)": (CressieRead(4.0), 1.0),
    "ChiSquare": (ChiSquare(), 1.0),
    "CressieRead(1.5)": (CressieRead(1.5), 1.0),
    "KL": (KL(), 1.0),
    "KLCVaR(0.3)": (KLCVaR(0.3), 1.0),
    "AlphaDivergence(0.5)": (AlphaDivergence(0.5), 1.0),
    "Hellinger": (Hellinger(), 0.25),
    "JensenShannon": (JensenShannon(), 0.25),
    "Burg": (Burg(), 1.0),
    "Neyman": (Neyman(), 1.0),
}


def row(name: str, worst: WorstCase) -> None:
    """Prints a line of the table."""
    weights = "".join(f"{weight:>7.3f}" for weight in worst.weights.tolist())
    number = effective_number(worst.weights).item()
    print(
        f"{name:<22}{weights}{worst.value:>8.3f}{number:>10.2f}{worst.multiplier:>11.3f}"
        f"{worst.gap:>9.0e}"
    )


def main() -> None:
    """Prints the table."""
    heads = "".join(f"{domain:>7}" for domain in DOMAINS)
    print(f"{'':<22}{heads}{'value':>8}{'effective':>10}{'multiplier':>11}{'gap':>9}")
    row("nominal", worst_case(LOSSES, divergence=KL(), radius=0.0, nominal=SHARES))
    for name, (divergence, curvature) in SMOOTH.items():
        radius = RELATIVE_RADIUS * curvature
        row(name, worst_case(LOSSES, divergence=divergence, radius=radius, nominal=SHARES))
    variation = worst_case(LOSSES, divergence=TotalVariation(), radius=0.13, nominal=SHARES)
    row("TotalVariation", variation)
    row("CVaR(0.5)", worst_case(LOSSES, divergence=CVaR(0.5), nominal=SHARES))
    extremile = Spectral.extremile(2.2)
    row("Spectral.extremile", worst_case(LOSSES, divergence=extremile, nominal=SHARES))


if __name__ == "__main__":
    main()
