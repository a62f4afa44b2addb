"""Masked exchange: what travels under masks, what does not, and how masks that differ are noticed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hvd_compress import Compression, GradientCompression
from hvd_compress.compressors import (
    AdaCompCompressor,
    DGCCompressor,
    MaskedCompressor,
    MaskError,
    NoneCompressor,
    TopKCompressor,
)
from hvd_compress.compressors.masked import KeptCompressor, digest
from hvd_compress.local import LocalRanks
from hvd_compress.training import ACDC, Masks, Schedule

from .drive import bits, bound, random

SHAPES = {"a": (30, 40), "conv": (6, 5, 4, 7), "bias": (11,)}
DENSE = {
    "none": NoneCompressor(),
    "topk": TopKCompressor(density=0.05),
    "adacomp": AdaCompCompressor(),
}
every = pytest.mark.parametrize("dense", DENSE.values(), ids=DENSE)


def mask_of(*shape, keep=0.1, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < keep


def masks_of(seed=0, **options):
    return {name: mask_of(*shape, seed=seed, **options) for name, shape in SHAPES.items() if len(shape) > 1}


def ranks_with(sources, dense, shapes=SHAPES):
    return LocalRanks([bound(MaskedCompressor(masks=source, dense=dense), shapes) for source in sources])


def gradients_of(size, seed=0, shapes=SHAPES, dtype=torch.float32):
    return [{n: random(*s, seed=100 * seed + r).to(dtype) for n, s in shapes.items()} for r in range(size)]


def sent_bytes(ranks):
    """Of every rank and all parameters, in the last step."""
    found = [compression.telemetry.total.sent_bytes for compression in ranks.compressions]
    for compression in ranks.compressions:
        compression.telemetry.reset()
    return found


@every
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_kept_values_are_summed_and_pruned_ones_are_zero(dense, size, dtype):
    masks = Masks(masks_of())
    ranks = ranks_with([masks] * size, dense)
    for number in range(3):
        gradients = gradients_of(size, seed=number, dtype=dtype)
        results = ranks.exchange(gradients, average=False)
        for name, mask in masks.masks.items():
            expected = sum(mine[name].double() for mine in gradients) * mask
            assert all(bits(result[name]) == bits(results[0][name]) for result in results)
            assert results[0][name].dtype == dtype
            slack = 3 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps  # a rounding a rank
            most = sum(mine[name].double().abs() for mine in gradients)
            assert bool(((results[0][name].double() - expected).abs() <= slack * most).all())
            assert not results[0][name][~mask].any()


def test_what_travels_is_what_is_kept_to_the_byte():
    masks = Masks(masks_of())
    ranks = ranks_with([masks] * 2, NoneCompressor())
    ranks.exchange(gradients_of(2))
    sent_bytes(ranks)
    for number in range(1, 4):
        ranks.exchange(gradients_of(2, seed=number))
        kept = sum(int(mask.sum()) for mask in masks.masks.values())
        assert sent_bytes(ranks) == [4 * (kept + 11)] * 2
    for compression in ranks.compressions:
        assert not compression.memory.residuals


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_a_compressed_phase_of_acdc_sends_what_the_sparsity_leaves(sparsity, scope):
    """Comparing the masks included, which is done once a phase."""
    models = [nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(4))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    plans = [
        ACDC(m, torch.optim.SGD(m.parameters(), lr=0.1), schedule=Schedule((1, 1)), sparsity=sparsity, scope=scope)
        for m in models
    ]
    ranks = LocalRanks([Compression.masked(plan, min_numel=1) for plan in plans])
    shapes = {name: tuple(p.shape) for name, p in models[0].named_parameters()}
    dense_bytes = 40 * sum(4 * math.prod(shape) for shape in shapes.values())
    for phase in range(2):
        for plan in plans:
            plan.begin(phase)
        for number in range(40):
            ranks.exchange(gradients_of(2, seed=number, shapes=shapes))
        masked = sum(mask.numel() for mask in plans[0].masks.values()) / 40_000
        share = 1 - sparsity * masked
        assert masked == {(0, "global"): 0, (0, "uniform"): 0, (1, "global"): 1, (1, "uniform"): 0.5}[phase, scope]
        for found in sent_bytes(ranks):
            assert found == pytest.approx(share * dense_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["topk", "adacomp"])
def test_dense_phases_are_those_of_the_dense_compressor(name):
    masks = Masks()
    ranks = ranks_with([masks] * 3, DENSE[name])
    alone = LocalRanks([bound(DENSE[name], SHAPES) for _ in range(3)])
    for number in range(3):
        found = ranks.exchange(gradients_of(3, seed=number))
        expected = alone.exchange(gradients_of(3, seed=number))
        for mine, theirs in zip(found, expected):
            assert {n: bits(t) for n, t in mine.items()} == {n: bits(t) for n, t in theirs.items()}


@pytest.mark.parametrize("name", ["topk", "adacomp"])
def test_the_residual_is_sent_where_weights_are_kept_and_dropped_where_they_are_not(name):
    masks = Masks()
    ranks = ranks_with([masks] * 2, DENSE[name])
    ranks.exchange(gradients_of(2))
    for compression in ranks.compressions:
        compression.settle()
    owed = sum(c.memory.residuals["a"] for c in ranks.compressions).view(30, 40)
    assert owed.any()
    masks.update(masks_of())
    gradients = gradients_of(2, seed=1)
    (result, _) = ranks.exchange(gradients, average=False)
    expected = (gradients[0]["a"] + gradients[1]["a"] + owed) * masks.masks["a"]
    assert torch.allclose(result["a"], expected, rtol=1e-4, atol=1e-5)
    gradients = gradients_of(2, seed=2)
    (result, _) = ranks.exchange(gradients, average=False)
    assert torch.equal(result["a"], (gradients[0]["a"] + gradients[1]["a"]) * masks.masks["a"])
    masks.update({})
    for compression in ranks.compressions:
        assert not compression.memory.residuals["a"].any()
    alone = LocalRanks([bound(DENSE[name], SHAPES) for _ in range(2)])
    found, expected = (r.exchange(gradients_of(2, seed=3))[0] for r in (ranks, alone))
    assert bits(found["a"]) == bits(expected["a"])


def test_masks_that_change_are_followed_at_once():
    masks = Masks()
    ranks = ranks_with([masks] * 2, NoneCompressor())
    for number in range(4):
        masks.update(masks_of(seed=number))
        for _ in range(2):
            gradients = gradients_of(2, seed=number)
            for result in ranks.exchange(gradients, average=False):
                assert torch.equal(result["a"], (gradients[0]["a"] + gradients[1]["a"]) * masks.masks["a"])


def test_masks_may_be_made_after_the_compression():
    made = []
    compressor = MaskedCompressor(masks=lambda: made[0], dense=NoneCompressor())
    ranks = LocalRanks([bound(compressor, SHAPES) for _ in range(2)])
    made.append(Masks(masks_of()))
    (result, _) = ranks.exchange(gradients_of(2))
    assert not result["a"][~made[0].masks["a"]].any()


# Masks that differ


def errors_of_ranks(sources, dense, names=("a", "conv", "bias")):
    """What each rank raises when it exchanges these parameters one after the other; None for nothing."""
    ranks = ranks_with(sources, dense)
    raised = [None] * len(sources)
    for name in names:
        index = list(SHAPES).index(name)
        exchanges = []
        for rank, compression in enumerate(ranks.compressions):
            gradient = random(*SHAPES[name], seed=rank)
            compressor = compression.compressor_of(index, gradient)
            exchanges.append(compressor.exchange(compression.slots[index], gradient))
        frames = [next(exchange).frame for exchange in exchanges]
        for rank, exchange in enumerate(exchanges):
            try:
                exchange.send(list(frames))
            except MaskError as error:
                raised[rank] = raised[rank] or error
    return raised


def tampered(how, name="a"):
    masks = masks_of()
    if how == "moved":  # as many as before
        kept = torch.nonzero(masks[name].view(-1)).view(-1)[0]
        pruned = torch.nonzero(~masks[name].view(-1)).view(-1)[0]
        masks[name].view(-1)[kept], masks[name].view(-1)[pruned] = False, True
    elif how == "one more":
        masks[name].view(-1)[torch.nonzero(~masks[name].view(-1)).view(-1)[0]] = True
    else:
        del masks[name]
    return Masks(masks)


@every
@pytest.mark.parametrize("how", ["moved", "one more", "missing"])
@pytest.mark.parametrize("name", ["a", "conv"])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_mask_that_differs_is_an_error_on_every_rank(dense, how, name, culprit):
    sources = [Masks(masks_of()) for _ in range(4)]
    sources[culprit] = tampered(how, name)
    errors = errors_of_ranks(sources, dense)
    assert all(isinstance(error, MaskError) for error in errors)
    assert {(error.parameter, tuple(error.ranks)) for error in errors} == {(name, (culprit,))}
    assert f"mask of '{name}' on rank {culprit} " in str(errors[0])


def test_equal_masks_are_no_error():
    assert errors_of_ranks([Masks(masks_of()) for _ in range(4)], NoneCompressor()) == [None] * 4


def test_a_mask_that_differs_later_is_noticed_in_the_same_step():
    sources = [Masks(masks_of()) for _ in range(2)]
    ranks = ranks_with(sources, NoneCompressor())
    for number in range(2):
        ranks.exchange(gradients_of(2, seed=number))
    sources[0].update(masks_of(seed=1))
    sources[1].update(dict(tampered("moved").masks))
    with pytest.raises(MaskError, match="mask of 'a' on rank 1 "):
        ranks.exchange(gradients_of(2, seed=2))


def test_digests_tell_masks_apart():
    mask = mask_of(30, 40)
    other = mask.clone()
    other[29, 39] ^= True
    digests = [digest(m) for m in (mask, other, None, torch.zeros(8, dtype=torch.bool), torch.zeros(0).bool())]
    assert len(set(digests[:4])) == 4
    assert {len(found) for found in digests} == {16}
    assert digest(mask.clone()) == digests[0]


# Gradients that are odd


@every
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_non_finite_gradient_shows_on_all_ranks(dense, value, kept, first):
    masks = Masks(masks_of())
    ranks = ranks_with([masks] * 3, dense)
    if not first:
        ranks.exchange(gradients_of(3))
    gradients = gradients_of(3, seed=1)
    place = torch.nonzero(masks.masks["a"].view(-1) == kept).view(-1)[7]
    gradients[2]["a"].view(-1)[place] = value
    results = ranks.exchange(gradients)
    assert not any(bool(torch.isfinite(result["a"]).all()) for result in results)
    assert len({bits(result["conv"]) for result in results}) == 1
    assert bool(torch.isfinite(results[0]["conv"]).all())
    results = ranks.exchange(gradients_of(3, seed=2))
    assert all(bool(torch.isfinite(tensor).all()) for result in results for tensor in result.values())


@pytest.mark.parametrize("spoilt", [False, True])
def test_nothing_kept_gives_zeros_and_still_shows_what_is_not_finite(spoilt):
    masks = Masks({"a": torch.zeros(30, 40, dtype=torch.bool)})
    ranks = ranks_with([masks] * 2, NoneCompressor())
    for number in range(2):
        gradients = gradients_of(2, seed=number)
        gradients[1]["a"][3, 3] = math.nan if spoilt else 1.0
        for result in ranks.exchange(gradients):
            assert bool(result["a"].isnan().all()) if spoilt else not result["a"].any()


def test_large_finite_gradients_are_no_infinite_ones():
    kept = KeptCompressor(torch.tensor([0, 3]))
    assert kept.summand(torch.full((50,), 3e38)).tolist() == torch.full((2,), 3e38).tolist()
    assert kept.summand(torch.full((50,), 6e4, dtype=torch.float16)).tolist() == [6e4, 6e4]


@pytest.mark.parametrize("tensor", [random(24, 33).t(), random(2000)[::3], random(30, 1).expand(30, 25)], ids=str)
def test_the_layout_in_memory_does_not_matter(tensor):
    kept = KeptCompressor(torch.arange(0, tensor.numel(), 7))
    before = bits(tensor)
    assert bits(kept.summand(tensor)) == bits(kept.summand(tensor.contiguous()))
    assert bits(tensor) == before


# What is refused, and what ranks compare


@pytest.mark.parametrize("dense", [DGCCompressor(), MaskedCompressor(masks=Masks(), dense=NoneCompressor())], ids=str)
def test_momentum_and_masks_in_dense_phases_are_refused(dense):
    with pytest.raises(ValueError, match="dense="):
        MaskedCompressor(masks=Masks(), dense=dense)


@pytest.mark.parametrize(
    "mask", [torch.ones(40, 30, dtype=torch.bool), torch.ones(30, 39, dtype=torch.bool)], ids=["turned", "short"]
)
def test_a_mask_of_another_shape_is_refused(mask):
    ranks = ranks_with([Masks({"a": mask})] * 2, NoneCompressor())
    with pytest.raises(ValueError, match=r"mask of 'a' must be bool of shape \(30, 40\)"):
        ranks.exchange(gradients_of(2))


def test_masks_without_a_model_need_the_names_of_its_parameters():
    for masks in (Masks(), lambda: Masks()):
        with pytest.raises(ValueError, match="does not know its model: give model.named_parameters"):
            Compression.masked(masks)


def test_ranks_compare_the_options_of_both_phases_and_no_addresses():
    named = [("a", torch.zeros(30, 40))]

    def description(density):
        return Compression.masked(Masks(), named, dense=Compression.topk(named, density=density)).description()

    assert description(0.1) == description(0.1)
    assert description(0.1) != description(0.2)
    assert description(0.1) != Compression.masked(Masks(), named).description()
    assert "0x" not in repr(description(0.1))


def test_a_compression_for_dense_phases_is_not_compared_by_itself():
    named = [("a", torch.zeros(30, 40))]
    dense = Compression.topk(named)
    masked = Compression.masked(Masks(), named, dense=dense)
    assert isinstance(masked, GradientCompression)
    assert dense._id not in dense._registry.unchecked
    assert masked._id in masked._registry.unchecked
