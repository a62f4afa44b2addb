"""NovoGrad against its formulas, worked out by hand and in exact arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from hvd_compress import Compression
from hvd_compress.local import LocalRanks
from hvd_compress.training import NovoGrad

# |g|^2 is 25, 100, 2500; with second = 0.75 v is 25, 43.75, 657.8125.
GRADIENTS = [(3.0, 4.0), (-6.0, 8.0), (0.0, 50.0)]


def train(weights, gradients=GRADIENTS, **options):
    weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
    optimizer = NovoGrad([weight], **options)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_a_worked_example():
    """Weights (1, -2), lr 0.1, first 0.5, second 0.75, decay 0.01, an eps that does not show."""
    weight, state = train((1.0, -2.0), lr=0.1, betas=(0.5, 0.75), eps=1e-300, weight_decay=0.01)
    assert state["exp_avg_sq"].item() == 657.8125
    # m1 = (0.6, 0.8) + 0.01 (1, -2) = (0.61, 0.78); w1 = (0.939, -2.078)
    # m2 = (0.305, 0.39) + (-6, 8) / sqrt(43.75) + 0.01 w1; w2 = w1 - 0.1 m2; and so on.
    second = (0.305 - 6 / math.sqrt(43.75) + 0.00939, 0.39 + 8 / math.sqrt(43.75) - 0.02078)
    after_two = (0.939 - 0.1 * second[0], -2.078 - 0.1 * second[1])
    third = (0.5 * second[0] + 0.01 * after_two[0], 0.5 * second[1] + 50 / math.sqrt(657.8125) + 0.01 * after_two[1])
    expected = [after_two[0] - 0.1 * third[0], after_two[1] - 0.1 * third[1]]
    torch.testing.assert_close(weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


def test_averaging_takes_a_share_of_what_is_added():
    plain, _ = train((1.0, -2.0), GRADIENTS[:1], lr=0.1, betas=(0.75, 0.5), eps=1e-300)
    averaged, _ = train((1.0, -2.0), GRADIENTS[:1], lr=0.1, betas=(0.75, 0.5), eps=1e-300, grad_averaging=True)
    start = torch.tensor((1.0, -2.0), dtype=torch.float64)
    torch.testing.assert_close(start - averaged, (start - plain) / 4, rtol=1e-12, atol=0)


def test_steps_do_not_depend_on_the_scale_of_gradients():
    """As those of Adam: a loss that is a thousand times larger trains alike."""
    large = [tuple(1024 * element for element in gradient) for gradient in GRADIENTS]
    assert torch.equal(train((1.0, -2.0), eps=1e-300)[0], train((1.0, -2.0), large, eps=1e-300)[0])


def test_no_gradient_moves_nothing():
    weight, state = train((1.0, -2.0), [(0.0, 0.0)])
    assert weight.tolist() == [1.0, -2.0]
    assert state["exp_avg"].tolist() == [0.0, 0.0]


def test_a_checkpoint_goes_on_to_the_bit():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = NovoGrad(model.parameters(), weight_decay=0.01)
    batches = torch.randn(6, 4, 6)

    def steps(model, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    steps(model, optimizer, batches[:3])
    again = copy.deepcopy(model)
    resumed = NovoGrad(again.parameters(), weight_decay=0.5)  # the state's comes instead
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, batches[3:])
    steps(again, resumed, batches[3:])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_it_learns_from_one_element_in_twenty():
    """A linear regression, by top-k with error feedback on two ranks, as well as by whole gradients."""
    torch.manual_seed(1)
    inputs, wanted = torch.randn(256, 64), torch.randn(64, 64) / 8
    losses = []
    for make in (lambda named: Compression.none(named), lambda named: Compression.topk(named, density=0.05)):
        model = nn.Linear(64, 64, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = NovoGrad(model.parameters(), lr=0.02, betas=(0.9, 0.98))
        ranks = LocalRanks([make(list(model.named_parameters())) for _ in range(2)])
        for _ in range(300):
            gradients = []
            for half in inputs.split(128):
                model.zero_grad()
                (model(half) - half @ wanted).square().mean().backward()
                gradients.append({"weight": model.weight.grad.clone()})
            model.weight.grad = ranks.exchange(gradients)[0]["weight"]
            optimizer.step()
        losses.append((model(inputs) - inputs @ wanted).square().mean().item())
    start = (inputs @ wanted).square().mean().item()
    assert max(losses) < 0.05 * start


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr must not be negative"),
        ({"betas": (1.0, 0.9)}, "betas must be in"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_options_that_cannot_work_are_errors(options, says):
    with pytest.raises(ValueError, match=says):
        NovoGrad([nn.Parameter(torch.zeros(2))], **options)


def test_sparse_gradients_are_refused_with_the_remedy():
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        NovoGrad(embedding.parameters()).step()
