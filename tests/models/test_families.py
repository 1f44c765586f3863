"""The shared tiny models: the five families build, train and generate without a warning."""

import pytest
import torch


@pytest.fixture
def tokens():
    return torch.randint(2, 64, (2, 12))


def expert_modules(model):
    return [m for n, m in model.named_modules() if n.endswith(".experts")]


def test_a_family_trains_and_generates(family, build_family, tokens):
    model = build_family(family)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert len(expert_modules(model)) == 2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    generated = model.eval().generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        pad_token_id=1,
    )
    assert generated.shape == (2, 15)


def test_one_expert_is_visible_in_the_output(family, build_family, tokens):
    model = build_family(family).eval()
    experts = expert_modules(model)[0]
    chosen = []
    handle = experts.register_forward_hook(lambda _m, args, _out: chosen.append(args[1]))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        handle.remove()
        experts.down_proj[chosen[0].flatten().mode().values].zero_()
        after = model(input_ids=tokens).logits
    assert (before - after).abs().max() > 1e-2


def test_group_limited_routing_stays_in_one_group(build_family, tokens):
    model = build_family("deepseek_v3_grouped").eval()
    groups = []
    for _, module in model.named_modules():
        if hasattr(module, "experts"):
            module.gate.register_forward_hook(lambda _m, _args, out: groups.append(out[2] // 4))
    model(input_ids=tokens)
    assert len(groups) == 2
    for chosen in groups:
        assert (chosen[:, 0] == chosen[:, 1]).all()


def test_the_seed_alone_decides_the_weights(build_family):
    state = torch.random.get_rng_state()
    first, second, other = (build_family("olmoe", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
