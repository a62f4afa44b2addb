"""What holds wherever gradients travel in pieces: checks that tests of several topologies share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_compress.local import LocalRanks

from .drive import bits, random

SHAPES = {"a": (40, 50), "b": (300, 70), "tiny": (3, 2), "d": (1000, 100)}
Make = Callable[[], LocalRanks]


def gradients(size: int, step: int = 0) -> list[dict[str, torch.Tensor]]:
    return [{name: random(*shape, seed=100 * step + r) for name, shape in SHAPES.items()} for r in range(size)]


def mean(of_ranks: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    return torch.stack([mine[name].double() for mine in of_ranks]).mean(0)


def size_of(ranks: LocalRanks) -> int:
    return len(ranks.compressions)


def check_that_it_travels(make: Callable[[int], LocalRanks]) -> None:
    """By a topology; `make` takes a number of ranks."""
    for size in (2, 6):
        check_that_all_get_the_same(make(size), None)
    check_that_what_is_not_finite_changes_nothing(lambda: make(4), float("nan"), 7)
    check_that_order_and_absence_do_not_matter(lambda: make(4))
    check_that_a_checkpoint_goes_on(lambda: make(4))


def check_that_all_get_the_same(ranks: LocalRanks, largest_error: float | None) -> None:
    """Bits, and near the mean where there is a limit of the relative error."""
    for step in range(2):
        known = gradients(size_of(ranks), step)
        results = ranks.exchange(known)
        for name, shape in SHAPES.items():
            assert all(bits(result[name]) == bits(results[0][name]) for result in results)
            assert results[0][name].shape == shape
    if largest_error is not None:
        for name in SHAPES:
            error = (results[0][name] - mean(known, name)).norm() / mean(known, name).norm()
            assert error < largest_error


def check_that_what_is_not_finite_changes_nothing(make: Make, value: float, place: int) -> None:
    """It shows on all ranks."""
    ranks, twins = make(), make()
    size = size_of(ranks)
    for together in (ranks, twins):
        together.exchange(gradients(size))
    spoilt = gradients(size, 1)
    spoilt[1]["d"].view(-1)[place] = value
    results = ranks.exchange(spoilt)
    assert not any(bool(result["d"].isfinite().any()) for result in results)
    assert all(bool(result[name].isfinite().all()) for result in results for name in ("a", "b", "tiny"))
    twins.exchange(gradients(size, 1))
    for together in (ranks, twins):
        for compression in together.compressions:
            compression.discard()
    states = [[c.state_dict()["residuals"] for c in together.compressions] for together in (ranks, twins)]
    assert repr(states[0]) == repr(states[1])
    results, expected = ranks.exchange(gradients(size, 2))[0], twins.exchange(gradients(size, 2))[0]
    assert all(bits(results[name]) == bits(expected[name]) for name in SHAPES)


def check_that_order_and_absence_do_not_matter(make: Make) -> None:
    ranks, twins = make(), make()
    for step in range(3):
        known = [{name: mine[name] for name in list(SHAPES)[step != 1 :]} for mine in gradients(size_of(ranks), step)]
        shuffled = [dict(list(mine.items())[:: (-1) ** rank]) for rank, mine in enumerate(known)]
        one, other = twins.exchange(known)[0], ranks.exchange(shuffled)[0]
        assert one.keys() == other.keys()
        assert all(bits(one[name]) == bits(other[name]) for name in one)


def check_that_what_is_owed_follows_the_loss_scale(make: Make) -> None:
    plain, scaled = make(), make()
    for step in range(4):
        scale = 2.0 ** (10 + step)
        for compression in scaled.compressions:
            compression.loss_scale = scale
        known = gradients(size_of(plain), step)
        expected = plain.exchange(known)[0]
        found = scaled.exchange([{n: g * scale for n, g in mine.items()} for mine in known])[0]
        for name in SHAPES:
            assert torch.equal(found[name] / scale, expected[name])


def check_that_a_checkpoint_goes_on(make: Make) -> list[dict[str, torch.Tensor]]:
    """To the bit. Returns the residuals of every rank in the checkpoint."""
    ranks, resumed = make(), make()
    size = size_of(ranks)
    for step in range(3):
        ranks.exchange(gradients(size, step))
    states = [compression.state_dict() for compression in ranks.compressions]
    for compression, state in zip(resumed.compressions, states):
        compression.load_state_dict(state)
    for step in range(3, 6):
        one, other = ranks.exchange(gradients(size, step))[0], resumed.exchange(gradients(size, step))[0]
        assert all(bits(one[name]) == bits(other[name]) for name in SHAPES)
    return [state["residuals"][rank] for rank, state in enumerate(states)]
