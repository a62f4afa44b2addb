"""Measures what a rank has to do and to move in a step: simulated ranks, the code that real ones run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compressors import SummedCompressor
from ..gradient_compression import GradientCompression
from ..local import LocalRanks
from ..session import BUCKET_BYTES
from .traffic import Collective, Recorder

Named = Sequence[tuple[str, Tensor]]
Make = Callable[[Iterable[tuple[str, Tensor]]], GradientCompression]

MOST_ELEMENTS = 1 << 24  # of all simulated ranks together; of larger models some tensors stand for all
_DIFFERENT = 4  # gradients; as many ranks as there are share each
_STEPS = 5  # the first two make memory


@dataclass(frozen=True)
class Work:
    """What one rank does in a step, for all of its gradients.

    rounds: of every bucket alike, the bytes that each collective moves: those of all buckets together.
    """

    parameters: int
    tensors: int
    bucket_bytes: int
    encode_seconds: float
    decode_seconds: float
    rounds: tuple[tuple[Collective, ...], ...]
    held_bytes: int  # between steps

    @property
    def received_bytes(self) -> float:
        return sum(collective.received_bytes for collectives in self.rounds for collective in collectives)

    @property
    def outside_bytes(self) -> float:
        """Of these, from other nodes."""
        return sum(collective.outside_bytes for collectives in self.rounds for collective in collectives)

    @property
    def buckets(self) -> int:
        return max(1, round(4 * self.parameters / self.bucket_bytes))


def measured(make: Make, named: Named, ranks: int, ranks_per_node: int = 1, *, steps: int = _STEPS) -> Work:
    """Take a few steps on this machine, in this thread, and count. `named`: float32 tensors; only shapes matter.

    Raises ValueError for a method that cannot do so, as for a topology that it does not have.
    """
    sample = _sample(named, MOST_ELEMENTS // ranks)
    scale = sum(tensor.numel() for _, tensor in named) / sum(tensor.numel() for _, tensor in sample)
    compressions = [make(sample) for _ in range(ranks)]
    first = compressions[0]
    held = make(named)
    held.unregister()
    together = LocalRanks(compressions, readers=[0])
    assert first.attached is not None
    recorder = Recorder(first.attached, ranks_per_node)
    first.telemetry.watch(records=1)
    generator = torch.Generator().manual_seed(0)
    known = [{name: _like_gradients(t.shape, generator) for name, t in sample} for _ in range(_DIFFERENT)]
    spans: dict[str, list[float]] = {"encode": [], "decode": []}
    mine = {name: torch.empty_like(gradient) for name, gradient in known[0].items()}
    for _ in range(steps):
        recorder.collectives.clear()
        for name, gradient in mine.items():
            gradient.copy_(known[0][name])
        together.exchange([mine, *(known[rank % _DIFFERENT] for rank in range(1, ranks))], in_place=True)
        for compression in compressions:
            compression.settle()
        for kind, found in spans.items():
            found.append(getattr(first.telemetry.history[-1], kind))
    seconds = {kind: statistics.median(found[2:] or found) for kind, found in spans.items()}
    if isinstance(first.compressor, SummedCompressor):  # which Horovod adds up itself, but for the casts
        seconds = _casts(first.compressor, known[0].values(), ranks)
    return Work(
        parameters=sum(tensor.numel() for _, tensor in named),
        tensors=len(named),
        bucket_bytes=first.options.bucket_bytes or BUCKET_BYTES,
        encode_seconds=scale * seconds["encode"],
        decode_seconds=scale * seconds["decode"],
        rounds=_rounds(recorder.collectives, scale),
        held_bytes=held.memory_needed().total_bytes,
    )


def _like_gradients(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Cubes of normal numbers: few are large, as of gradients. AdaComp's bytes depend on it."""
    return torch.randn(shape, generator=generator).pow_(3)


def _sample(named: Named, most_elements: int) -> Named:
    """All tensors, or every n-th of those in the order of their sizes."""
    by_size = sorted(named, key=lambda pair: -pair[1].numel())
    for stride in itertools.count(1):
        taken = {name for name, _ in by_size[::stride]}
        sample = [pair for pair in named if pair[0] in taken]
        if len(sample) == 1 or sum(tensor.numel() for _, tensor in sample) <= most_elements:
            return sample
    raise AssertionError("unreachable")


def _rounds(collectives: Sequence[Collective], scale: float) -> tuple[tuple[Collective, ...], ...]:
    """By the round of their bucket; of each kind the sum over the buckets, for the whole model."""
    rounds = []
    for number in sorted({collective.round for collective in collectives}):
        kinds: dict[str, list[Collective]] = {}
        for collective in collectives:
            if collective.round == number:
                kinds.setdefault(collective.kind, []).append(collective)
        rounds.append(
            tuple(
                Collective(
                    kind,
                    "all",
                    number,
                    scale * sum(each.received_bytes for each in of_kind),
                    scale * sum(each.outside_bytes for each in of_kind),
                )
                for kind, of_kind in kinds.items()
            )
        )
    return tuple(rounds)


def _casts(compressor: SummedCompressor, gradients: Iterable[Tensor], size: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {"encode": [], "decode": []}
    gradients = list(gradients)
    for _ in range(_STEPS):
        start = time.perf_counter()
        summands = [compressor.summand(gradient, size) for gradient in gradients]
        middle = time.perf_counter()
        for gradient, summand in zip(gradients, summands):
            compressor.restore(summand, gradient.shape, gradient.dtype, size)
        seconds["encode"].append(middle - start)
        seconds["decode"].append(time.perf_counter() - middle)
    return {kind: statistics.median(found[2:]) for kind, found in seconds.items()}
