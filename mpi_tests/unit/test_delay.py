"""delay=1 beside the exchange: snapshots, other numbers of ranks, the last step, and what cannot be late."""

from __future__ import annotations

import pytest
import torch

from hvd_compress import Compression, GradientCompression
from hvd_compress.local import LocalRanks
from hvd_compress.local_steps import LocalSteps

from .test_adaptive import SHAPES, gradients, run


def late(**options: object) -> GradientCompression:
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    return Compression.topk(named, **({"density": 0.02, "delay": 1} | options))


def world(size: int = 3) -> LocalRanks:
    return LocalRanks([late() for _ in range(size)])


def test_a_snapshot_has_what_is_under_way():
    """As an elastic job commits, goes on, and goes back to it."""
    ranks = world()
    run(ranks, range(3))
    snapshots = [compression.snapshot() for compression in ranks.compressions]
    first = run(ranks, range(3, 6))
    for compression, snapshot in zip(ranks.compressions, snapshots):
        compression.settle()
        compression.go_back(snapshot)
    assert run(ranks, range(3, 6)) == first


@pytest.mark.parametrize("size", [2, 4])
def test_another_number_of_ranks_applies_what_was_under_way(size):
    first = world()
    run(first, range(2))
    states = [compression.state_dict() for compression in first.compressions]
    expected = first.exchange(gradients(2))[0]
    compressions = [late() for _ in range(size)]
    for compression in compressions:
        compression.load_state_dict(states)
    resumed = LocalRanks(compressions).exchange(gradients(2, size))
    for result in resumed:
        assert all(torch.equal(result[name], expected[name]) for name in SHAPES)


def test_flush_applies_the_last_gradients_once_and_not_what_is_not_finite():
    ranks, now = world(), LocalRanks([late(delay=0) for _ in range(3)])
    compression = ranks.compressions[0]
    optimizer = torch.optim.SGD(compression.parameters, lr=1.0)
    assert not compression.flush(optimizer)  # nothing was exchanged
    ranks.exchange(gradients(0))
    expected = now.exchange(gradients(0))[0]
    assert compression.flush(optimizer)
    assert all(torch.equal(-p, expected[name]) for name, p in zip(compression.names, compression.parameters))
    assert not compression.flush(optimizer)
    bad = gradients(1)
    bad[1]["a"][3, 3] = float("inf")
    ranks.exchange(bad)
    before = [p.detach().clone() for p in compression.parameters]
    assert not compression.flush(optimizer)
    assert all(map(torch.equal, before, compression.parameters))


def test_without_delay_flush_does_nothing():
    ranks = LocalRanks([late(delay=0) for _ in range(2)])
    ranks.exchange(gradients(0, 2))
    assert not ranks.compressions[0].flush(torch.optim.SGD(ranks.compressions[0].parameters, lr=1.0))


def test_a_single_rank_is_not_late():
    (result,) = world(1).exchange(gradients(0, 1))
    assert torch.equal(result["bias"], gradients(0, 1)[0]["bias"])


@pytest.mark.parametrize("delay", [-1, 2, 0.5])
def test_delays_that_cannot_be(delay):
    with pytest.raises(ValueError, match="delay must be 0 or 1 step"):
        late(delay=delay)


def test_what_cannot_be_late():
    named = [("w", torch.nn.Parameter(torch.zeros(60, 50)))]
    with pytest.raises(ValueError, match="delay=1 is not possible with OneBitCompressor"):
        Compression.onebit(named, momentum=0.9, delay=1)
    compression = Compression.topk(named, delay=1)
    with pytest.raises(ValueError, match="leave out delay=1"):
        LocalSteps(torch.optim.SGD([named[0][1]], lr=0.1), compression)
    sparse = torch.sparse_coo_tensor(torch.tensor([[3]]), torch.ones(1, 50), (60, 50))
    ranks = LocalRanks([Compression.topk(named, delay=1) for _ in range(2)])
    with pytest.raises(ValueError, match="dense gradients alone, and that of 'w' is not"):
        ranks.exchange([{"w": sparse}, {"w": sparse}])


def test_the_off_switch_takes_the_delay_away(monkeypatch):
    monkeypatch.setenv("HVD_COMPRESS_OFF", "1")
    assert late().options.delay == 0
