"""Gap codes, sparse payloads and the choice of the largest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hvd_compress.compressors import AdaCompCompressor, TopKCompressor
from hvd_compress.kernels import decode_gaps, encode_gaps, pack_sparse, sparse_bytes, topk_indices, unpack_sparse
from hvd_compress.kernels.adacomp import adacomp_choice as select
from hvd_compress.schedules import entries_of

from .drive import run

widths = pytest.mark.parametrize("width", [8, 16])
FAR = {8: 127 * 128, 16: 32767 * 32768}


def reference_tokens(positions: list[int], negative: list[bool], width: int) -> list[int]:
    limit = 2 ** (width - 1) - 1
    tokens, previous = [], -1
    for position, sign in zip(positions, negative):
        skip = position - previous - 1
        while skip >= limit * (limit + 1):
            tokens.append(2 * limit + 1)
            skip -= limit * (limit + 1)
        while skip >= limit:
            tokens.append(limit)
            skip -= limit
        tokens.append(skip + (limit + 1) * sign)
        previous = position
    return tokens


def round_trip(positions: list[int], negative: list[bool], width: int) -> None:
    packed = encode_gaps(torch.tensor(positions, dtype=torch.int64), torch.tensor(negative, dtype=torch.bool), width)
    expected = np.array(reference_tokens(positions, negative, width), dtype=f"<u{width // 8}")
    assert packed.dtype == torch.uint8
    assert packed.numpy().tobytes() == expected.tobytes()
    found, signs = decode_gaps(packed, width)
    assert found.tolist() == positions
    assert signs.tolist() == negative


@widths
@pytest.mark.parametrize("sign", [False, True])
def test_gaps_of_every_interesting_length(width, sign):
    limit = 2 ** (width - 1) - 1
    far = FAR[width]
    for gap in (
        0,
        1,
        limit - 1,
        limit,
        limit + 1,
        2 * limit - 1,
        2 * limit,
        far - 1,
        far,
        far + 1,
        far + limit,
        3 * far,
    ):
        round_trip([gap], [sign], width)
        round_trip([0, gap + 1], [not sign, sign], width)
        round_trip([gap, 2 * gap + 1, 2 * gap + 2], [sign, sign, not sign], width)


@widths
def test_no_element_needs_no_byte(width):
    round_trip([], [], width)
    assert encode_gaps(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), width).numel() == 0


@widths
@pytest.mark.parametrize("seed", range(150))
def test_random_positions_come_back(width, seed):
    rng = np.random.default_rng(seed)
    spread = int(rng.choice([1, 3, 100, 500, 20_000, 1_000_000]))
    positions = np.cumsum(rng.integers(1, spread + 1, size=rng.integers(1, 60))) - 1
    round_trip(positions.tolist(), (rng.random(positions.size) < rng.random()).tolist(), width)


@widths
def test_any_bytes_decode_to_ascending_positions(width):
    rng = np.random.default_rng(1)
    for _ in range(200):
        packed = torch.tensor(rng.integers(0, 256, size=2 * rng.integers(0, 50)).tolist(), dtype=torch.uint8)
        positions, signs = decode_gaps(packed, width)
        assert positions.numel() == signs.numel()
        assert bool((positions.diff() > 0).all())
        assert not positions.numel() or int(positions[0]) >= 0


@pytest.mark.parametrize("numel", [1, 100, 65_535, 65_536, 65_537, 131_072, 200_000])
@pytest.mark.parametrize("share", ["none", "first", "last", "few", "chunk ends", "all"])
def test_sparse_payloads_come_back(numel, share):
    rng = np.random.default_rng(numel)
    chosen = {
        "none": [],
        "first": [0],
        "last": [numel - 1],
        "few": np.sort(rng.choice(numel, size=max(numel // 50, 1), replace=False)),
        "chunk ends": [p for p in (0, 32_767, 32_768, 65_535, 65_536, 131_071, 131_072) if p < numel],
        "all": np.arange(numel),
    }[share]
    positions = torch.tensor(np.asarray(chosen, dtype=np.int64))
    values = torch.tensor(rng.standard_normal(positions.numel()).tolist(), dtype=torch.float32)
    packed = pack_sparse(values, positions, numel)
    assert packed.numel() == sparse_bytes(numel, positions.numel())
    assert packed.numel() == 4 * -(-numel // 65536) + 6 * positions.numel()
    found, where = unpack_sparse(packed, numel)
    assert torch.equal(found, values)
    assert torch.equal(where, positions)


def test_a_sparse_payload_is_laid_out_as_it_is_written_down():
    values = torch.tensor([1.0, -2.0, 0.5])
    packed = pack_sparse(values, torch.tensor([3, 65_535, 65_540]), 65_600).numpy().tobytes()
    assert packed == (
        np.array([2, 1], "<u4").tobytes()
        + np.array([1.0, -2.0, 0.5], "<f4").tobytes()
        + np.array([3, 65_535, 4], "<u2").tobytes()
    )


def sparse_payload(counts, values, low) -> torch.Tensor:
    parts = (np.array(counts, "<u4"), np.array(values, "<f4"), np.array(low, "<u2"))
    return torch.from_numpy(np.frombuffer(b"".join(part.tobytes() for part in parts), dtype=np.uint8).copy())


@pytest.mark.parametrize(
    ("counts", "values", "low", "numel"),
    [
        ([2], [1, 2], [5, 5], 100),
        ([2], [1, 2], [6, 5], 100),
        ([1], [1], [100], 100),
        ([2], [1], [5], 100),
        ([0], [1], [5], 100),
        ([0xFFFFFFFF], [1], [5], 100),
        ([0x80000000, 0x80000000], [], [], 70_000),
        ([65_537], [1], [5], 70_000),
        ([0xFFFFFFFF, 2], [1], [5], 70_000),
        ([1, 1], [1, 2], [0, 5000], 70_000),
        ([], [], [], 100),
    ],
)
def test_sparse_payloads_that_make_no_sense_are_refused(counts, values, low, numel):
    with pytest.raises(ValueError, match=r"bytes|positions"):
        unpack_sparse(sparse_payload(counts, values, low), numel)


def numpy_topk(values: np.ndarray, k: int) -> list[int]:
    return sorted(np.argsort(-np.abs(values), kind="stable")[:k].tolist())


@pytest.mark.parametrize("seed", range(100))
def test_topk_is_the_stable_sort_of_magnitudes(seed):
    rng = np.random.default_rng(seed)
    numel = int(rng.integers(1, 400))
    values = rng.standard_normal(numel).astype(np.float32)
    if seed % 2:
        values = np.round(values * 2) / 2  # many ties, zeros of both signs among them
    if seed % 5 == 0:
        values[rng.integers(0, numel)] = np.float32(1e-45) if seed % 10 else np.float32(3e38)
    for k in {1, numel, min(numel, int(rng.integers(1, numel + 1)))}:
        assert topk_indices(torch.from_numpy(values), k).tolist() == numpy_topk(values, k)


@pytest.mark.parametrize("k", [1, 3, 999, 1000])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_of_equals_the_first_are_taken(k, value):
    assert topk_indices(torch.full((1000,), value), k).tolist() == list(range(k))


G1 = [0.4, -0.1, 0.05, 0.3, -0.25, 0.02, -0.6, 0.1, 0.0, 0.15]
G2 = [0.1, -0.3, 0.2, 0.1, -0.1, 0.4, -0.2, 0.0, 0.05, -0.15]


def test_topk_chooses_as_in_the_worked_example():
    assert topk_indices(torch.tensor(G1), 3).tolist() == [0, 3, 6]
    assert topk_indices(torch.tensor(G1), 2).tolist() == [0, 6]


def test_topk_keeps_what_it_did_not_send():
    """Padded with zeros so that a sparse frame pays: three of a hundred. Of 2 and 6 with equal size, 2 is sent."""
    gradients = [torch.tensor(values + [0.0] * 90) for values in (G1, G2)]
    outcome = run(TopKCompressor(density=0.03), gradients)
    assert outcome.totals[0][:10].tolist() == pytest.approx([0.4, -0.3, 0.2, 0.3, 0, 0.4, -0.6, 0, 0, 0])
    kept = []
    for memory in outcome.memories:
        memory.commit()
        kept.append(memory.residuals["weight"][:10].tolist())
    assert kept[0] == pytest.approx([0.0, -0.1, 0.05, 0.0, -0.25, 0.02, 0.0, 0.1, 0.0, 0.15])
    assert kept[1] == pytest.approx([0.1, 0.0, 0.0, 0.1, -0.1, 0.0, -0.2, 0.0, 0.05, -0.15])


@pytest.mark.parametrize(
    ("density", "numel", "k"),
    [
        (0.01, 1024, 11),
        (0.01, 100, 1),
        (0.07, 100, 7),
        (0.3, 10, 3),
        (1.0, 7, 7),
        (0.001, 1, 1),
        (0.001, 3 * 10**8, 300_000),
        (0.07, 10**8, 7_000_000),
        (0.29, 10**8, 29_000_000),
        (0.1, 3, 1),
        (0.07, 4_000_000_100, 280_000_007),
        (1e-12, 100, 1),
    ],
)
def test_k_is_the_density_of_the_tensor_rounded_up(density, numel, k):
    assert entries_of(density, numel) == k


RESIDUE = [0.1, -0.05, 0.02, 0.0, 0.08, -0.2, 0.04, 0.01, -0.03, 0.0]
GRADIENT = [0.03, -0.06, 0.01, -0.02, 0.05, 0.04, 0.05, -0.02, -0.06, 0.01]
KEPT = [-0.015, 0.035, 0.03, -0.02, -0.015, -0.16, 0.09, -0.01, -0.09, 0.01]


def test_adacomp_selects_as_in_the_worked_example():
    """The largest of the second bin, -.16, is opposed by its newest gradient: that bin sends nothing."""
    accumulated = torch.tensor(RESIDUE) + torch.tensor(GRADIENT)
    positions, negative, scale = select(accumulated, torch.tensor(GRADIENT), 5)
    assert positions.tolist() == [0, 1, 4]
    assert negative.tolist() == [False, True, False]
    assert scale == pytest.approx(0.145, rel=1e-6)


def test_adacomp_sends_and_keeps_as_in_the_worked_example():
    """Ten times over, so that a frame with gaps pays."""
    residue, gradient = (torch.tensor(values * 10) for values in (RESIDUE, GRADIENT))
    outcome = run(AdaCompCompressor(bin_size=5), [gradient], residuals=[residue])
    assert not outcome.parsed()[0].dense
    expected = torch.zeros(10)
    expected[[0, 1, 4]] = torch.tensor([0.145, -0.145, 0.145])
    assert torch.allclose(outcome.totals[0], expected.repeat(10), rtol=1e-6, atol=0)
    outcome.memories[0].commit()
    assert torch.allclose(outcome.memories[0].residuals["weight"], torch.tensor(KEPT * 10), rtol=0, atol=2e-8)
    payload = outcome.parsed()[0].payload.numpy().tobytes()
    assert payload[4:13] == bytes([0, 128, 2, 5, 128, 2, 5, 128, 2])  # skips, minus in the top bit


@pytest.mark.parametrize("bin_size", [1, 5, 7, 64, 500])
def test_adacomp_selects_as_a_loop_over_bins_does(bin_size):
    rng = np.random.default_rng(bin_size)
    residue, gradient = (rng.standard_normal(1003).astype(np.float32) for _ in range(2))
    residue[100:300] = gradient[100:300] = 0
    accumulated = residue + gradient
    chosen, largest = [], []
    for start in range(0, 1003, bin_size):
        inside = accumulated[start : start + bin_size]
        largest.append(float(np.abs(inside).max()))
        for place, value in enumerate(inside):
            if largest[-1] > 0 and value != 0 and abs(value + gradient[start + place]) >= np.float32(largest[-1]):
                chosen.append(start + place)
    positions, negative, scale = select(torch.from_numpy(accumulated), torch.from_numpy(gradient), bin_size)
    assert positions.tolist() == chosen
    assert negative.tolist() == [bool(accumulated[p] < 0) for p in chosen]
    assert scale == pytest.approx(np.mean(largest), rel=1e-6)


@pytest.mark.parametrize(("shape", "bin_size"), [((64, 3, 3, 3), 50), ((8, 8, 3), 50), ((500, 20), 500), ((700,), 500)])
def test_adacomp_takes_smaller_bins_for_convolutions(shape, bin_size):
    assert AdaCompCompressor().bin_size_of(torch.Size(shape)) == bin_size
    assert AdaCompCompressor(bin_size=77).bin_size_of(torch.Size(shape)) == 77
