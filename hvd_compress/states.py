"""All ranks' tensors to one of them, for a checkpoint: piece by piece, so that no other holds more than a few."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .transports.base import Transport

_ROOM_BYTES = 64 << 20  # of all ranks' pieces together, which every rank receives
_LEAST_BYTES = 1 << 16  # of a piece: with many ranks, too many collectives take longer than room is worth


def gather(transport: Transport, name: str, mine: Mapping[str, Tensor], root: int) -> dict[int, dict[str, Tensor]]:
    """At rank `root` the float32 tensors of all ranks, by rank; elsewhere nothing. Collective.

    Ranks may have different ones. Transports can only gather to all ranks: pieces of them, which all but `root` drop.
    """
    everyone: list[dict[str, list[int]]] = transport.gather_objects(
        f"{name}.shapes", {key: list(tensor.shape) for key, tensor in mine.items()}
    ).wait()
    gathered: dict[int, dict[str, Tensor]] = {}
    if transport.rank == root:
        gathered = {
            rank: {key: torch.empty(shape, dtype=torch.float32) for key, shape in shapes.items()}
            for rank, shapes in enumerate(everyone)
        }
    step = max(_ROOM_BYTES // transport.size, _LEAST_BYTES) // 4
    for key in sorted({key for shapes in everyone for key in shapes}):
        own = mine[key].reshape(-1) if key in mine else torch.empty(0, dtype=torch.float32)
        for start in range(0, max(math.prod(shapes.get(key, [0])) for shapes in everyone), step):
            part = own[start : start + step].view(torch.uint8)
            for rank, piece in enumerate(transport.allgather(name, [part]).wait()):
                if rank in gathered and piece.numel():
                    gathered[rank][key].view(-1)[start : start + step].view(torch.uint8).copy_(piece)
    return gathered
