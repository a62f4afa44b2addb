"""Deep Gradient Compression: against worked numbers, against momentum SGD, and what ports of it get wrong."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from hvd_compress.compressors import TopKCompressor
from hvd_compress.compressors.dgc import DGCCompressor, saves
from hvd_compress.local import LocalRanks
from hvd_compress.schedules import ExponentialWarmup

from .drive import bits, bound, random, run
from .test_contract import LAYOUTS, TENSORS, ranks_of

SIZES = (1, 2, 3, 5)
COMPRESSORS = {
    "plain": DGCCompressor(density=0.01),
    "nesterov": DGCCompressor(density=0.01, nesterov=True),
    "clipped": DGCCompressor(density=0.05, clip=0.5),
    "no momentum": DGCCompressor(density=0.05, momentum=0.0),
    "dense": DGCCompressor(density=1.0),
}
every = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)


def ranks_for(compressor, size, shape):
    return LocalRanks([bound(compressor, {"w": shape}) for _ in range(size)])


def step(ranks, gradients, *, average=False):
    """One step of a parameter named w: what rank 0 has, and every rank's memory after it."""
    results = [result["w"] for result in ranks.exchange([{"w": g} for g in gradients], average=average)]
    assert len({bits(result) for result in results}) == 1
    for compression in ranks.compressions:
        compression.settle()
    return results[0], [compression.memory.residuals for compression in ranks.compressions]


def padded(values, numel=100):
    return torch.tensor([*values, *[0.0] * (numel - len(values))])


def test_two_steps_give_the_worked_numbers():
    ranks = ranks_for(DGCCompressor(density=0.02), 1, (100,))  # two of a hundred
    total, (memory,) = step(ranks, [padded([0.4, -0.1, 0.05, 0.3, -0.25, 0.02, -0.6, 0.1, 0.0, 0.15])])
    assert torch.equal(total, padded([0.4, 0, 0, 0, 0, 0, -0.6]))
    kept = padded([0.0, -0.1, 0.05, 0.3, -0.25, 0.02, 0.0, 0.1, 0.0, 0.15])
    assert torch.equal(memory["w"], kept)
    assert torch.equal(memory["w/momentum"], kept)
    total, (memory,) = step(ranks, [padded([0.1, -0.3, 0.2, 0.1, -0.1, 0.4, -0.2, 0.0, 0.05, -0.15])])
    assert torch.allclose(total, padded([0, 0, 0, 0.67, -0.575]))
    v = padded([0.1, -0.49, 0.295, 0.0, 0.0, 0.438, -0.2, 0.19, 0.05, 0.135])
    u = padded([0.1, -0.39, 0.245, 0.0, 0.0, 0.418, -0.2, 0.09, 0.05, -0.015])
    assert torch.allclose(memory["w"], v, atol=1e-7)
    assert torch.allclose(memory["w/momentum"], u, atol=1e-7)


# Against momentum SGD: a least squares problem, whose data the ranks share out.


