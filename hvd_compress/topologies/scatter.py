"""Everyone sends each piece of its gradients to the rank that owns it; owners add up, and send their sums to all.

As a dense reduce-scatter and allgather, what a rank receives does not grow with the number of ranks: at most twice what
it sends at once. The sparse variant is the rule of Ok-Topk (Li and Hoefler, PPoPP 2022, arXiv 2201.07598).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels, messages
from ..compressors.codec import Common, ScatterCodec
from ..requests import AllgatherParts, AlltoallParts, GroupExchange, Total
from ..wire import WireError
from .base import Part, agreed
from .regions import Piece, of_parts, regions

_TO_OWNER, _TO_ALL = "to owner", "to all"


@dataclass(frozen=True)
class Scatter:
    """Two rounds: pieces to their owners, and what the codec makes of the sums to all. All ranks, the owner included,
    use what was sent, so that they have the same bits.

    known: what else the ranks must have in common, for their messages to fit.
    """

    codec: ScatterCodec
    known: int = 0

    def reduce(self, parts: Sequence[Part]) -> GroupExchange:
        common = yield from agreed(self.codec, parts)
        exchange = _Exchange(self, parts, common)
        outgoing, shares = exchange.encoded()
        rank = exchange.rank
        addressed = [[] if owner == rank else [message] for owner, message in enumerate(outgoing)]
        incoming: list[Tensor] = yield AlltoallParts(addressed, shares)
        incoming[rank] = outgoing[rank]
        message, shares = exchange.added(incoming)
        del outgoing, incoming
        everyone: list[Tensor] = yield AllgatherParts([message], shares, last=True)
        return exchange.decoded(everyone)


class _Exchange:
    """The work of one rank between the rounds."""

    def __init__(self, scatter: Scatter, parts: Sequence[Part], common: Sequence[Common | None]) -> None:
        codec = self.codec = scatter.codec
        self.parts, self.common = parts, common
        self.rank, self.size = parts[0].slot.step.rank, parts[0].slot.step.size
        self.owned = regions(tuple(part.span for part in parts), codec.alignment, self.size)
        told = [(part.slot.parameter.index, part.gradient.dtype, codec.rate_of(part.slot)) for part in parts]
        spans = [part.span for part in parts]
        self.known = (codec.algorithm, parts[0].slot.step.number, told, spans, scatter.known)
        self._contexts = messages.context(self.known)

    def encoded(self) -> tuple[list[Tensor], list[int]]:
        """A message for each owner, and how many bytes of the others' each gradient takes."""
        payloads: list[list[Tensor | None]] = [[] for _ in self.owned]
        shares = [0] * len(self.parts)
        for number, pieces in enumerate(of_parts(self.owned, len(self.parts))):
            part = self.parts[number]
            cuts = [(piece.start, piece.stop) for _, piece in pieces]
            encoded = self.codec.cut(part.slot, part.gradient, cuts, self.common[number])
            for (owner, _), payload in zip(pieces, encoded):
                payloads[owner].append(payload)
                shares[number] += 0 if owner == self.rank or payload is None else payload.numel()
        outgoing = [self._packed(_TO_OWNER, owner, of_owner) for owner, of_owner in enumerate(payloads)]
        sent = sum(message.numel() for owner, message in enumerate(outgoing) if owner != self.rank)
        return outgoing, _rest_added(shares, sent)

    def added(self, incoming: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """What this rank, as an owner, sends to all of its sums; and how many bytes of it each gradient takes."""
        mine = self.owned[self.rank]
        received = [self._unpacked(_TO_OWNER, peer, self.rank, message) for peer, message in enumerate(incoming)]
        sums: list[Tensor | None] = []
        shares = [0] * len(self.parts)
        for piece, payloads in zip(mine, zip(*received)):
            total = self._total(piece, payloads)
            part, common = self.parts[piece.part], self.common[piece.part]
            back = None if total is None else self.codec.give_back(part.slot, total, piece.start, common)
            sums.append(back)
            shares[piece.part] += 0 if back is None else back.numel()
        message = self._packed(_TO_ALL, self.rank, sums)
        return message, _rest_added(shares, message.numel())

    def decoded(self, everyone: Sequence[Tensor]) -> list[Total | None]:
        """The sums of all gradients; None for one that is not finite on some rank."""
        payloads: list[list[tuple[Piece, int, Tensor | None]]] = [[] for _ in self.parts]
        for owner, message in enumerate(everyone):
            for piece, payload in zip(self.owned[owner], self._unpacked(_TO_ALL, owner, owner, message)):
                payloads[piece.part].append((piece, owner, payload))
        return [self._result(number, of_part) for number, of_part in enumerate(payloads)]

    def _total(self, piece: Piece, payloads: Sequence[Tensor | None]) -> Tensor | None:
        slot = self.parts[piece.part].slot
        total = torch.empty(piece.numel)
        there = [payload for payload in payloads if payload is not None]
        if len(there) < self.size:
            return None
        try:
            bound = self.codec.add(slot, there, 1.0, total)
        except kernels.PayloadError as error:
            raise WireError(error.rank, slot.name, "a payload that decodes", error) from error
        return total if bound < float("inf") else None

    def _result(self, number: int, pieces: Sequence[tuple[Piece, int, Tensor | None]]) -> Total | None:
        part, common = self.parts[number], self.common[number]
        slot, divisor = part.slot, part.slot.step.divisor
        there = [payload for _, _, payload in pieces if payload is not None]
        if len(there) < len(pieces):
            return None
        out = slot.room_for_sum(part.gradient)

        def decode(host: Tensor) -> float:
            bounds = [0.0]
            for (piece, owner, _), payload in zip(pieces, there):
                into = host[piece.start : piece.stop]
                try:
                    bounds.append(self.codec.take_back(slot, payload, common, divisor, into))
                except kernels.PayloadError as error:
                    raise WireError(owner, slot.name, "a payload that decodes", error) from error
            return max(bounds)

        bound = kernels.on_host(decode, out)
        self.codec.learn(slot, there, [piece.numel for piece, _, _ in pieces])
        return Total(out, divisor, bound)

    def _packed(self, way: str, owner: int, payloads: Sequence[Tensor | None]) -> Tensor:
        varying = self.codec.varying
        return messages.pack(messages.context(self._contexts, way, self.rank, owner), payloads, varying=varying)

    def _unpacked(self, way: str, peer: int, owner: int, message: Tensor) -> list[Tensor | None]:
        pieces = self.owned[owner]
        lengths = None if self.codec.varying else list(self._lengths(way, pieces))
        known = messages.context(self._contexts, way, peer, owner)
        return messages.unpack(message, known, len(pieces), lengths, peer, self._names(pieces))

    def _lengths(self, way: str, pieces: Sequence[Piece]) -> Iterator[int]:
        back = way == _TO_ALL
        return (self.codec.piece_bytes(self.parts[p.part].slot, p.numel, back=back) for p in pieces)

    def _names(self, pieces: Sequence[Piece]) -> str:
        return ", ".join(dict.fromkeys(self.parts[piece.part].slot.name for piece in pieces)) or self.parts[0].slot.name


def _rest_added(shares: Sequence[int], total: int) -> list[int]:
    """`shares`, to which what is left of `total` (of headers and padding) is added in equal parts."""
    rest, count = total - sum(shares), len(shares)
    return [share + rest * (i + 1) // count - rest * i // count for i, share in enumerate(shares)]
