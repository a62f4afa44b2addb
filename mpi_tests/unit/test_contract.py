"""What every compressor promises, whatever its algorithm."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress import kernels, wire
from hvd_compress.compressors import (
    AdaCompCompressor,
    BF16Compressor,
    DGCCompressor,
    QSGDCompressor,
    ScaleComCompressor,
    StochasticPruningCompressor,
    TernGradCompressor,
    TopKCompressor,
)
from hvd_compress.local import LocalRanks
from hvd_compress.requests import Allgather

from . import drive
from .drive import (
    ADACOMP,
    EVERY,
    FRAMED,
    NARROW,
    SIZES,
    STATEFUL,
    SUMMED,
    TERNGRAD,
    TOPK,
    bits,
    bound,
    gathering,
    random,
    run,
)

every = pytest.mark.parametrize("compressor", EVERY.values(), ids=EVERY)
framed = pytest.mark.parametrize("compressor", FRAMED.values(), ids=FRAMED)
stateful = pytest.mark.parametrize("compressor", STATEFUL.values(), ids=STATEFUL)
sizes = pytest.mark.parametrize("size", SIZES)

_TINY = 2.0**-149
_HUGE = 3e38

TENSORS = {
    "empty": torch.zeros(0),
    "one element": torch.tensor([-0.7]),
    "one zero": torch.zeros(1),
    "two elements": torch.tensor([3.0, -1e-3]),
    "zeros": torch.zeros(700),
    "negative zeros": torch.full((700,), -0.0),
    "constant": torch.full((700,), 0.1),
    "constant huge": torch.full((700,), -_HUGE),
    "constant denormal": torch.full((700,), 3 * _TINY),
    "one spike": torch.zeros(700).index_fill_(0, torch.tensor([699]), 5.0),
    "one huge spike": random(700).index_fill_(0, torch.tensor([350]), _HUGE),
    "denormal": random(700, seed=1).mul_(1e-41),
    "all magnitudes": torch.logspace(-44, 38, 700) * torch.tensor([1.0, -1.0]).repeat(350),
    "matrix": random(35, 20, seed=2),
    "convolution": random(6, 5, 3, 7, seed=3),
    "over a chunk": random(70_001, seed=4),
}
LAYOUTS = {
    "transposed": random(24, 33).t(),
    "channels last": random(4, 6, 5, 3).contiguous(memory_format=torch.channels_last),
    "every third": random(2000)[::3],
    "a column": random(900, 3)[:, 1],
    "expanded": random(30, 1).expand(30, 25),
    "at an offset": random(1001)[1:],
}
DTYPES = (torch.float16, torch.bfloat16, torch.float64)


def ranks_of(tensor: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Different gradients of the same shape for every rank; rank 0 has `tensor` itself."""
    return [tensor] + [(random(*tensor.shape, seed=100 + rank)).to(tensor.dtype) for rank in range(1, size)]


def dense_frame_bytes(gradient: torch.Tensor) -> int:
    return wire.frame_bytes(gradient.numel() * gradient.element_size())


@pytest.mark.filterwarnings("error")
@every
@sizes
@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_every_rank_gets_the_same_bits_of_the_right_shape(compressor, size, tensor):
    outcome = run(compressor, ranks_of(tensor, size))
    assert outcome.totals[0] is not None or not math.isfinite(float(tensor.to(torch.bfloat16).abs().max()))
    for total in outcome.totals:
        if total is not None:
            assert total.shape == (tensor.numel(),)
            assert total.dtype == torch.float32
            assert bits(total) == bits(outcome.totals[0])
        else:
            assert outcome.totals[0] is None


@every
@pytest.mark.parametrize("tensor", [*TENSORS.values(), *LAYOUTS.values()], ids=[*TENSORS, *LAYOUTS])
def test_gradients_are_left_as_they_are(compressor, tensor):
    gradients = ranks_of(tensor, 2)
    before = [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients]
    run(compressor, gradients, residuals=[random(tensor.numel(), seed=9)] * 2)
    assert [(bits(gradient), gradient.stride(), gradient.data_ptr()) for gradient in gradients] == before


@stateful
def test_residuals_are_left_as_they_are_until_the_commit(compressor):
    residual = random(1500, seed=5)
    outcome = run(compressor, [random(1500)], residuals=[residual])
    assert bits(outcome.memories[0].residuals["weight"]) == bits(residual)
    outcome.memories[0].commit()
    assert bits(outcome.memories[0].residuals["weight"]) != bits(residual)


