"""Hypergradients through kernels without second derivatives: grouped experts, fused attention."""

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from drgr.bilevel import second_derivatives


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        initializer_range=0.5,
        num_experts_per_tok=4,  # all of them: a change of route would be a jump of the loss
    )
    return OlmoeForCausalLM(config).eval()


def inner_loss(model, kernels):
    """A weighted training loss of two domains, as a function of vectors."""
    experts, attention = kernels
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    # Token 1 is padding: its embedding is 0, where normalising has a kink.
    ids = torch.randint(2, 32, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    shapes = {name: value.shape for name, value in model.named_parameters()}

    def loss(mixture, vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        params = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        domains = [
            torch.func.functional_call(
                model, params, kwargs={"input_ids": rows, "labels": rows}
            ).loss
            for rows in ids
        ]
        return mixture @ torch.stack(domains)

    return loss


FUSED, PLAIN = ("grouped_mm", "sdpa"), ("eager", "eager")
MIXTURE = torch.tensor([0.3, 0.7])


@pytest.fixture
def vector(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_grouped_experts_and_fused_attention_will_do(model, vector):
    direction = torch.randn(vector.shape, generator=torch.Generator().manual_seed(2))
    expected = second_derivatives(
        "double-backward", inner_loss(model, PLAIN), MIXTURE, vector
    ).hessian_and_cross(direction)
    found = second_derivatives(
        "central-difference", inner_loss(model, FUSED), MIXTURE, vector
    ).hessian_and_cross(direction)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_the_fused_kernels_have_no_second_derivative(model, vector):
    """Otherwise the test above would show nothing."""
    loss, ones = inner_loss(model, FUSED), torch.ones_like(vector)
    with pytest.raises(RuntimeError, match=r"derivative"):
        second_derivatives("double-backward", loss, MIXTURE, vector).hessian(ones)
