"""Predicted weights: SpecTrain's rule for SGD and Adam, and the weights as they were afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hvd_compress.training import NovoGrad, predicted_weights


def trained(make, steps: int = 3) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = make([weights])
    for step in range(steps):
        weights.grad = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return weights, optimizer


def test_worked_example():
    """Momentum 0.9 and rate 0.5: after a gradient of 2 the velocity is 2, and 0.9 goes to 0; the next step without a
    gradient would go on by 0.5 * 0.9 * 2."""
    weights = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weights], lr=0.5, momentum=0.9)
    weights.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()
    assert weights.item() == 0.0
    with predicted_weights(optimizer):
        assert weights.item() == pytest.approx(-0.9, abs=1e-15)
    assert weights.item() == 0.0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 1.0 - 1e-15)),  # whose second moment hardly changes
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 1.0 - 1e-15), weight_decay=0.0),
    ],
)
def test_it_is_where_a_step_without_a_gradient_leads(make):
    """For Adam's second moment, which is corrected by the number of steps, within what that makes of it."""
    weights, optimizer = trained(make)
    before = weights.detach().clone()
    with predicted_weights(optimizer):
        predicted = weights.detach().clone()
    assert torch.equal(weights, before)
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    tolerance = 0.0 if isinstance(optimizer, torch.optim.SGD) else 0.25  # sqrt(4 / 3) - 1 is 0.15
    torch.testing.assert_close(predicted - before, weights.detach() - before, rtol=tolerance + 1e-12, atol=0)
    assert (predicted - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_moves_without_a_momentum(make, steps):
    weights, optimizer = trained(make, steps)
    before = weights.detach().clone()
    with predicted_weights(optimizer):
        moved = not torch.equal(weights, before)
    assert moved == (steps > 0 and optimizer.defaults["momentum"] > 0)


def test_gradients_are_of_the_predicted_weights_and_errors_leave_the_others():
    weights, optimizer = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    before = weights.detach().clone()
    optimizer.zero_grad()
    predicted = []

    def fail() -> None:
        with predicted_weights(optimizer):
            predicted.append(weights.detach().clone())
            weights.square().sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(weights.grad, 2 * predicted[0])
    assert torch.equal(weights, before)


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adagrad(p), lambda p: NovoGrad(p, 0.1)])
def test_what_cannot_be_predicted_is_refused(make):
    weights, optimizer = trained(make)
    with pytest.raises(ValueError, match="cannot be told from its state"), predicted_weights(optimizer):
        pass