@framed
def test_the_same_seed_gives_the_same_frames(compressor):
    gradients = ranks_of(random(40, 50), 3)
    first, second = (run(compressor, gradients, seed=7, step=3) for _ in range(2))
    assert [bits(frame) for frame in first.frames] == [bits(frame) for frame in second.frames]
    assert bits(first.totals[0]) == bits(second.totals[0])


@framed
@pytest.mark.parametrize("other", [{"seed": 8}, {"step": 4}], ids=["seed", "step"])
def test_only_stochastic_compressors_depend_on_seed_and_step(compressor, other):
    gradients = ranks_of(random(40, 50), 2)
    first = run(compressor, gradients, seed=7, step=3)
    second = run(compressor, gradients, **({"seed": 7, "step": 3} | other))
    same = [bits(a) == bits(b) for a, b in zip(first.frames, second.frames)]
    stochastic = isinstance(compressor, (TernGradCompressor, QSGDCompressor, StochasticPruningCompressor))
    assert same == [not stochastic] * 2


def test_stochastic_frames_differ_by_rank_and_parameter():
    gradient = random(40, 50)
    compressor = TernGradCompressor()
    payloads = {bits(frame.payload) for frame in run(compressor, [gradient] * 3).parsed()}
    payloads |= {bits(frame.payload) for frame in run(compressor, [gradient] * 3, index=1).parsed()}
    assert len(payloads) == 6


@framed
@pytest.mark.parametrize("tensor", [*TENSORS.values(), *LAYOUTS.values()], ids=[*TENSORS, *LAYOUTS])
def test_frames_have_the_size_that_the_format_says(compressor, tensor):
    outcome = run(compressor, ranks_of(tensor, 2))
    for frame, parsed in zip(outcome.frames, outcome.parsed()):
        numel = tensor.numel()
        if not parsed.finite:
            assert frame.numel() == wire.HEADER_BYTES
        elif parsed.dense:
            assert frame.numel() == dense_frame_bytes(tensor)
        elif isinstance(compressor, BF16Compressor):
            assert frame.numel() == 36 + 2 * numel + (-2 * numel) % 4
        elif isinstance(compressor, TernGradCompressor):
            assert frame.numel() == 36 + 4 + 32 * math.ceil(numel / 128)
        elif isinstance(compressor, QSGDCompressor):
            norms, blocks = math.ceil(numel / compressor.bucket_size), math.ceil(numel / 256)
            assert frame.numel() == 36 + 4 * norms + 32 * compressor.bits * blocks
        elif isinstance(compressor, StochasticPruningCompressor):
            magnitudes = ranks_of(tensor, 2)[parsed.sender].abs()
            threshold = parsed.payload[:4].view(torch.float32)
            exact = int(((magnitudes >= threshold) & (magnitudes > 0)).sum())
            assert frame.numel() == 36 + 4 + 32 * math.ceil(numel / 128) + 4 * exact
        elif isinstance(compressor, TopKCompressor):
            k = min(math.ceil(round(compressor.density * numel, 6)), numel)
            payload = 4 * math.ceil(numel / 65536) + 6 * k
            if compressor.value_bits < 32:
                low = int(math.log2(numel / k)) if k else 0
                in_bits = (k + ((numel - 1) >> low), k * low, k * compressor.value_bits) if k else ()
                payload = 4 + 4 * math.ceil(k / 64) + sum(math.ceil(size / 8) for size in in_bits)
            assert frame.numel() == 36 + payload + -payload % 4
        else:
            assert isinstance(compressor, AdaCompCompressor)
            width = 8 if compressor.bin_size_of(tensor.shape) <= 64 else 16
            positions, _ = kernels.decode_gaps(parsed.payload[4:], width)
            far_apart = numel // (2 ** (width - 1) - 1)  # at most one skip for as many elements
            assert positions.numel() * width // 8 <= parsed.payload.numel() - 4
            assert parsed.payload.numel() - 4 <= (positions.numel() + far_apart) * width // 8
        assert frame.numel() <= max(dense_frame_bytes(tensor), frame.numel() * isinstance(compressor, BF16Compressor))
        assert outcome.sent_bytes[parsed.sender] == frame.numel() + 4 * getattr(compressor, "share_scaler", False)