def problem(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(20, 30, generator=generator)
    inputs = [torch.randn(64, 20, generator=generator) for _ in range(size)]
    return true, [(x, x @ true + 0.01 * torch.randn(64, 30, generator=generator)) for x in inputs]


def gradient_of(weight, data):
    x, y = data
    return 2 * x.t() @ (x @ weight - y) / len(x)


def decays(compression, weight):
    """Let the only parameter of `compression` have this value."""
    (slot,) = compression.slots
    slot.parameter = dataclasses.replace(slot.parameter, tensor=weight)


def train(compressor, size, steps, *, rate=0.02, **sgd):
    """The weights after so many steps of the optimizer that is told of, with gradients that `compressor` combines."""
    true, data = problem(size)
    weight = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = torch.optim.SGD([weight], lr=rate, **sgd)
    ranks = ranks_for(compressor, size, (20, 30))
    for compression in ranks.compressions:
        decays(compression, weight.detach())
    for _ in range(steps):
        gradients = [gradient_of(weight.detach(), mine) for mine in data]
        weight.grad, _ = step(ranks, gradients, average=True)
        optimizer.step()
    return weight.detach(), float((weight.detach() - true).norm() / true.norm())


def reference(size, steps, *, rate=0.02, **sgd):
    _, data = problem(size)
    weight = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = torch.optim.SGD([weight], lr=rate, **sgd)
    for _ in range(steps):
        weight.grad = sum(gradient_of(weight.detach(), mine) for mine in data) / size
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.0}],
    ids=str,
)
def test_where_all_is_sent_it_is_momentum_sgd(size, options):
    found, _ = train(DGCCompressor(density=1.0, **options), size, 30)
    assert torch.allclose(found, reference(size, 30, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [1.0, 0.05])
def test_momentum_in_the_optimizer_too_would_not_be_momentum_sgd(density):
    """What ports do that keep the optimizer's momentum: the check refuses it, and so it should."""
    expected = reference(2, 30, momentum=0.9)
    scale = float(expected.norm())
    once, _ = train(DGCCompressor(density=density, momentum=0.9), 2, 30)
    twice, _ = train(DGCCompressor(density=density, momentum=0.9), 2, 30, momentum=0.9)
    assert float((twice - expected).norm()) > 0.5 * scale
    assert float((once - expected).norm()) < (1e-5 if density == 1 else 0.5) * scale
    both = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    assert "momentum twice" in DGCCompressor(density=density, momentum=0.9).conflict(both)


def test_sparse_training_arrives_where_dense_training_does():
    # An entry waits some 20 steps: a learning rate that is stable without the delay, 0.02, is not with it.
    _, dense = train(DGCCompressor(density=1.0), 2, 400, rate=0.01)
    _, sparse = train(DGCCompressor(density=0.05), 2, 400, rate=0.01)
    _, warm = train(DGCCompressor(density=ExponentialWarmup(interval=20, final=0.05)), 2, 400, rate=0.01)
    assert dense < 0.001
    assert sparse < 1.1 * dense
    assert warm < 1.1 * dense


def test_momentum_correction_delivers_each_gradient_as_momentum_would():
    """Without masking nothing would be lost; masking gives up the later momentum of what was sent, and no more."""
    shape, momentum = (30, 40), 0.5
    ranks = ranks_for(DGCCompressor(density=0.01, momentum=momentum), 1, shape)
    u, v = torch.zeros(1200), torch.zeros(1200)
    for number in range(8):
        gradient = random(*shape, seed=number).mul_(1024).round_() / 1024  # halves of these stay exact
        total, (memory,) = step(ranks, [gradient])
        u = momentum * u + gradient.view(-1)
        v = v + u
        sent = total.view(-1) != 0
        assert torch.equal(total.view(-1)[sent], v[sent])
        assert int(sent.sum()) == 12
        assert v[sent].abs().min() >= v[~sent].abs().max()
        u, v = u.masked_fill(sent, 0), v.masked_fill(sent, 0)
        assert torch.equal(memory["w"], v)
        assert torch.equal(memory["w/momentum"], u)


def test_without_momentum_it_is_top_k():
    gradients = [random(30, 40, seed=r) for r in range(3)]
    residuals = [random(1200, seed=7 + r) for r in range(3)]
    found = run(DGCCompressor(density=0.05, momentum=0.0), gradients, residuals=residuals)
    expected = run(TopKCompressor(density=0.05), gradients, residuals=residuals)
    assert bits(found.totals[0]) == bits(expected.totals[0])
    for mine, theirs in zip(found.memories, expected.memories):
        mine.commit()
        theirs.commit()
        assert mine.residuals.keys() == {"weight"}
        assert bits(mine.residuals["weight"]) == bits(theirs.residuals["weight"])


def test_when_the_density_reaches_one_the_residual_arrives():
    ranks = ranks_for(DGCCompressor(density=lambda step: 0.05 if step < 3 else 1.0, momentum=0.0), 2, (30, 40))
    there = torch.zeros(30, 40, dtype=torch.float64)
    for number in range(4):
        gradients = [random(30, 40, seed=2 * number + r).mul_(64).round_() for r in range(2)]
        total, memories = step(ranks, gradients)
        there += sum(gradient.double() for gradient in gradients) - total.double()
        assert bool(there.any()) == (number < 3)
    assert not any(memory["w"].any() for memory in memories)


# Clipping and weight decay


@pytest.mark.parametrize("size", [1, 2, 4, 9])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_the_mean_of_independent_gradients_is_clipped_to_the_limit(size, loss_scale):
    ranks = ranks_for(DGCCompressor(density=1.0, clip=0.5, momentum=0.0), size, (size, 40))
    gradients = []
    for rank, compression in enumerate(ranks.compressions):
        compression.loss_scale = loss_scale
        gradients.append(torch.zeros(size, 40))
        gradients[-1][rank] = loss_scale * 10 * random(40, seed=rank)  # orthogonal to the others'
    mean, _ = step(ranks, gradients, average=True)
    assert float(mean.norm()) == pytest.approx(0.5 * loss_scale, rel=1e-5)
    for rank, gradient in enumerate(gradients):
        cosine = torch.nn.functional.cosine_similarity(mean[rank], gradient[rank], dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)


def test_clipping_leaves_alone_what_is_below_the_limit_and_what_accumulated():
    gradient = random(30, 40)
    gradient *= 0.4 / gradient.norm()
    ranks = ranks_for(DGCCompressor(density=1.0, clip=0.5), 1, (30, 40))
    ranks.compressions[0].memory.residuals["w"] = torch.full((1200,), 5.0)
    total, _ = step(ranks, [gradient])
    assert torch.equal(total, gradient + 5)


def test_weights_decay_before_the_momentum_in_units_of_the_scaled_loss():
    ranks = ranks_for(DGCCompressor(density=1.0, weight_decay=0.1, clip=1e-3), 2, (30, 40))
    weight = random(30, 40, seed=5).to(torch.bfloat16)
    for compression in ranks.compressions:
        decays(compression, weight)
        compression.loss_scale = 8.0
    zeros = [torch.zeros(30, 40)] * 2
    first, _ = step(ranks, zeros, average=True)
    second, _ = step(ranks, zeros, average=True)
    assert torch.allclose(first, 0.8 * weight.float())  # not clipped: torch.optim.SGD does not either
    assert torch.allclose(second, 1.9 * 0.8 * weight.float())


# The optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "momentum": 0.5}], lr=0.1),
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.RMSprop(p, momentum=0.9),
    ],
    ids=["sgd", "one group", "adam", "rmsprop"],
)
def test_an_optimizer_with_momentum_is_refused(make):
    optimizer = make([torch.zeros(2), torch.zeros(3)])
    assert re.search(r"momentum twice.*momentum=0\.9.*momentum=0", DGCCompressor().conflict(optimizer))
    assert DGCCompressor(momentum=0.0).conflict(optimizer) is None
    assert TopKCompressor().conflict(optimizer) is None


