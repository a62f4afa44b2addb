"""Messages: the payloads of several pieces of gradients, for one rank or for all, under one checksum. Wire version 2.

What a frame says of its gradient (wire.py) both sides of a message know: which pieces it holds follows from the plan of
buckets, the number of ranks and the step, and all of it goes into the checksum. A message is little-endian:

    offset  size  field
         0     2  magic, b"hC"
         2     1  wire version, 2
         3     1  flags: bit 1, some piece of the sender's gradient is not finite
         4     4  CRC-32 (IEEE) of what both sides know, of bytes 0 to 3, and of all that follows
         8     -  with that flag: for each piece a byte, 1 if it is not finite, which then has no payload
         -     -  where payloads vary in length: for each piece that of its payload, uint32
         -     -  the payloads, each followed by zeros up to a multiple of 4
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .wire import MAGIC, NON_FINITE, WireError

VERSION = 2
HEADER_BYTES = 8
_HEAD = struct.Struct("<2s2B")


def context(*known: object) -> int:
    """A checksum of what sender and receiver both know of a message, by its repr."""
    return zlib.crc32(repr(known).encode())


def pack(known: int, payloads: Sequence[Tensor | None], *, varying: bool) -> Tensor:
    """Lay out payloads, uint8, as one message, uint8 [bytes]; None stands for a piece that is not finite.

    known: of `context`, the same as the receiver's. varying: whether it must be told how long the payloads are.
    """
    flags = NON_FINITE if any(payload is None for payload in payloads) else 0
    parts = [np.empty(HEADER_BYTES, np.uint8)]
    if flags:
        parts += _padded(np.array([payload is None for payload in payloads], np.uint8))
    if varying:
        parts.append(np.array([0 if p is None else p.numel() for p in payloads], "<u4").view(np.uint8))
    for payload in payloads:
        if payload is not None:
            parts += _padded(payload.numpy())
    message = torch.from_numpy(np.concatenate(parts))
    head = _HEAD.pack(MAGIC, VERSION, flags)
    checksum = kernels.of(message).crc32(struct.pack("<I", known) + head, message[HEADER_BYTES:])
    message[:HEADER_BYTES] = torch.frombuffer(bytearray(head + struct.pack("<I", checksum)), dtype=torch.uint8)
    return message


def unpack(
    message: Tensor, known: int, count: int, lengths: Sequence[int] | None, peer: int, parameter: str
) -> list[Tensor | None]:
    """The payloads of `count` pieces, as views; None for one that is not finite at its sender.

    lengths: of the payloads in bytes; None where they vary. peer, parameter: are only named in errors.
    Raises WireError for what `pack` would not have written.
    """
    if message.numel() < HEADER_BYTES:
        raise WireError(peer, parameter, f"a message of at least {HEADER_BYTES} bytes", f"{message.numel()} bytes")
    octets = message.numpy()
    head, (checksum,) = octets[:4].tobytes(), struct.unpack("<I", octets[4:HEADER_BYTES].tobytes())
    magic, version, flags = _HEAD.unpack(head)
    if magic != MAGIC or version != VERSION:
        raise WireError(peer, parameter, f"magic {MAGIC!r} and wire version {VERSION}", f"{magic!r} and {version}")
    computed = kernels.of(message).crc32(struct.pack("<I", known) + head, message[HEADER_BYTES:])
    if checksum != computed:
        raise WireError(peer, parameter, f"checksum {computed:#010x} of these pieces", f"{checksum:#010x}")
    at, marks = HEADER_BYTES, [0] * count
    if flags == NON_FINITE:
        marks = octets[at : at + count].tolist()
        at += count + -count % 4
    if lengths is None:
        table = octets[at : at + 4 * count]
        lengths = table.view("<u4").tolist() if table.size == 4 * count else [message.numel()] * count
        at += 4 * count
    payloads: list[Tensor | None] = []
    for mark, length in zip(marks, lengths):
        payloads.append(None if mark else message[at : at + length])
        at += 0 if mark else length + -length % 4
    if at != message.numel() or flags not in (0, NON_FINITE) or len(payloads) != count:
        raise WireError(peer, parameter, f"{count} pieces in {at} bytes", f"{message.numel()} bytes, flags {flags:#x}")
    return payloads


def _padded(array: np.ndarray) -> list[np.ndarray]:
    padding = -array.size % 4
    return [array, np.zeros(padding, np.uint8)] if padding else [array]
