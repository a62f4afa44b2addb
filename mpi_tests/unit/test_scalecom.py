"""ScaleCom: against worked numbers, and in every way in which a gradient can be odd."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress.compressors import Step
from hvd_compress.compressors.scalecom import ScaleComCompressor, saves
from hvd_compress.kernels import position_bytes
from hvd_compress.kernels.positions import pack_positions
from hvd_compress.local import LocalRanks
from hvd_compress.memory import ErrorFeedback
from hvd_compress.requests import Allreduce, Broadcast
from hvd_compress.schedules import Steps
from hvd_compress.topologies import Cyclic, Part
from hvd_compress.wire import WireError

from .drive import bits, bound, random, run, slot_of
from .test_contract import LAYOUTS, TENSORS, ranks_of

G1 = [0.4, -0.1, 0.05, 0.3, -0.25, 0.02, -0.6, 0.1, 0.0, 0.15]
G2 = [0.1, -0.3, 0.2, 0.1, -0.1, 0.4, -0.2, 0.0, 0.05, -0.15]
MEAN = [0.25, 0, 0, 0.2, 0, 0, -0.4, 0, 0, 0]
SUMMED = {
    "exact": ScaleComCompressor(density=0.01),
    "filtered": ScaleComCompressor(density=0.05, beta=0.1),
    "chunks": ScaleComCompressor(chunk=64),
    "dense": ScaleComCompressor(density=1.0),
}
ROUNDED = {
    "8 bits": ScaleComCompressor(density=0.01, value_bits=8),
    "4 bits": ScaleComCompressor(density=0.3, value_bits=4),
    "4 bits, filtered": ScaleComCompressor(chunk=64, beta=0.1, value_bits=4),
}
COMPRESSORS = SUMMED | ROUNDED
every = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)
summed = pytest.mark.parametrize("compressor", SUMMED.values(), ids=SUMMED)
rounded = pytest.mark.parametrize("compressor", ROUNDED.values(), ids=ROUNDED)
SIZES = (1, 2, 3, 5)


def ranks_for(compressor, size, shape):
    return LocalRanks([bound(compressor, {"w": shape}) for _ in range(size)])


def step(ranks, gradients, *, average=False):
    """One step of a parameter named w: what every rank has, and the residuals after it."""
    results = [result["w"] for result in ranks.exchange([{"w": g} for g in gradients], average=average)]
    for compression in ranks.compressions:
        compression.settle()
    return results, [compression.memory.residuals.get("w") for compression in ranks.compressions]


@pytest.mark.parametrize(
    ("beta", "residuals"),
    [
        (1.0, [[0, -0.1, 0.05, 0, -0.25, 0.02, 0, 0.1, 0, 0.15], [0, -0.3, 0.2, 0, -0.1, 0.4, 0, 0, 0.05, -0.15]]),
        (
            0.1,
            [
                [0, -0.01, 0.005, 0, -0.025, 0.002, 0, 0.01, 0, 0.015],
                [0, -0.03, 0.02, 0, -0.01, 0.04, 0, 0, 0.005, -0.015],
            ],
        ),
    ],
)
def test_a_step_gives_the_worked_numbers(beta, residuals):
    ranks = ranks_for(ScaleComCompressor(density=0.3, beta=beta), 2, (10,))
    results, kept = step(ranks, [torch.tensor(G1), torch.tensor(G2)], average=True)
    assert all(torch.allclose(result, torch.tensor(MEAN)) for result in results)
    assert torch.allclose(torch.stack(kept), torch.tensor(residuals), atol=1e-7)


def test_the_next_step_has_another_leader():
    ranks = ranks_for(ScaleComCompressor(density=0.3, beta=0.1), 2, (10,))
    step(ranks, [torch.tensor(G1), torch.tensor(G2)])
    results, kept = step(ranks, [torch.tensor(G2), torch.tensor(G1)], average=True)
    assert torch.allclose(results[0], torch.tensor(MEAN), atol=1e-7)
    expected = [0, -0.04, 0.025, 0, -0.035, 0.042, 0, 0.01, 0.005, 0]
    assert torch.allclose(kept[0], torch.tensor(expected), atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_ranks_lead_in_turn(size):
    ranks = ranks_for(ScaleComCompressor(density=0.1), size, (100,))
    for number in range(2 * size + 1):
        # Each rank has its large entries elsewhere, and the residuals are too small to matter.
        gradients = [torch.full((100,), 1e-6) for _ in range(size)]
        for rank, gradient in enumerate(gradients):
            gradient[10 * rank : 10 * rank + 10] = 1.0
        results, _ = step(ranks, gradients)
        leader = number % size
        assert torch.nonzero(results[0]).view(-1).tolist() == list(range(10 * leader, 10 * leader + 10))
        for compression in ranks.compressions:
            compression.memory.residuals.clear()


@every
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tensor", [*TENSORS.values(), *LAYOUTS.values()], ids=[*TENSORS, *LAYOUTS])
def test_every_rank_gets_the_same_bits_and_gradients_stay(compressor, size, tensor):
    gradients = ranks_of(tensor, size)
    before = [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients]
    results, kept = step(ranks_for(compressor, size, tuple(tensor.shape)), gradients)
    assert [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients] == before
    assert {bits(result) for result in results} == {bits(results[0])}
    assert bool(torch.isfinite(results[0]).all())
    if tensor.numel():  # else it is not compressed
        assert all(residual.shape == (tensor.numel(),) and residual.dtype == torch.float32 for residual in kept)


@pytest.mark.parametrize("compressor", [COMPRESSORS["exact"], COMPRESSORS["chunks"]], ids=["exact", "chunks"])
@pytest.mark.parametrize("size", SIZES)
def test_without_the_filter_nothing_is_lost(compressor, size):
    ranks = ranks_for(compressor, size, (30, 40))
    there = torch.zeros(1200, dtype=torch.float64)
    for number in range(2 * size + 2):
        gradients = [random(30, 40, seed=size * number + r).mul_(64).round_() for r in range(size)]  # integers: exact
        there += sum(gradient.double().view(-1) for gradient in gradients)
        results, kept = step(ranks, gradients)
        there -= results[0].double().view(-1)
        assert torch.equal(sum(residual.double() for residual in kept), there)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_filter_keeps_that_part_of_what_is_not_sent(beta):
    ranks = ranks_for(ScaleComCompressor(density=0.05, beta=beta), 2, (30, 40))
    residuals = [random(1200, seed=8), random(1200, seed=9)]
    for compression, residual in zip(ranks.compressions, residuals):
        compression.memory.residuals["w"] = residual.clone()
    gradients = [random(30, 40, seed=r) for r in range(2)]
    results, kept = step(ranks, gradients)
    picked = (gradients[0].view(-1) + residuals[0]).abs().topk(60).indices
    assert set(torch.nonzero(results[0].view(-1)).view(-1).tolist()) == set(picked.tolist())
    for residual, gradient, new in zip(residuals, gradients, kept):
        sent = torch.zeros(1200).index_copy_(0, picked, (gradient.view(-1) + residual)[picked])
        assert torch.allclose(new, residual + beta * (gradient.view(-1) - sent), atol=1e-5)


def test_a_chunk_sends_its_largest():
    gradient = random(1000)
    ranks = ranks_for(ScaleComCompressor(chunk=30), 1, (1000,))
    results, _ = step(ranks, [gradient])
    for start in range(0, 1000, 30):
        chunk, sent = gradient[start : start + 30], results[0][start : start + 30]
        assert torch.count_nonzero(sent) == 1
        assert sent.abs().max() == chunk.abs().max()
    assert torch.count_nonzero(results[0]) == 34


@summed
@pytest.mark.parametrize("shape", [(30, 40), (100, 70), (7,)], ids=str)
def test_what_a_rank_sends_does_not_depend_on_how_many_there_are(compressor, shape):
    numel = math.prod(shape)
    k = -(-numel // compressor.chunk) if compressor.chunk else math.ceil(round(compressor.density * numel, 6))
    for size in (2, 4, 8, 64, 256):
        ranks = ranks_for(compressor, size, shape)
        gradients = [random(*shape, seed=r) for r in range(size)]
        for number in range(1, 3):
            step(ranks, gradients)
            sent = [compression.telemetry.total.sent_bytes for compression in ranks.compressions]
            each = position_bytes(numel, k) + 4 * k + 4 if saves(numel, k) else 4 * numel
            assert sent == [number * each] * size


def test_requests_are_a_broadcast_of_positions_and_a_sum_of_values():
    ranks = ranks_for(ScaleComCompressor(density=0.01), 3, (30, 40))
    (slot,) = ranks.compressions[1].slots
    slot.step = Step(4, 1, 3)
    exchange = ranks.compressions[1].compressor.exchange(slot, random(30, 40))
    request = next(exchange)
    assert isinstance(request, Broadcast)
    # 12 of 1200: 6 bits of each are low ones, and the others take 12 + (1199 >> 6) bits.
    assert (request.root, request.tensor.shape, request.tensor.dtype) == (1, (9 + 4,), torch.uint8)
    request = exchange.send(request.tensor)
    assert isinstance(request, Allreduce)
    assert request.tensor.shape == (13,)
    assert request.tensor[-1] == 0


def of(positions, numel=1200):
    return pack_positions(torch.tensor(positions), numel)


def bit(packed, number):
    spoilt = packed.clone()
    spoilt[number // 8] ^= 1 << number % 8
    return spoilt


SPOILT = {  # packed positions of 1200 elements
    "a bit of the upper ones": lambda packed: bit(packed, 3),
    "nothing but zeros": torch.zeros_like,
    "nothing but ones": lambda packed: torch.full_like(packed, 255),
    "repeated": lambda packed: of([*range(10, 10 + entries_in(packed) - 1), 10 + entries_in(packed) - 2]),
}


def entries_in(packed):
    return {position_bytes(1200, k): k for k in (12, 19)}[packed.numel()]


@pytest.mark.parametrize("victims", [(0, 1, 2), (1,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("compressor", [COMPRESSORS["exact"], COMPRESSORS["chunks"]], ids=["exact", "chunks"])
def test_positions_that_cannot_be_are_an_error_on_every_rank_that_names_the_leader(compressor, how, victims):
    """Even where only some ranks got them: else these would fail, and the others wait for them for ever."""
    memories = [ErrorFeedback() for _ in range(3)]
    slots = [slot_of([30, 40], "layer.w", step=Step(4, r, 3), memory=memories[r]) for r in range(3)]
    exchanges = [compressor.exchange(slot, random(30, 40, seed=slot.step.rank)) for slot in slots]
    positions = [next(exchange) for exchange in exchanges][1].tensor
    answers = [SPOILT[how](positions) if r in victims else positions.clone() for r in range(3)]
    values = [exchange.send(answer).tensor for exchange, answer in zip(exchanges, answers)]
    for exchange in exchanges:
        with pytest.raises(WireError, match=r"rank 1 for .* 'layer\.w': expected \d+ ascending positions") as caught:
            exchange.send(sum(values))
        assert caught.value.peer == 1
    for memory in memories:
        memory.commit()
        assert memory.residuals == {}


@pytest.mark.parametrize("size", [1, 2, 64, 4097])
def test_flags_of_all_ranks_do_not_add_up_to_the_wrong_one(size):
    slot = slot_of([30, 40], step=Step(size=size))
    gradient = random(30, 40)
    gradient[0, 0] = math.nan
    exchange = COMPRESSORS["exact"].exchange(slot, gradient)
    positions = next(exchange).tensor
    sent = exchange.send(positions).tensor
    with pytest.raises(StopIteration) as end:
        exchange.send(sent * size)  # no rank has a finite gradient, all have positions
    assert end.value.value is None


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", [0, 517, 1199])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_non_finite_gradient_shows_on_all_ranks_and_changes_nothing(compressor, value, place, culprit):
    shapes = {"w": (30, 40), "tiny": (2, 2), "other": (40, 30)}
    ranks = LocalRanks([bound(compressor, shapes) for _ in range(3)])  # leaders by step: 0, 1, 2

    def gradients(seed):
        return [{n: random(*shape, seed=seed + r) for n, shape in shapes.items()} for r in range(3)]

    def residuals():
        for compression in ranks.compressions:
            compression.settle()
        return [{key: bits(tensor) for key, tensor in c.memory.residuals.items()} for c in ranks.compressions]

    ranks.exchange(gradients(0))
    before = residuals()
    spoilt = gradients(10)
    spoilt[culprit]["w"].view(-1)[place] = value
    results = ranks.exchange(spoilt)
    assert not any(bool(torch.isfinite(result["w"]).any()) for result in results)
    assert len({bits(result["other"]) for result in results}) == 1
    assert all(bool(torch.isfinite(result["other"]).all()) for result in results)
    assert residuals() == before
    results = ranks.exchange(gradients(20))
    assert all(bool(torch.isfinite(tensor).all()) for result in results for tensor in result.values())


@every
def test_a_sum_that_overflows_changes_nothing(compressor):
    ranks = ranks_for(compressor, 2, (30, 40))
    for compression in ranks.compressions:
        compression.memory.residuals["w"] = torch.full((1200,), 0.5)
    results, kept = step(ranks, [torch.full((30, 40), 3e38)] * 2)
    assert not any(bool(torch.isfinite(result).any()) for result in results)
    assert all(torch.equal(residual, torch.full((1200,), 0.5)) for residual in kept)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_types_travel_as_their_float32_values(compressor, dtype):
    gradients = [random(30, 40, seed=r).to(dtype) for r in range(3)]
    results, kept = step(ranks_for(compressor, 3, (30, 40)), gradients)
    single, single_kept = step(ranks_for(compressor, 3, (30, 40)), [gradient.float() for gradient in gradients])
    assert bits(results[0]) == bits(single[0].to(dtype))
    assert [bits(residual) for residual in kept] == [bits(residual) for residual in single_kept]


@every
def test_an_empty_tensor_has_an_empty_sum(compressor):
    outcome = run(compressor, [torch.zeros(0)] * 2)
    assert [total.shape for total in outcome.totals] == [(0,), (0,)]


@rounded
@pytest.mark.parametrize("size", SIZES)
def test_rounded_values_are_near_those_of_32_bits_and_all_else_is_the_same(compressor, size):
    exact = ScaleComCompressor(compressor.density, compressor.beta, compressor.chunk)
    gradients = [random(100, 70, seed=rank) for rank in range(size)]
    results, kept = step(ranks_for(compressor, size, (100, 70)), gradients)
    expected, residuals = step(ranks_for(exact, size, (100, 70)), gradients)
    assert [bits(residual) for residual in kept] == [bits(residual) for residual in residuals]
    levels = 2 ** (compressor.value_bits - 1) - 1
    largest = sum(float(gradient.abs().max()) for gradient in gradients)
    # A rank errs by less than one level of its largest, an owner, at eight bits, by less than one of the sum's.
    assert float((results[0] - expected[0]).abs().max()) < largest / levels + 2 * largest / 127
    assert bool((results[0][expected[0] == 0] == 0).all())


@rounded
def test_rounded_values_are_right_on_average(compressor):
    """Random numbers differ by step: the mean of many, each without residuals, goes to the sum."""
    exact = ScaleComCompressor(compressor.density, compressor.beta, compressor.chunk)
    gradients, steps = [random(30, 40, seed=rank) for rank in range(2)], 400

    def means(of):
        ranks, totals = ranks_for(of, 2, (30, 40)), torch.zeros(2, 30, 40)
        for number in range(steps):
            results, _ = step(ranks, gradients)
            totals[number % 2] += results[0]  # by who leads
            for compression in ranks.compressions:
                compression.memory.residuals.clear()
        return totals / (steps / 2)

    level = 2 * max(float(gradient.abs().max()) for gradient in gradients) / (2 ** (compressor.value_bits - 1) - 1)
    errors = (means(compressor) - means(exact)).abs()
    assert 0 < float(errors.max()) < 5 * level / math.sqrt(steps / 2)


@pytest.mark.parametrize("victims", [(0, 1, 2), (1,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("how", ["one that is sound", *SPOILT])
@pytest.mark.parametrize("value_bits", [4, 8])
def test_rounded_values_for_other_positions_are_an_error_on_every_rank(value_bits, how, victims):
    """Positions that some have got otherwise, damaged or not: nobody adds up what does not belong together."""
    compressor = ScaleComCompressor(density=0.01, value_bits=value_bits)
    memories = [ErrorFeedback() for _ in range(3)]
    parts = [
        [
            Part(slot_of(shape, name, number, step=Step(4, rank, 3), memory=memories[rank]), random(*shape, seed=rank))
            for number, (name, shape) in enumerate({"first": (40, 50), "layer.w": (30, 40)}.items())
        ]
        for rank in range(3)
    ]
    exchanges = [Cyclic(compressor).reduce(of_rank) for of_rank in parts]
    positions = [next(exchange) for exchange in exchanges][1].tensor
    length = position_bytes(1200, 12)
    spoil = SPOILT.get(how, lambda packed: of(range(100, 112)))
    answers = []
    for rank in range(3):
        answer = positions.clone()
        if rank in victims:
            answer[-length:] = spoil(answer[-length:])
        answers.append(answer)
    sent = [exchange.send(answer).parts for exchange, answer in zip(exchanges, answers)]
    alike = len(victims) == 3 and how == "one that is sound"
    for rank, exchange in enumerate(exchanges):
        incoming = [sent[peer][rank][0] if peer != rank else None for peer in range(3)]
        if alike:
            exchange.send(incoming)
            continue
        with pytest.raises(WireError, match=r"rank \d for parameter '(first, )?(first|layer\.w)': expected checksum"):
            exchange.send(incoming)
    for memory in memories:
        memory.commit()
        assert memory.residuals == {}


def test_zeros_and_constants_need_no_special_case():
    results, kept = step(ranks_for(COMPRESSORS["exact"], 2, (30, 40)), [torch.zeros(30, 40)] * 2)
    assert not results[0].any()
    assert not kept[0].any()
    results, kept = step(ranks_for(COMPRESSORS["chunks"], 2, (30, 40)), [torch.full((30, 40), 0.1)] * 2)
    assert torch.count_nonzero(results[0]) == 19
    assert results[0].unique().tolist() == pytest.approx([0.0, 0.2])


def test_the_density_may_be_a_schedule_or_set_from_outside():
    ranks = ranks_for(ScaleComCompressor(density=Steps((0, 0.25), (1, 0.05))), 2, (30, 40))
    for expected in (300, 60, 60):
        results, _ = step(ranks, [random(30, 40), random(30, 40, seed=1)])
        assert torch.count_nonzero(results[0]) == expected
    for compression in ranks.compressions:
        compression.slots[0].rate = 0.1
    assert torch.count_nonzero(step(ranks, [random(30, 40), random(30, 40, seed=1)])[0][0]) == 120


@pytest.mark.parametrize(
    "options",
    [
        *({"density": 0}, {"density": 1.5}, {"beta": 0}, {"beta": 1.1}, {"beta": math.nan}, {"chunk": 0}),
        *({"value_bits": 16}, {"value_bits": 0}, {"value_bits": "8"}),
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ScaleComCompressor(**options)
