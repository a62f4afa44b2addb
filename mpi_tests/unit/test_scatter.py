"""Scattering: every piece of a gradient is added up by one rank, and nothing gets lost on the way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hvd_compress import Compression, kernels
from hvd_compress.compressors import QSGDCompressor, Step, TopKCompressor
from hvd_compress.local import LocalRanks
from hvd_compress.memory import CUT, OWNED, key, owned_key, owner, share
from hvd_compress.topologies import Piece, Span, regions
from hvd_compress.wire import WireError

from .drive import bits, random, slot_of
from .in_pieces import (
    SHAPES,
    check_that_a_checkpoint_goes_on,
    check_that_all_get_the_same,
    check_that_order_and_absence_do_not_matter,
    check_that_what_is_not_finite_changes_nothing,
    check_that_what_is_owed_follows_the_loss_scale,
    gradients,
    mean,
)

SIZES = (2, 3, 8, 33)
METHODS = {
    "bf16": lambda named, **options: Compression.bf16(named, **options),
    "terngrad": lambda named, **options: Compression.terngrad(named, clip_sigma=None, **options),
    "qsgd": lambda named, **options: Compression.qsgd(named, **options),
    "qsgd_1": lambda named, **options: Compression.qsgd(named, bits=1, bucket_size=64, norm="l2", **options),
    "topk": lambda named, **options: Compression.topk(named, density=0.05, **options),
    "dgc": lambda named, **options: Compression.dgc(named, density=0.05, momentum=0.0, **options),
    "topk_4": lambda named, **options: Compression.topk(named, density=0.05, value_bits=4, **options),
}
SPARSE = ("topk", "dgc", "topk_4")
method = pytest.mark.parametrize("method", METHODS)
sizes = pytest.mark.parametrize("size", SIZES)
LARGEST_ERRORS = {"bf16": 0.01, "qsgd": 0.5}  # of one step; the others are far from the mean then


def ranks_of(method: str, size: int, **options) -> LocalRanks:
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    options = {"topology": "scatter", "min_numel": 1, "bucket_bytes": 100_000} | options
    return LocalRanks([METHODS[method](named, **options) for _ in range(size)])


@pytest.mark.parametrize("alignment", [1, 128, 512])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 5000])
def test_every_element_has_one_owner_and_cuts_are_aligned(alignment, size):
    numels = (2000, 21_000, 6, 0, 100_000, 1)
    spans, offset = [], 0
    for numel in numels:
        spans.append(Span(offset, numel, sum(numels)))
        offset += numel
    owned = regions(tuple(spans), alignment, size)
    assert len(owned) == size
    for part, numel in enumerate(numels):
        pieces = [piece for of_owner in owned for piece in of_owner if piece.part == part]
        assert (
            [piece.start for piece in pieces] + [numel] == [0, *(piece.stop for piece in pieces)]
            if numel
            else not pieces
        )
        assert all(piece.start % alignment == 0 for piece in pieces)
    work = [sum(piece.numel for piece in of_owner) for of_owner in owned]
    assert max(work) <= sum(numels) / size + len(numels) * alignment


def test_an_owner_stays_one_when_other_gradients_are_not_there():
    spans = (Span(0, 3000, 9000), Span(3000, 4000, 9000), Span(7000, 2000, 9000))
    owned = regions(spans, 128, 4)
    alone = regions(spans[1:2], 128, 4)
    assert [[(p.start, p.stop) for p in of if p.part == 1] for of in owned] == [
        [(p.start, p.stop) for p in of] for of in alone
    ]


@method
@sizes
def test_all_ranks_get_the_same_bits_near_the_mean(method, size):
    check_that_all_get_the_same(ranks_of(method, size), LARGEST_ERRORS.get(method))


@sizes
@pytest.mark.parametrize("average", [True, False])
def test_terngrad_scattered_equals_terngrad_gathered_to_the_bit(size, average):
    scattered, gathered = ranks_of("terngrad", size), ranks_of("terngrad", size, topology="gather")
    for step in range(2):
        one = scattered.exchange(gradients(size, step), average=average)[0]
        other = gathered.exchange(gradients(size, step), average=average)[0]
        for name, shape in SHAPES.items():
            if math.prod(shape) > 10:  # smaller ones are gathered as they are
                assert bits(one[name]) == bits(other[name])


@pytest.mark.parametrize("method", ["bf16", "qsgd", "qsgd_1", "terngrad"])
def test_what_has_no_state_is_unbiased(method):
    """But for bfloat16, which rounds to nearest; over many steps errors of random rounding cancel."""
    ranks, known, steps = (
        ranks_of(method, 5),
        gradients(5),
        100,
    )
    total = sum(ranks.exchange(known)[0]["a"].double() for _ in range(steps)) / steps
    single = ranks.exchange(known)[0]["a"].double() - mean(known, "a")
    expected = single.norm() / math.sqrt(steps)
    assert (total - mean(known, "a")).norm() < (1.3 * expected if method != "bf16" else 0.01 * mean(known, "a").norm())


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize(("size", "steps"), [(2, 70), (3, 20), (8, 10), (33, 3)])
def test_what_was_sent_and_what_is_owed_is_all_there_was(method, size, steps):
    ranks = ranks_of(method, size)
    sent = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in SHAPES.items()}
    there = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(steps):
        known = [{n: (8 * g).round() for n, g in mine.items()} for mine in gradients(size, step)]  # sums are exact
        total = ranks.exchange(known, average=False)[0]
        for name in SHAPES:
            sent[name] += total[name].view(-1)
            there[name] += sum(mine[name].double().view(-1) for mine in known)
    owed = owed_by(ranks)
    for name in SHAPES:
        # Steps of 4 bits are no integers: sums of some thousands are rounded by 2**-13 at most, twice a step and rank.
        slack = 2.0**-13 * 2 * steps * size if method == "topk_4" else 0.0
        assert float((sent[name] + owed[name] - there[name]).abs().max()) <= slack


def owed_by(ranks: LocalRanks) -> dict[str, torch.Tensor]:
    """All that any rank, as a sender or an owner, has not sent yet."""
    owed = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in SHAPES.items()}
    for compression in ranks.compressions:
        for name, residual in compression.state_dict()["residuals"][compression.rank].items():
            of, kind = owner(name)
            if kind == OWNED:
                start = int(name.rpartition(".")[2])
                owed[of][start : start + residual.numel()] += residual
            elif kind == "":
                owed[of] += residual
    return owed


@pytest.mark.parametrize("method", SPARSE)
def test_twice_as_many_entries_come_back_as_one_rank_sends_however_many_ranks_there_are(method):
    for size, steps in ((2, 12), (8, 12), (33, 5)):
        ranks = ranks_of(method, size)
        for step in range(steps):
            results = ranks.exchange(gradients(size, step))[0]
            found = int((results["d"] != 0).sum())
            assert found <= (1.25 if step == 0 else 2) * 10_000 + 10 * size
        assert found > 5000


@pytest.mark.parametrize(("density", "of_sum"), [(0.1, 200), (0.3, 500), (0.5, 500), (0.6, 600)])
def test_of_sums_more_entries_come_back_only_up_to_half_of_the_elements(density, of_sum):
    assert TopKCompressor(density=density).wanted_of_sum(slot_of([1000])) == of_sum


def test_the_threshold_is_that_of_all_ranks_together():
    """What is sent of a sum is its largest: at all owners, what is no smaller than one threshold."""
    ranks = ranks_of("topk", 3)
    for step in range(5):
        results = ranks.exchange(gradients(3, step), average=False)[0]
        cuts = [compression.memory.residuals.get(key("d", CUT)) for compression in ranks.compressions]
        if step > 1:
            assert len({float(cut) for cut in cuts}) == 1
            sent = results["d"][results["d"] != 0].abs()
            assert float(sent.min()) >= float(cuts[0])
    # what owners keep is smaller, as long as the threshold is the one that was used
    for compression in ranks.compressions:
        compression.settle()


@method
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 99_999])
def test_a_gradient_that_is_not_finite_shows_on_all_ranks_and_changes_nothing(method, value, place):
    check_that_what_is_not_finite_changes_nothing(lambda: ranks_of(method, 3), value, place)


@pytest.mark.parametrize("method", ["bf16", "topk", "dgc"])
def test_a_sum_that_overflows_shows_on_all_ranks(method):
    ranks, known = ranks_of(method, 3), gradients(3)
    for mine in known:
        mine["d"].view(-1)[7] = 3e38
    for result in ranks.exchange(known, average=False):
        assert not bool(result["d"].isfinite().any())
        assert bool(result["a"].isfinite().all())


@method
def test_gradients_may_be_handed_in_in_any_order_or_not_at_all(method):
    check_that_order_and_absence_do_not_matter(lambda: ranks_of(method, 3))


@pytest.mark.parametrize("method", SPARSE)
def test_what_owners_owe_is_in_the_unit_of_the_loss_scale(method):
    check_that_what_is_owed_follows_the_loss_scale(lambda: ranks_of(method, 3))


@pytest.mark.parametrize("method", SPARSE)
def test_a_checkpoint_goes_on_to_the_bit(method):
    residuals = check_that_a_checkpoint_goes_on(lambda: ranks_of(method, 3))
    assert any(owner(name)[1] == OWNED for name in residuals[0])


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("options", [{}, {"topology": "gather"}, {"bucket_bytes": 1}], ids=str)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_owners_owe_survives_another_number_of_ranks_or_plan(method, options, size):
    """Nothing is lost, and nothing is counted twice, wherever pieces go."""
    ranks = ranks_of(method, 3)
    for step in range(3):
        ranks.exchange([{n: (8 * g).round() for n, g in mine.items()} for mine in gradients(3, step)])
    before = owed_by(ranks)
    states = [compression.state_dict() for compression in ranks.compressions]
    resumed = ranks_of(method, size, **options)
    for compression, transport in zip(resumed.compressions, [c._engine.transport for c in resumed.compressions]):
        compression.load_state_dict(states)
        compression.attach(transport)
    after = owed_by(resumed)
    for name in SHAPES:
        assert torch.allclose(after[name], before[name], rtol=1e-6, atol=1e-4)
    if options.get("topology") == "gather":
        assert not any(owner(n)[1] == OWNED for c in resumed.compressions for n in c.memory.residuals)


def test_a_piece_goes_to_one_rank_whole():
    piece = torch.ones(5)
    mine = {owned_key("w", 10): piece}
    taken = [share({0: {}, 1: mine, 2: {}}, 3, rank, 2, "sum") for rank in range(2)]
    assert [len(one) for one in taken] == [0, 1]


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
@pytest.mark.parametrize("way", [0, 1])
@method
def test_damage_is_found(method, damage, way, monkeypatch):
    """In a message to an owner, or in one to all."""
    from hvd_compress.transports.local import LocalTransport

    name = ("alltoall", "allgather")[way]
    usual = getattr(LocalTransport, name)

    def spoil(message: torch.Tensor) -> torch.Tensor:
        if not message.numel():
            return message
        message = message.clone()
        if damage == "flip":
            message[message.numel() // 2] ^= 4
        return message[:-4] if damage == "cut" else torch.cat([message, message[:4]]) if damage == "longer" else message

    def spoilt(transport, key, parts):
        parts = [[spoil(p) for p in to] for to in parts] if way == 0 else [spoil(part) for part in parts]
        return usual(transport, key, parts)

    monkeypatch.setattr(LocalTransport, name, spoilt)
    with pytest.raises(WireError, match=r"rank \d"):
        ranks_of(method, 3).exchange(gradients(3))


def test_auto_gathers_on_few_ranks_and_scatters_on_many():
    for size, like in ((2, "gather"), (4, "gather"), (5, "scatter"), (9, "scatter")):
        for method in ("bf16", "topk", "qsgd"):
            found, expected = (ranks_of(method, size, topology=t).exchange(gradients(size))[0] for t in ("auto", like))
            assert all(bits(found[name]) == bits(expected[name]) for name in SHAPES)


def test_auto_does_not_scatter_where_that_moves_more():
    assert not scatters(QSGDCompressor(bits=1), 8)  # eight bits on the way back
    assert scatters(QSGDCompressor(bits=1), 10)
    assert scatters(QSGDCompressor(bits=8), 5)


def scatters(compressor, size: int) -> bool:

    return compressor.scatters(slot_of([10], step=Step(size=size)), "auto")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda named, **o: Compression.adacomp(named, **o), "depends on the whole"),
        (lambda named, **o: Compression.powersgd(named, **o), "sums"),
        (lambda named, **o: Compression.scalecom(named, **o), "sums"),
        (lambda named, **o: Compression.none(named, **o), "sums"),
        (lambda named, **o: Compression.terngrad(named, share_scaler=False, **o), "share_scaler=True"),
    ],
)
def test_what_cannot_be_scattered_says_why(make, why):
    with pytest.raises(ValueError, match=why):
        make([("w", torch.zeros(50, 50))], topology="scatter")


def test_an_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="auto, gather, scatter, hierarchical: 'ring'"):
        Compression.topk([("w", torch.zeros(50, 50))], topology="ring")


def test_bytes_do_not_grow_with_the_ranks():
    for method in ("bf16", "qsgd", "topk", "dgc"):
        sent = []
        for size in (4, 16):
            ranks = ranks_of(method, size, bucket_bytes=1 << 20)
            for step in range(3):
                ranks.exchange(gradients(size, step))
            sent.append(ranks.compressions[0].telemetry.total.sent_bytes)
        assert sent[1] < 1.3 * sent[0]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 64, 127, 128, 1000, 32_767])
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 255, 256, 257, 1000])
def test_whole_numbers_are_packed_exactly(most, numel):
    generator = np.random.default_rng(most + numel)
    numbers = torch.from_numpy(generator.integers(-most, most + 1, numel).astype(np.float32))
    packed = {}
    for level in ("torch", "plain", "avx2"):
        before = kernels.in_use()
        kernels.use(level)
        try:
            payload = torch.zeros(kernels.count_bytes(numel, most), dtype=torch.uint8)
            kernels.of(numbers).counts_encode(numbers, most, payload)
            out = torch.empty(numel)
            bound = kernels.of(out).counts_decode(payload, most, 0.3, 7.0, out)
            packed[level] = (bits(payload), bits(out), bound)
        finally:
            kernels.use(before)
    assert packed["torch"] == packed["plain"] == packed["avx2"]
    assert bits(out) == bits(numbers * torch.tensor(0.3) / 7.0)
    assert payload.numel() == math.ceil(numel / 256) * 32 * max(math.ceil(math.log2(2 * most + 1)), 2)


def test_a_code_past_the_largest_is_loud():
    for level in ("torch", "plain", "avx2"):
        before = kernels.in_use()
        kernels.use(level)
        try:
            payload, out = torch.full((kernels.count_bytes(256, 5),), 255, dtype=torch.uint8), torch.empty(256)
            assert kernels.of(out).counts_decode(payload, 5, 1.0, 1.0, out) == math.inf
        finally:
            kernels.use(before)


def test_topk_is_cut_where_its_entries_are():

    gradient = random(300_000)
    compressor = TopKCompressor(density=0.01)
    cuts = [(0, 10), (10, 70_000), (70_000, 70_001), (70_001, 299_999), (299_999, 300_000)]
    payloads = compressor.cut(slot_of(gradient.shape), gradient, cuts, None)
    whole = torch.empty(300_000)
    for (start, stop), payload in zip(cuts, payloads):
        kernels.of(whole).sparse_sum([payload], 1.0, whole[start:stop])
    kept = gradient.abs() >= gradient.abs().sort(descending=True).values[2999]
    assert torch.equal(whole, gradient * kept)


def test_pieces_know_their_length():
    assert Piece(0, 5, 12).numel == 7
