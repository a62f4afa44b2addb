"""States of all ranks at one of them: what the others receive meanwhile, and files of each rank."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress import states
from hvd_compress.memory import merged
from hvd_compress.transports.base import Pending, Transport


class Answer(Pending):
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def ready(self) -> bool:
        return True

    def wait(self) -> Any:
        return self._answer


class Threads(Transport):
    """Ranks that are threads: `meeting` and `posted` are common to them."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, posted: dict[int, Any]) -> None:
        self.rank, self.size, self._meeting, self._posted = rank, size, meeting, posted
        self.received: list[int] = []  # bytes, by collective

    def allgather(self, name: str, parts: Any) -> Pending:
        self._posted[self.rank] = name, torch.cat(list(parts))
        self._meeting.wait(10)
        assert len({of for of, _ in self._posted.values()}) == 1
        answer = [self._posted[rank][1].clone() for rank in range(self.size)]
        self._meeting.wait(10)
        self.received.append(sum(buffer.numel() for buffer in answer))
        return Answer(answer)

    allreduce = broadcast = alltoall = None


def gathered(of_ranks: list[dict[str, Tensor]], root: int) -> tuple[list[Any], list[Threads]]:
    size = len(of_ranks)
    meeting, posted = threading.Barrier(size), {}
    transports = [Threads(rank, size, meeting, posted) for rank in range(size)]
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        results[rank] = states.gather(transports[rank], "state", of_ranks[rank], root)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, transports


@pytest.mark.parametrize("root", [0, 2])
def test_one_rank_gets_all_and_no_rank_receives_much_at_a_time(root, monkeypatch):
    monkeypatch.setattr(states, "_ROOM_BYTES", 1200)
    monkeypatch.setattr(states, "_LEAST_BYTES", 40)
    of_ranks = [
        {
            "a": torch.randn(1000),
            "b/factor": torch.randn(3, 2),
            f"only {rank}": torch.randn(rank + 1),
            "none": torch.empty(0),
        }
        for rank in range(3)
    ]
    results, transports = gathered(of_ranks, root)
    assert [bool(result) for result in results] == [rank == root for rank in range(3)]
    for rank, theirs in results[root].items():
        assert theirs.keys() == of_ranks[rank].keys()
        assert all(torch.equal(theirs[key], of_ranks[rank][key]) for key in theirs)
    names = len(json.dumps([{key: list(tensor.shape) for key, tensor in mine.items()} for mine in of_ranks]))
    for transport in transports:
        assert max(transport.received[1:]) <= 1200
        assert sum(transport.received) <= 3 * 4 * 1006 + 4 * 6 + names


def state(rank: int, size: int = 3, **change: Any) -> dict[str, Any]:
    residuals = {rank: {"w": torch.full((2,), float(rank))}}
    return {"step": 5, "loss_scale": 2.0, "size": size, "residuals": residuals} | change


def test_states_of_ranks_are_one_state_in_any_order_and_stay_what_they_are():
    of_ranks = [state(2), state(0), state(1)]
    whole = merged(iter(of_ranks))
    assert {rank: mine["w"].tolist() for rank, mine in whole["residuals"].items()} == {r: [r, r] for r in range(3)}
    assert {key: whole[key] for key in ("step", "loss_scale", "size")} == {"step": 5, "loss_scale": 2.0, "size": 3}
    assert of_ranks[0]["residuals"].keys() == {2}


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([], "empty"),
        ([state(0), state(0)], r"two of the states have residuals of ranks \[0\]"),
        ([state(0), state(1, step=6)], r"different moments: step is 5 of ranks \[0\] and 6 of ranks \[1\]"),
        ([state(0), state(1, size=2)], "size is 3"),
        ([state(0), state(1, loss_scale=4.0)], "loss_scale is 2.0"),
        ([state(0), state(1, adaptive={"number": 1})], "adaptive is None"),
    ],
)
def test_states_that_do_not_belong_together_are_refused(others, says):
    with pytest.raises(ValueError, match=says):
        merged(others)
