"""Small models, gradients that are known in advance, and the simulation that a job's result is compared with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_compress import Compression, GradientCompression
from hvd_compress.local import LocalRanks

from .job import Job, NamedParameters

Gradients = dict[str, Tensor]
MakeCompression = Callable[[NamedParameters], GradientCompression]

# Small tensors too, a bucket a parameter, so that as much as possible is under way at once.
OPTIONS = {"min_numel": 1, "bucket_bytes": 1}

COMPRESSIONS: dict[str, MakeCompression] = {
    "none": lambda named: Compression.none(named, bucket_bytes=1),
    "fp16": lambda named: Compression.fp16(named, bucket_bytes=1),
    "bf16": lambda named: Compression.bf16(named, **OPTIONS),
    "terngrad": lambda named: Compression.terngrad(named, **OPTIONS),
    "qsgd": lambda named: Compression.qsgd(named, topology="scatter", **OPTIONS),
    "adacomp": lambda named: Compression.adacomp(named, **OPTIONS),
    "scattered": lambda named: Compression.topk(named, density=0.1, topology="scatter", **OPTIONS),
    "topk": lambda named: Compression.topk(named, density=0.1, **OPTIONS),
    "stochastic_pruning": lambda named: Compression.stochastic_pruning(named, rate=0.8, **OPTIONS),
    "powersgd": lambda named: Compression.powersgd(named, approximation_rank=1, **OPTIONS),
    "scalecom": lambda named: Compression.scalecom(named, density=0.1, **OPTIONS),
    "scalecom_4_bits": lambda named: Compression.scalecom(named, density=0.1, value_bits=4, **OPTIONS),
    "dgc": lambda named: Compression.dgc(named, density=0.1, momentum=0.5, **OPTIONS),
}
# Added in rank order by every rank: the same bits everywhere.
IN_FRAMES = ("bf16", "terngrad", "qsgd", "adacomp", "scattered", "topk", "scalecom_4_bits", "stochastic_pruning")
IN_SUMS = ("powersgd", "scalecom", "dgc")  # of several rounds, with residuals and more; added up by the backend
WITH_RESIDUALS = ("adacomp", "scattered", "topk")

SHAPES = {"a": (30, 20), "b": (8, 4, 3, 3), "c": (40, 10)}


def parameters(shapes: Mapping[str, Sequence[int]] = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Parameters by name, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def gradients(of: Mapping[str, Tensor], rank: int, step: int, seed: int = 0) -> Gradients:
    """The gradients of one rank in one step: known to all, equal to those of no other rank or step."""
    generator = torch.Generator().manual_seed(10_000 * seed + 100 * step + rank)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in of.items()}


def backward(of: Mapping[str, Tensor], known: Gradients, order: Sequence[str] | None = None) -> None:
    """Give `of` their gradients through autograd, those of `order` one after the other in this order."""
    loss = torch.zeros(())
    for name in reversed(list(order or known)):  # autograd runs what was recorded last first
        loss = loss + (of[name] * known[name]).sum().float()
    loss.backward()


def sgd(of: Mapping[str, Tensor], **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(of.values(), **{"lr": 0.1, **options})


def grads(of: Mapping[str, Tensor]) -> Gradients:
    """What stands in `grad` now."""
    return {name: p.grad.clone() for name, p in of.items() if p.grad is not None}


def copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def takes_part(size: int, compression: GradientCompression) -> bool:
    """Whether a compression does anything among so many ranks: one rank has a use for a momentum alone, and DDP alone
    calls it there."""
    on_torch = os.environ.get("HVD_COMPRESS_BACKEND") == "torch"
    return size > 1 or (on_torch and bool(compression.compressor.replaces))


class Simulation:
    """What a job of as many ranks must do to gradients, by simulated ranks in this process."""

    def __init__(self, size: int, make: MakeCompression, of: Mapping[str, Tensor]) -> None:
        self.size = size
        compressions = [make(list(of.items())) for _ in range(size)]
        self.compression = compressions[0]
        self._ranks = LocalRanks(compressions) if takes_part(size, compressions[0]) else None

    def exchange(self, of_ranks: Sequence[Gradients], *, average: bool = True) -> Gradients:
        assert len(of_ranks) == self.size
        if self._ranks is None:
            return dict(of_ranks[0])
        results = self._ranks.exchange(of_ranks, average=average)
        assert all(equal(result, results[0]) for result in results)
        return results[0]

    def load(self, of_ranks: Sequence[Gradients]) -> None:
        """Go on from these residuals, by rank."""
        assert self._ranks is not None
        for compression, mine in zip(self._ranks.compressions, of_ranks):
            compression.memory.load_state_dict(mine)

    def residuals(self, rank: int) -> Gradients:
        return residuals(self._ranks.compressions[rank]) if self._ranks else {}


def residuals(compression: GradientCompression) -> Gradients:
    """This rank's."""
    return compression.state_dict()["residuals"].get(compression.rank, {})


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(digest({"": one[name]}) == digest({"": other[name]}) for name in one)


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """To the bit; else says where they differ."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """To rounding."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all bits."""
    parts = (t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def assert_replicated(job: Job, tensors: Mapping[str, Tensor]) -> None:
    """The same bits on every rank."""
    assert len(set(job.allgather(digest(tensors)))) == 1, "the ranks differ"