@framed
def test_frames_name_their_sender_parameter_and_gradient(compressor):
    outcome = run(compressor, ranks_of(random(40, 50).to(torch.float16), 3), index=5)
    for rank, frame in enumerate(outcome.parsed()):
        assert (frame.sender, frame.parameter, frame.numel, frame.dtype) == (rank, 5, 2000, torch.float16)
        assert frame.algorithm == compressor.algorithm


@pytest.mark.parametrize("compressor", [*TERNGRAD.values(), *STATEFUL.values()], ids=[*TERNGRAD, *STATEFUL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("numel", [1, 2, 3, 4])
def test_what_would_be_larger_than_dense_is_sent_dense_and_exact(compressor, dtype, numel):
    gradient = random(numel).to(dtype)
    (frame,) = run(compressor, [gradient]).parsed()
    assert frame.dense
    assert bits(frame.payload) == bits(gradient.to(torch.float32).to(dtype))
    outcome = run(compressor, [gradient])
    assert bits(outcome.totals[0]) == bits(gradient.to(torch.float32))
    outcome.memories[0].commit()
    if compressor.stateful:
        assert not outcome.memories[0].residuals["weight"].any()


@stateful
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_a_dense_frame_stays_in_the_residual(compressor, dtype):
    gradient, residual = random(9).to(dtype), random(9, seed=1, scale=1e-3)
    outcome = run(compressor, [gradient], residuals=[residual])
    assert outcome.parsed()[0].dense
    outcome.memories[0].commit()
    kept = outcome.memories[0].residuals["weight"]
    assert kept.any()
    assert torch.equal(outcome.totals[0] + kept, gradient.float() + residual)


@stateful
@pytest.mark.parametrize("tensor", [*TENSORS.values(), *LAYOUTS.values()], ids=[*TENSORS, *LAYOUTS])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e6])
def test_gradient_plus_residual_is_what_is_sent_plus_the_new_residual(compressor, tensor, scale):
    residual = random(tensor.numel(), seed=7, scale=scale)
    outcome = run(compressor, [tensor], residuals=[residual])
    outcome.memories[0].commit()
    sent, kept = outcome.totals[0], outcome.memories[0].residuals["weight"]
    accumulated = tensor.reshape(-1) + residual
    if isinstance(compressor, TopKCompressor) or outcome.parsed()[0].dense:
        assert torch.equal(sent + kept, accumulated)  # the values themselves travel
    # kept = round(accumulated - sent), one rounding to nearest of a float32
    rounding = 2.0**-24 * kept.double().abs() + _TINY / 2
    assert bool(((sent.double() + kept.double() - accumulated.double()).abs() <= rounding).all())


@stateful
def test_over_many_steps_nothing_is_lost(compressor):
    gradients = [random(30, 40, seed=step).mul_(64).round_() for step in range(20)]  # integers: all sums are exact
    residual, sent = None, torch.zeros(1200, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        outcome = run(compressor, [gradient], residuals=[residual], step=step)
        outcome.memories[0].commit()
        residual = outcome.memories[0].residuals["weight"]
        sent += outcome.totals[0]
    exact = torch.stack(gradients).double().sum(0).view(-1)
    # AdaComp's scale is no integer, nor are steps of 8 or 4 bits: one rounding of the residual a step
    slack = 0.0 if getattr(compressor, "value_bits", 0) == 32 else 20 * 2.0**-24 * 64 * 200
    assert float((sent + residual.double() - exact).abs().max()) <= slack


def decoded(compressor, outcome):
    """Every rank's frame decoded on its own."""
    for frame in outcome.frames:
        parsed = wire.unpack(frame, 0)
        gradient = torch.zeros(parsed.numel, dtype=parsed.dtype)
        alone = bytearray(bits(wire.pack(wire.Frame(**(vars(parsed) | {"sender": 0})))))
        yield run(compressor, [gradient], tamper=lambda _, a=alone: [torch.frombuffer(a, dtype=torch.uint8)]).totals[0]


@framed
@sizes
def test_the_total_is_the_sum_of_the_decoded_frames_in_rank_order(compressor, size):
    outcome = run(compressor, ranks_of(random(40, 50), size))
    total = torch.zeros(2000)
    for part in decoded(compressor, outcome):
        total += part
    assert bits(total) == bits(outcome.totals[0])


@pytest.mark.parametrize("name", SUMMED)
@sizes
def test_summed_compressors_add_what_they_cast(name, size):
    gradients = ranks_of(random(40, 50), size)
    (total, *_) = run(SUMMED[name], gradients).totals
    dtype = {"none": torch.float32, "fp16": torch.float16}[name]
    expected = gradients[0].to(dtype)
    for gradient in gradients[1:]:
        expected = expected + gradient.to(dtype)
    assert bits(total) == bits(expected.float().view(-1))


# |decoded - gradient| of one rank: half a unit in the last place of the type, or what the algorithm allows.
BOUNDS = {
    "none": lambda g: torch.zeros_like(g),
    "fp16": lambda g: g.abs() * 2.0**-11 + 2.0**-25,
    "bf16": lambda g: g.abs() * 2.0**-8 + 2.0**-134,
    "terngrad_unclipped": lambda g: g.abs().max().expand_as(g),
    "terngrad_local_unclipped": lambda g: g.abs().max().expand_as(g),
    "topk_1.0": lambda g: torch.zeros_like(g),
    "topk_0.3": lambda g: g.abs().sort(descending=True).values[math.ceil(0.3 * g.numel()) - 1].expand_as(g),
    "topk_0.01": lambda g: g.abs().sort(descending=True).values[math.ceil(0.01 * g.numel()) - 1].expand_as(g),
} | {name: lambda g: g.abs().max().expand_as(g) for name in ADACOMP}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 30.0])
def test_one_rank_decodes_within_the_bound_of_the_algorithm(name, scale):
    gradient = random(2000, scale=scale)
    (total,) = run(EVERY[name], [gradient]).totals
    assert bool(((total.double() - gradient.double()).abs() <= BOUNDS[name](gradient.double())).all())


