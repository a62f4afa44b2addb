"""PowerSGD: against worked numbers, against the singular values, and in every way in which a gradient can be odd."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress.compressors.powersgd import PowerSGDCompressor, starting_factor
from hvd_compress.kernels import orthonormalise
from hvd_compress.kernels.lowrank import product
from hvd_compress.local import LocalRanks
from hvd_compress.schedules import Steps

from .drive import bits, bound, random, run, slot_of
from .test_contract import LAYOUTS, TENSORS, ranks_of

RANKS = (1, 2, 4, 7)
SIZES = (1, 2, 3, 5)


def low_rank(rows, columns, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def with_spectrum(rows, columns, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64) @ right.t()).float()


def ranks_for(compressor, size, shape=(30, 40), **options):
    return LocalRanks([bound(compressor, {"w": shape}, **options) for _ in range(size)])


def settled(ranks):
    for compression in ranks.compressions:
        compression.settle()
    return [compression.memory.residuals for compression in ranks.compressions]


def step(ranks, *gradients):
    """One step of a parameter named w: the sum, and every rank's memory after it."""
    results = [result["w"] for result in ranks.exchange([{"w": g} for g in gradients], average=False)]
    assert len({bits(result) for result in results}) == 1
    return results[0], settled(ranks)


# The numbers of one step, computed by hand for M1 and M2; other entries of the matrix are zero so that two thirds of
# the traffic are saved and it is compressed.
M1 = [[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]]
M2 = [[0.0, 2.0], [2.0, 1.0], [2.0, 2.0]]
APPROXIMATION = [
    [1.260710553814002, 1.4294670846394983],
    [0.9289446185997908, 1.0532915360501565],
    [1.3270637408568442, 1.5047021943573666],
]
FACTOR = [2.052663483676874, 2.327429461806849]
RESIDUAL_1 = [
    [-0.17136886102403337, 0.9676071055381401],
    [-0.863113897596656, 0.239289446185998],
    [0.7669801462904913, -1.0867293625914314],
]


def padded(corner, rows=12, columns=10):
    matrix = torch.zeros(rows, columns)
    matrix[:3, :2] = torch.tensor(corner)
    return matrix


def test_one_step_of_two_ranks_gives_the_worked_numbers():
    ranks = ranks_for(PowerSGDCompressor(approximation_rank=1), 2, shape=(12, 10))
    for compression in ranks.compressions:
        compression.memory.residuals["w/factor"] = torch.tensor([[0.6], [0.8], *[[0.0]] * 8])
    total, memories = step(ranks, padded(M1), padded(M2))
    assert torch.allclose(total / 2, padded(APPROXIMATION), rtol=1e-6, atol=1e-7)
    assert torch.allclose(memories[0]["w/factor"][:2, 0] / 2, torch.tensor(FACTOR), rtol=1e-6)
    assert torch.allclose(memories[0]["w"].view(12, 10), padded(RESIDUAL_1), rtol=1e-5, atol=1e-6)
    lost = sum(memory["w"].view(12, 10) for memory in memories) + total
    assert torch.allclose(lost, padded(M1) + padded(M2), atol=1e-6)
    assert ranks.compressions[0].telemetry.total.sent_bytes == 4 * (12 + 10)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent_and_what_is_kept_is_what_there_was(rank, size):
    ranks = ranks_for(PowerSGDCompressor(approximation_rank=rank), size)
    kept = torch.zeros(30, 40, dtype=torch.float64)
    for number in range(6):
        gradients = [random(30, 40, seed=10 * number + r) for r in range(size)]
        there = kept + sum(g.double() for g in gradients)
        total, memories = step(ranks, *gradients)
        kept = sum(memory["w"].double() for memory in memories).view(30, 40)
        assert float((total.double() + kept - there).norm()) < 1e-6 * float(there.norm())
        for memory, gradient in zip(memories, gradients):
            assert torch.isfinite(memory["w"]).all()
            assert number or memory["w"].norm() <= gradient.norm() * (1 + 1e-6)  # a projection


