"""What decides the collectives of a step is compared by all ranks: a difference is one error on each, not a hang."""

from __future__ import annotations

import collections
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import torch

from . import wire
from .fingerprint import MismatchError
from .requests import Allgather, Allreduce, Exchange, ReduceOp

BYTES = 32  # that a rank sends where all agree
_ALGORITHM = 254  # in the frames of the other case
_DIGEST_BYTES = 7  # positive as an int64, and so is its negative negative

States = Mapping[str, str]  # what is compared, in words, such as "'fc.weight'": "frozen"


def agree(
    rank: int,
    terms: object,
    describe: Callable[[], States],
    error: Callable[[str, Mapping[str, list[int]]], Exception],
    *,
    habits: object = None,
) -> Exchange:
    """Compare `terms`, by their repr, with those of all ranks. Answer: bool [1], whether their `habits` are equal, too.

    If they differ: raises on every rank `error(what, ranks_by_state)` of the first difference between what `describe`
    says on the ranks.
    """
    digest, habit = _digest(terms), _digest(habits)
    answer = yield Allreduce(torch.tensor([digest, -digest, habit, -habit]), ReduceOp.MIN)
    least, most, least_habit, most_habit = answer.tolist()
    if least == -most:
        return torch.tensor([least_habit == -most_habit])
    said = torch.frombuffer(bytearray(json.dumps(dict(describe())).encode()), dtype=torch.uint8)
    frames = yield Allgather(wire.pack(wire.Frame(_ALGORITHM, torch.float32, rank, 0, 0.0, 0, said)), last=True)
    everyone = [wire.unpack(frame, peer).payload.numpy().tobytes() for peer, frame in enumerate(frames)]
    raise error(*difference([json.loads(one) for one in everyone]))


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=_DIGEST_BYTES).digest(), "little")


def difference(everyone: Sequence[States]) -> tuple[str, dict[str, list[int]]]:
    """The first thing that is not in the same state on all ranks, and the ranks by state, the most common one first."""
    for what in {what: None for states in everyone for what in states}:
        states = [states.get(what, "unknown") for states in everyone]
        if len(set(states)) > 1:
            usual = [state for state, _ in collections.Counter(states).most_common()]
            return what, {state: [rank for rank, one in enumerate(states) if one == state] for state in usual}
    raise AssertionError(f"digests differ, and nothing that was described does: {everyone}")


def mismatch(step: int, remedy: str) -> Callable[[str, Mapping[str, list[int]]], MismatchError]:
    """An `error` for `agree` that tells the step and a remedy."""

    def error(what: str, ranks_by_state: Mapping[str, list[int]]) -> MismatchError:
        told = " and ".join(f"{state} on rank {', '.join(map(str, r))}" for state, r in ranks_by_state.items())
        return MismatchError(f"the ranks disagree in step {step}: {what} is {told}. {remedy}")

    return error