@pytest.mark.parametrize("compressor", TERNGRAD.values(), ids=TERNGRAD)
def test_a_ternary_total_has_the_levels_of_its_scalers(compressor):
    gradients = ranks_of(random(40, 50), 3)
    outcome = run(compressor, gradients)
    scalers = [frame.payload[:4].view(torch.float32).item() for frame in outcome.parsed()]
    if compressor.share_scaler:
        assert len(set(scalers)) == 1
        levels = outcome.totals[0].double() / scalers[0]
        assert float((levels - levels.round()).abs().max()) < 1e-6
        assert set(levels.round().tolist()) <= set(range(-3, 4))
    else:
        assert len(set(scalers)) == 3
    for gradient, scaler in zip(gradients, scalers):
        sigma = float(gradient.double().std(correction=0))
        largest = float(gradient.abs().max())
        own = min(largest, compressor.clip_sigma * sigma) if compressor.clip_sigma else largest
        assert scaler >= own * (1 - 1e-6)
        assert compressor.share_scaler or scaler == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("name", TOPK)
def test_topk_sends_the_largest_and_keeps_the_rest(name):
    gradient = random(2000)
    outcome = run(TOPK[name], [gradient])
    outcome.memories[0].commit()
    sent = outcome.totals[0] != 0
    assert int(sent.sum()) == math.ceil(TOPK[name].density * 2000)
    kept = outcome.memories[0].residuals["weight"]
    assert torch.equal(kept, gradient.masked_fill(sent, 0))
    if not sent.all():
        assert gradient[sent].abs().min() >= gradient[~sent].abs().max()


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_narrow_values_are_the_nearest_of_their_levels_and_the_residual_has_the_rest(name, scale):
    gradient, bits_, k = random(2000, scale=scale), NARROW[name].value_bits, math.ceil(NARROW[name].density * 2000)
    outcome = run(NARROW[name], [gradient])
    outcome.memories[0].commit()
    (total,), kept = outcome.totals, outcome.memories[0].residuals["weight"]
    assert torch.equal(total + kept, gradient)
    chosen = kernels.topk_indices(gradient, k)
    assert int((total != 0).sum()) <= k
    for block in chosen.split(64):
        half = float(gradient[block].abs().max()) / (2 ** (bits_ - 1) - 1) / 2
        assert float(kept[block].abs().max()) <= half * (1 + 1e-6)
    assert torch.equal(kept[total == 0], gradient[total == 0])


@pytest.mark.parametrize("compressor", ADACOMP.values(), ids=ADACOMP)
def test_adacomp_residuals_grow_no_larger_than_what_was_there(compressor):
    gradient, residual = random(2000), random(2000, seed=1)
    outcome = run(compressor, [gradient], residuals=[residual])
    outcome.memories[0].commit()
    scale = outcome.totals[0].abs().max()
    kept = outcome.memories[0].residuals["weight"]
    assert bool((kept.abs() <= torch.maximum((gradient + residual).abs(), scale)).all())


