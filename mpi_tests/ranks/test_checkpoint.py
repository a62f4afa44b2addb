"""Training that is saved, and resumed from there: to the bit, and at another number of ranks."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression
from hvd_compress.local import LocalRanks

from .job import Job
from .training import (
    COMPRESSIONS,
    IN_SUMS,
    WITH_RESIDUALS,
    assert_close,
    assert_equal,
    backward,
    copy,
    gradients,
    grads,
    parameters,
    residuals,
    sgd,
    takes_part,
)

KINDS = (*WITH_RESIDUALS, *IN_SUMS, "terngrad", "stochastic_pruning")


class Training:
    def __init__(self, job: Job, kind: str) -> None:
        self.rank = job.rank
        self.of = parameters()
        self.compression = COMPRESSIONS[kind](self.of.items())
        optimizer = sgd(self.of, momentum=0.0 if kind == "dgc" else 0.9)
        self.optimizer = job.distribute(optimizer, self.of.items(), self.compression)
        # What the backend adds up itself it may add in another order each time, where there are more than two ranks.
        self.assert_same = assert_close if kind in IN_SUMS and job.size > 2 else assert_equal

    def run(self, steps: range) -> dict[str, Tensor]:
        for step in steps:
            self.optimizer.zero_grad()
            backward(self.of, gradients(self.of, self.rank, step))
            self.optimizer.step()
        return copy(self.of)

    def load(self, parameters: dict[str, Tensor], optimizer: Any, compression: Any) -> None:
        with torch.no_grad():
            for name, p in self.of.items():
                p.copy_(parameters[name])
        self.optimizer.load_state_dict(optimizer)
        self.compression.load_state_dict(compression)


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_equals_uninterrupted_to_the_bit(job: Job, kind: str, gathered: bool) -> None:
    first = Training(job, kind)
    first.run(range(3))
    state = first.compression.gather_state_dict() if gathered else first.compression.state_dict()
    if gathered:  # as written by rank 0 and read by all
        assert state["residuals"].keys() == (set(range(job.size)) if job.rank == 0 else {job.rank})
        state = job.allgather(state)[0]
    saved = through_file([copy(first.of), first.optimizer.state_dict(), state])
    uninterrupted = first.run(range(3, 6))
    resumed = Training(job, kind)
    resumed.load(*saved)
    first.assert_same(resumed.run(range(3, 6)), uninterrupted)
    first.assert_same(residuals(resumed.compression), residuals(first.compression))


@pytest.mark.parametrize("kind", KINDS)
def test_loading_in_the_midst_of_training_goes_back(job: Job, kind: str) -> None:
    one = Training(job, kind)
    one.run(range(3))
    saved = copy(one.of), one.optimizer.state_dict(), one.compression.gather_state_dict()
    saved = through_file(saved)
    ahead = one.run(range(3, 6))
    one.load(*saved)
    one.assert_same(one.run(range(3, 6)), ahead)


def saved_by(size: int, kind: str = "adacomp") -> dict[str, Any]:
    """The gathered state of a training on `size` ranks."""
    of = parameters()
    ranks = LocalRanks([COMPRESSIONS[kind](of.items()) for _ in range(size)])
    for step in range(3):
        ranks.exchange([gradients(of, rank, step) for rank in range(size)])
    states = [compression.state_dict() for compression in ranks.compressions]
    return states[0] | {"residuals": {rank: state["residuals"][rank] for rank, state in enumerate(states)}}


@pytest.mark.parametrize("resize", ["sum", "reset"])
@pytest.mark.parametrize("saved_size", [1, 2, 3, 8])
def test_another_number_of_ranks_takes_over_the_sum_of_residuals(several: Job, saved_size: int, resize: str) -> None:
    job = several
    state = saved_by(saved_size)
    of = parameters()
    # At this density all goes at once, so that the residuals show in the next sum.
    compression = Compression.topk(of.items(), density=1.0, min_numel=1)
    compression.load_state_dict(through_file(state), resize=resize)
    optimizer = job.distribute(sgd(of), of.items(), compression, op="sum")
    backward(of, gradients(of, job.rank, 0))
    optimizer.step()
    expected = {name: sum(gradients(of, rank, 0)[name] for rank in range(job.size)) for name in of}
    if resize == "sum" or saved_size == job.size:
        for name in of:
            expected[name] = expected[name] + sum(
                mine[name].view(of[name].shape) for mine in state["residuals"].values()
            )
    assert_close(grads(of), expected)


@pytest.mark.parametrize("kind", ["topk", "dgc", "powersgd"])
def test_any_rank_can_gather_and_the_others_get_their_own(job: Job, kind: str) -> None:
    training = Training(job, kind)
    training.run(range(3))
    own = training.compression.state_dict()
    everyone = job.allgather(own)
    for root in {0, job.size - 1}:
        state = training.compression.gather_state_dict(root)
        assert {key: state[key] for key in ("step", "loss_scale", "size")} == {
            "step": 3 if takes_part(job.size, training.compression) else 0,
            "loss_scale": None,
            "size": job.size,
        }
        assert state["residuals"].keys() == (set(range(job.size)) if job.rank == root else {job.rank})
        for rank, residuals_of in state["residuals"].items():
            assert_equal(residuals_of, everyone[rank]["residuals"][rank])
    with pytest.raises(ValueError, match=f"less than {job.size}: {job.size}"):
        training.compression.gather_state_dict(job.size)


def test_files_of_all_ranks_do_for_any_number_of_ranks(several: Job) -> None:
    """Each rank of the first training has saved its own; each of the second reads all."""
    job = several
    whole = saved_by(5)
    of_ranks = [through_file(whole | {"residuals": {rank: whole["residuals"][rank]}}) for rank in (3, 0, 4, 1, 2)]
    trained = []
    for state in (whole, of_ranks):
        training = Training(job, "adacomp")
        training.compression.load_state_dict(state)
        trained.append(training.run(range(2)))
    assert_equal(*trained)


def test_one_ranks_state_does_not_do_for_another_number_of_ranks(several: Job) -> None:
    job = several
    state = saved_by(8)
    del state["residuals"][7]
    of = parameters()
    compression = COMPRESSIONS["adacomp"](of.items())
    compression.load_state_dict(state)
    with pytest.raises(ValueError, match=r"lacks the residuals of ranks \[7\].*gather_state_dict"):  # noqa: PT012
        optimizer = job.distribute(sgd(of), of.items(), compression)
        backward(of, gradients(of, job.rank, 0))
        optimizer.step()


def test_what_is_loaded_can_be_saved_before_the_first_step(job: Job) -> None:
    state = saved_by(3)
    compression = COMPRESSIONS["adacomp"](parameters().items())
    compression.load_state_dict(state)
    again = compression.state_dict()
    assert again["residuals"].keys() == {0, 1, 2}
    for rank in range(3):
        assert_equal(again["residuals"][rank], state["residuals"][rank])
