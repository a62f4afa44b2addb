"""The C++ kernels, by ctypes: they take pointers, release the GIL, and write the bytes of kernels/reference.py."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .affine import affine_bytes
from .codec import NOT_FINITE, TOO_LARGE, PayloadError
from .counts import count_bits, count_bytes
from .gaps import token_width
from .moments import deviation
from .narrow import narrow_bytes
from .payloads import Payloads
from .positions import position_bytes
from .quantise import quantised_bytes
from .sources import digest
from .sparse import sparse_bytes
from .ternary import ternary_bytes

LEVELS = ("plain", "avx2")  # in the order of their numbers
VARIABLE = "HVD_COMPRESS_KERNELS"

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_READABLE = {*_TYPES, torch.uint8}  # payloads, too
_INFINITY_BITS = 0x7F800000
_NO_MEMORY = -(1 << 30)
_ERROR_CODES = 16  # codes of a rank
_SOLVER_TILE = 16  # SOLVER_TILE in solver.hpp: a row of the table takes whole tiles
_SPARSE_ERRORS = (
    "",
    "fewer bytes than its counts take",
    "another number of entries than its counts say",
    "positions that do not ascend, or are past the end",
)
_POSITION_ERRORS = (
    "",
    "another length, or another number of positions, than its entries take",
    "positions that do not ascend, or are past the end",
)
_NARROW_ERRORS = (
    *_POSITION_ERRORS,
    "steps or numbers of them that are none",
)
_GAPS_ERRORS = ("", "no scale, or no whole number of tokens after it", "a position past the end")
_LIBRARY = Path(__file__).with_name("_native.so")
_SOURCES = digest(Path(__file__).with_name("native"))  # None of a wheel, which brings the library alone

# Result and arguments of every function.
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "hc_select": (c_int, [c_int]),
    "hc_crc32": (c_uint32, [c_uint32, c_void_p, c_size_t]),
    "hc_frames": (c_int, [c_void_p, c_void_p, c_int, c_char_p, c_size_t, c_void_p, c_void_p, c_void_p]),
    "hc_moments": (c_int32, [c_void_p, c_int, c_size_t, c_void_p]),
    "hc_magnitudes": (c_int32, [c_void_p, c_int, c_size_t, c_void_p]),
    "hc_largest": (c_int32, [c_void_p, c_int, c_size_t]),
    "hc_ternary_encode": (None, [c_void_p, c_int, c_size_t, c_float, c_float, c_uint64, c_int, c_void_p]),
    "hc_ternary_sum": (c_int32, [c_void_p, c_int, c_size_t, c_float, c_void_p]),
    "hc_quantise_encode": (c_int, [c_void_p, c_int, c_size_t, c_int, c_size_t, c_int, c_uint64, c_int, c_void_p]),
    "hc_quantise_sum": (c_int32, [c_void_p, c_int, c_size_t, c_int, c_size_t, c_float, c_void_p]),
    "hc_affine_encode": (c_int, [c_void_p, c_int, c_size_t, c_int, c_uint64, c_void_p]),
    "hc_affine_decode": (None, [c_void_p, c_size_t, c_int, c_void_p]),
    "hc_accumulate": (c_int32, [c_void_p, c_int, c_size_t, c_void_p, c_void_p]),
    "hc_topk_encode": (c_int64, [c_void_p, c_int, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p]),
    "hc_threshold_encode": (c_int64, [c_void_p, c_int, c_size_t, c_void_p, c_void_p, c_float, c_void_p, c_size_t]),
    "hc_sparse_sum": (c_int, [c_void_p, c_void_p, c_int, c_size_t, c_float, c_void_p, c_void_p]),
    "hc_sparse_positions": (c_int64, [c_void_p, c_size_t, c_size_t, c_void_p]),
    "hc_positions_encode": (None, [c_void_p, c_size_t, c_size_t, c_void_p]),
    "hc_positions_decode": (c_int, [c_void_p, c_size_t, c_size_t, c_size_t, c_void_p]),
    "hc_narrow_encode": (None, [c_void_p, c_size_t, c_size_t, c_int, c_void_p, c_void_p]),
    "hc_narrow_decode": (c_int64, [c_void_p, c_size_t, c_size_t, c_int, c_void_p, c_void_p, c_size_t]),
    "hc_narrow_sum": (c_int, [c_void_p, c_void_p, c_int, c_size_t, c_int, c_float, c_void_p, c_void_p]),
    "hc_adacomp_encode": (
        c_int64,
        [c_void_p, c_int, c_size_t, c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_size_t],
    ),
    "hc_gaps_sum": (c_int, [c_void_p, c_void_p, c_int, c_size_t, c_int, c_float, c_void_p, c_void_p]),
    "hc_prune_encode": (c_int64, [c_void_p, c_int, c_size_t, c_float, c_uint64, c_void_p, c_size_t]),
    "hc_prune_sum": (c_int, [c_void_p, c_void_p, c_int, c_size_t, c_float, c_void_p, c_void_p]),
    "hc_prune_dense": (c_uint64, [c_void_p, c_size_t, c_float, c_uint64, c_void_p, c_void_p]),
    "hc_bfloat_encode": (c_int, [c_void_p, c_int, c_size_t, c_void_p]),
    "hc_bfloat_sum": (c_int32, [c_void_p, c_int, c_size_t, c_float, c_void_p]),
    "hc_counts_encode": (None, [c_void_p, c_size_t, c_int, c_int, c_void_p]),
    "hc_counts_decode": (c_int32, [c_void_p, c_size_t, c_int, c_int, c_float, c_float, c_void_p]),
    "hc_project": (
        c_int32,
        [c_void_p, c_int, c_size_t, c_size_t, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p],
    ),
    "hc_backproject": (None, [c_void_p, c_size_t, c_size_t, c_void_p, c_size_t, c_void_p]),
    "hc_rebuild": (
        c_int32,
        [c_void_p, c_size_t, c_size_t, c_void_p, c_void_p, c_void_p, c_size_t, c_float, c_void_p],
    ),
    "hc_orthonormalise": (c_int, [c_void_p, c_size_t, c_size_t, c_void_p]),
    "hc_sign_encode": (c_int, [c_void_p, c_int, c_size_t, c_void_p, c_void_p, c_size_t, c_void_p]),
    "hc_momentum": (None, [c_void_p, c_int, c_size_t, c_void_p, c_float, c_int, c_void_p]),
    "hc_chunk_largest": (None, [c_void_p, c_size_t, c_size_t, c_void_p]),
    "hc_solve": (c_int, [c_void_p, c_void_p, c_int32, c_int32, c_int32, c_void_p, c_void_p]),
}


def _load() -> Any:
    """The library; None where there is none, or one of other sources than lie beside it."""
    if not _LIBRARY.exists():
        return None
    library = ctypes.CDLL(str(_LIBRARY))
    if _SOURCES not in (None, _compiled_of(library)):
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _compiled_of(library: ctypes.CDLL) -> str:
    """The digest of its sources, or "" of a library that is too old to know it."""
    try:
        function = library.hc_sources
    except AttributeError:
        return ""
    function.restype = c_char_p
    return str(function().decode())


_library = _load()


def watch(before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call these before and after every kernel, in its thread, from now on."""
    global _library
    if _library is not None and not isinstance(_library, SimpleNamespace):
        _library = SimpleNamespace(**{name: _between(before, getattr(_library, name), after) for name in _SIGNATURES})


