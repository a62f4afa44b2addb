"""Gathering messages of any length by one collective of one size, in place of one for the lengths and one for the rest.

Every message takes the same room: what the longest of this name took the last time, which all ranks have seen. A header
tells its length. What does not fit follows from rank to rank: answers may be taken before or after the
next collective is posted, so that another collective would find no place that is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

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

    def learn_from(self, name: str, messages: list[Tensor]) -> list[Tensor]:
        """As `learn`, of the first messages of this name; returns them."""
        self.learn(name, max(message.numel() for message in messages))
        return messages


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


def unsent(lengths: Sequence[int], room: int) -> list[int]:
    """How many bytes of every rank's message did not fit."""
    return [max(length + _HEADER_BYTES - room, 0) for length in lengths]


def rest_of(message: Tensor, room: int) -> Tensor:
    """What of `message` did not fit."""
    return message[room - _HEADER_BYTES :]


def messages_of(rows: Tensor, lengths: Sequence[int], rests: Mapping[int, Tensor]) -> list[Tensor]:
    """The whole messages; rests: by rank, what followed."""
    fit = [row[_HEADER_BYTES : _HEADER_BYTES + length] for row, length in zip(rows, lengths)]
    return [torch.cat([message, rests[rank]]) if rank in rests else message for rank, message in enumerate(fit)]


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
