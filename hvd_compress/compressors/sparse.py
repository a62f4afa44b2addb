"""Sparse gradients, as of embeddings, uncompressed: every rank's indices and values, as Horovod exchanges them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import wire
from ..requests import Allgather, Exchange, Total
from .base import Compressor
from .frames import unpack
from .slot import Slot

_COUNTS = struct.Struct("<QQ")  # sparse dimensions, entries


@dataclass(frozen=True)
class SparseGatherer(Compressor):
    """The sum over the ranks as a sparse COO tensor. Payload: counts, indices, values."""

    algorithm = 6

    def exchange(self, slot: Slot, gradient: Tensor) -> Exchange:
        gradient = gradient.coalesce()
        counts = bytearray(_COUNTS.pack(gradient.sparse_dim(), gradient._nnz()))
        parts = [part.cpu().contiguous().view(-1).view(torch.uint8) for part in (gradient.indices(), gradient.values())]
        payload = torch.cat([torch.frombuffer(counts, dtype=torch.uint8), *parts])
        rank, index = slot.step.rank, slot.parameter.index
        sent = wire.Frame(self.algorithm, gradient.dtype, rank, index, 0.0, gradient.numel(), payload)
        answers: list[Tensor] = yield Allgather(wire.pack(sent), last=True)
        everyone = [_decode(frame, slot, gradient.sparse_dim()) for frame in unpack(sent, answers, slot)]
        indices = torch.cat([indices for indices, _ in everyone], dim=1)
        values = torch.cat([values for _, values in everyone])
        shape, device = slot.parameter.shape, gradient.device
        total = torch.sparse_coo_tensor(indices, values, shape, device=device, check_invariants=False)
        return Total(total.coalesce())


def _decode(frame: wire.Frame, slot: Slot, dimensions: int) -> tuple[Tensor, Tensor]:
    payload = frame.payload.clone()  # int64 needs 8-byte alignment
    head = payload[: _COUNTS.size].numpy().tobytes()
    found, entries = _COUNTS.unpack(head) if len(head) == _COUNTS.size else (dimensions, 0)
    start, row = _COUNTS.size + 8 * dimensions * entries, slot.parameter.shape[dimensions:]
    length = start + entries * row.numel() * frame.dtype.itemsize
    if found != dimensions or length != payload.numel():
        expected = f"{entries} entries of {dimensions} sparse dimensions in {length} bytes"
        raise wire.WireError(frame.sender, slot.name, expected, f"{found} dimensions, {payload.numel()} bytes")
    indices = payload[_COUNTS.size : start].view(torch.int64).view(dimensions, entries)
    if not bool(((indices >= 0) & (indices < torch.tensor(slot.parameter.shape[:dimensions])[:, None])).all()):
        raise wire.WireError(frame.sender, slot.name, f"indices in {tuple(slot.parameter.shape)}", "others")
    return indices, payload[start:].view(frame.dtype).view(entries, *row)
