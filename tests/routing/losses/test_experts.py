"""Losses of expert weights, activations and layer pairs against loops."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drgr.routing import (
    expert_router_coupling_loss,
    expert_specialisation_loss,
    layer_coupling_loss,
    noise_radius,
    router_responses,
    selected_mass,
)


def coupling_by_loop(router, gates, noise, tolerance):
    """The published sums, with numpy."""
    number = len(router)
    proxies = []
    for i in range(number):
        distances = [np.linalg.norm(router[i] - router[j]) for j in range(number) if j != i]
        radius = min(distances) / (2 * np.linalg.norm(router[i])) if distances else 0.0
        proxies.append(router[i] * (1 + radius * noise[i]))
    answer = [[np.linalg.norm(gates[j] @ proxies[i]) for j in range(number)] for i in range(number)]
    total = 0.0
    for i in range(number):
        for j in range(number):
            if i != j:
                total += max(answer[i][j] - tolerance * answer[i][i], 0)
                total += max(answer[j][i] - tolerance * answer[i][i], 0)
    return total / number**2, answer


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_coupling_is_the_definition(tolerance, number):
    router = torch.randn(number, 6, dtype=torch.float64)
    gates = torch.randn(number, 4, 6, dtype=torch.float64)
    noise = torch.rand(number, 6, dtype=torch.float64) * 2 - 1
    expected, answer = coupling_by_loop(router.numpy(), gates.numpy(), noise.numpy(), tolerance)
    loss = expert_router_coupling_loss(router, gates, noise=noise, tolerance=tolerance)
    assert float(loss) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    torch.testing.assert_close(
        router_responses(router, gates, noise=noise), torch.tensor(answer, dtype=torch.float64)
    )


def test_coupling_reaches_router_and_gates():
    router = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(3, 4, dtype=torch.float64) * 2 - 1
    # The radius of the noise is a constant, which finite differences would not know.
    assert torch.autograd.gradcheck(
        lambda r, w: expert_router_coupling_loss(r, w, tolerance=0.5), (router, gates)
    )
    expert_router_coupling_loss(router, gates, noise=noise, tolerance=0.5).backward()
    radius = noise_radius(router).unsqueeze(1)
    frozen = router.detach().clone().requires_grad_()
    answers = torch.stack([(frozen * (1 + radius * noise)) @ w.T for w in gates.detach()])
    m = answers.norm(dim=2).T
    own = 0.5 * m.diagonal()[:, None]
    off = 1 - torch.eye(3)
    (((m - own).relu() + (m.T - own).relu()) * off).sum().div(9).backward()
    torch.testing.assert_close(router.grad, frozen.grad)
    assert gates.grad.abs().sum() > 0


def test_coupled_experts_pay_nothing():
    router, gates = torch.eye(3), torch.eye(3).unsqueeze(1)
    assert float(expert_router_coupling_loss(router, gates, tolerance=0.0)) == 0
    crossed = gates[[1, 2, 0]]
    # Every row is answered by one foreign expert, and every expert answers one foreign row.
    assert float(expert_router_coupling_loss(router, crossed)) == pytest.approx(6 / 9)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(number=st.integers(2, 6), width=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_proxy_is_never_nearer_to_another_row(number, width, seed):
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(number, width, generator=generator, dtype=torch.float64)
    noise = torch.rand(number, width, generator=generator, dtype=torch.float64) * 2 - 1
    proxies = router * (1 + noise_radius(router).unsqueeze(1) * noise)
    distances = (proxies.unsqueeze(1) - router.unsqueeze(0)).norm(dim=2)
    assert (distances.diagonal() <= distances.min(dim=1).values + 1e-12).all()


def test_radius_of_zeros_and_of_rows_that_occur_twice():
    router = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    assert noise_radius(router)[:3].tolist() == [0, 0, 0]
    assert noise_radius(router)[3] == pytest.approx(4 / 8)
    assert noise_radius(router[:1]).tolist() == [0]


def test_coupling_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"gates must have shape \(3, 'any', 4\)"):
        expert_router_coupling_loss(torch.rand(3, 4), torch.rand(3, 4, 2))
    with pytest.raises(ValueError, match=r"tolerance must .* got -1"):
        expert_router_coupling_loss(torch.rand(3, 4), torch.rand(3, 2, 4), tolerance=-1)
    with pytest.raises(ValueError, match="noise must have shape"):
        expert_router_coupling_loss(torch.rand(3, 4), torch.rand(3, 2, 4), noise=torch.rand(3))


def specialisation_by_loop(activations, keep, valid):
    squares = []
    for token in range(len(keep)):
        for e in range(keep.shape[1]):
            for v in range(keep.shape[1]):
                if e != v and valid[token] and keep[token, e] and keep[token, v]:
                    a, b = activations[token, e], activations[token, v]
                    scale = np.linalg.norm(a) * np.linalg.norm(b)
                    squares.append((a @ b / scale) ** 2 if scale else 0.0)
    return np.mean(squares) if squares else 0.0


def test_specialisation_is_the_definition():
    activations = torch.randn(7, 3, 5, dtype=torch.float64)
    activations[1, 0] = 0
    keep, valid = torch.rand(7, 3) < 0.8, torch.rand(7) < 0.8
    keep[:2] = valid[:2] = True
    expected = specialisation_by_loop(activations.numpy(), keep.numpy(), valid.numpy())
    loss = expert_specialisation_loss(activations, keep, valid=valid)
    assert float(loss) == pytest.approx(expected, 1e-12)


def test_specialisation_gradient_and_extremes():
    keep = torch.tensor([[True, True, False], [True, True, True]])
    activations = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: expert_specialisation_loss(h, keep), activations)
    same = torch.ones(2, 2, 3)
    assert float(expert_specialisation_loss(same, keep[:, :2])) == pytest.approx(1)
    assert (
        float(expert_specialisation_loss(torch.eye(2).expand(4, 2, 2), keep[:1, :2].expand(4, 2)))
        == 0
    )
    one = torch.tensor([[True, False], [False, False]])
    assert float(expert_specialisation_loss(same, one)) == 0
    zeros = torch.zeros(2, 2, 3, requires_grad=True)
    expert_specialisation_loss(zeros, keep[:, :2]).backward()
    assert zeros.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="activations must have shape"):
        expert_specialisation_loss(torch.rand(2, 3), keep)


def test_coupling_of_layers_is_the_published_sum_over_pairs_of_experts():
    layers = []
    valid = torch.tensor([1, 1, 0, 1, 1]).bool()
    for _ in range(3):
        scores = torch.rand(5, 4, dtype=torch.float64)
        keep = torch.rand(5, 2) < 0.7
        layers.append((scores, scores.topk(2, dim=1).indices, keep))
    total, number = 0.0, 0
    for (s1, i1, k1), (s2, i2, k2) in pairwise(layers):
        for token in range(5):
            if not valid[token]:
                continue
            number += 1
            for a in range(2):
                for b in range(2):
                    if k1[token, a] and k2[token, b]:
                        first = s1[token, i1[token, a]] / s1[token].sum()
                        total += float(first * s2[token, i2[token, b]] / s2[token].sum())
    masses = torch.stack([selected_mass(*layer, valid=valid) for layer in layers])
    assert not masses[:, 2].any()
    assert float(layer_coupling_loss(masses, valid=valid)) == pytest.approx(-total / number, 1e-12)


def test_coupling_of_layers_gradient_and_single_layer():
    ids, keep = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[True, True], [True, False]])
    scores = torch.rand(2, 2, 4, dtype=torch.float64, requires_grad=True)

    def loss(scores):
        return layer_coupling_loss(torch.stack([selected_mass(s, ids, keep) for s in scores]))

    assert torch.autograd.gradcheck(loss, scores)
    assert float(layer_coupling_loss(torch.rand(1, 3))) == 0
    assert float(layer_coupling_loss(torch.rand(3, 0))) == 0
    with pytest.raises(ValueError, match="masses must have shape"):
        layer_coupling_loss(torch.rand(3))
    assert math.isclose(float(layer_coupling_loss(torch.ones(2, 3))), -1)
