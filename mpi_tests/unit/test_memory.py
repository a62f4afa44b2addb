"""Error feedback: when residuals change, and who takes over whose."""

from __future__ import annotations

import pytest
import torch

from hvd_compress.memory import ErrorFeedback, share


def test_a_first_gradient_is_compensated_by_nothing():
    gradient = torch.tensor([1.0, 2.0])
    compensated = ErrorFeedback().compensate("w", gradient)
    compensated += 1
    assert gradient.tolist() == [1.0, 2.0]


def test_a_proposal_counts_from_the_commit_on():
    memory = ErrorFeedback()
    memory.propose("w", torch.tensor([0.5, 0.0]))
    assert memory.compensate("w", torch.ones(2)).tolist() == [1.0, 1.0]
    memory.commit()
    assert memory.compensate("w", torch.ones(2)).tolist() == [1.5, 1.0]
    memory.propose("w", torch.tensor([7.0, 7.0]))
    memory.discard()
    memory.commit()
    assert memory.compensate("w", torch.ones(2)).tolist() == [1.5, 1.0]


def test_only_what_was_proposed_changes():
    memory = ErrorFeedback()
    memory.residuals = {"a": torch.ones(1), "b": torch.ones(1)}
    memory.propose("a", torch.zeros(1))
    memory.commit()
    assert {name: residual.item() for name, residual in memory.residuals.items()} == {"a": 0.0, "b": 1.0}


def test_compensation_leaves_the_residual_alone():
    memory = ErrorFeedback()
    memory.residuals["w"] = torch.ones(2)
    memory.compensate("w", torch.ones(2)).zero_()
    assert memory.residuals["w"].tolist() == [1.0, 1.0]


def test_rescaling_reaches_every_residual():
    memory = ErrorFeedback()
    memory.residuals = {"a": torch.tensor([2.0]), "b": torch.tensor([-3.0])}
    memory.rescale(0.5)
    assert {name: residual.item() for name, residual in memory.residuals.items()} == {"a": 1.0, "b": -1.5}


def test_a_state_is_a_copy_both_ways():
    memory = ErrorFeedback()
    memory.residuals["w"] = torch.tensor([1.0])
    state = memory.state_dict()
    memory.rescale(2)
    assert state["w"].item() == 1.0
    memory.load_state_dict(state)
    memory.rescale(2)
    assert state["w"].item() == 1.0


def test_loading_replaces_all_and_drops_proposals():
    memory = ErrorFeedback()
    memory.residuals["old"] = torch.ones(1)
    memory.propose("w", torch.ones(1))
    memory.load_state_dict({"w": torch.tensor([3.0], dtype=torch.float64)})
    memory.commit()
    assert memory.residuals.keys() == {"w"}
    assert memory.residuals["w"].dtype == torch.float32
    assert memory.residuals["w"].item() == 3.0


RESIDUALS = {rank: {"w": torch.tensor([float(2**rank), 1.0]), f"only {rank}": torch.ones(1)} for rank in range(4)}


@pytest.mark.parametrize("resize", ["sum", "reset"])
def test_as_many_ranks_as_before_take_their_own(resize):
    for rank in range(4):
        assert share(RESIDUALS, 4, rank, 4, resize) == RESIDUALS[rank]
    assert share({2: RESIDUALS[2]}, 4, 2, 4, resize) == RESIDUALS[2]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_other_numbers_of_ranks_share_the_same_total(size):
    shares = [share(RESIDUALS, 4, rank, size, "sum") for rank in range(size)]
    for name in ("w", "only 0", "only 3"):
        before = sum(mine[name] for mine in RESIDUALS.values() if name in mine)
        assert torch.allclose(sum(mine[name] for mine in shares), before, rtol=1e-6)
    assert all(mine.keys() == {"w", "only 0", "only 1", "only 2", "only 3"} for mine in shares)


def test_shares_do_not_alias_what_was_saved():
    mine = share({0: {"w": torch.ones(1)}}, 1, 0, 2, "sum")
    mine["w"].zero_()
    assert share({0: {"w": torch.ones(1)}}, 1, 0, 2, "sum")["w"].item() == 0.5


def test_a_reset_needs_nothing_and_gives_nothing():
    assert share({}, 4, 1, 3, "reset") == {}


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (3, 8), (1, 4)])
def test_missing_ranks_are_named(rank, size):
    there = {0: RESIDUALS[0], 2: RESIDUALS[2]}
    with pytest.raises(ValueError, match=rf"ranks \[1, 3\] of 4, needed at rank {rank} of {size}") as caught:
        share(there, 4, rank, size, "sum")
    assert "gather_state_dict" in str(caught.value)
