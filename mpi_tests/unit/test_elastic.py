"""What a worker of an elastic job goes back to, and on with: with simulated ranks in place of workers."""

from __future__ import annotations

import logging

import pytest
import torch

from hvd_compress import Compression, GradientCompression
from hvd_compress.elastic import Keeper
from hvd_compress.local import LocalRanks

from .drive import bits, random
from .every import VARIANTS

SHAPES = {"a": (40, 60), "b": (30, 50), "bias": (7,)}


def ranks_of(method: str, size: int = 2) -> LocalRanks:
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    return LocalRanks([VARIANTS[method](named, min_numel=100) for _ in range(size)])


def run(ranks: LocalRanks, steps: range, scales: dict[int, float] | None = None) -> list[dict[str, bytes]]:
    """Each step's result, without the loss scale that it had, a power of two."""
    results = []
    for step in steps:
        scale = (scales or {}).get(step, 1.0)
        mine = []
        for rank, compression in enumerate(ranks.compressions):
            if scales:
                compression.loss_scale = scale
            of_rank = {n: random(*s, seed=100 * step + 10 * rank + i) for i, (n, s) in enumerate(SHAPES.items())}
            mine.append({name: scale * gradient for name, gradient in of_rank.items()})
        (first, *_) = ranks.exchange(mine)
        results.append({name: bits(total / scale) for name, total in first.items()})
    return results


def state_of(compression: GradientCompression) -> list[object]:
    snapshot = compression.snapshot()
    return [snapshot["progress"]] + [
        {name: bits(tensor) for name, tensor in snapshot[kind].items()} for kind in ("residuals", "accumulated")
    ]


def restart(compressions: list[GradientCompression], keepers: list[Keeper]) -> LocalRanks:
    """As of an elastic job that has lost a worker: all go back, then on together, as rank 0 has it."""
    for compression, keeper in zip(compressions, keepers):
        keeper.restore(compression)
    root = compressions[0].progress
    for compression, keeper in zip(compressions, keepers):
        keeper.sync(compression, lambda _: root, len(compressions))
    return LocalRanks(compressions)


GROWN = {step: 2.0 ** (10 if step < 4 else 11 if step < 6 else 13) for step in range(20)}


@pytest.mark.parametrize("scales", [None, GROWN], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("committed", [2, 3, 5])
@pytest.mark.parametrize("method", VARIANTS)
def test_going_back_undoes_all_that_was_done_since(method, committed, scales):
    """The loss scale grows after the commit, and adaptive methods decide: at step 4 for L-GreCo and Accordion."""
    ranks = ranks_of(method)
    run(ranks, range(committed), scales)
    keepers = [Keeper(compression) for compression in ranks.compressions]
    before = [state_of(compression) for compression in ranks.compressions]
    uninterrupted = run(ranks, range(committed, 10), scales)
    after = [state_of(compression) for compression in ranks.compressions]
    ranks = restart(ranks.compressions, keepers)
    assert [state_of(compression) for compression in ranks.compressions] == before
    assert run(ranks, range(committed, 10), scales) == uninterrupted
    assert [state_of(compression) for compression in ranks.compressions] == after


def test_what_was_committed_can_be_gone_back_to_more_than_once():
    ranks = ranks_of("topk")
    run(ranks, range(3))
    keepers = [Keeper(compression) for compression in ranks.compressions]
    first = run(ranks, range(3, 5))
    for _ in range(2):
        ranks = restart(ranks.compressions, keepers)
        assert run(ranks, range(3, 5)) == first


def test_a_new_worker_takes_over_what_all_ranks_have_in_common():
    ranks = ranks_of("lgreco")
    run(ranks, range(6), GROWN)
    old, new = ranks.compressions, ranks_of("lgreco", 1).compressions[0]
    root = old[0].progress
    assert root[2]["number"] == 1
    keepers = [Keeper(compression) for compression in [*old, new]]
    for compression, keeper in zip([*old, new], keepers):
        compression.detach()
        keeper.sync(compression, lambda _: root, 3)
    assert [compression.progress for compression in [*old, new]] == [root] * 3
    assert [slot.rate for slot in new.slots] == [slot.rate for slot in old[0].slots]
    assert new.memory.residuals == {}
    together = LocalRanks([*old, new])
    run(together, range(6, 10), GROWN)
    assert len({str(compression.progress) for compression in together.compressions}) == 1


def test_residuals_are_in_units_of_the_loss_scale_that_all_go_on_with():
    """A worker may have changed its scale before rank 0 did."""
    ranks = ranks_of("dgc")
    run(ranks, range(3), GROWN)
    (root, other) = ranks.compressions
    other.settle()
    before = {name: residual.clone() for name, residual in other.memory.residuals.items()}
    other.loss_scale = 4096.0
    Keeper(other).sync(other, lambda _: root.progress, 2)
    assert other.loss_scale == root.loss_scale == 1024.0
    assert all(torch.equal(other.memory.residuals[name], residual) for name, residual in before.items())


def test_a_checkpoint_that_waits_for_the_first_exchange_is_not_lost():
    first = ranks_of("topk")
    run(first, range(3))
    states = [compression.state_dict() for compression in first.compressions]
    resumed = [ranks_of("topk", 1).compressions[0] for _ in range(2)]
    for compression, state in zip(resumed, states):
        compression.detach()
        compression.load_state_dict(state)
    keepers = [Keeper(compression) for compression in resumed]
    ranks = LocalRanks(resumed)
    expected = run(ranks, range(3, 5))
    assert run(restart(resumed, keepers), range(3, 5)) == expected
    assert run(first, range(3, 5)) == expected


def test_a_worker_that_may_be_left_without_momentum_says_so(monkeypatch, caplog):
    named = [("a", torch.zeros(40, 60))]
    for elastic, method, size, says in (
        ("", Compression.dgc, 1, True),
        ("1", Compression.dgc, 1, False),  # Horovod hands such workers their gradients
        ("", Compression.dgc, 2, False),
        ("", Compression.topk, 1, False),
    ):
        monkeypatch.setenv("HOROVOD_ELASTIC", elastic)
        caplog.clear()
        compression = method(named)
        with caplog.at_level(logging.WARNING):
            Keeper(compression).sync(compression, lambda value: value, size)
        assert [("momentum" in r.getMessage() and "--min-np" in r.getMessage()) for r in caplog.records] == [
            True
        ] * says
        compression.unregister()
