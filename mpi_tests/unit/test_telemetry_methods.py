"""Telemetry of every method of `Compression`: its bytes, its rates, its errors, each found out in another way."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress import GradientCompression
from hvd_compress.local import LocalRanks
from hvd_compress.telemetry import ParameterStep
from hvd_compress.transports.local import LocalTransport

from .drive import random
from .every import METHODS, PUBLIC, VARIANTS

SHAPES = {"a": (40, 60), "b": (30, 50), "vector": (7,)}
STEPS = 6
FEEDBACK = ("AdaCompCompressor", "TopKCompressor", "PowerSGDCompressor")
every = pytest.mark.parametrize("method", VARIANTS)


def ranks_of(method: str, size: int) -> LocalRanks:
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    ranks = LocalRanks([VARIANTS[method](named, min_numel=100) for _ in range(size)])
    for compression in ranks.compressions:
        compression.telemetry.watch(records=1000, errors=True)
    return ranks


def gradients(step: int, rank: int = 0) -> dict[str, Tensor]:
    return {n: random(*shape, seed=100 * step + 10 * rank + i) for i, (n, shape) in enumerate(SHAPES.items())}


def records_of(compression: GradientCompression) -> list[ParameterStep]:
    return [record for record in compression.telemetry.history if isinstance(record, ParameterStep)]


def test_no_method_is_left_out():
    assert METHODS.keys() == PUBLIC


class Owed:
    """What a method has to send of one parameter, by its formula, from gradients and results of a single rank."""

    def __init__(self, compression: GradientCompression, name: str) -> None:
        self.compressor: Any = compression.compressor
        self.kind = type(self.compressor).__name__
        self.dense = name == "vector"
        self.residual: Any = 0.0
        self.momentum: Any = 0.0

    def before(self, gradient: Tensor) -> Tensor:
        self.gradient = gradient
        if self.kind == "DGCCompressor":
            m = self.compressor.momentum
            self.momentum = m * (self.momentum + gradient) if self.compressor.nesterov else m * self.momentum + gradient
            gradient = self.momentum + gradient if self.compressor.nesterov else self.momentum
        if self.kind == "OneBitCompressor" and not self.dense:
            self.momentum = self.compressor.momentum * self.momentum + gradient
            return (1 - self.compressor.momentum) * (self.residual + self.momentum)
        return self.residual + gradient

    def after(self, owed: Tensor, sent: Tensor) -> None:
        if self.dense:
            self.residual = 0.0
        elif self.kind == "DGCCompressor":
            self.residual, self.momentum = owed - sent, torch.where(sent == 0, self.momentum, 0.0)
        elif self.kind == "OneBitCompressor":
            self.residual = (owed - sent) / (1 - self.compressor.momentum)
        elif self.kind == "ScaleComCompressor" and self.compressor.value_bits < 32:  # unbiased, without feedback
            picked = owed.abs().view(-1).topk(math.ceil(self.compressor.density * owed.numel())).indices
            self.residual = owed.view(-1).index_fill(0, picked, 0.0).view_as(owed)
        elif self.kind == "ScaleComCompressor":
            self.residual = self.residual + self.compressor.beta * (owed - sent - self.residual)
        elif self.kind in FEEDBACK or (self.kind == "MaskedCompressor" and not self.compressor.masks.masks):
            self.residual = owed - sent


@every
def test_errors_are_what_is_owed_and_not_sent(method):
    ranks = ranks_of(method, 1)
    (compression,) = ranks.compressions
    formulas = {name: Owed(compression, name) for name in SHAPES}
    expected = []
    for step in range(STEPS):
        mine = gradients(step)
        owed = {name: formulas[name].before(gradient) for name, gradient in mine.items()}
        (sent,) = ranks.exchange([mine])
        for name in SHAPES:
            expected.append(float((owed[name] - sent[name]).norm() / owed[name].norm()))
            formulas[name].after(owed[name], sent[name])
    found = [record.error for record in records_of(compression)]
    assert found == pytest.approx(expected, rel=1e-4, abs=2e-7)
    lossless = method in ("none", "topk of everything")
    assert all(error == 0 for error in found) == lossless


RATES = {
    "none": None,
    "fp16": None,
    "bf16": None,
    "terngrad": None,
    "terngrad of its own scaler": None,
    "masked": None,
    "adacomp": 50,
    "topk of everything": 1,
    "qsgd": 4,
    "qsgd of 8 bits": 8,
    "onebit": 1,
    "onebit with momentum": 1,
    "powersgd": 2,
    "scalecom by chunks": 0.04,
    "dgc of Nesterov": 0.05,
    "stochastic_pruning": 0.8,
    "accordion": 4,
}


@every
def test_rates_are_those_that_gradients_travel_at(method):
    ranks = ranks_of(method, 2)
    chosen = []
    for step in range(STEPS):
        for compression in ranks.compressions:
            compression.settle()
        chosen.append({slot.name: slot.rate for slot in ranks.compressions[0].slots})
        ranks.exchange([gradients(step, rank) for rank in range(2)])
    for compression in ranks.compressions:
        for record in records_of(compression):
            own = None if record.parameter == "vector" else RATES.get(method, 0.05)
            assert record.rate == (chosen[record.step][record.parameter] or own)
    assert any(chosen[-1].values()) == (method in ("lgreco", "accordion", "fractrain"))


@every
def test_bytes_are_those_that_a_rank_gives_to_its_transport(method, monkeypatch):
    given = [0, 0]

    def counting(primitive: str) -> None:
        real = getattr(LocalTransport, primitive)

        def counted(self: LocalTransport, name: str, what: Any, *more: Any) -> Any:
            tensors = [what] if isinstance(what, Tensor) else what
            if primitive == "alltoall":
                tensors = [part for destination in what for part in destination]
            given[self.rank] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return real(self, name, what, *more)

        monkeypatch.setattr(LocalTransport, primitive, counted)

    for primitive in ("allreduce", "allgather", "broadcast", "alltoall"):
        counting(primitive)
    ranks = ranks_of(method, 2)
    for step in range(STEPS):
        ranks.exchange([gradients(step, rank) for rank in range(2)])
    for rank, compression in enumerate(ranks.compressions):
        compression.settle()  # what is late counts when it has ended
        beside = compression.controller.sent_bytes if compression.controller else 0
        beside += compression.telemetry.agreement_bytes
        assert compression.telemetry.total.sent_bytes + beside == given[rank]
        assert sum(record.sent_bytes for record in records_of(compression)) + beside == given[rank]
        raw = STEPS * sum(4 * math.prod(shape) for shape in SHAPES.values())
        assert compression.telemetry.total.raw_bytes == raw


@every
def test_to_look_at_errors_changes_no_bit(method):
    watched, plain = ranks_of(method, 2), ranks_of(method, 2)
    for compression in plain.compressions:
        compression.telemetry.errors = False
    for step in range(STEPS):
        mine = [gradients(step, rank) for rank in range(2)]
        for one, other in zip(watched.exchange(mine), plain.exchange(mine)):
            assert all(torch.equal(one[name], other[name]) for name in SHAPES)