@every
@pytest.mark.parametrize("tensor", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_in_memory_does_not_matter(compressor, tensor):
    strided = run(compressor, [tensor, tensor])
    packed = run(compressor, [tensor.clone(memory_format=torch.contiguous_format)] * 2)
    assert bits(strided.totals[0]) == bits(packed.totals[0])
    assert [bits(frame) for frame in strided.frames] == [bits(frame) for frame in packed.frames]


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(30, 40), (3, 3), (8, 5, 3, 3)], ids=str)
def test_other_floating_types_travel_as_their_float32_values(compressor, dtype, shape):
    gradients = [gradient.to(dtype) for gradient in ranks_of(random(*shape), 3)]
    half = run(compressor, gradients)
    single = run(compressor, [gradient.float() for gradient in gradients])
    assert all(bits(total) == bits(half.totals[0]) for total in half.totals)
    assert half.totals[0].dtype == (
        torch.float64 if dtype == torch.float64 and compressor in SUMMED.values() else torch.float32
    )
    if compressor is not SUMMED["none"] or dtype == torch.bfloat16:  # else they are added in their own type
        assert torch.allclose(half.totals[0].float(), single.totals[0], rtol=2e-3, atol=0) or not all(
            frame.dense == other.dense for frame, other in zip(half.parsed(), single.parsed())
        )


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", [0, 517, 1199])
@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_non_finite_gradient_shows_on_all_ranks_and_changes_no_residual(compressor, value, place, culprit, dtype):
    shapes = {"a": (30, 40), "b": (20, 70), "tiny": (2, 2)}
    ranks = LocalRanks([bound(compressor, shapes) for _ in range(3)])

    def gradients(step):
        return [
            {name: random(*shape, seed=10 * step + r).to(dtype) for name, shape in shapes.items()} for r in range(3)
        ]

    ranks.exchange(gradients(0))
    for compression in ranks.compressions:
        compression.settle()
    before = [{n: bits(r) for n, r in c.memory.residuals.items()} for c in ranks.compressions]
    spoilt = gradients(1)
    spoilt[culprit]["a"].view(-1)[place] = value
    results = ranks.exchange(spoilt)
    assert not any(bool(torch.isfinite(result["a"]).all()) for result in results)
    assert len({bits(result["b"]) for result in results}) == 1
    assert all(bool(torch.isfinite(result["b"]).all()) for result in results)
    for compression in ranks.compressions:
        compression.settle()
    assert [{n: bits(r) for n, r in c.memory.residuals.items()} for c in ranks.compressions] == before
    assert [compression.progress[0] for compression in ranks.compressions] == [2, 2, 2]
    results = ranks.exchange(gradients(2))  # as if it had not been
    assert all(bool(torch.isfinite(tensor).all()) for result in results for tensor in result.values())


@pytest.mark.parametrize("compressor", [*TERNGRAD.values(), *STATEFUL.values()], ids=[*TERNGRAD, *STATEFUL])
def test_a_small_dense_gradient_that_is_not_finite_shows_too(compressor):
    outcome = run(compressor, [torch.ones(2, 2), torch.tensor([[1, math.nan], [1, 1]])])
    assert outcome.totals == [None, None]


@stateful
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shape", [(30, 40), (2, 2)], ids=str)
def test_an_accumulated_gradient_that_overflows_poisons_nothing(compressor, sign, shape):
    (compression,) = (ranks := LocalRanks([bound(compressor, {"w": shape})])).compressions
    numel = math.prod(shape)
    compression.memory.residuals["w"] = torch.full((numel,), sign * 2e38)
    (result,) = ranks.exchange([{"w": torch.full(shape, sign * 2e38)}])
    assert not bool(torch.isfinite(result["w"]).all())
    compression.settle()
    assert torch.equal(compression.memory.residuals["w"], torch.full((numel,), sign * 2e38))
    (result,) = ranks.exchange([{"w": torch.full(shape, -sign * 1e38)}])
    assert bool(torch.isfinite(result["w"]).all())


