"""Small random models: the sizes asked for, decided by the seed, able to learn and generate."""

import pytest
import torch

from drgr.models import tiny_olmoe, tiny_qwen3_moe

SMALL = {
    "vocabulary_size": 50,
    "hidden_size": 32,
    "expert_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
    "max_positions": 32,
}
builders = pytest.mark.parametrize("build", [tiny_olmoe, tiny_qwen3_moe])


@builders
def test_has_the_sizes_asked_for(build):
    model = build(**SMALL, experts_per_token=3, seed=0)
    experts = [part for name, part in model.named_modules() if name.endswith(".experts")]
    assert [part.down_proj.shape for part in experts] == [(4, 32, 16)] * 2
    assert model.lm_head.weight.shape == (50, 32)
    assert model.config.num_experts_per_tok == 3
    assert model.config.max_position_embeddings == 32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.training


@builders
def test_default_sizes(build):
    model = build(vocabulary_size=1000, seed=0)
    # Per layer 8 experts of 3 * 192^2; attention, routers and norms beside.
    experts = 4 * 8 * 3 * 192**2
    attention = 4 * 192**2 * (4 if build is tiny_olmoe else 3)
    total = experts + attention + 4 * 8 * 192 + 2 * 1000 * 192
    assert model.num_parameters() == pytest.approx(total, rel=1e-3)


@builders
def test_the_seed_alone_decides_the_weights(build):
    state = torch.get_rng_state()
    first = build(**SMALL, seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    second, other = build(**SMALL, seed=1).state_dict(), build(**SMALL, seed=2).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@builders
def test_learns_one_batch(build):
    model = build(**SMALL, seed=0)
    ids = torch.randint(50, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        output = model(input_ids=ids, labels=ids)
        assert output.past_key_values is None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(torch.tensor(50.0).log().item(), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]


@builders
def test_generates_with_the_cache_as_without(build, capfd):
    model = build(**SMALL, seed=0).eval()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _m, _args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = torch.randint(50, (2, 6))
    options = {"max_new_tokens": 5, "do_sample": False}
    cached = model.generate(ids, **options)
    assert lengths == [6, 1, 1, 1, 1]
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape == (2, 11)
    assert "token_id" not in capfd.readouterr().err


@builders
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocabulary_size", 0, "vocabulary_size must be a finite number above 0, got 0"),
        ("num_layers", 0, "num_layers must be a finite number above 0, got 0"),
        ("max_positions", -1, "max_positions must be a finite number above 0, got -1"),
        ("hidden_size", 0, "hidden_size must be a finite number above 0, got 0"),
        ("expert_size", 0, "expert_size must be a finite number above 0, got 0"),
        ("num_heads", 0, "num_heads must be a finite number above 0, got 0"),
        ("num_experts", 0, "num_experts must be a finite number above 0, got 0"),
        ("experts_per_token", 0, "experts_per_token must be a finite number above 0, got 0"),
        ("experts_per_token", 5, "experts_per_token must be at most num_experts = 4, got 5"),
        ("hidden_size", 36, r"hidden_size must be a multiple of 2 \* num_heads = 8 .* got 36"),
        ("expert_size", 18, "expert_size must be a multiple of 4 .* got 18; use 20"),
    ],
)
def test_refuses_sizes_that_do_not_fit(build, field, value, message):
    with pytest.raises(ValueError, match=message):
        build(**{**SMALL, field: value}, seed=0)


def test_refuses_a_width_without_whole_blocks():
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of 4 .* got 30; use 32"):
        tiny_olmoe(**{**SMALL, "hidden_size": 30, "num_heads": 3}, seed=0)
