"""What every method costs a rank, as it says beforehand: bytes that it sends and receives, and memory that it holds."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from hvd_compress import Compression, log
from hvd_compress.compressors import (
    BF16Compressor,
    Compressor,
    FP16Compressor,
    NoneCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    ScaleComCompressor,
    SparseGatherer,
    StochasticPruningCompressor,
    TernGradCompressor,
    TopKCompressor,
    traffic,
    warn_if_more_than_dense,
)
from hvd_compress.compressors.footprint import Sent
from hvd_compress.local import LocalRanks
from hvd_compress.memory import Held, storage_bytes
from hvd_compress.training import Masks

from .every import METHODS, VARIANTS, masked

SHAPES = {"a": (40, 60), "b": (30, 50), "tiny": (3, 3), "vector": (7,)}
MODEL = 4 * sum(math.prod(shape) for shape in SHAPES.values())
every = pytest.mark.parametrize("method", VARIANTS)


def ranks_of(make, size=2, **options):
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    return LocalRanks([make(named, **({"min_numel": 100} | options)) for _ in range(size)])


def run(ranks, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ranks.exchange(
            [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in ranks.compressions]
        )


@every
@pytest.mark.parametrize("min_numel", [1, 100])
def test_what_a_rank_sends_is_what_it_says(method, min_numel):
    ranks = ranks_of(VARIANTS[method], min_numel=min_numel)
    (compression, _) = ranks.compressions
    run(ranks, 1)  # the first exchange under a mask compares it
    compression.telemetry.reset()
    steps = 20 if method == "stochastic_pruning" else 1  # its threshold is calibrated meanwhile
    run(ranks, steps)
    compressor = compression.compressor
    for slot in compression.slots:
        if not (slot.parameter.compressed or compressor.takes_all):
            continue
        sent = compressor.sent(slot)
        expected = sent.gathered + sent.reduced + sent.broadcast
        found = compression.telemetry.parameters[slot.name].sent_bytes / steps
        if sent.scattered:  # less what a rank owns itself, and with what frames it
            assert expected < found < expected + sent.scattered
        elif method == "adacomp":  # depends on the gradients: more of noise
            assert expected / 3 < found < 3 * expected
        else:
            assert found == pytest.approx(expected, rel=0.1 if method == "stochastic_pruning" else 0)


N = 1_000_000


@pytest.mark.parametrize(
    ("compressor", "last"),
    [
        (BF16Compressor(), 4),
        (QSGDCompressor(bits=8), 7),
        (QSGDCompressor(bits=4), 15),
        (TernGradCompressor(), 32),
        (StochasticPruningCompressor(rate=0.9), 12),
        (TopKCompressor(density=0.01), 133),
        (NoneCompressor(), 10_000),
        (FP16Compressor(), 10_000),
        (PowerSGDCompressor(approximation_rank=4), 10_000),
        (ScaleComCompressor(density=0.01), 10_000),
    ],
    ids=str,
)
def test_the_number_of_ranks_up_to_which_a_method_saves(compressor: Compressor, last: int, caplog):
    shapes = [torch.Size([1000, 1000])] * 3
    log.warn_once.cache_clear()
    for size in (1, 2, last):
        received, dense = traffic(compressor, shapes, size, "gather")
        assert received <= 1.005 * dense
        assert dense == pytest.approx(3 * 8 * N * (size - 1) / size)
        warn_if_more_than_dense(compressor, shapes, 0, size, "gather")
    assert not caplog.records
    if last < 10_000:
        received, dense = traffic(compressor, shapes, last + 1, "gather")
        assert received > 1.005 * dense
        with caplog.at_level(logging.WARNING):
            for rank in (1, 0, 0, 2):
                warn_if_more_than_dense(compressor, shapes, rank, last + 1, "gather")
        (record,) = caplog.records
        assert f"moves more than no compression with {last + 1} ranks" in record.getMessage()
        assert f"{received / 1e6:,.1f} MB a step in place of {dense / 1e6:,.1f}" in record.getMessage()


@pytest.mark.parametrize(
    ("compressor", "bits"),
    [
        (BF16Compressor(), 32),
        (QSGDCompressor(bits=4), 12.125),
        (TernGradCompressor(), 2 + 12),
        (TopKCompressor(), 0.48 + 2 * 0.48),
    ],
    ids=str,
)
def test_scattered_a_method_saves_with_any_number_of_ranks(compressor: Compressor, bits: float):
    """Bits received an element: of a piece at its owner, and of the sums of all."""
    shapes = [torch.Size([1000, 1000])] * 3
    for size in (5, 8, 64, 1024):
        received, dense = traffic(compressor, shapes, size)
        assert received < dense
    assert received == pytest.approx(3 * N * bits / 8 * 1023 / 1024, rel=1e-2)


def test_a_rank_receives_what_all_others_gather_and_a_ring_of_what_is_added_up():
    assert Sent(gathered=100).received(4) == 300
    assert Sent(reduced=100).received(4) == 150
    assert Sent(broadcast=100).received(4) == 100
    assert Sent(100, 100, 100).received(1) == 0


def test_of_what_cannot_tell_nothing_is_said(caplog):
    shapes = [torch.Size([50, 8])]
    assert math.isnan(traffic(SparseGatherer(), shapes, 100)[0])
    warn_if_more_than_dense(SparseGatherer(), shapes, 0, 100)
    assert not caplog.records


@every
@pytest.mark.parametrize("min_numel", [1, 100])
def test_what_is_held_after_two_steps_is_what_is_needed(method, min_numel):
    options = {"interval": 2} if method in ("lgreco", "accordion") else {}
    ranks = ranks_of(VARIANTS[method], min_numel=min_numel, **options)
    needed = [compression.memory_needed() for compression in ranks.compressions]
    run(ranks, 2)
    for compression, beforehand in zip(ranks.compressions, needed):
        assert compression.memory_held() == beforehand
        assert compression.memory_needed() == beforehand
        compression.settle()
        assert compression.memory_held().total_bytes <= beforehand.total_bytes


@every
def test_what_is_held_is_all_there_is(method):
    """Found by following every reference from the compression, but for its parameters and masks."""
    options = {"interval": 2} if method in ("lgreco", "accordion") else {}
    ranks = ranks_of(VARIANTS[method], **options)
    run(ranks, 2)
    for compression in ranks.compressions:
        masks = getattr(compression.compressor, "masks", None)
        own = [*compression.parameters, *(masks.masks.values() if masks else ())]
        compression.settle()  # what is late is out of sight in an exchange until it has ended
        found = tensors_of(compression, skip={id(tensor) for tensor in own})
        assert compression.memory_held().total_bytes == storage_bytes(found)


def tensors_of(root, skip):
    found, seen, waiting = [], set(skip), [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, (list, tuple, set)):
            waiting.extend(one)
        elif type(one).__module__.startswith("hvd_compress"):
            waiting.extend(vars(one).values())
    return found


COPIES = {
    "none": 0,
    "fp16": 0,
    "bf16": 0.5,
    "terngrad": 0.0625,
    "qsgd": 0.127,
    "adacomp": 3,
    "topk": 2.075,  # six bytes an entry
    "onebit": 2.035,
    "powersgd": 2,
    "scalecom": 2,
    "dgc": 4.075,
    "masked": 1,  # half of the weights, eight bytes each
    "stochastic_pruning": 1,
    "lgreco": 3.075,
    "fractrain": 0.127,  # of 4 bits, before the first step
    "accordion": 3,
}


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_a_large_model(method):
    """The table of the documentation."""
    compression = METHODS[method]([("w", torch.zeros(2000, 2000))])
    needed = compression.memory_needed()
    assert needed.copies == pytest.approx(COPIES[method], rel=0.01, abs=0.005)
    assert needed.model_bytes == 4 * 4_000_000


def test_what_is_held_is_shown_by_what_it_is():
    ranks = ranks_of(Compression.topk)
    assert str(ranks.compressions[0].memory_held()) == "0.00 copies of the model"
    run(ranks, 2)
    held = ranks.compressions[0].memory_held()
    assert held.model_bytes == MODEL
    assert held.parts["residuals"] == held.parts["spare"] == 4 * (40 * 60 + 30 * 50)
    assert str(held).startswith(f"{held.copies:.2f} copies of the model: ")
    assert "residuals 1.00" in str(held)


def test_tensors_of_one_storage_count_once():
    whole = torch.zeros(100)
    assert storage_bytes([whole[:10], whole[50:], torch.zeros(3)]) == 412
    assert Held({}, 0).copies == 0


def test_masks_that_are_set_later_are_counted_from_then_on():
    made = {}

    def later():
        return made.setdefault("masks", Masks())

    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    compression = Compression.masked(later, named, min_numel=100)
    assert compression.memory_needed().total_bytes == 0
    made["masks"].update({"a": torch.ones(40, 60, dtype=torch.bool)})
    assert compression.memory_needed().parts == {"positions": 8 * 2400}
    assert masked(named).memory_needed().parts["positions"] == 8 * (1200 + 750 + 5)


@pytest.mark.parametrize(("size", "min_numel", "says"), [(4, 1, 0), (6, 1, 1), (6, 10_000, 0), (1, 1, 0)])
def test_ranks_say_it_of_what_they_compress(size, min_numel, says, caplog):
    log.warn_once.cache_clear()
    named = [("w", torch.zeros(60, 80))]
    ranks = LocalRanks([Compression.bf16(named, min_numel=min_numel, topology="gather") for _ in range(size)])
    with caplog.at_level(logging.WARNING):
        for compression in ranks.compressions:
            compression.routing.say_if_more_than_dense(compression.rank, compression.size)
    assert len(caplog.records) == says