@pytest.mark.parametrize("rank", RANKS)
def test_a_matrix_of_that_rank_or_less_arrives_whole_in_one_step(rank):
    for true_rank in {1, rank}:
        gradients = [low_rank(30, 40, true_rank)] * 2
        total, memories = step(ranks_for(PowerSGDCompressor(approximation_rank=rank), 2), *gradients)
        assert float((total / 2 - gradients[0]).norm()) < 5e-5 * float(gradients[0].norm())  # 1e-7 times a condition
        assert float(memories[0]["w"].norm()) < 5e-5 * float(gradients[0].norm())


def test_the_warm_start_finds_the_best_approximation_of_a_gradient_that_stays():
    values = [10.0, 8.0, 4.0, 2.0, 1.5, 1.0, 0.5]
    gradient = with_spectrum(30, 40, values)
    (compression,) = (ranks := ranks_for(PowerSGDCompressor(approximation_rank=2), 1)).compressions
    errors = []
    for _ in range(12):
        total, _ = step(ranks, gradient)
        errors.append(float((total - gradient).norm()))
        compression.memory.residuals["w"].zero_()  # the approximation alone: feedback would hide what it lacks
    best = math.sqrt(sum(value**2 for value in values[2:]))
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-4)
    for before, after in zip(errors, errors[1:]):
        assert after < before * (1 + 1e-5)


def test_feedback_delivers_what_one_step_leaves_out():
    gradient = with_spectrum(30, 40, [4.0, 3.0, 2.0, 1.0])
    ranks = ranks_for(PowerSGDCompressor(approximation_rank=1), 1)
    sent = torch.zeros(30, 40)
    for number in range(1, 41):
        total, memories = step(ranks, gradient)
        sent += total
        assert torch.allclose(sent + memories[0]["w"].view(30, 40), number * gradient, atol=1e-4)
    assert float(memories[0]["w"].norm()) < 0.4 * float((40 * gradient).norm())
    assert float((sent / 40 - gradient).norm()) < 0.4 * float(gradient.norm())


@pytest.mark.parametrize("rank", RANKS)
def test_after_a_gradient_of_zeros_others_still_arrive(rank):
    ranks = ranks_for(PowerSGDCompressor(approximation_rank=rank), 2)
    total, memories = step(ranks, torch.zeros(30, 40), torch.zeros(30, 40))
    assert not total.any()
    assert not memories[0]["w"].any()
    assert not memories[0]["w/factor"].any()
    gradient = low_rank(30, 40, rank)
    total, _ = step(ranks, gradient, gradient)
    assert float((total / 2 - gradient).norm()) < 5e-5 * float(gradient.norm())


def test_after_a_gradient_of_low_rank_the_rank_can_grow_again():
    ranks = ranks_for(PowerSGDCompressor(approximation_rank=4), 1)
    total, memories = step(ranks, low_rank(30, 40, 1))
    assert torch.allclose(total, low_rank(30, 40, 1), atol=1e-5)
    total, memories = step(ranks, low_rank(30, 40, 4, seed=1))
    assert torch.allclose(total, low_rank(30, 40, 4, seed=1), atol=2e-5)
    assert torch.linalg.matrix_rank(memories[0]["w/factor"]) == 4


def test_columns_of_the_factor_survive_a_change_of_rank():
    (compression,) = (ranks := ranks_for(PowerSGDCompressor(), 1)).compressions
    slot = compression.slots[0]
    gradient = with_spectrum(30, 40, [10.0, 5.0, 2.0, 1.0, 0.5, 0.2])
    for rank in (3, 2, 5):
        before = compression.memory.residuals.get("w/factor")
        slot.rate = float(rank)
        start = starting_factor(slot, 40, rank)
        if before is not None:
            common = min(rank, before.shape[1])
            cosines = torch.nn.functional.cosine_similarity(start[:, :common], before[:, :common], dim=0)
            assert torch.allclose(cosines, torch.ones(common), atol=1e-6)
        assert bool((start.norm(dim=0) <= 1).all())
        assert torch.linalg.matrix_rank(start) == rank
        _, memories = step(ranks, gradient)
        assert memories[0]["w/factor"].shape == (40, rank)
    assert compression.telemetry.total.sent_bytes == sum(4 * rank * 70 for rank in (3, 2, 5))