def test_weight_decay_in_both_is_refused():
    decaying = torch.optim.SGD([torch.zeros(2)], lr=0.1, weight_decay=1e-4)
    assert "weight decay twice: 0.001 by DGC, 0.0001 by SGD" in DGCCompressor(weight_decay=1e-3).conflict(decaying)
    assert DGCCompressor().conflict(decaying) is None
    assert DGCCompressor(weight_decay=1e-3).conflict(torch.optim.SGD([torch.zeros(2)], lr=0.1)) is None


# The contract


def test_parameters_that_are_not_compressed_get_momentum_and_no_frames():
    compressor, shapes = DGCCompressor(density=0.01), {"w": (30, 40)}
    ranks = LocalRanks([bound(compressor, shapes, exclude="w") for _ in range(2)])
    for compression in ranks.compressions:
        assert not compression.slots[0].parameter.compressed
    gradients = [random(30, 40, seed=r) for r in range(2)]
    first, _ = step(ranks, gradients)
    second, memories = step(ranks, gradients)
    assert torch.equal(first, gradients[0] + gradients[1])
    assert torch.allclose(second, 1.9 * first, rtol=1e-5, atol=1e-6)
    assert not memories[0]["w"].any()
    assert ranks.compressions[0].telemetry.total.sent_bytes == 2 * 4 * 1200


@every
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tensor", [*TENSORS.values(), *LAYOUTS.values()], ids=[*TENSORS, *LAYOUTS])
def test_every_rank_gets_the_same_bits_and_gradients_stay(compressor, size, tensor):
    gradients = ranks_of(tensor, size)
    before = [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients]
    outcome = run(compressor, gradients, residuals=[random(tensor.numel(), seed=9)] * size)
    assert [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients] == before
    if outcome.totals[0] is None:  # nesterov: 1.9 times 3e38
        assert compressor.nesterov
        assert outcome.totals == [None] * size
        return
    assert {bits(total) for total in outcome.totals} == {bits(outcome.totals[0])}
    assert outcome.totals[0].shape == (tensor.numel(),)
    assert outcome.totals[0].dtype == torch.float32


