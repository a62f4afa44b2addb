"""Which implementation runs: the C++ kernels for tensors that they can read, torch operations for all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ..log import log
from . import native, prune, reference, sparse, topk

_level: str | None = None  # "torch", or one of native.LEVELS; None before the first use


def use(level: str) -> str:
    """Use "torch", or the C++ kernels of "plain" or at most "avx2", from now on; returns what is in use then."""
    global _level
    _level = "torch" if level == "torch" else native.select(level) or "torch"
    return _level


def in_use() -> str:
    """The implementation for contiguous float32, float16 and bfloat16 tensors on the CPU: torch, plain or avx2."""
    level = _level
    if level is None:
        asked = native.requested()
        level = use(asked)
        if level == "torch" != asked:
            log.warning(
                "the C++ kernels are not there, as if installed without a compiler: torch operations, ten and more "
                "times slower, take their place. Remedy: install a C++17 compiler, and hvd_compress again."
            )
    return level


def of(gradient: Tensor) -> ModuleType:
    """The module, native or reference, whose functions take this tensor."""
    return native if in_use() != "torch" and native.takes(gradient) else reference


def host_memory(numel: int, device: torch.device) -> Tensor | None:
    """float32 [numel] on the CPU for what is copied to `device`, pinned for CUDA; None where that is the CPU."""
    if device.type == "cpu":
        return None
    return torch.empty(numel, dtype=torch.float32, pin_memory=device.type == "cuda")


def on_host(add: Callable[[Tensor], float], out: Tensor) -> float:
    """Call `add`, which fills a tensor from payloads on the CPU, for `out`, float32 [numel] on any device.

    The kernels write to the CPU's memory alone: what belongs on another device is added up there, then copied once.
    """
    host = host_memory(out.numel(), out.device)
    if host is None:
        return add(out)
    bound = add(host)
    out.copy_(host)  # returns when it is done: whoever reads `out` may do so on another stream than this thread's
    return bound


def largest_positions(values: Tensor, k: int) -> Tensor:
    """As kernels.topk.topk_indices, of finite float32 [numel]."""
    if not 0 < k < values.numel() or (kernel := of(values)) is reference:
        return topk.topk_indices(values, k)
    payload = torch.empty(sparse.sparse_bytes(values.numel(), k), dtype=torch.uint8)
    kernel.topk_encode(values, None, torch.empty_like(values), k, payload)
    return kernel.sparse_positions(payload, values.numel())


def find_frames(
    buffers: Sequence[Tensor], starts: np.ndarray, expected: bytes, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """As native.find_frames; None, too, where there are no kernels."""
    if in_use() == "torch":
        return None
    return native.find_frames(starts, np.fromiter(map(Tensor.numel, buffers), np.int64, len(buffers)), expected, count)


def orthonormalise(matrix: Tensor) -> Tensor:
    """As kernels.lowrank.orthonormalise, of finite float32 [n, r]."""
    matrix = matrix.contiguous()
    result: Tensor = of(matrix).orthonormalise(matrix)
    return result


def prune_dense(gradient: Tensor, threshold: float, key: int) -> tuple[Tensor, float, int]:
    """As kernels.prune.prune_dense, in one pass where a kernel can."""
    if 0 < threshold < torch.finfo(torch.float32).max and gradient.dtype == torch.float32 and gradient.numel():
        return of(gradient).prune_dense(gradient, threshold, key)
    return prune.prune_dense(gradient, threshold, key)
