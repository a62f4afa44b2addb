"""Sessions: when a step ends, what outlives it, and in which units."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hvd_compress import Compression, GradientCompression
from hvd_compress.compressors import TopKCompressor
from hvd_compress.local import LocalRanks
from hvd_compress.transports.local import LocalWorld

from .drive import STATEFUL, bits, bound, random

SHAPES = {"a": (30, 40), "b": (20, 50), "bias": (30,)}
TOPK = TopKCompressor(density=0.05)


def world(size: int = 2, compressor=TOPK, **options: Any) -> LocalRanks:
    return LocalRanks([bound(compressor, SHAPES, **options) for _ in range(size)])


def gradients(step: int, size: int = 2, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    return [
        {
            name: random(*shape, seed=100 * step + 10 * rank + i, scale=scale)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for rank in range(size)
    ]


def residuals(compression: GradientCompression) -> dict[str, bytes]:
    return {name: bits(residual) for name, residual in compression.memory.residuals.items()}


def test_residuals_change_when_the_next_step_begins():
    ranks = world()
    ranks.exchange(gradients(0))
    assert [residuals(c) for c in ranks.compressions] == [{}, {}]
    ranks.exchange(gradients(1))
    assert all(residuals(c).keys() == {"a", "b"} for c in ranks.compressions)
    assert ranks.compressions[0].progress == (2, None)


def test_a_step_ends_once():
    (compression,) = (ranks := world(1)).compressions
    ranks.exchange(gradients(0, 1))
    compression.settle()
    before = residuals(compression)
    compression.settle()
    assert residuals(compression) == before
    assert compression.progress == (1, None)
    assert compression.telemetry.steps == 1


@pytest.mark.parametrize("where", ["a", "b", "bias"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_of_a_step_that_is_not_finite_everywhere_nothing_stays(where, culprit):
    """Be it in a tensor that is compressed or in one that is not."""
    ranks = world()
    ranks.exchange(gradients(0))
    before = [c.progress and residuals(c) for c in ranks.compressions]
    spoilt = gradients(1)
    spoilt[culprit][where].view(-1)[3] = math.inf
    ranks.exchange(spoilt)
    for compression, residual in zip(ranks.compressions, before):
        compression.settle()
        assert residuals(compression) == residual
    assert [c.progress[0] for c in ranks.compressions] == [2, 2]


def test_a_later_step_goes_on_as_if_the_bad_one_had_not_been():
    good, bad = world(), world()
    for step in range(3):
        good.exchange(gradients(step))
        bad.exchange(gradients(step))
        if step == 1:
            spoilt = gradients(50)
            spoilt[1]["b"][0, 0] = math.nan
            bad.exchange(spoilt)
    for one, other in zip(good.compressions, bad.compressions):
        one.settle()
        other.settle()
        assert residuals(one) == residuals(other)


@pytest.mark.parametrize("compressor", STATEFUL.values(), ids=STATEFUL)
def test_a_loss_scale_changes_units_and_nothing_else(compressor):
    plain, scaled = world(2, compressor), world(2, compressor)
    for step, scale in enumerate((1024.0, 1024.0, 2048.0, 512.0)):
        for compression in scaled.compressions:
            compression.loss_scale = scale
        expected = plain.exchange(gradients(step))
        found = scaled.exchange(gradients(step, scale=scale))
        for one, other in zip(expected, found):
            for name in SHAPES:
                assert torch.equal(one[name] * scale, other[name])


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan])
def test_impossible_loss_scales_are_refused(scale):
    (compression,) = world(1).compressions
    with pytest.raises(ValueError, match="loss_scale must be positive and finite"):
        compression.loss_scale = scale
    assert compression.loss_scale is None


def test_the_first_loss_scale_rescales_nothing():
    (compression,) = world(1).compressions
    compression.memory.residuals["a"] = torch.ones(1200)
    compression.loss_scale = 1024.0
    assert compression.memory.residuals["a"][0].item() == 1.0


def saved(size: int, steps: int = 3, scale: float | None = None) -> tuple[LocalRanks, list[dict[str, Any]]]:
    ranks = world(size)
    for step in range(steps):
        for compression in ranks.compressions:
            if scale:
                compression.loss_scale = scale
        ranks.exchange(gradients(step, size))
    return ranks, [compression.state_dict() for compression in ranks.compressions]


def merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    return states[0] | {"residuals": {rank: state["residuals"][rank] for rank, state in enumerate(states)}}


@pytest.mark.parametrize("attached", [True, False])
def test_a_run_goes_on_where_it_was_saved(attached):
    ranks, states = saved(2)
    compressions = [bound(TOPK, SHAPES) for _ in range(2)]
    resumed = LocalRanks(compressions) if attached else None
    for compression, state in zip(compressions, states):
        compression.load_state_dict(state)
    resumed = resumed or LocalRanks(compressions)
    for step in (3, 4):
        for one, other in zip(ranks.exchange(gradients(step)), resumed.exchange(gradients(step))):
            assert {n: bits(t) for n, t in one.items()} == {n: bits(t) for n, t in other.items()}
    assert [c.progress for c in compressions] == [c.progress for c in ranks.compressions]


def test_a_state_survives_a_file(tmp_path):
    _, states = saved(2, scale=64.0)
    torch.save(merged(states), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert (state["step"], state["loss_scale"], state["size"]) == (3, 64.0, 2)
    compressions = [bound(TOPK, SHAPES) for _ in range(2)]
    for compression in compressions:
        compression.load_state_dict(state)
    LocalRanks(compressions)
    for compression, mine in zip(compressions, states):
        assert residuals(compression) == {n: bits(r) for n, r in mine["residuals"][compression.rank].items()}


def test_a_state_that_waits_for_its_ranks_is_not_lost():
    _, states = saved(2)
    (compression, _) = [bound(TOPK, SHAPES) for _ in range(2)]
    compression.load_state_dict(merged(states))
    again = compression.state_dict()
    assert again.keys() == states[0].keys()
    assert (again["step"], again["size"], again["residuals"].keys()) == (3, 2, {0, 1})
    assert torch.equal(again["residuals"][1]["a"], states[1]["residuals"][1]["a"])
    assert compression.progress[0] == 3


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_loaded_state_follows_a_change_of_the_loss_scale(attach_first):
    """Scalers change their scale after the step: what is set next differs from what was saved."""
    _, states = saved(2, scale=1024.0)
    compressions = [bound(TOPK, SHAPES) for _ in range(2)]
    if attach_first:
        LocalRanks(compressions)
    for compression, state in zip(compressions, states):
        compression.load_state_dict(state)
        compression.loss_scale = 2048.0
    if not attach_first:
        LocalRanks(compressions)
    for compression, state in zip(compressions, states):
        assert compression.loss_scale == 2048.0
        for name, residual in state["residuals"][compression.rank].items():
            assert torch.equal(compression.memory.residuals[name], 2 * residual)


def test_a_waiting_state_that_is_saved_again_keeps_its_units():
    _, states = saved(1, scale=1024.0)
    compression = bound(TOPK, SHAPES)
    compression.load_state_dict(states[0])
    compression.loss_scale = 4096.0
    again = compression.state_dict()
    last = bound(TOPK, SHAPES)
    last.load_state_dict(again)
    last.loss_scale = 1024.0
    LocalRanks([last])
    for name, residual in states[0]["residuals"][0].items():
        assert torch.equal(last.memory.residuals[name], residual)


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_takes_over_the_whole(size):
    _, states = saved(2)
    compressions = [bound(TOPK, SHAPES) for _ in range(size)]
    LocalRanks(compressions)
    for compression in compressions:
        compression.load_state_dict(merged(states))
    for name in ("a", "b"):
        before = sum(state["residuals"][rank][name] for rank, state in enumerate(states))
        after = sum(compression.memory.residuals[name] for compression in compressions)
        assert torch.allclose(after, before, rtol=1e-5, atol=1e-6)


def test_a_reset_says_that_residuals_are_dropped(caplog):
    _, states = saved(2)
    compressions = [bound(TOPK, SHAPES) for _ in range(3)]
    LocalRanks(compressions)
    for compression in compressions:
        compression.load_state_dict(merged(states), resize="reset")
        assert compression.memory.residuals == {}
        assert compression.progress[0] == 3
    assert [record.getMessage() for record in caplog.records] == [
        "residuals of 2 ranks are dropped at 3, as resize='reset' asks"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residuals": {0: {"a": torch.zeros(7)}}}, "7 elements for 'a'.*1200"),
        ({"residuals": {0: {"other": torch.zeros(7)}}}, "'other'.*no such name"),
        ({"residuals": {0: {}, 1: {"b": torch.zeros(1)}}}, "1 elements for 'b'"),
        ({"size": 3}, r"lacks the residuals of ranks \[1, 2\] of 3"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    ranks, states = saved(2)
    compression = ranks.compressions[0]
    before = residuals(compression), compression.progress
    with pytest.raises(ValueError, match=message):
        compression.load_state_dict(states[0] | {"step": 77} | change)
    assert (residuals(compression), compression.progress) == before
    assert compression.state_dict()["step"] == 3


def test_what_is_missing_is_found_at_the_first_exchange():
    _, states = saved(2)
    compressions = [bound(TOPK, SHAPES) for _ in range(3)]
    for compression in compressions:
        compression.load_state_dict(states[0])
    with pytest.raises(ValueError, match=r"lacks the residuals of ranks \[1\] of 2"):
        LocalRanks(compressions)


def test_an_attach_that_fails_leaves_nothing_attached():
    _, states = saved(2)
    compression = bound(TOPK, SHAPES)
    compression.load_state_dict(states[0])
    with pytest.raises(ValueError, match="lacks the residuals"):
        compression.attach(LocalWorld(3).transports[0])
    with pytest.raises(AssertionError, match="attach first"):
        compression.submit(0, torch.zeros(30, 40))
    compression.load_state_dict(states[0], resize="reset")  # the way out that the message names
    compression.attach(LocalWorld(3).transports[0])
    assert compression.state_dict()["size"] == 3


@pytest.mark.parametrize("resize", ["", "mean", None])
def test_other_ways_to_resize_are_refused(resize):
    _, states = saved(1)
    with pytest.raises(ValueError, match="resize must be 'sum' or 'reset'"):
        bound(TOPK, SHAPES).load_state_dict(states[0], resize=resize)


def test_a_state_of_what_is_not_bound_says_so():
    _, states = saved(1)
    with pytest.raises(ValueError, match="named_parameters"):
        Compression.bf16.load_state_dict(states[0])


def test_a_detached_session_keeps_residuals_step_and_counts():
    ranks = world(2)
    for step in range(2):
        ranks.exchange(gradients(step))
    (compression, other) = ranks.compressions
    compression.settle()
    other.settle()
    before = residuals(compression), compression.telemetry.total.sent_bytes
    ranks.exchange(gradients(2))  # under way: is dropped
    compression.detach()
    compression.settle()
    assert residuals(compression) == before[0]
    assert compression.progress[0] == 2
    assert compression.telemetry.total.sent_bytes > before[1]
    LocalRanks([compression]).exchange(gradients(3, 1))


def test_what_is_not_handed_in_keeps_its_residual():
    ranks = world(1)
    ranks.exchange(gradients(0, 1))
    compression = ranks.compressions[0]
    compression.settle()
    before = residuals(compression)
    ranks.exchange([{"a": gradients(1, 1)[0]["a"]}])
    compression.settle()
    assert residuals(compression)["b"] == before["b"]
    assert residuals(compression)["a"] != before["a"]


def test_sparse_gradients_pass_uncompressed_beside_others():
    ranks = LocalRanks([bound(TOPK, {"embedding": (50, 8), "w": (30, 40)}) for _ in range(2)])
    sparse = [
        torch.sparse_coo_tensor([[rank, 7]], random(2, 8, seed=rank), (50, 8), check_invariants=True)
        for rank in range(2)
    ]
    results = ranks.exchange(
        [{"embedding": sparse[rank], "w": random(30, 40, seed=rank)} for rank in range(2)], average=True
    )
    exact = (sparse[0].to_dense() + sparse[1].to_dense()) / 2
    for result in results:
        assert result["embedding"].is_sparse
        assert torch.equal(result["embedding"].to_dense(), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_results_have_the_type_and_shape_of_the_gradients(dtype):
    ranks = world(2)
    mine = [{name: gradient.to(dtype) for name, gradient in of_rank.items()} for of_rank in gradients(0)]
    for result in ranks.exchange(mine):
        for name, shape in SHAPES.items():
            assert (result[name].dtype, result[name].shape) == (dtype, torch.Size(shape))


def test_gradients_of_another_number_of_ranks_are_refused():
    with pytest.raises(ValueError, match="gradients of 3 ranks for 2 compressions"):
        world(2).exchange(gradients(0, 3))


def test_gathered_states_hold_every_rank():
    ranks = world(1)
    ranks.exchange(gradients(0, 1))
    compression = ranks.compressions[0]
    state = compression.gather_state_dict()
    assert state["residuals"].keys() == {0}
    assert state["step"] == 1


def test_a_state_taken_between_synchronizing_and_the_step_is_that_before_the_step():
    (compression,) = (ranks := world(1)).compressions
    for step in range(2):
        ranks.exchange(gradients(step, 1))
        compression.step_made()
    assert compression.state_dict()["step"] == 2
    before = residuals(compression)
    ranks.exchange(gradients(2, 1))
    assert compression.state_dict()["step"] == 2
    assert residuals(compression) == before
    compression.step_made()
    assert compression.state_dict()["step"] == 3
    assert residuals(compression) != before
    before = residuals(compression)
    ranks.exchange(gradients(3, 1))  # by which no step is made
    ranks.exchange(gradients(4, 1))
    assert residuals(compression) == before
    compression.loss_scale = 2.0  # before the next step, nor is one made by these
    assert residuals(compression) == before
