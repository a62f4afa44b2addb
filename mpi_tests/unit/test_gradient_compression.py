"""The interface that Horovod calls, without Horovod: what it is given to add up, and what it gets back."""

from __future__ import annotations

import random
import sys
import types
from typing import Any

import pytest
import torch

from hvd_compress import Compression, GradientCompression, fingerprint, horovod_hooks
from hvd_compress.transports.local import LocalTransport, LocalWorld

from .drive import EVERY, SIZES, bits, run
from .drive import random as gradient_like

SHAPES = {"a": (40, 50), "bias": (40,), "conv": (12, 10, 3, 3), "small": (3, 4)}
METHODS = {
    "none": (lambda named: Compression.none(named), EVERY["none"]),
    "fp16": (lambda named: Compression.fp16(named), EVERY["fp16"]),
    "bf16": (lambda named: Compression.bf16(named, topology="gather"), EVERY["bf16"]),
    "terngrad": (lambda named: Compression.terngrad(named), EVERY["terngrad"]),
    "adacomp": (lambda named: Compression.adacomp(named), EVERY["adacomp"]),
    "topk": (lambda named: Compression.topk(named, topology="gather"), EVERY["topk_0.01"]),
}


class Unchecked(fingerprint.Registry):
    def check(self, transport: Any) -> None:
        """Ranks that are simulated in one thread cannot wait for one another here."""


class Ranks:
    """Simulated ranks under what does as Horovod does."""

    def __init__(self, method: str, size: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32):
        self.world = LocalWorld(size)
        transports = iter(self.world.transports)

        def make(process_set: object) -> LocalTransport:
            transport = next(transports)
            transport.members = list(range(size))
            transport.is_current = lambda: True
            return transport

        module = types.ModuleType("hvd_compress.transports.horovod")
        module.HorovodTransport = make
        monkeypatch.setitem(sys.modules, "hvd_compress.transports.horovod", module)
        self.parameters = [
            {n: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for n, shape in SHAPES.items()} for _ in range(size)
        ]
        self.compressions: list[GradientCompression] = []
        for named in self.parameters:
            compression = METHODS[method][0](list(named.items()))
            compression.unregister()
            compression._registry = Unchecked()  # as in a process of its own
            self.compressions.append(compression)

    def compress(self, step: int = 0, dtype: torch.dtype = torch.float32) -> list[dict[str, tuple[torch.Tensor, Any]]]:
        compressed = []
        for rank, (compression, named) in enumerate(zip(self.compressions, self.parameters)):
            names = list(SHAPES)
            random.Random(10 * step + rank).shuffle(names)
            for name in names:
                named[name].grad = gradient(name, rank, step).to(dtype)
            compressed.append({name: compression.compress(named[name].grad) for name in names})
            self.world.polls[rank] = compression._engine.poll
        return compressed

    def step(self, number: int = 0, *, average: bool = True, factor: float = 1.0, dtype=torch.float32):
        compressed = self.compress(number, dtype)
        for compression in self.compressions:  # Horovod's synchronize() comes when all have handed in
            compression._engine.flush()
        results: list[dict[str, torch.Tensor]] = [{} for _ in self.compressions]
        for name in SHAPES:
            added = sum(of_rank[name][0] * factor for of_rank in compressed)
            if average:
                added = added / len(compressed)
            for rank, (compression, of_rank) in enumerate(zip(self.compressions, compressed)):
                results[rank][name] = compression.decompress((added / factor).to(added.dtype), of_rank[name][1])
        return results


def gradient(name: str, rank: int, step: int) -> torch.Tensor:
    return gradient_like(*SHAPES[name], seed=100 * step + 10 * rank + list(SHAPES).index(name))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("average", [True, False])
def test_what_comes_back_is_what_the_exchange_gives(method, size, average, monkeypatch):
    results = Ranks(method, size, monkeypatch).step(average=average)
    for index, (name, shape) in enumerate(SHAPES.items()):
        gradients = [gradient(name, rank, 0) for rank in range(size)]
        large = name in ("a", "conv")
        compressor = METHODS[method][1] if (large and size > 1) or method == "fp16" else EVERY["none"]
        total = run(compressor, gradients, name=name, index=index).totals[0].view(shape)
        expected = total / size if average else total
        for result in results:
            assert result[name].shape == shape
            assert bits(result[name]) == bits(results[0][name])
            assert torch.allclose(result[name], expected, rtol=1e-6 if method != "fp16" else 2e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["bf16", "terngrad", "adacomp", "topk"])