def test_the_rank_may_be_a_schedule():
    ranks = ranks_for(PowerSGDCompressor(approximation_rank=Steps((0, 1), (2, 3))), 2)
    for expected in (1, 1, 3, 3):
        _, memories = step(ranks, random(30, 40), random(30, 40, seed=1))
        assert memories[0]["w/factor"].shape[1] == memories[1]["w/factor"].shape[1] == expected
        assert bits(memories[0]["w/factor"]) == bits(memories[1]["w/factor"])


def test_the_first_factor_is_drawn_by_seed_parameter_and_column():
    def start(seed, index, rank):
        return starting_factor(slot_of([30, 40], index=index, seed=seed), 40, rank)

    assert bits(start(1, 2, 4)) == bits(start(1, 2, 4))
    assert torch.equal(start(1, 2, 4)[:, :2], start(1, 2, 2))
    assert not torch.allclose(start(1, 2, 4), start(2, 2, 4), atol=0.01)
    assert not torch.allclose(start(1, 2, 4), start(1, 3, 4), atol=0.01)


@pytest.mark.parametrize("rank", [0, -1, 2.5, math.nan, math.inf])
def test_a_rank_that_is_no_whole_number_is_refused(rank):
    with pytest.raises(ValueError, match="rank|rate"):
        PowerSGDCompressor(approximation_rank=rank)


# Orthonormalisation


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (7, 7), (1000, 4), (999, 33)], ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30])
def test_columns_become_orthonormal_and_span_the_same(shape, scale):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    basis = orthonormalise(matrix)
    assert torch.allclose(basis.t() @ basis, torch.eye(shape[1]), atol=2e-6)
    unit = matrix.double() / matrix.double().norm(dim=0)
    assert torch.allclose(basis.double() @ (basis.double().t() @ unit), unit, atol=1e-5)


def test_orthonormalising_follows_gram_schmidt():
    matrix = torch.randn(50, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = torch.linalg.qr(matrix)
    signs = expected.R.diagonal().sign()
    assert torch.allclose(orthonormalise(matrix.float()).double(), expected.Q * signs, atol=1e-6)


def test_columns_that_depend_on_others_become_zero():
    a, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    matrix = torch.stack([a, 2 * a, torch.zeros(40), b, a - 3 * b], dim=1)
    basis = orthonormalise(matrix)
    assert [bool(column.any()) for column in basis.t()] == [True, False, False, True, False]
    assert torch.isfinite(basis).all()


def test_the_smallest_numbers_have_a_direction_too():
    tiny = 2.0**-149
    basis = orthonormalise(torch.tensor([[3 * tiny, 0], [4 * tiny, -tiny], [0, 0]]))
    assert torch.allclose(basis, torch.tensor([[0.6, 0.8], [0.8, -0.6], [0, 0]]), atol=1e-6)


def with_threads(compute):
    """What `compute` gives with 1 to 4 threads."""
    threads = torch.get_num_threads()
    try:
        for number in range(1, 5):
            torch.set_num_threads(number)
            yield compute()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [1, 2, 3, 1000, 200_003])
def test_the_number_of_threads_does_not_change_a_bit(rows):
    matrix = random(rows, min(rows, 5), seed=4)
    assert len({bits(basis) for basis in with_threads(lambda: orthonormalise(matrix))}) == 1


