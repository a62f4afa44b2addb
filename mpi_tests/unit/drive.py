"""Drives exchanges of simulated ranks without engine or transport, so that every frame can be seen and spoilt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hvd_compress import GradientCompression, wire
from hvd_compress.compressors import (
    AdaCompCompressor,
    BF16Compressor,
    Codec,
    Compressor,
    DGCCompressor,
    FP16Compressor,
    NoneCompressor,
    OneBitCompressor,
    Parameter,
    PowerSGDCompressor,
    QSGDCompressor,
    ScaleComCompressor,
    Slot,
    Step,
    StochasticPruningCompressor,
    TernGradCompressor,
    TopKCompressor,
)
from hvd_compress.memory import ErrorFeedback
from hvd_compress.requests import Allgather, Allreduce, Broadcast, ReduceOp, sent_bytes

SUMMED = {"none": NoneCompressor(), "fp16": FP16Compressor()}
TERNGRAD = {
    "terngrad": TernGradCompressor(),
    "terngrad_unclipped": TernGradCompressor(clip_sigma=None),
    "terngrad_local": TernGradCompressor(share_scaler=False),
    "terngrad_local_unclipped": TernGradCompressor(clip_sigma=None, share_scaler=False),
}
ADACOMP = {
    "adacomp": AdaCompCompressor(),
    "adacomp_5": AdaCompCompressor(bin_size=5),
    "adacomp_64": AdaCompCompressor(bin_size=64),
    "adacomp_65": AdaCompCompressor(bin_size=65),
    "adacomp_500": AdaCompCompressor(bin_size=500),
    "adacomp_16384": AdaCompCompressor(bin_size=16384),
}
TOPK = {
    "topk_0.01": TopKCompressor(density=0.01),
    "topk_0.3": TopKCompressor(density=0.3),
    "topk_1.0": TopKCompressor(density=1.0),
}
NARROW = {
    "topk_0.05_in_8_bits": TopKCompressor(density=0.05, value_bits=8),
    "topk_0.3_in_4_bits": TopKCompressor(density=0.3, value_bits=4),
}
QSGD = {
    "qsgd": QSGDCompressor(),
    "qsgd_1": QSGDCompressor(bits=1),
    "qsgd_3_l2": QSGDCompressor(bits=3, bucket_size=64, norm="l2"),
    "qsgd_8": QSGDCompressor(bits=8, bucket_size=256),
}
PRUNED = {
    "stochastic_pruning": StochasticPruningCompressor(),
    "stochastic_pruning_0.5": StochasticPruningCompressor(rate=0.5),
}
STATEFUL: dict[str, Compressor] = {**ADACOMP, **TOPK, **NARROW}
FRAMED: dict[str, Compressor] = {"bf16": BF16Compressor(), **TERNGRAD, **QSGD, **PRUNED, **STATEFUL}
MIXED: dict[str, Compressor] = {  # frames, sums or both; more of their contract is in tests of their own
    "powersgd": PowerSGDCompressor(),
    "scalecom": ScaleComCompressor(density=0.05),
    "scalecom_filtered": ScaleComCompressor(beta=0.5, chunk=50),
    "dgc": DGCCompressor(density=0.05),
    "onebit": OneBitCompressor(),
}
EVERY: dict[str, Compressor] = {**SUMMED, **FRAMED, **MIXED}
SIZES = (1, 2, 3, 5)

_OPS = {ReduceOp.SUM: torch.add, ReduceOp.MAX: torch.maximum, ReduceOp.MIN: torch.minimum}


def slot_of(
    shape: Sequence[int],
    name: str = "w",
    index: int = 0,
    *,
    step: Step | None = None,
    seed: int = 0,
    memory: ErrorFeedback | None = None,
) -> Slot:
    """That of a parameter by itself."""
    return Slot(Parameter(name, index, torch.Size(shape), seed), step or Step(), memory or ErrorFeedback())


@dataclass
class Outcome:
    totals: list[Tensor | None]  # by rank
    memories: list[ErrorFeedback]
    frames: list[Tensor] = field(default_factory=list)  # by rank; empty for summed compressors
    sent_bytes: list[int] = field(default_factory=list)

    def parsed(self) -> list[wire.Frame]:
        return [wire.unpack(frame, rank) for rank, frame in enumerate(self.frames)]


def run(
    compressor: Compressor,
    gradients: Sequence[Tensor],
    *,
    name: str = "weight",
    index: int = 0,
    step: int = 0,
    seed: int = 0,
    residuals: Sequence[Tensor | None] | None = None,
    tamper: Callable[[list[Tensor]], list[Tensor]] = list,
) -> Outcome:
    """One exchange by as many ranks as there are gradients; `tamper` may change the frames that all of them receive."""
    size = len(gradients)
    memories = [ErrorFeedback() for _ in gradients]
    for memory, residual in zip(memories, residuals or ()):
        if residual is not None:
            memory.residuals[name] = residual.clone()
    slots = [
        slot_of(gradient.shape, name, index, step=Step(step, rank, size), seed=seed, memory=memory)
        for rank, (gradient, memory) in enumerate(zip(gradients, memories))
    ]
    outcome = Outcome([None] * size, memories, sent_bytes=[0] * size)
    exchanges = [compressor.exchange(slot, gradient) for slot, gradient in zip(slots, gradients)]
    answers: list[Any] = [None] * size
    while True:
        requests = []
        for rank, exchange in enumerate(exchanges):
            try:
                requests.append(exchange.send(answers[rank]))
                outcome.sent_bytes[rank] += sent_bytes(requests[-1])
            except StopIteration as end:
                outcome.totals[rank] = None if end.value is None else end.value.values
        if not requests:
            return outcome
        assert len(requests) == size, "some ranks have finished, others ask on"
        assert len({type(request) for request in requests}) == 1, "ranks ask for different collectives"
        if isinstance(requests[0], Allreduce):
            combined = reduce(_OPS[requests[0].op], [request.tensor.contiguous() for request in requests])
            answers = [combined.clone() for _ in requests]
        elif isinstance(requests[0], Broadcast):
            (root,) = {request.root for request in requests}
            answers = [requests[root].tensor.clone() for _ in requests]
        else:
            assert isinstance(requests[0], Allgather)
            outcome.frames = [request.frame.clone() for request in requests]
            answers = [[frame.clone() for frame in tamper(outcome.frames)] for _ in requests]


def bits(tensor: Tensor) -> bytes:
    """Everything of a tensor's values that can differ, NaN payloads and signs of zero included."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Gradient-like: heavy tails, as normal numbers cubed have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).pow(3).mul_(scale)


def gathering(compressor: Compressor) -> dict[str, str]:
    """The option by which many ranks exchange as `run` does, which knows no other way."""
    return {"topology": "gather"} if isinstance(compressor, Codec) else {}


def bound(compressor: Compressor, shapes: dict[str, tuple[int, ...]], **options: Any) -> GradientCompression:
    """A compression of parameters of these shapes, however small."""
    named = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
    options.setdefault("min_numel", 1)
    return GradientCompression(compressor, named, **options)