@stateful
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 6e4), (torch.bfloat16, 3.3895e38)], ids=str)
@pytest.mark.parametrize("shape", [(30, 40), (2, 2)], ids=str)
def test_an_accumulated_gradient_beyond_its_type_poisons_nothing(compressor, dtype, large, shape):
    (compression,) = (ranks := LocalRanks([bound(compressor, {"w": shape})])).compressions
    compression.memory.residuals["w"] = torch.full((math.prod(shape),), large * 0.0035)
    ranks.exchange([{"w": torch.full(shape, large, dtype=dtype)}])
    ranks.exchange([{"w": torch.full(shape, large, dtype=dtype)}])
    compression.settle()
    assert bool(torch.isfinite(compression.memory.residuals["w"]).all())
    (result,) = ranks.exchange([{"w": torch.full(shape, -large, dtype=dtype)}])
    assert bool(torch.isfinite(result["w"]).all())


@stateful
@pytest.mark.parametrize(
    ("dtype", "large", "average"),
    [(torch.float32, 3e38, True), (torch.float32, 3e38, False), (torch.float16, 6e4, False)],
    ids=["float32 mean", "float32 sum", "float16 sum"],
)
def test_a_sum_that_overflows_changes_no_residual(compressor, dtype, large, average):
    ranks = LocalRanks([bound(compressor, {"w": (30, 40)}) for _ in range(2)])
    for compression in ranks.compressions:
        compression.memory.residuals["w"] = torch.full((1200,), 0.5)
    results = ranks.exchange([{"w": torch.full((30, 40), large, dtype=dtype)}] * 2, average=average)
    assert not bool(torch.isfinite(results[0]["w"]).all())
    for compression in ranks.compressions:
        compression.settle()
        assert torch.equal(compression.memory.residuals["w"], torch.full((1200,), 0.5))


@every
def test_an_all_zero_gradient_gives_zeros(compressor):
    outcome = run(compressor, [torch.zeros(3000)] * 2)
    assert not outcome.totals[0].any()
    for memory in outcome.memories:
        memory.commit()
        assert not any(bool(residual.any()) for residual in memory.residuals.values())


@pytest.mark.parametrize("compressor", ADACOMP.values(), ids=ADACOMP)
def test_adacomp_sends_nothing_for_bins_of_zeros(compressor):
    gradient = torch.zeros(40_000)
    gradient[12_345] = -2.0
    outcome = run(compressor, [gradient])
    assert torch.count_nonzero(outcome.totals[0]) == 1
    assert outcome.totals[0][12_345] < 0
    assert outcome.frames[0].numel() < 400


@every
@pytest.mark.parametrize("tensor", [torch.full((40, 30), 0.1), torch.tensor([[-0.7]])], ids=["constant", "single"])
def test_constant_gradients_are_not_erased(compressor, tensor):
    total = run(compressor, [tensor]).totals[0]
    sent = total != 0
    assert bool(sent.any())
    exact = not isinstance(compressor, (TopKCompressor, ScaleComCompressor, DGCCompressor))
    assert bool((total[sent] * tensor.view(-1)[sent] > 0).all())
    if getattr(compressor, "norm", "max") != "l2":  # of a norm above all values, they are right on average alone
        assert bool(torch.allclose(total[sent], tensor.view(-1)[sent], rtol=2.0**-8))
        assert bool(sent.all()) or not exact


@every
@sizes
def test_simulated_ranks_give_what_the_exchange_alone_gives(compressor, size):
    shapes = {"a": (30, 40), "conv": (6, 5, 4, 7), "c": (11, 3)}
    options = {"seed": 3, "bucket_bytes": 5000} | gathering(compressor)
    ranks = LocalRanks([bound(compressor, shapes, **options) for _ in range(size)])
    gradients = [{n: random(*shape, seed=r) for n, shape in shapes.items()} for r in range(size)]
    results = ranks.exchange(gradients, average=False)
    for index, (name, shape) in enumerate(shapes.items()):
        total = run(compressor, [mine[name] for mine in gradients], name=name, index=index, seed=3).totals[0]
        for result in results:
            assert result[name].shape == shape
            assert bits(result[name]) == bits(total)


@every
@pytest.mark.parametrize("average", [True, False])
def test_the_mean_is_the_sum_over_the_number_of_ranks(compressor, average):
    gradients = [{"w": random(30, 40, seed=rank)} for rank in range(5)]
    ranks = LocalRanks([bound(compressor, {"w": (30, 40)}, **gathering(compressor)) for _ in range(5)])
    results = ranks.exchange(gradients, average=average)
    total = run(compressor, [mine["w"] for mine in gradients], name="w").totals[0]
    assert bits(results[3]["w"]) == bits(total / 5 if average else total)