@pytest.mark.parametrize("rank", [1, 3, 8, 32])
@pytest.mark.parametrize("shape", [(100, 100), (513, 777), (3, 70_001)], ids=str)
def test_the_product_is_that_of_a_plain_loop_whatever_the_threads(shape, rank):
    """The products of a BLAS are not: at 100 x 100 and rank 8 four threads round differently than one."""
    left, right = (torch.randn(n, rank, generator=torch.Generator().manual_seed(n)) for n in shape)
    expected = left[:, :1] * right[:, 0]
    for number in range(1, rank):
        expected = expected + left[:, number : number + 1] * right[:, number]

    def found():
        product(left, right.t(), out := torch.empty(shape))
        return out

    assert {bits(result) for result in with_threads(found)} == {bits(expected)}
    assert torch.allclose(expected, left @ right.t(), rtol=1e-5, atol=1e-5)


# What a controller asks


@pytest.mark.parametrize("shape", [(30, 40), (64, 3, 7, 7), (1000, 8), (4, 4), (50,), (), (0, 5)], ids=str)
def test_every_candidate_saves_half_and_the_next_one_more(shape):
    compressor = PowerSGDCompressor()
    size = torch.Size(shape)
    candidates = compressor.candidates(size)
    assert list(candidates) == sorted(set(candidates))
    payloads = [compressor.payload_bytes(size, rate) for rate in candidates]
    assert payloads == sorted(payloads)
    assert all(2 * payload <= 4 * size.numel() for payload in payloads)
    assert bool(candidates) == (len(shape) > 1 and math.prod(shape) >= 16)


@pytest.mark.parametrize("shape", [(30, 40), (64, 3, 7, 7), (40, 3), (50,), (3, 3)], ids=str)
@pytest.mark.parametrize("rate", [1.0, 2.0, 5.0, 100.0])
def test_payload_bytes_are_those_that_are_sent(shape, rate):
    compressor = PowerSGDCompressor(approximation_rank=rate)
    (outcome,) = [run(compressor, ranks_of(random(*shape), 2))]
    assert outcome.sent_bytes == [compressor.payload_bytes(torch.Size(shape), rate)] * 2
    slots = ranks_for(PowerSGDCompressor(), 1, shape=shape)
    slots.compressions[0].slots[0].rate = rate
    step(slots, random(*shape))
    assert slots.compressions[0].telemetry.total.sent_bytes == outcome.sent_bytes[0]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_errors_are_those_of_the_best_approximation(scale):
    values = [64.0 / 2**place for place in range(12)]
    gradient = with_spectrum(60, 80, values) * scale
    rates = (1.0, 2.0, 4.0, 8.0, 1000.0)
    errors = PowerSGDCompressor().errors(gradient.view(60, 8, 10), rates)
    best = [scale * math.sqrt(sum(value**2 for value in values[int(rate) :])) for rate in rates[:-1]]
    assert errors[:-1] == pytest.approx(best, rel=0.02)
    assert all(error >= 0.999 * least for error, least in zip(errors, best))
    assert errors[-1] == 0.0  # travels as it is


def test_errors_of_a_flat_spectrum_are_close_to_what_a_step_leaves():
    gradient = random(100, 120)
    compressor = PowerSGDCompressor()
    rates = compressor.candidates(gradient.shape)
    singular = torch.linalg.svdvals(gradient.double())
    for rate, error in zip(rates, compressor.errors(gradient, rates)):
        total = run(PowerSGDCompressor(approximation_rank=rate), [gradient]).totals[0]
        cold = float((total.view(100, 120) - gradient).norm())
        best = float(singular[int(rate) :].norm())
        assert 0.9999 * best <= error <= cold * 1.0001


def test_errors_need_no_special_case():
    compressor = PowerSGDCompressor()
    assert compressor.errors(torch.zeros(30, 40), (1.0, 2.0)) == [0.0, 0.0]
    assert compressor.errors(random(50), (1.0, 2.0)) == [0.0, 0.0]
    assert compressor.errors(torch.full((30, 40), math.nan), (1.0,)) == [math.inf]
    whole = compressor.errors(low_rank(30, 40, 2), (1.0, 2.0, 4.0))
    assert whole[0] > 1
    assert max(whole[1:]) < 1e-4
    before = random(30, 40)
    compressor.errors(gradient := before.clone(), (1.0, 4.0))
    assert bits(gradient) == bits(before)