def _between(before: Callable[[], None], kernel: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    def watched(*arguments: Any) -> Any:
        before()
        result = kernel(*arguments)
        after()
        return result

    return watched


def select(level: str) -> str | None:
    """Use the kernels of `level`, one of LEVELS, or of less where the processor lacks it; None without a library.

    Raises RuntimeError if the library was compiled of other sources than those that lie here.
    """
    if _library is None and _LIBRARY.exists():
        raise RuntimeError(
            "the C++ kernels were compiled of other sources than those of this checkout, as after a git pull. Remedy: "
            f"install hvd_compress again (make setup, or pip install --editable .), or set {VARIABLE}=torch"
        )
    return None if _library is None else LEVELS[_library.hc_select(LEVELS.index(level))]


def built() -> bool:
    """Whether there are kernels at all."""
    return _library is not None


def takes(gradient: Tensor) -> bool:
    """Whether the kernels can read this tensor where it lies."""
    return gradient.is_cpu and gradient.dtype in _READABLE and gradient.is_contiguous()


def crc32(header: bytes, payload: Tensor) -> int:
    """CRC-32 (IEEE) of `header` and `payload`."""
    assert _library is not None
    return int(_library.hc_crc32(zlib.crc32(header), payload.data_ptr(), payload.numel()))


def find_frames(
    starts: np.ndarray, sizes: np.ndarray, expected: bytes, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Where the payloads of `count` frames of every rank lie in its buffer: offsets and lengths, int64, and the frames'
    flags, uint8, all [ranks, count]. None where a frame is damaged, or is not what its header in `expected` says.

    starts, sizes: int64 [ranks], of the buffers.
    """
    assert _library is not None
    offsets, lengths = np.empty((2, len(starts), count), np.int64)
    flags = np.empty((len(starts), count), np.uint8)
    into = offsets.ctypes.data, lengths.ctypes.data, flags.ctypes.data
    good = _library.hc_frames(starts.ctypes.data, sizes.ctypes.data, len(starts), expected, count, *into)
    return (offsets, lengths, flags) if good == len(starts) else None


def largest(gradient: Tensor) -> float:
    assert _library is not None
    return _magnitude(_library.hc_largest(*_array(gradient)))


def moments(gradient: Tensor) -> tuple[float, float]:
    assert _library is not None
    sums = (c_double * 2)()
    top = _magnitude(_library.hc_moments(*_array(gradient), sums))
    finite = 0 < top < float("inf")
    return top, deviation(sums[1], sums[0], gradient.numel()) if finite else 0.0


def magnitudes(gradient: Tensor) -> tuple[float, float]:
    assert _library is not None
    total = c_double()
    top = _magnitude(_library.hc_magnitudes(*_array(gradient), ctypes.byref(total)))
    return top, total.value / gradient.numel() if 0 < top < float("inf") else 0.0


def ternary_encode(gradient: Tensor, bound: float, scaler: float, key: int, opposite: bool, payload: Tensor) -> int:
    assert _library is not None
    length = _room(payload, 4 + ternary_bytes(gradient.numel()))
    start = payload.data_ptr()
    c_float.from_address(start).value = scaler
    _library.hc_ternary_encode(*_array(gradient), bound, scaler, key, opposite, start + 4)
    return length


def ternary_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    assert _library is not None
    _expect(payloads, 4 + ternary_bytes(out.numel()))
    shape = len(payloads), out.numel(), divisor, out.data_ptr()
    return _magnitude(_checked(_library.hc_ternary_sum(_addresses(payloads), *shape)))


def quantise_encode(
    gradient: Tensor, bits: int, bucket_size: int, l2: bool, key: int, opposite: bool, payload: Tensor
) -> int:
    assert _library is not None
    length = _room(payload, quantised_bytes(gradient.numel(), bits, bucket_size))
    failed = _library.hc_quantise_encode(*_array(gradient), bits, bucket_size, l2, key, opposite, payload.data_ptr())
    return NOT_FINITE if failed else length


def quantise_sum(payloads: Sequence[Tensor], bits: int, bucket_size: int, divisor: float, out: Tensor) -> float:
    assert _library is not None
    _expect(payloads, quantised_bytes(out.numel(), bits, bucket_size))
    shape = len(payloads), out.numel(), bits, bucket_size, divisor, out.data_ptr()
    return _magnitude(_library.hc_quantise_sum(_addresses(payloads), *shape))


def affine_encode(values: Tensor, bits: int, key: int, payload: Tensor) -> int:
    assert _library is not None
    length = _room(payload, affine_bytes(values.numel(), bits))
    return NOT_FINITE if _library.hc_affine_encode(*_array(values), bits, key, payload.data_ptr()) else length


def affine_decode(payload: Tensor, bits: int, out: Tensor) -> None:
    assert _library is not None
    _expect([payload], affine_bytes(out.numel(), bits))
    _library.hc_affine_decode(payload.data_ptr(), out.numel(), bits, out.data_ptr())


def sign_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, bucket_size: int, payload: Tensor) -> int:
    assert _library is not None
    length = _room(payload, quantised_bytes(gradient.numel(), 1, bucket_size))
    into = kept.data_ptr(), bucket_size, payload.data_ptr()
    return NOT_FINITE if _library.hc_sign_encode(*_array(gradient), _start(residual), *into) else length


def bfloat_encode(gradient: Tensor, payload: Tensor) -> int:
    assert _library is not None
    length = _room(payload, 2 * gradient.numel())
    return NOT_FINITE if _library.hc_bfloat_encode(*_array(gradient), payload.data_ptr()) else length


def bfloat_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    assert _library is not None
    _expect(payloads, 2 * out.numel())
    shape = len(payloads), out.numel(), divisor, out.data_ptr()
    return _magnitude(_library.hc_bfloat_sum(_addresses(payloads), *shape))


def counts_encode(totals: Tensor, most: int, payload: Tensor) -> int:
    assert _library is not None
    length = _room(payload, count_bytes(totals.numel(), most))
    _library.hc_counts_encode(totals.data_ptr(), totals.numel(), count_bits(most), most, payload.data_ptr())
    return length


def counts_decode(payload: Tensor, most: int, scaler: float, divisor: float, out: Tensor) -> float:
    assert _library is not None
    _expect([payload], count_bytes(out.numel(), most))
    shape = out.numel(), count_bits(most), most, scaler, divisor, out.data_ptr()
    return _magnitude(_library.hc_counts_decode(payload.data_ptr(), *shape))


def accumulate(gradient: Tensor, residual: Tensor | None, kept: Tensor) -> float:
    assert _library is not None
    return _magnitude(_library.hc_accumulate(*_array(gradient), _start(residual), kept.data_ptr()))


def topk_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, k: int, payload: Tensor) -> int:
    assert _library is not None
    length = _room(payload, sparse_bytes(gradient.numel(), k))
    into = kept.data_ptr(), k, payload.data_ptr()
    failed = _checked(_library.hc_topk_encode(*_array(gradient), _start(residual), *into))
    return failed or length


def threshold_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, threshold: float, payload: Tensor) -> int:
    assert _library is not None
    numel = gradient.numel()
    capacity = (payload.numel() - sparse_bytes(numel, 0)) // 6
    if capacity < 0:
        return TOO_LARGE if accumulate(gradient, residual, kept) < float("inf") else NOT_FINITE
    into = kept.data_ptr(), threshold, payload.data_ptr(), capacity
    entries = _checked(_library.hc_threshold_encode(*_array(gradient), _start(residual), *into))
    return entries if entries < 0 else sparse_bytes(numel, entries)


def sparse_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    assert _library is not None
    bound = c_float()
    shape = len(payloads), out.numel(), divisor, out.data_ptr(), ctypes.byref(bound)
    failed = _checked(_library.hc_sparse_sum(_addresses(payloads), _lengths(payloads), *shape))
    return _bound(failed, _SPARSE_ERRORS, bound.value, out)


def sparse_positions(payload: Tensor, numel: int) -> Tensor:
    assert _library is not None
    positions = torch.empty(payload.numel() // 6, dtype=torch.int64)  # at least as many as there are entries
    found = _library.hc_sparse_positions(payload.data_ptr(), payload.numel(), numel, positions.data_ptr())
    if found < 0:
        raise ValueError("positions are not ascending or past the end, or bytes do not fit their counts")
    return positions[:found]


def positions_encode(positions: Tensor, numel: int) -> Tensor:
    assert _library is not None
    positions = positions.contiguous()
    packed = torch.empty(position_bytes(numel, positions.numel()), dtype=torch.uint8)
    _library.hc_positions_encode(positions.data_ptr(), positions.numel(), numel, packed.data_ptr())
    return packed


def positions_decode(packed: Tensor, numel: int, entries: int) -> Tensor:
    assert _library is not None
    positions = torch.empty(entries, dtype=torch.int64)
    into = entries, numel, positions.data_ptr()
    if wrong := _library.hc_positions_decode(packed.data_ptr(), packed.numel(), *into):
        raise ValueError(_POSITION_ERRORS[wrong])
    return positions


def narrow_encode(exact: Tensor, numel: int, bits: int, kept: Tensor) -> Tensor:
    assert _library is not None
    payload = torch.empty(narrow_bytes(numel, (exact.numel() - sparse_bytes(numel, 0)) // 6, bits), dtype=torch.uint8)
    into = kept.data_ptr(), payload.data_ptr()
    _library.hc_narrow_encode(exact.data_ptr(), exact.numel(), numel, bits, *into)
    return payload


def narrow_decode(payload: Tensor, numel: int, bits: int) -> tuple[Tensor, Tensor]:
    assert _library is not None
    capacity = 8 * payload.numel() // bits  # at least as many as there are entries
    values, positions = torch.empty(capacity), torch.empty(capacity, dtype=torch.int64)
    shape = payload.data_ptr(), payload.numel(), numel, bits
    found = _library.hc_narrow_decode(*shape, values.data_ptr(), positions.data_ptr(), capacity)
    if found < 0:
        raise ValueError(_NARROW_ERRORS[-found])
    return values[:found], positions[:found]


def narrow_sum(payloads: Sequence[Tensor], bits: int, divisor: float, out: Tensor) -> float:
    assert _library is not None
    bound = c_float()
    shape = len(payloads), out.numel(), bits, divisor, out.data_ptr(), ctypes.byref(bound)
    failed = _checked(_library.hc_narrow_sum(_addresses(payloads), _lengths(payloads), *shape))
    return _bound(failed, _NARROW_ERRORS, bound.value, out)


def adacomp_encode(gradient: Tensor, residual: Tensor | None, kept: Tensor, bin_size: int, payload: Tensor) -> int:
    assert _library is not None
    if payload.numel() < 4:
        return TOO_LARGE if accumulate(gradient, residual, kept) < float("inf") else NOT_FINITE
    into = kept.data_ptr(), bin_size, token_width(bin_size), payload.data_ptr(), payload.numel()
    return _checked(_library.hc_adacomp_encode(*_array(gradient), _start(residual), *into))


def gaps_sum(payloads: Sequence[Tensor], width: int, divisor: float, out: Tensor) -> float:
    assert _library is not None
    bound = c_float()
    shape = len(payloads), out.numel(), width, divisor, out.data_ptr(), ctypes.byref(bound)
    failed = _checked(_library.hc_gaps_sum(_addresses(payloads), _lengths(payloads), *shape))
    return _bound(failed, _GAPS_ERRORS, bound.value, out)


def prune_encode(gradient: Tensor, threshold: float, key: int, payload: Tensor) -> int:
    assert _library is not None
    start = 4 + ternary_bytes(gradient.numel())
    capacity = (payload.numel() - start) // 4
    if capacity < 0:
        return TOO_LARGE if largest(gradient) < float("inf") else NOT_FINITE
    c_float.from_address(payload.data_ptr()).value = threshold
    into = threshold, key, payload.data_ptr() + 4, capacity
    entries = int(_library.hc_prune_encode(*_array(gradient), *into))
    return entries if entries < 0 else start + 4 * entries


def prune_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    assert _library is not None
    top = c_int32()
    shape = len(payloads), out.numel(), divisor, out.data_ptr(), ctypes.byref(top)
    failed = _checked(_library.hc_prune_sum(_addresses(payloads), _lengths(payloads), *shape))
    if failed:
        raise PayloadError(-failed - 1, "no threshold, or another number of elements than its codes say")
    return _magnitude(top.value)


def prune_dense(gradient: Tensor, threshold: float, key: int) -> tuple[Tensor, float, int]:
    """As kernels.prune.prune_dense, for contiguous float32 on the CPU."""
    assert _library is not None
    pruned, total = torch.empty_like(gradient), c_double()
    start, numel = gradient.data_ptr(), gradient.numel()
    below = _library.hc_prune_dense(start, numel, threshold, key, pruned.data_ptr(), ctypes.byref(total))
    return pruned, total.value, int(below)


def project(gradient: Tensor, residual: Tensor | None, kept: Tensor, lines: Tensor, left: Tensor) -> float:
    assert _library is not None
    into = _start(residual), kept.data_ptr(), lines.data_ptr(), len(lines), left.data_ptr()
    shape = gradient.data_ptr(), _TYPES[gradient.dtype], *_shape(kept, left, lines)
    return _magnitude(_checked(_library.hc_project(*shape, *into)))


def backproject(kept: Tensor, left: Tensor, lines: Tensor) -> None:
    assert _library is not None
    into = left.data_ptr(), len(lines), lines.data_ptr()
    _library.hc_backproject(kept.data_ptr(), *_shape(kept, left, lines), *into)


def rebuild(kept: Tensor, left: Tensor, mine: Tensor, lines: Tensor, divisor: float, out: Tensor) -> float:
    assert _library is not None
    assert mine.shape == lines.shape
    factors = left.data_ptr(), mine.data_ptr(), lines.data_ptr(), len(lines)
    shape = kept.data_ptr(), *_shape(kept, left, lines)
    return _magnitude(_library.hc_rebuild(*shape, *factors, divisor, out.data_ptr()))


def _shape(kept: Tensor, left: Tensor, lines: Tensor) -> tuple[int, int]:
    """Of the matrix `kept`, [rows * columns], where `left` is [rows, rank] and `lines` [rank, columns]."""
    (rows, rank), (of_lines, columns) = left.shape, lines.shape
    assert kept.numel() == rows * columns
    assert rank == of_lines
    assert left.is_contiguous()
    assert lines.is_contiguous()
    return rows, columns


def orthonormalise(matrix: Tensor) -> Tensor:
    assert _library is not None
    basis = torch.empty_like(matrix)
    _checked(_library.hc_orthonormalise(matrix.data_ptr(), *matrix.shape, basis.data_ptr()))
    return basis


def momentum(gradient: Tensor, velocity: Tensor | None, factor: float, nesterov: bool, out: Tensor) -> None:
    assert _library is not None
    _library.hc_momentum(*_array(gradient), _start(velocity), factor, nesterov, out.data_ptr())


def chunk_largest(values: Tensor, chunk: int) -> Tensor:
    assert _library is not None
    positions = torch.empty(-(-values.numel() // chunk), dtype=torch.int64)
    _library.hc_chunk_largest(values.data_ptr(), values.numel(), chunk, positions.data_ptr())
    return positions


def solve_units(units: np.ndarray, costs: np.ndarray, levels: int) -> np.ndarray | None:
    """As kernels.solver.solve_units."""
    assert _library is not None
    units, costs = np.ascontiguousarray(units, np.int32), np.ascontiguousarray(costs, np.float64)
    assert costs.shape == units.shape, f"{costs.shape} costs for {units.shape} units"
    table = np.empty((len(units) + 1) * (levels // _SOLVER_TILE + 2) * _SOLVER_TILE)
    choice = np.empty(len(units), np.int32)
    into = table.ctypes.data, choice.ctypes.data
    return choice if _library.hc_solve(units.ctypes.data, costs.ctypes.data, *units.shape, levels, *into) else None


def _array(gradient: Tensor) -> tuple[int, int, int]:
    return gradient.data_ptr(), _TYPES[gradient.dtype], gradient.numel()


def _magnitude(bits: int) -> float:
    return float("inf") if bits >= _INFINITY_BITS else c_float.from_buffer(c_int32(bits)).value


def _addresses(payloads: Sequence[Tensor]) -> Any:
    if isinstance(payloads, Payloads):
        return payloads.addresses.ctypes.data
    return (c_void_p * len(payloads))(*(payload.data_ptr() for payload in payloads))


def _start(residual: Tensor | None) -> int | None:
    return None if residual is None else residual.data_ptr()


def _lengths(payloads: Sequence[Tensor]) -> Any:
    if isinstance(payloads, Payloads):
        return payloads.lengths.ctypes.data
    return (c_size_t * len(payloads))(*(payload.numel() for payload in payloads))


def _checked(result: int) -> int:
    if result == _NO_MEMORY:
        raise MemoryError("no memory for a kernel to work in")
    return result


def _bound(failed: int, errors: Sequence[str], bound: float, out: Tensor) -> float:
    """`bound` where it says something; raises what `failed`, a sum's result, stands for."""
    if failed:
        rank, code = divmod(-failed, _ERROR_CODES)
        raise PayloadError(rank, errors[code])
    return bound if bound < float("inf") else largest(out)


def _room(payload: Tensor, length: int) -> int:
    assert payload.numel() >= length, f"{length} bytes do not fit in {payload.numel()}"
    return length


def _expect(payloads: Sequence[Tensor], length: int) -> None:
    if isinstance(payloads, Payloads) and bool((payloads.lengths == length).all()):
        return
    for rank, payload in enumerate(payloads):
        if payload.numel() != length:
            raise PayloadError(rank, f"{payload.numel()} bytes instead of {length}")


def requested() -> str:
    """What the environment asks for: torch, plain or avx2. Raises ValueError for anything else."""
    level = os.environ.get(VARIABLE, LEVELS[-1])
    if level not in ("torch", *LEVELS):
        raise ValueError(f"{VARIABLE} must be torch, {' or '.join(LEVELS)}: {level!r}")
    return level
