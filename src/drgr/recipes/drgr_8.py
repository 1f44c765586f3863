"""Runs on the corpus ``drgr-8`` that fit two CPU cores."""

from drgr.training.config import (
    BudgetConfig,
    DataConfig,
    NoControllerConfig,
    QuantileConfig,
    RobustnessConfig,
    RoutingConfig,
    RunConfig,
    TinyModelConfig,
    TrainingConfig,
)

# Unequal on purpose, as real mixtures are: two domains are most of what is drawn, three are rare.
SAMPLING = {
    "email": 0.05,
    "speech": 0.15,
    "fiction": 0.40,
    "dictionary": 0.03,
    "factbook": 0.015,
    "chem": 0.005,
    "python": 0.25,
    "javascript": 0.10,
}


def demo() -> RunConfig:
    """Robust and budgeted: KL weights of held-out losses as sampling, 2 of 1 to 4 experts."""
    return RunConfig(
        name="demo",
        data=DataConfig(corpus="drgr-8", sampling=SAMPLING),
        model=TinyModelConfig(kind="tiny-olmoe"),
        routing=RoutingConfig(
            budget=BudgetConfig(minimum=1, maximum=4, average=2),
            controller=QuantileConfig(),
        ),
        robustness=RobustnessConfig(apply_to="sampling", divergence="kl", penalty=0.3),
        training=TrainingConfig(steps=250, evaluate_every=50),
    )


def erm() -> RunConfig:
    """The common baseline: unequal sampling as it is, top-2 routing, the Switch auxiliary loss."""
    return demo().model_copy(
        update={
            "name": "erm",
            "routing": RoutingConfig(
                budget=BudgetConfig(minimum=2, maximum=2, average=2),
                controller=NoControllerConfig(),
                auxiliary_coefficient=0.01,
            ),
            "robustness": RobustnessConfig(apply_to="nothing"),
        }
    )


def uniform() -> RunConfig:
    """The simple baseline that robust training has to beat: every domain drawn equally often."""
    return erm().model_copy(
        update={"name": "uniform", "data": DataConfig(corpus="drgr-8", sampling="uniform")}
    )


def qwen3_moe() -> RunConfig:
    """The demo with a Qwen3-MoE model."""
    return demo().model_copy(
        update={"name": "qwen3-moe", "model": TinyModelConfig(kind="tiny-qwen3-moe")}
    )
