"""FracTrain's progressive precision: the published rule, the same rates on all ranks, and what outlives a run."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress import Compression, GradientCompression
from hvd_compress.activations import CompressedActivations
from hvd_compress.adaptive import FracTrain
from hvd_compress.local import LocalRanks

from .test_adaptive import base, gradients, rates

# Mean losses of epochs. By hand: the scale is the mean of all up to the tenth; the window is five.
LOSSES = [2.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.01, 1.0, 1.0, 1.0, 1.0, 0.99, 0.99, 0.99, 0.985, 0.98, 0.98, 0.98]


def test_worked_example():
    """At epoch 7 the loss of epoch 3 differs by 0.1, and 0.05 of the scale, 1.235, is 0.0618; at epoch 8 the largest
    difference is 0.05, and the scale 1.2089: within 0.0604. Then the threshold is 0.015, of a scale of 1.188 0.0178:
    epochs 9 to 13, 1.0 to 0.99, differ by 0.01. Then it is 0.0045, hence 0.0053: epochs 14 to 17 are too few."""
    policy = FracTrain()
    scale = sum(LOSSES[:8]) / 8
    assert scale == pytest.approx(1.235, abs=1e-12)
    assert abs(LOSSES[7] - LOSSES[3]) > 0.05 * scale
    assert policy.turning_points(LOSSES[:8]) == []
    assert policy.turning_points(LOSSES) == [8, 13]
    assert policy.turning_points([*LOSSES, 0.98]) == [8, 13, 18]
    assert policy.turning_points([*LOSSES, 0.98] + [0.98] * 40) == [8, 13, 18]  # there are no more rates


def test_the_threshold_itself_is_within_it():
    policy = FracTrain(rates=(1.0, 2.0), threshold=0.25, window=2)
    assert policy.turning_points([5.0, 3.0]) == []  # the scale is 4, and they differ by 2
    assert policy.turning_points([4.5, 3.5]) == [1]  # by 1, a quarter of it


def test_activations_may_go_along():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
    compression = Compression.fractrain(
        Compression.qsgd(model.named_parameters()), (2, 4, 8), interval=4, threshold=0.5, window=2
    )
    ranks = LocalRanks([compression])
    ratios = []
    with CompressedActivations(model, lambda: max(compression.rates.values())) as activations:
        for _ in range(20):
            model.zero_grad()
            loss = model(torch.ones(64, 64)).square().mean()
            loss.backward()
            compression.record_loss(1.0)
            ranks.exchange([{name: p.grad for name, p in model.named_parameters()}])
            ratios.append(activations.saved.ratio)
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) == 3
    assert set(compression.rates.values()) == {8.0}
    assert Compression.qsgd(model.named_parameters()).rates == {}


def adapted(interval: int = 4, **options: object) -> GradientCompression:
    return Compression.fractrain(base("qsgd"), (2, 4, 8), interval=interval, threshold=0.5, window=2, **options)


def run(ranks: LocalRanks, steps: range, loss: float = 1.0) -> None:
    """Ranks have losses around `loss`."""
    size = len(ranks.compressions)
    for step in steps:
        for rank, compression in enumerate(ranks.compressions):
            compression.record_loss(torch.tensor(loss + rank - (size - 1) / 2))
        ranks.exchange(gradients(step, size))


def test_all_ranks_go_on_to_more_bits_when_their_mean_loss_stalls(tmp_path):
    ranks = LocalRanks([adapted(log=tmp_path / "plans.jsonl") for _ in range(3)])
    assert rates(ranks) == [2.0, 2.0, None, 2.0]
    run(ranks, range(5), loss=8.0)  # decided in step 4, by the losses of five steps
    assert rates(ranks) == [2.0, 2.0, None, 2.0]
    run(ranks, range(5, 9), loss=1.0)
    assert rates(ranks) == [2.0, 2.0, None, 2.0]
    run(ranks, range(9, 13), loss=1.0)
    assert rates(ranks) == [4.0, 4.0, None, 4.0]
    run(ranks, range(13, 17), loss=1.0)  # the first of two intervals anew
    assert rates(ranks) == [4.0, 4.0, None, 4.0]
    run(ranks, range(17, 21), loss=1.0)
    assert rates(ranks) == [8.0, 8.0, None, 8.0]
    states = [compression.state_dict()["adaptive"]["losses"] for compression in ranks.compressions]
    assert states == [[8.0, 1.0, 1.0, 1.0, 1.0]] * 3
    replayed = LocalRanks([adapted(plan=tmp_path / "plans.jsonl") for _ in range(2)])
    run(replayed, range(13))
    assert rates(replayed) == [4.0, 4.0, None, 4.0]


def test_losses_that_are_not_finite_are_left_out():
    ranks = LocalRanks([adapted() for _ in range(2)])
    for loss in (math.inf, math.nan, 3.0):
        ranks.compressions[0].record_loss(loss)
    run(ranks, range(4), loss=3.0)
    ranks.exchange(gradients(4, 2))
    rates(ranks)
    assert ranks.compressions[1].controller._losses == [3.0]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_resumes_in_the_midst_of_an_interval(size):
    """With what was told so far, also at the step of a decision, and at another number of ranks."""
    ranks = LocalRanks([adapted() for _ in range(2)])
    run(ranks, range(5), loss=1.0)
    run(ranks, range(5, 8), loss=1.0)
    states = [compression.state_dict() for compression in ranks.compressions]
    resumed = LocalRanks([adapted() for _ in range(size)])
    for compression in resumed.compressions:
        compression.load_state_dict(states)
    resumed.exchange(gradients(8, size))  # without a loss
    assert rates(resumed) == [4.0, 4.0, None, 4.0]


def test_without_any_loss_there_is_an_error_on_every_rank():
    ranks = LocalRanks([adapted() for _ in range(2)])
    run(ranks, range(4))
    for compression in ranks.compressions:
        compression.controller.accumulated.clear()
    with pytest.raises(ValueError, match=r"call compression.record_loss\(loss\) in every step"):
        ranks.exchange(gradients(4, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": (4,)}, "two or more positive numbers"),
        ({"rates": (4, 0)}, "two or more positive numbers"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"decay": 1.5}, "decay positive and at most 1"),
        ({"window": 1}, "window must be at least 2"),
        ({"interval": 0}, "interval must be"),
        ({"rates": (4, 40)}, "bits"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        Compression.fractrain(base("qsgd"), **options)


def test_others_take_a_loss_and_do_nothing_with_it():
    compression = base("qsgd")
    compression.record_loss(1.0)
    assert compression.controller is None
    adaptive = Compression.accordion(base("qsgd"), 8, 2)
    adaptive.record_loss(1.0)
    assert adaptive.controller is not None
    assert not adaptive.controller.accumulated
