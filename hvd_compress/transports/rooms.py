"""Gathering messages of any length by one collective of one size, in place of one for the lengths and one for the rest.

Every message takes the same room: what the longest of this name took the last time, which all ranks have seen. A header
tells its length. What does not fit follows from rank to rank: answers may be taken before or after the
next collective is posted, so that another collective would find no place that is the same on all ranks.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import Pending, Then, WatchfulTransport

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
    """One whose library can gather rows of one size, and send from rank to rank."""

    def __init__(self) -> None:
        self._rooms = Rooms()

    @property
    @abc.abstractmethod
    def most_gathered_bytes(self) -> float:
        """Of all ranks' rows together; longer ones are gathered as `allgather` does."""

    @abc.abstractmethod
    def gather_rows(self, row: Tensor) -> Pending:
        """Answer: the rows, uint8 [room], of all ranks: uint8 [ranks, room]."""

    @abc.abstractmethod
    def swap(self, incoming: Mapping[int, Tensor], outgoing: Mapping[int, Tensor]) -> None:
        """Send `outgoing`, and fill `incoming`, uint8 by the other's rank. Waits."""

    def regather(self, name: str, parts: Sequence[Tensor]) -> Pending:
        room = self._rooms.of(name)
        if room is None or room * self.size > self.most_gathered_bytes:
            return Then(self.allgather(name, parts), lambda messages: self._learned(name, messages))
        message = joined(parts)
        return Then(self.gather_rows(padded(message, room)), lambda rows: self._whole(name, rows, message, room))

    def _learned(self, name: str, messages: list[Tensor]) -> list[Tensor]:
        self._rooms.learn(name, max(message.numel() for message in messages))
        return messages

    def _whole(self, name: str, rows: Tensor, mine: Tensor, room: int) -> list[Tensor]:
        """The messages of all ranks. Waits for what of them did not fit."""
        lengths = lengths_of(rows)
        unsent = [max(length + _HEADER_BYTES - room, 0) for length in lengths]
        others = [rank for rank in range(self.size) if rank != self.rank]
        rests = {rank: mine.new_empty(unsent[rank]) for rank in others if unsent[rank]}
        rest = mine[room - _HEADER_BYTES :]
        if any(unsent):
            self.swap(rests, dict.fromkeys(others, rest) if unsent[self.rank] else {})
        if unsent[self.rank]:
            rests[self.rank] = rest
        return self._learned(name, messages_of(rows, lengths, rests))


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


def messages_of(rows: Tensor, lengths: Sequence[int], rests: Mapping[int, Tensor]) -> list[Tensor]:
    """The whole messages; rests: by rank, what followed."""
    fit = [row[_HEADER_BYTES : _HEADER_BYTES + length] for row, length in zip(rows, lengths)]
    return [torch.cat([message, rests[rank]]) if rank in rests else message for rank, message in enumerate(fit)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
