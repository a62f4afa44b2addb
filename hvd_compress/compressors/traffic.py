"""Whether a method still moves less than no compression does, with so many ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..log import warn_once
from .base import Compressor
from .codec import AUTO, HIERARCHICAL, ScatterCodec
from .footprint import Sent
from .slot import Parameter, Slot, Step

_FRAMING = 1.005  # a frame's header makes no difference


def traffic(
    compressor: Compressor, shapes: Sequence[torch.Size], size: int, topology: str = AUTO
) -> tuple[float, float]:
    """Bytes that each of `size` ranks receives in a step for float32 gradients of these shapes, all of them compressed:
    by this compressor and topology, and without compression, added up by a ring. Of the hierarchical topology: `size`
    nodes, and what comes into each.

    Exact but for what depends on the values of gradients; NaN where a compressor cannot tell.
    """
    slots = [Slot(Parameter("", index, shape), Step(size=size)) for index, shape in enumerate(shapes)]
    sent = [_sent(compressor, slot, topology) for slot in slots]
    dense = sum(Sent(reduced=4 * shape.numel()).received(size) for shape in shapes)
    return sum(math.nan if of_one is None else of_one.received(size) for of_one in sent), dense


def _sent(compressor: Compressor, slot: Slot, topology: str) -> Sent | None:
    if not (isinstance(compressor, ScatterCodec) and slot.step.size > 1 and compressor.scatters(slot, topology)):
        return compressor.sent(slot)
    numel = slot.parameter.numel
    return Sent(scattered=sum(compressor.piece_bytes(slot, numel, back=back) for back in (False, True)))


def warn_if_more_than_dense(
    compressor: Compressor, shapes: Sequence[torch.Size], rank: int, size: int, topology: str = AUTO
) -> None:
    """Say on rank 0, once, when a compressor moves more than no compression would with so many ranks."""
    received, dense = traffic(compressor, shapes, size, topology)
    if rank == 0 and received > _FRAMING * dense:
        of = "nodes" if topology == HIERARCHICAL else "ranks"
        warn_once(
            f"{compressor} moves more than no compression with {size} {of}: each of them receives "
            f"{received / 1e6:,.1f} MB a step in place of {dense / 1e6:,.1f}, as every one's frame goes to every "
            "other. Remedy: topology='scatter' where the method can, a method whose traffic does not grow with the "
            "ranks (Compression.fp16, powersgd or scalecom), fewer bits or a lower density, or no compression"
        )
