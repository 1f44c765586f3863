"""Published robust-training methods as settings of the one trainer, on the corpus ``drgr-8``.

Each is the method's rule, not its authors' code; where a rule is not theirs to the letter the
docstring says so. Budget and routing are those of ``erm``, so that nothing else differs.
"""

from pathlib import Path
from typing import Any

from drgr.recipes.drgr_8 import demo, erm
from drgr.training.config import DataConfig, OuterConfig, RobustnessConfig, RunConfig
from drgr.training.routing_config import BudgetConfig, TrafficConfig

REFERENCE = Path("runs/erm/evaluation.json")


def group_dro() -> RunConfig:
    """Group DRO: exponentiated-gradient weights of training losses on the objective.

    ``q_d <- q_d exp(eta loss_d)`` after every step, from uniform batches, with ``eta = 0.05``
    (Sagawa, Koh, Hashimoto, Liang, *Distributionally Robust Neural Networks for Group Shifts*, ICLR
    2020). Loss of a domain: its mean token loss in the step.
    """
    return _with(
        "group-dro",
        data=DataConfig(corpus="drgr-8", sampling="uniform"),
        robustness=RobustnessConfig(
            apply_to="objective",
            losses="train",
            unit="nats-per-token",
            nominal="previous",
            penalty=20.0,
            smoothing=0.0,
            begin=1,
            every=1,
        ),
    )


def doremi() -> RunConfig:
    """DoReMi's proxy: exponentiated-gradient weights of clipped excess losses, smoothed.

    ``q_d <- q_d exp(eta max(loss_d - reference_d, 0))``, then ``(1 - c) q + c / G`` with ``c =
    1e-3`` (Xie et al., *DoReMi*, NeurIPS 2023). Train ``erm`` into ``runs/erm`` first: its losses
    are the reference. The result of the method is the average weight over the run: train another
    recipe with ``--set data.sampling=runs/doremi/evaluation.json``. Differs from the paper in that
    the excess is clipped by domain, not by token, for which a reference model would have to run
    along.
    """
    return _with(
        "doremi",
        data=DataConfig(corpus="drgr-8", sampling="uniform"),
        robustness=RobustnessConfig(
            apply_to="objective",
            losses="train",
            unit="nats-per-token",
            reference=REFERENCE,
            clip_excess=True,
            nominal="previous",
            uniform_share=1e-3,
            penalty=1.0,
            smoothing=0.0,
            begin=1,
            every=1,
        ),
    )


def doge() -> RunConfig:
    """DoGE: the mixture follows gradient alignment with all domains, the Hessian left out.

    ``w_e <- w_e exp(rate <grad l_e, mean_d grad l_d>)`` from uniform batches (Fan, Pagliardini,
    Jaggi, *DoGE*, ICML 2024), with held-out gradients for the target, every ten steps. Differs from
    the paper in that the mixture is what is drawn, and that gains are in the unit of the losses.
    """
    return _with(
        "doge",
        data=DataConfig(corpus="drgr-8", sampling="uniform"),
        robustness=RobustnessConfig(apply_to="nothing", penalty=None, radius=0.0),
        outer=OuterConfig(
            variables=("mixture",),
            every=10,
            update="gradient",
            metric="identity",
            anchor="uniform",
            anchor_strength=0.0,
            smoothing=0.0,
        ),
    )


def drmoet() -> RunConfig:
    """DRMoET: experts are the groups; exponentiated-gradient weights of their losses.

    ``q_e <- q_e exp(eta loss_e)`` in each layer on an average of ``loss_e``, the mean loss of the
    tokens that the expert serves, credited by its combine weights (after *Distributionally Robust
    Mixture-of-Experts Training*, 2026). Differs in that the loss of an expert is a mean, where a
    sum would confuse it with the expert's load.
    """
    return _with(
        "drmoet",
        robustness=RobustnessConfig(
            groups="experts",
            apply_to="objective",
            losses="train",
            unit="nats-per-token",
            nominal="previous",
            penalty=30.0,
            smoothing=0.9,
            begin=1,
            every=1,
        ),
    )


def drgr() -> RunConfig:
    """What pays for its FLOPs: a late adversary, one expert a token, a price on gradient traffic.

    Batches are drawn uniformly at first, so that every domain is learned from all; then by KL
    weights of the training losses, which cost nothing and, while no text is seen twice, are as good
    as held-out ones. Where text is repeated, take those: ``robustness.losses=validation``. A token
    has one expert, and the run the FLOPs of ``erm`` all the same: at both sizes of
    ``docs/results.md`` steps are worth more than a second expert, throughout or for the last steps
    (``routing.selection={kind: progressive, first: 1, switch_step: N}`` with a budget of two).
    Strength and begin of the adversary are what tuning chose at this size, the price what the
    smaller comparison has; move ``robustness.begin`` with the steps.
    """
    routing = demo().routing.model_copy(
        update={
            "budget": BudgetConfig(minimum=1, maximum=1, average=1),
            "traffic": TrafficConfig(coefficient=0.03),
        }
    )
    return demo().model_copy(
        update={
            "name": "drgr",
            "training": demo().training.model_copy(update={"steps": 320}),
            "routing": routing,
            "robustness": RobustnessConfig(
                apply_to="sampling", divergence="kl", penalty=0.38, losses="train", begin=100
            ),
        }
    )


def drgr_bilevel() -> RunConfig:
    """The mixture looks ahead by hypergradients, inside an exact budget; does not pay so far.

    The mixture moves to the one whose predicted held-out losses have the least worst case, by
    gradient alignments between all pairs of domains in the optimizer's metric. On models of a few
    million parameters it does not beat ``demo``, which draws by the adversary's weights
    (``benchmarks/frontier``, ``docs/results.md``).
    """
    return demo().model_copy(
        update={
            "name": "drgr-bilevel",
            "robustness": RobustnessConfig(apply_to="nothing", divergence="kl", penalty=0.3),
            "outer": OuterConfig(variables=("mixture",), update="lookahead"),
        }
    )


def _with(name: str, **changes: Any) -> RunConfig:
    return erm().model_copy(update={"name": name, **changes})
