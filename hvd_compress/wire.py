"""Frames: how one rank's message about one parameter is laid out as bytes. Knows no algorithm.

A frame is little-endian and self-delimiting:

    offset  size  field
         0     2  magic, b"hC"
         2     1  wire version, 1
         3     1  algorithm id (Compressor.algorithm)
         4     1  dtype of the gradient: 1 float32, 2 float16, 3 bfloat16, 4 float64
         5     1  flags: bit 0, the payload is the dense tensor; bit 1, the sender's gradient is not finite
         6     2  rank of the sender
         8     4  index of the parameter in the bound order
        12     4  rate, float32: density, bits, bin size... as the algorithm has it
        16     8  elements of the parameter
        24     8  payload length in bytes
        32     4  CRC-32 (IEEE) of bytes 0 to 31 and the payload
        36     -  payload, then zero bytes up to a multiple of 4, so that words in it can be read in place
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels

MAGIC = b"hC"
VERSION = 1
DENSE = 1
NON_FINITE = 2

_HEADER = struct.Struct("<2s4BHIfQQ")
_LENGTH = struct.Struct("<Q")  # the end of the header
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_PADDING = bytes(3)

_DTYPE_CODES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
_DTYPES = {code: dtype for dtype, code in _DTYPE_CODES.items()}


class WireError(RuntimeError):
    """A frame that does not parse, or is not the one expected. Names the sender, the parameter and the difference."""

    def __init__(self, peer: int, parameter: str, expected: object, found: object) -> None:
        super().__init__(
            f"frame from rank {peer} for parameter {parameter!r}: expected {expected}, found {found}. "
            "The data was damaged in transit, or the ranks run different versions or options of hvd_compress."
        )
        self.peer, self.parameter, self.expected, self.found = peer, parameter, expected, found


@dataclass  # not frozen, which would triple the time that it takes to make one
class Frame:
    """One parsed frame; `payload` is a view, uint8 [payload bytes]."""

    algorithm: int
    dtype: torch.dtype
    sender: int
    parameter: int
    rate: float
    numel: int
    payload: Tensor
    flags: int = 0

    @property
    def dense(self) -> bool:
        return bool(self.flags & DENSE)

    @property
    def finite(self) -> bool:
        return not self.flags & NON_FINITE


def _crc32(header: bytes, payload: Tensor) -> int:
    return int(kernels.of(payload).crc32(header, payload))


def rounded(rate: float) -> float:
    """`rate` as a frame holds it."""
    return float(struct.unpack("<f", struct.pack("<f", rate))[0])


def frame_bytes(payload_bytes: int) -> int:
    """Length on the wire of a frame with a payload of `payload_bytes`."""
    return HEADER_BYTES + payload_bytes + -payload_bytes % 4


def header(frame: Frame) -> bytes:
    """All of a frame's header but its checksum."""
    return _HEADER.pack(
        MAGIC,
        VERSION,
        frame.algorithm,
        _DTYPE_CODES[frame.dtype],
        frame.flags,
        frame.sender,
        frame.parameter,
        frame.rate,
        frame.numel,
        frame.payload.numel(),
    )


def pack(frame: Frame, room: Tensor | None = None) -> Tensor:
    """Lay out `frame` as uint8 [frame_bytes], on the CPU; in `room` where that is enough.

    A payload that is in its place in `room` already is not copied.
    """
    payload = frame.payload if frame.payload.is_cpu else frame.payload.cpu()
    length, head = payload.numel(), header(frame)
    whole = frame_bytes(length)
    if room is None or room.numel() < whole:
        room = torch.empty(whole, dtype=torch.uint8)
    packed = room if room.numel() == whole else room[:whole]
    if payload.data_ptr() != packed.data_ptr() + HEADER_BYTES:
        packed[HEADER_BYTES : HEADER_BYTES + length] = payload
    # By address: a view of a tensor takes longer to make than all this.
    start, end = packed.data_ptr(), HEADER_BYTES + length
    ctypes.memmove(start, head + _CHECKSUM.pack(_crc32(head, payload)), HEADER_BYTES)
    ctypes.memmove(start + end, _PADDING, whole - end)
    return packed


def unpack(buffer: Tensor, peer: int, parameter: str = "?") -> Frame:
    """Parse the one frame that fills `buffer`, uint8 [bytes]; `peer` and `parameter` are only named in errors.

    Raises WireError for anything that `pack` would not have written.
    """
    if buffer.storage_offset() % 4 or not buffer.is_contiguous():
        buffer = buffer.clone(memory_format=torch.contiguous_format)  # so that words in the payload can be viewed
    if buffer.numel() < HEADER_BYTES:
        raise WireError(peer, parameter, f"at least {HEADER_BYTES} bytes", f"{buffer.numel()} bytes")
    start = buffer.data_ptr()
    head = ctypes.string_at(start, _HEADER.size)
    magic, version, algorithm, dtype, flags, sender, index, rate, numel, length = _HEADER.unpack(head)
    if magic != MAGIC:
        raise WireError(peer, parameter, f"magic {MAGIC!r}", repr(magic))
    if version != VERSION:
        raise WireError(peer, parameter, f"wire version {VERSION}", f"version {version}")
    if buffer.numel() != frame_bytes(length):
        raise WireError(peer, parameter, f"a frame of {frame_bytes(length)} bytes", f"{buffer.numel()} bytes")
    payload, end = buffer.narrow(0, HEADER_BYTES, length), HEADER_BYTES + length
    (checksum,) = _CHECKSUM.unpack(ctypes.string_at(start + _HEADER.size, _CHECKSUM.size))
    computed = _crc32(head, payload)
    if checksum != computed:
        raise WireError(peer, parameter, f"checksum {checksum:#010x}", f"{computed:#010x}")
    if any(ctypes.string_at(start + end, buffer.numel() - end)):
        raise WireError(peer, parameter, "zero padding", "other bytes")
    if dtype not in _DTYPES:
        raise WireError(peer, parameter, f"a dtype code of {sorted(_DTYPES)}", dtype)
    if flags & ~(DENSE | NON_FINITE) or (flags & NON_FINITE and (flags & DENSE or length)):
        raise WireError(peer, parameter, "flags that go together", f"flags {flags:#04x} and {length} bytes")
    return Frame(algorithm, _DTYPES[dtype], sender, index, rate, numel, payload, flags)


def split(buffer: Tensor, count: int, peer: int) -> list[Tensor]:
    """Cut a concatenation of `count` frames from rank `peer` into views, one a frame.

    Raises WireError unless exactly `count` frames fill `buffer`.
    """
    octets = buffer.numpy().data
    lengths = []
    offset = 0
    for number in range(count):
        if offset + HEADER_BYTES > len(octets) or octets[offset : offset + len(MAGIC)] != MAGIC:
            found = bytes(octets[offset : offset + 8])
            raise WireError(peer, "?", f"frame {number + 1} of {count} at byte {offset}", f"{found!r}")
        (payload_bytes,) = _LENGTH.unpack_from(octets, offset + _HEADER.size - _LENGTH.size)
        lengths.append(frame_bytes(payload_bytes))
        offset += lengths[-1]
        if offset > len(octets):
            raise WireError(peer, "?", f"{offset} bytes", f"{len(octets)} bytes")
    if offset != len(octets):
        raise WireError(peer, "?", f"{count} frames in {offset} bytes", f"{len(octets)} bytes")
    return list(buffer.split_with_sizes(lengths))
