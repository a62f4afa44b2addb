"""Messages of any length between ranks, by collectives of one size, and no wait but for an answer.

A collective of one size comes first: every message takes the same room, what the longest of this name took the last
time, which all ranks have seen, and a header tells its length. What does not fit follows once that is known. Ranks
learn it at different times, one before it posts its next collective and another after, so that what follows travels
apart from the collectives, in the order of those that it follows. A rank that waited for it, or for lengths, before it
posts would keep collectives back that others wait for.
"""

from __future__ import annotations

import abc
import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Pending, PolledPending, Then, WatchfulTransport

_HEADER_BYTES = 8  # the length of the message, int64
_SPARE = 16  # a part of the length, one in so many, is left free where lengths change


class Rooms:
    """How much room messages get, in bytes, by their name: the same on all ranks, which use a name alike."""

    def __init__(self) -> None:
        self._longest: dict[str, int] = {}
        self._rooms: dict[str, int] = {}

    def of(self, name: str) -> int | None:
        """With the header; None before the first messages of this name."""
        return self._rooms.get(name)

    def learn(self, name: str, longest: int) -> None:
        """The longest message of this name had so many bytes this time."""
        steady = self._longest.get(name) in (None, longest)
        self._longest[name] = longest
        self._rooms[name] = _aligned(_HEADER_BYTES + longest + (0 if steady else longest // _SPARE))


class RoomTransport(WatchfulTransport):
    """One whose library can gather and exchange rows of one size, and apart from these messages of known lengths."""

    def __init__(self) -> None:
        self._rooms = Rooms()
        self._line: collections.deque[_Followed] = collections.deque()  # of which nothing has followed yet

    @property
    @abc.abstractmethod
    def most_gathered_bytes(self) -> float:
        """Of all ranks' rows together; of longer ones only the headers are gathered, and the rest follows."""

    @abc.abstractmethod
    def gather_rows(self, row: Tensor) -> Pending:
        """Answer: the rows, uint8 [room], of all ranks: uint8 [ranks, room]."""

    @abc.abstractmethod
    def exchange_rows(self, rows: Tensor) -> Pending:
        """rows: uint8 [ranks, n], one for each rank. Answer: those of all ranks for this one, in the same shape."""

    @abc.abstractmethod
    def follow(self, outgoing: Tensor, sizes: list[int], lengths: list[int], number: int) -> Pending:
        """Send messages of any length; ranks call this in one order, before or after other collectives.

        outgoing: one behind the other by destination, uint8 [sum of sizes], or [ranks, size] where all are as long.
        sizes, lengths: of what goes to the ranks, and of what they send. number: of the collective that this follows.
        Answer: what they sent.
        """

    def allgather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        return self._gather(joined(parts), _HEADER_BYTES)

    def regather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        room = self._rooms.of(name)
        if room is None or room * self.size > self.most_gathered_bytes:
            room = _HEADER_BYTES
        return Then(self._gather(joined(parts), room), lambda messages: self._learned(name, messages))

    def alltoall(self, name: str, parts: Sequence[Sequence[Tensor]]) -> Pending:
        sizes = [sum(part.numel() for part in destination) for destination in parts]
        outgoing = joined([part for destination in parts for part in destination])
        exchanged = self.exchange_rows(torch.tensor(sizes).view(-1, 1).view(torch.uint8))
        return self._followed(exchanged, lambda rows, number: self.follow(outgoing, sizes, lengths_of(rows), number))

    def _gather(self, message: Tensor, room: int) -> Pending:
        rest = message[room - _HEADER_BYTES :]

        def follow(rows: Tensor, number: int) -> Pending:
            lengths = lengths_of(rows)
            unsent = [max(length + _HEADER_BYTES - room, 0) for length in lengths]
            if not any(unsent):
                return _There(messages_of(rows, lengths))
            rests = self.follow(rest.expand(self.size, -1), [rest.numel()] * self.size, unsent, number)
            return Then(rests, lambda rests: messages_of(rows, lengths, rests))

        return self._followed(self.gather_rows(padded(message, room)), follow)

    def _learned(self, name: str, messages: list[Tensor]) -> list[Tensor]:
        self._rooms.learn(name, max(message.numel() for message in messages))
        return messages

    def _followed(self, pending: Pending, follow: Callable[[Any, int], Pending]) -> Pending:
        number = self.posted
        followed = _Followed(pending, lambda answer: follow(answer, number), self._line)
        self._line.append(followed)
        return followed


class _Followed(PolledPending):
    """A collective and what follows once its answer is there; `line` has those that begin before or after this one."""

    def __init__(self, pending: Pending, follow: Callable[[Any], Pending], line: collections.deque[_Followed]) -> None:
        self._pending, self._follow, self._line = pending, follow, line
        self._begun = False

    def ready(self) -> bool:
        while not self._begun and self._line[0].begin():
            self._line.popleft()
        return self._begun and self._pending.ready()

    def begin(self) -> bool:
        """Begin what follows, if it can begin; whether it has."""
        if not self._begun and self._pending.ready():
            self._pending = self._follow(self._pending.wait())
            self._begun = True
            del self._follow  # which holds what has been sent
        return self._begun

    def wait(self) -> Any:
        self.await_ready()
        return self._pending.wait()


class _There(Pending):
    """An answer."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def ready(self) -> bool:
        return True

    def wait(self) -> Any:
        return self._answer


def padded(message: Tensor, room: int) -> Tensor:
    """As much of `message`, uint8 [n], as there is room for, behind its header: uint8 [room]."""
    row = torch.empty(room, dtype=torch.uint8)
    row[:_HEADER_BYTES].view(torch.int64)[0] = message.numel()
    fits = min(message.numel(), room - _HEADER_BYTES)
    row[_HEADER_BYTES : _HEADER_BYTES + fits] = message[:fits]
    return row


def lengths_of(rows: Tensor) -> list[int]:
    """What the headers of uint8 [ranks, room] tell."""
    lengths: list[int] = rows[:, :_HEADER_BYTES].contiguous().view(torch.int64).view(-1).tolist()
    return lengths


def messages_of(rows: Tensor, lengths: Sequence[int], rests: Sequence[Tensor] = ()) -> list[Tensor]:
    """The whole messages; rests: what followed, by rank."""
    messages = [row[_HEADER_BYTES : _HEADER_BYTES + length] for row, length in zip(rows, lengths)]
    if rests:
        messages = [torch.cat([message, rest]) if rest.numel() else message for message, rest in zip(messages, rests)]
    return messages


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