@every
def test_the_order_of_submission_may_differ_by_rank(compressor):
    shapes = {f"p{number}": (20 + number, 30) for number in range(6)}
    gradients = [{name: random(*shape, seed=rank) for name, shape in shapes.items()} for rank in range(3)]
    alike = LocalRanks([bound(compressor, shapes, bucket_bytes=6000) for _ in range(3)])
    unlike = LocalRanks([bound(compressor, shapes, bucket_bytes=6000) for _ in range(3)])
    for step in range(3):
        shuffled = []
        for rank, mine in enumerate(gradients):
            names = sorted(mine, key=lambda name, rank=rank: hash((int(name[1:]) * 7 + rank * 3 + step) % 6))
            shuffled.append({name: mine[name] for name in names})
        expected, found = alike.exchange(gradients), unlike.exchange(shuffled)
        for a, b in zip(expected, found):
            assert {name: bits(tensor) for name, tensor in a.items()} == {name: bits(b[name]) for name in a}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_no_compression_at_one_rank_changes_nothing(dtype):
    gradient = random(20, 30).to(dtype)
    (result,) = LocalRanks([bound(EVERY["none"], {"w": (20, 30)})]).exchange([{"w": gradient}])
    assert result["w"].dtype == dtype
    assert bits(result["w"]) == bits(gradient)


@pytest.mark.parametrize("compressor", {**SUMMED, **FRAMED}.values(), ids={**SUMMED, **FRAMED})
def test_telemetry_counts_the_bytes_that_were_packed(compressor, monkeypatch):
    packed: dict[tuple[int, int], int] = {}
    pack = wire.pack

    def spy(frame, *room):
        buffer = pack(frame, *room)
        key = frame.sender, frame.parameter
        packed[key] = packed.get(key, 0) + buffer.numel()
        return buffer

    monkeypatch.setattr(wire, "pack", spy)
    shapes = {"a": (30, 40), "b": (7,), "c": (20, 30, 3)}
    compressions = [bound(compressor, shapes) for _ in range(2)]
    ranks = LocalRanks(compressions)
    for step in range(3):
        ranks.exchange([{n: random(*shape, seed=2 * step + r) for n, shape in shapes.items()} for r in range(2)])
    scaler_bytes = 4 if getattr(compressor, "share_scaler", False) else 0
    summand_bytes = {"none": 4, "fp16": 2}
    for rank, compression in enumerate(compressions):
        compression.settle()
        telemetry = compression.telemetry
        assert telemetry.steps == 3
        for index, (name, shape) in enumerate(shapes.items()):
            traffic = telemetry.parameters[name]
            numel = math.prod(shape)
            assert traffic.raw_bytes == 3 * 4 * numel
            if compression.binding.compressed[index] and compressor in FRAMED.values():
                assert traffic.sent_bytes == packed[rank, index] + 3 * scaler_bytes
            else:
                kind = "fp16" if compressor is EVERY["fp16"] else "none"
                assert traffic.sent_bytes == 3 * summand_bytes[kind] * numel
                assert (rank, index) not in packed
        assert telemetry.total.sent_bytes == sum(t.sent_bytes for t in telemetry.parameters.values())
        one_dimension = 0 if compressor in SUMMED.values() else telemetry.parameters["b"].sent_bytes
        assert telemetry.compressed.sent_bytes == telemetry.total.sent_bytes - one_dimension
        assert telemetry.total.compression_ratio == telemetry.total.raw_bytes / telemetry.total.sent_bytes


@framed
def test_a_rank_that_answers_too_little_is_noticed(compressor):
    with pytest.raises((wire.WireError, ValueError)):
        run(compressor, ranks_of(random(40, 50), 3), tamper=lambda frames: frames[:2])


@framed
def test_the_request_is_one_gather_of_one_frame(compressor):
    exchange = compressor.exchange(drive.slot_of([2000]), random(2000))
    request = next(exchange)
    if getattr(compressor, "share_scaler", False):
        assert request.tensor.shape == (1,)
        request = exchange.send(request.tensor)
    assert isinstance(request, Allgather)
    assert wire.split(request.frame, 1, 0)[0].numel() == request.frame.numel()