@pytest.mark.parametrize("numel", [1, 5, 20, 50, 700, 70_001])
@pytest.mark.parametrize("density", [1e-9, 0.01, 0.5, 0.9, 1.0])
def test_frames_have_the_size_that_the_format_says_or_there_are_none(numel, density):
    outcome = run(DGCCompressor(density=density), ranks_of(random(numel), 2))
    k = max(math.ceil(round(density * numel, 6)), 1)
    frame_bytes = 36 + 4 * math.ceil(numel / 65536) + 6 * k
    frame_bytes += -frame_bytes % 4
    assert saves(numel, k) == (frame_bytes < 4 * numel)
    assert bool(outcome.frames) == saves(numel, k)
    assert outcome.sent_bytes == [frame_bytes if saves(numel, k) else 4 * numel] * 2


def test_the_warmup_sends_ever_less_and_a_rate_from_outside_counts_more():
    ranks = ranks_for(DGCCompressor(density=ExponentialWarmup(interval=2)), 2, (100, 100))
    sent = []
    for number in range(12):
        total, _ = step(ranks, [random(100, 100, seed=number)] * 2)
        sent.append(int(torch.count_nonzero(total)))
    assert sent == [2500, 2500, 625, 625, 157, 157, 40, 40, 10, 10, 10, 10]
    for compression in ranks.compressions:
        compression.slots[0].rate = 0.05
    assert torch.count_nonzero(step(ranks, [random(100, 100)] * 2)[0]) == 500


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", [0, 517, 1199])
@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_non_finite_gradient_shows_on_all_ranks_and_changes_nothing(compressor, value, place, culprit, dtype):
    shapes = {"w": (30, 40), "tiny": (2, 2), "other": (40, 30)}
    ranks = LocalRanks([bound(compressor, shapes) for _ in range(3)])

    def gradients(seed):
        return [{n: random(*shape, seed=seed + r).to(dtype) for n, shape in shapes.items()} for r in range(3)]

    def memories():
        for compression in ranks.compressions:
            compression.settle()
        return [{key: bits(tensor) for key, tensor in c.memory.residuals.items()} for c in ranks.compressions]

    ranks.exchange(gradients(0))
    before = memories()
    assert before[0].keys() == {*shapes, *(f"{name}/momentum" for name in shapes if compressor.momentum)}
    spoilt = gradients(10)
    spoilt[culprit]["w"].view(-1)[place] = value
    results = ranks.exchange(spoilt)
    assert not any(bool(torch.isfinite(result["w"]).any()) for result in results)
    assert all(bool(torch.isfinite(result["other"]).all()) for result in results)
    assert memories() == before
    results = ranks.exchange(gradients(20))
    assert all(bool(torch.isfinite(tensor).all()) for result in results for tensor in result.values())


@every
@pytest.mark.parametrize("sign", [1, -1])
def test_an_accumulated_gradient_that_overflows_poisons_nothing(compressor, sign):
    ranks = ranks_for(compressor, 1, (30, 40))
    before = torch.full((1200,), sign * 3.4e38)
    ranks.compressions[0].memory.residuals["w"] = before.clone()
    total, (memory,) = step(ranks, [torch.full((30, 40), sign * 2e38)])
    if compressor.clip is None:
        assert not bool(torch.isfinite(total).any())
        assert torch.equal(memory["w"], before)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in memory.values())


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_types_travel_as_their_float32_values(compressor, dtype):
    gradients = [random(30, 40, seed=r).to(dtype) for r in range(3)]
    half, single = run(compressor, gradients), run(compressor, [gradient.float() for gradient in gradients])
    assert bits(half.totals[0]) == bits(single.totals[0])


@every
def test_zeros_and_constants_need_no_special_case(compressor):
    assert not run(compressor, [torch.zeros(30, 40)] * 2).totals[0].any()
    total = run(compressor, [torch.full((30, 40), 0.01)] * 2).totals[0]
    sent = total[total != 0]
    assert sent.numel() in (12, 60, 1200)
    assert len(set(sent.tolist())) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0},
        {"density": 1.5},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"nesterov": True, "momentum": 0.0},
        {"clip": 0.0},
        {"clip": math.inf},
        {"weight_decay": -1e-4},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DGCCompressor(**options)