def test_horovod_adds_up_two_numbers_in_place_of_what_is_compressed(method, monkeypatch):
    for of_rank in Ranks(method, 2, monkeypatch).compress():
        assert {name: tensor.numel() for name, (tensor, _) in of_rank.items()} == {
            "a": 2,
            "bias": 40,
            "conv": 2,
            "small": 12,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_gradients_of_every_type_survive(dtype, average, size, monkeypatch):
    ranks = Ranks("topk", size, monkeypatch, dtype)
    for step in range(2):
        for result in ranks.step(step, average=average, dtype=dtype):
            assert {tensor.dtype for tensor in result.values()} == {dtype}


@pytest.mark.parametrize("factor", [0.5, 1 / 3, 7.0])
def test_factors_before_and_after_the_sum_do_no_harm(factor, monkeypatch):
    scaled = Ranks("topk", 3, monkeypatch).step(factor=factor)
    plain = Ranks("topk", 3, monkeypatch).step()
    for one, other in zip(scaled, plain):
        assert torch.equal(one["a"], other["a"])


@pytest.mark.parametrize("combine", ["max", "twice", "others", "zero"])
def test_what_is_neither_a_sum_nor_an_average_over_these_ranks_is_refused(combine, monkeypatch):
    ranks = Ranks("topk", 3, monkeypatch)
    compressed = ranks.compress()
    carriers = torch.stack([of_rank["a"][0] for of_rank in compressed])
    wrong = {
        "max": carriers.amax(0),
        "twice": carriers.sum(0) * 2,
        "others": carriers[:2].mean(0),
        "zero": torch.zeros(2),
    }[combine]
    with pytest.raises(RuntimeError, match="did not sum or average"):
        ranks.compressions[0].decompress(wrong, compressed[0]["a"][1])


def test_steps_follow_one_another(monkeypatch):
    ranks = Ranks("topk", 2, monkeypatch)
    for step in range(4):
        results = ranks.step(step)
        assert all(bits(results[0][name]) == bits(results[1][name]) for name in SHAPES)
    for compression in ranks.compressions:
        assert compression.progress == (4, None)
        assert compression.memory.residuals.keys() == {"a", "conv"}
        assert compression.telemetry.steps == 4


def test_a_non_finite_tensor_that_horovod_adds_up_keeps_all_residuals(monkeypatch):
    ranks = Ranks("topk", 2, monkeypatch)
    ranks.step(0)
    before = []
    for compression in ranks.compressions:
        compression.settle()
        before.append({n: bits(r) for n, r in compression.memory.residuals.items()})
    compressed = ranks.compress(1)
    for compression in ranks.compressions:
        compression._engine.flush()
    for name in SHAPES:
        added = sum(of_rank[name][0] for of_rank in compressed) / 2
        if name == "bias":
            added[3] = torch.inf
        for compression, of_rank in zip(ranks.compressions, compressed):
            compression.decompress(added, of_rank[name][1])
    for compression, residual in zip(ranks.compressions, before):
        compression.settle()
        assert {n: bits(r) for n, r in compression.memory.residuals.items()} == residual


def test_carriers_count_as_sent(monkeypatch):
    ranks = Ranks("topk", 2, monkeypatch)
    ranks.step()
    for compression in ranks.compressions:
        sent = {name: traffic.sent_bytes for name, traffic in compression.telemetry.parameters.items()}
        assert sent == {
            "a": 36 + 4 + 6 * 20 + 2 * 4,
            "bias": 4 * 40,
            "conv": 36 + 4 + 6 * 11 + 2 + 2 * 4,
            "small": 4 * 12,
        }


def test_one_rank_exchanges_nothing(monkeypatch):
    ranks = Ranks("topk", 1, monkeypatch)
    (compressed,) = ranks.compress()
    for name, (tensor, _) in compressed.items():
        assert bits(tensor) == bits(gradient(name, 0, 0))


def test_sparse_tensors_come_without_context(monkeypatch):
    ranks = Ranks("topk", 2, monkeypatch)
    ranks.step()
    tensor = torch.sparse_coo_tensor([[1]], torch.ones(1, 3), (4, 3), check_invariants=True)
    assert ranks.compressions[0].decompress(tensor, None) is tensor


def added_up_one_by_one(values: torch.Tensor) -> torch.Tensor:
    """As the slowest of reductions adds them: float16 [ranks, n] to [n], rounded after each."""
    total = torch.zeros_like(values[0])
    for value in values:
        total = total + value
    return total


@pytest.mark.parametrize("size", [2, 64, 679, 680, 1500, 2048, 4000])
def test_half_precision_carriers_are_understood_at_any_number_of_ranks(size, monkeypatch):
    compression = Compression.topk([("w", torch.nn.Parameter(torch.zeros(40, 50)))])
    marks = [horovod_hooks.mark(rank) for rank in range(size)]
    monkeypatch.setattr(type(compression), "size", size)
    compression._horovod.mean_mark = sum(marks) / size
    total = added_up_one_by_one(torch.tensor([[1.0, mark] for mark in marks], dtype=torch.float16))
    assert not compression._horovod.is_average(total)
    assert compression._horovod.is_average(total / size)
