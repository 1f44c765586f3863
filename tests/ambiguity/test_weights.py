import pytest
import torch
from torch.autograd import gradcheck

from drgr.ambiguity import effective_number, is_near_one_hot


def test_effective_number_of_uniform_and_one_hot_weights():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    assert effective_number(weights).tolist() == [4.0, 1.0, 2.0]


def test_effective_number_is_differentiable():
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(effective_number, (weights,))


def test_alarm_below_the_threshold():
    weights = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    assert is_near_one_hot(weights).tolist() == [True, False]
    assert is_near_one_hot(weights, threshold=1.2).tolist() == [False, False]
    assert is_near_one_hot(weights, threshold=2.5).tolist() == [True, True]


def test_a_single_atom_is_no_alarm():
    assert not is_near_one_hot(torch.ones(1))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"weights must have shape \(..., n\), got a scalar"):
        effective_number(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"threshold must be above 1, got 0.5"):
        is_near_one_hot(torch.ones(2) / 2, threshold=0.5)
    with pytest.raises(ValueError, match="threshold must be a finite number above 0, got nan"):
        is_near_one_hot(torch.ones(2) / 2, threshold=float("nan"))