# The contract


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tensor", [*TENSORS.values(), *LAYOUTS.values()], ids=[*TENSORS, *LAYOUTS])
def test_every_rank_gets_the_same_bits_and_gradients_stay(size, tensor):
    gradients = ranks_of(tensor, size)
    before = [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients]
    outcome = run(PowerSGDCompressor(), gradients, residuals=[random(tensor.numel(), seed=9)] * size)
    assert [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients] == before
    if outcome.totals[0] is None:  # the ranks' sum of 3e38 has overflowed
        assert outcome.totals == [None] * size
        assert float(tensor.abs().max()) == pytest.approx(3e38)
        return
    assert {bits(total) for total in outcome.totals} == {bits(outcome.totals[0])}
    assert outcome.totals[0].shape == (tensor.numel(),)
    assert outcome.totals[0].dtype == torch.float32


@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_in_memory_does_not_matter(tensor):
    strided = run(PowerSGDCompressor(), [tensor] * 2).totals[0]
    assert bits(strided) == bits(run(PowerSGDCompressor(), [tensor.contiguous()] * 2).totals[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(30, 40), (7,), (3, 3)], ids=str)
def test_other_floating_types_travel_as_their_float32_values(dtype, shape):
    gradients = [gradient.to(dtype) for gradient in ranks_of(random(*shape), 3)]
    total = run(PowerSGDCompressor(), gradients).totals[0]
    assert bits(total) == bits(run(PowerSGDCompressor(), [gradient.float() for gradient in gradients]).totals[0])


def test_what_is_not_compressed_is_the_exact_sum_and_clears_the_residual():
    residual = random(50, seed=5)
    outcome = run(PowerSGDCompressor(), [random(50), random(50, seed=1)], residuals=[residual, None])
    assert torch.equal(outcome.totals[0], random(50) + residual + random(50, seed=1))
    outcome.memories[0].commit()
    assert not outcome.memories[0].residuals["weight"].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e37], ids=str)
@pytest.mark.parametrize("place", [0, 517, 1199])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_non_finite_gradient_shows_on_all_ranks_and_changes_nothing(value, place, culprit):
    shapes = {"w": (30, 40), "tiny": (2, 2), "other": (40, 30)}
    ranks = LocalRanks([bound(PowerSGDCompressor(approximation_rank=2), shapes) for _ in range(3)])

    def gradients(seed):
        mine = [{n: random(*shape, seed=seed + r) for n, shape in shapes.items()} for r in range(3)]
        for of_rank in mine:
            of_rank["w"][:, place % 40] = 0  # so that this row of the factor is zero, which must not hide anything
        return mine

    ranks.exchange(gradients(0))
    before = [{key: bits(tensor) for key, tensor in memory.items()} for memory in settled(ranks)]
    assert {"w", "w/factor", "tiny"} <= before[0].keys()
    spoilt = gradients(10)
    spoilt[culprit]["w"].view(-1)[place] = value
    results = ranks.exchange(spoilt)
    assert not any(bool(torch.isfinite(result["w"]).any()) for result in results)
    assert all(bool(torch.isfinite(result["other"]).all()) for result in results)
    assert [{key: bits(tensor) for key, tensor in memory.items()} for memory in settled(ranks)] == before
    results = ranks.exchange(gradients(20))
    assert all(bool(torch.isfinite(tensor).all()) for result in results for tensor in result.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_small_tensor_that_is_not_finite_in_sum_shows_too(value):
    outcome = run(PowerSGDCompressor(), [torch.full((2, 2), value)] * 2)
    assert outcome.totals == [None, None]


def test_constant_and_denormal_gradients_are_not_erased():
    for value in (0.1, -7.0, 1e-30, 1e-42):
        gradient = torch.full((30, 40), value)
        total = run(PowerSGDCompressor(), [gradient]).totals[0]
        assert torch.allclose(total.double(), gradient.view(-1).double(), rtol=0.02, atol=0)
