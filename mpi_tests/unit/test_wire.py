"""Frames: their bytes, and what damage does to them."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from hvd_compress import WireError, wire
from hvd_compress.compressors import Compressor, Slot, SparseGatherer, Step
from hvd_compress.requests import Allreduce
from hvd_compress.wire import Frame, frame_bytes, pack, split, unpack

from .drive import FRAMED, bits, random, run, slot_of

HEADER = struct.Struct("<2s4BHIfQQ")
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}


def octets(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def sealed(frame: bytes) -> bytes:
    """`frame` with a checksum that is right, as far as its length field makes one possible."""
    header = frame[:32]
    length = HEADER.unpack(header)[-1]
    return header + struct.pack("<I", zlib.crc32(header + frame[36 : 36 + length])) + frame[36:]


@pytest.mark.parametrize("payload_bytes", [0, 1, 2, 3, 4, 5, 1000, 65_537])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", [0, wire.DENSE])
def test_a_frame_comes_back(payload_bytes, dtype, flags):
    payload = torch.arange(payload_bytes).to(torch.uint8)
    frame = Frame(3, dtype, 65_535, 2**32 - 1, 0.25, 2**40, payload, flags)
    packed = pack(frame)
    assert packed.numel() == frame_bytes(payload_bytes)
    assert packed.numel() % 4 == 0
    found = unpack(packed, 0)
    assert torch.equal(found.payload, payload)
    assert vars(found) | {"payload": None} == vars(frame) | {"payload": None}
    assert (found.dense, found.finite) == (bool(flags), True)


def test_a_frame_is_laid_out_as_it_is_written_down():
    packed = pack(Frame(5, torch.bfloat16, 258, 66_051, 0.5, 7, octets(b"abcde"), wire.DENSE))
    header = struct.pack("<2sBBBBHIfQQ", b"hC", 1, 5, 3, 1, 258, 66_051, 0.5, 7, 5)
    assert bits(packed) == header + struct.pack("<I", zlib.crc32(header + b"abcde")) + b"abcde" + b"\0\0\0"


@pytest.mark.parametrize("offset", range(8))
def test_a_frame_is_read_wherever_it_lies(offset):
    packed = pack(Frame(1, torch.float32, 0, 0, 0.0, 2, torch.arange(8, dtype=torch.uint8)))
    buffer = torch.cat([torch.zeros(offset, dtype=torch.uint8), packed])
    assert unpack(buffer[offset:], 0).payload.view(torch.int32).tolist() == [0x03020100, 0x07060504]


@pytest.mark.parametrize(
    ("start", "damage", "expected", "found"),
    [
        (0, b"XX", "magic b'hC'", "b'XX'"),
        (2, b"\x02", "wire version 1", "version 2"),
        (4, b"\x09", "dtype", "9"),
        (24, b"\xff" * 8, str(36 + 2**64 - 1 + 1), "48 bytes"),
        (32, b"\0\0\0\0", "checksum 0x00000000", "0x"),
        (46, b"\1", "zero padding", "other"),
    ],
)
def test_damage_names_the_peer_the_parameter_and_what_was_found(start, damage, expected, found):
    packed = bytearray(bits(pack(Frame(1, torch.float32, 4, 0, 0.0, 2, octets(b"0123456789")))))
    packed[start : start + len(damage)] = damage
    data = bytes(packed) if start >= 24 or start < 3 else sealed(bytes(packed))
    with pytest.raises(WireError) as caught:
        unpack(octets(data), 4, "layer.weight")
    assert (caught.value.peer, caught.value.parameter) == (4, "layer.weight")
    for part in ("rank 4", "'layer.weight'", expected, found, "damaged in transit"):
        assert part in str(caught.value)
    assert expected in str(caught.value.expected)
    assert found in str(caught.value.found)


@pytest.mark.parametrize("flags", [4, 128, 255, wire.NON_FINITE | wire.DENSE])
def test_flags_that_nobody_sets_are_refused(flags):
    with pytest.raises((WireError, ValueError)):
        unpack(pack(Frame(1, torch.float32, 0, 0, 0.0, 1, octets(b"1234"), flags)), 0)


@pytest.mark.parametrize("length", [0, 1, 35, 37, 39])
def test_too_few_bytes_are_refused(length):
    packed = pack(Frame(1, torch.float32, 0, 0, 0.0, 1, octets(b"1234")))
    with pytest.raises(WireError):
        unpack(packed[:length], 0)


FRAMES = [bits(pack(Frame(1, torch.float32, 0, number, 0.0, 1, octets(b"x" * number)))) for number in range(4)]


@pytest.mark.parametrize("count", range(5))
def test_a_buffer_splits_into_its_frames(count):
    frames = split(octets(b"".join(FRAMES[:count])), min(count, 4), 0)
    assert [bits(frame) for frame in frames] == FRAMES[:count]


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"".join(FRAMES), 3),
        (b"".join(FRAMES), 5),
        (b"".join(FRAMES)[:-1], 4),
        (b"".join(FRAMES) + b"\0", 4),
        (b"".join(FRAMES)[1:], 4),
        (b"", 1),
        (FRAMES[0], 0),
        (FRAMES[0][:24] + b"\xff" * 8 + FRAMES[0][32:], 1),
        (FRAMES[0][:24] + struct.pack("<Q", 2**63) + FRAMES[0][32:], 1),
    ],
)
def test_a_buffer_that_does_not_hold_its_frames_is_refused(data, count):
    with pytest.raises(WireError, match="rank 6"):
        split(octets(data), count, 6)


# What the bytes of a payload mean, element by element: slow, plain, and written without the library.


def reference_bf16(payload: bytes, numel: int, rate: float) -> np.ndarray:
    require(len(payload) == 2 * numel)
    return (np.frombuffer(payload, "<u2").astype(np.uint32) << 16).view(np.float32)


def reference_ternary(payload: bytes, numel: int, rate: float) -> np.ndarray:
    require(len(payload) == 4 + 32 * math.ceil(numel / 128))
    (scaler,) = struct.unpack("<f", payload[:4])
    words = struct.unpack(f"<{(len(payload) - 4) // 4}I", payload[4:])
    levels = np.array([0.0, scaler, -scaler, math.nan], np.float32)
    places = range(numel)
    return levels[[words[e // 128 * 8 + e % 128 % 8] >> (2 * (e % 128 // 8)) & 3 for e in places]]


def reference_gaps(payload: bytes, numel: int, rate: float) -> np.ndarray:
    width = 8 if rate <= 64 else 16
    require(len(payload) >= 4)
    require((len(payload) - 4) % (width // 8) == 0)
    (scale,) = struct.unpack("<f", payload[:4])
    limit = 2 ** (width - 1) - 1
    values = np.zeros(numel, np.float32)
    position = 0
    for token in np.frombuffer(payload[4:], f"<u{width // 8}").tolist():
        skip, sign = token & limit, token > limit
        if skip == limit:
            position += limit * (limit + 1) if sign else limit
            continue
        position += skip
        require(position < numel)
        values[position] = -scale if sign else scale
        position += 1
    return values


def reference_sparse(payload: bytes, numel: int, rate: float) -> np.ndarray:
    chunks = math.ceil(numel / 65536)
    require(len(payload) >= 4 * chunks)
    counts = struct.unpack(f"<{chunks}I", payload[: 4 * chunks])
    entries = sum(counts)
    require(len(payload) == 4 * chunks + 6 * entries)
    values = np.frombuffer(payload, "<f4", entries, 4 * chunks)
    low = np.frombuffer(payload, "<u2", entries, 4 * chunks + 4 * entries).tolist()
    positions = [65536 * chunk + low.pop(0) for chunk, count in enumerate(counts) for _ in range(count)]
    require(all(a < b for a, b in zip(positions, positions[1:])))
    require(all(position < numel for position in positions))
    result = np.zeros(numel, np.float32)
    result[positions] = values
    return result


def require(condition: bool) -> None:
    if not condition:
        raise ValueError("no such payload")


REFERENCES: dict[int, Callable[[bytes, int, float], np.ndarray]] = {
    2: reference_bf16,
    3: reference_ternary,
    4: reference_gaps,
    5: reference_sparse,
}


def reference(frame: bytes, slot: Slot, peer: int, compressor: Compressor, rate: float) -> np.ndarray | None:
    """What a frame with a right checksum says; None: the peer's gradient is not finite. ValueError: nothing."""
    require(len(frame) >= 36)
    magic, version, algorithm, dtype, flags, sender, index, found, numel, length = HEADER.unpack(frame[:32])
    require(magic == b"hC" and version == 1 and len(frame) == 36 + length + -length % 4)
    require(not any(frame[36 + length :]))
    require((algorithm, dtype, sender, index) == (compressor.algorithm, 1, peer, slot.parameter.index))
    require(numel == slot.parameter.numel and flags in (0, wire.DENSE, wire.NON_FINITE))
    require(found == struct.unpack("<f", struct.pack("<f", rate))[0])
    if flags == wire.NON_FINITE:
        require(length == 0)
        return None
    if flags == wire.DENSE:
        require(length == 4 * numel)
        return np.frombuffer(frame, "<f4", numel, 36)
    return REFERENCES[algorithm](frame[36 : 36 + length], numel, found)


SHAPES = [(9, 33), (2, 2), (300,)]  # the second is sent dense
FUZZED = {
    name: FRAMED[name]
    for name in ("bf16", "terngrad", "terngrad_local", "adacomp_5", "adacomp", "topk_0.3", "topk_0.01")
}


@functools.cache
def genuine(name: str) -> list[list[bytes]]:
    """The frames of three parameters, by parameter and rank."""
    by_parameter = []
    for index, shape in enumerate(SHAPES):
        gradients = [random(*shape, seed=10 * index + rank) for rank in range(2)]
        by_parameter.append(
            [bits(frame) for frame in run(FUZZED[name], gradients, name=f"p{index}", index=index).frames]
        )
    return by_parameter


def received(name: str, buffer: bytes) -> Iterator[torch.Tensor | None]:
    """Rank 0's totals of all parameters when `buffer` is what arrives from rank 1: the whole way of a bucket."""
    mine = [octets(frames[0]) for frames in genuine(name)]
    theirs = split(octets(buffer), len(SHAPES), 1)
    for index, shape in enumerate(SHAPES):
        exchange = FUZZED[name].exchange(
            slot_of(shape, f"p{index}", index, step=Step(size=2)), random(*shape, seed=10 * index)
        )
        request = next(exchange)
        if isinstance(request, Allreduce):
            request = exchange.send(request.tensor)
        try:
            exchange.send([mine[index], theirs[index]])
        except StopIteration as end:
            yield None if end.value is None else end.value.values


def own(name: str) -> list[np.ndarray]:
    totals = []
    for index, frames in enumerate(genuine(name)):
        slot = slot_of(SHAPES[index], f"p{index}", index)
        totals.append(reference(frames[0], slot, 0, FUZZED[name], rate_of(name, index)))
    return totals


def rate_of(name: str, index: int) -> float:
    return HEADER.unpack(genuine(name)[index][0][:32])[7]


@pytest.fixture
def little_memory():
    """Half a GiB more than now: whoever believes a damaged length fails."""
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", FUZZED)
def test_the_plain_reading_of_frames_agrees(name):
    expected = [
        mine + reference(frames[1], slot_of(SHAPES[index], "", index), 1, FUZZED[name], rate_of(name, index))
        for index, (mine, frames) in enumerate(zip(own(name), genuine(name)))
    ]
    totals = list(received(name, b"".join(frames[1] for frames in genuine(name))))
    assert [bits(total) for total in totals] == [total.tobytes() for total in expected]


def flip(data: bytearray, rng) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def overwrite(data: bytearray, rng) -> None:
    for _ in range(rng.integers(1, 5)):
        data[rng.integers(len(data))] = int(rng.integers(256))


def truncate(data: bytearray, rng) -> None:
    del data[int(rng.integers(len(data))) :]


def extend(data: bytearray, rng) -> None:
    data += rng.integers(0, 256, rng.integers(1, 50), np.uint8).tobytes()


def cut_out(data: bytearray, rng) -> None:
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 40))]


def insert(data: bytearray, rng) -> None:
    start = int(rng.integers(len(data)))
    data[start:start] = rng.integers(0, 256, rng.integers(1, 9), np.uint8).tobytes()


def swap_halves(data: bytearray, rng) -> None:
    start = int(rng.integers(len(data)))
    data[:] = data[start:] + data[:start]


def forget(data: bytearray, rng) -> None:
    start = int(rng.integers(len(data)))
    data[start : start + 64] = bytes(len(data[start : start + 64]))


def lie(data: bytearray, rng) -> None:
    """Another number in a field of the header."""
    start, form = [(4, "B"), (5, "B"), (6, "H"), (8, "I"), (12, "I"), (16, "Q"), (24, "Q")][rng.integers(7)]
    top = 2 ** (8 * struct.calcsize(form)) - 1
    value = [0, 1, 3, top, top // 2, top // 2 + 1, 1 << 20, 0x7F800000, 0x7FC00000, int(rng.integers(512))][
        rng.integers(10)
    ]
    struct.pack_into("<" + form, data, start, value & top)


DAMAGES = [flip, overwrite, truncate, extend, cut_out, insert, swap_halves, forget, lie]


@pytest.mark.parametrize("name", FUZZED)
def test_damaged_buffers_raise_or_do_not_matter(name, little_memory):
    """1,500 for each compressor, 10,500 in all."""
    rng = np.random.default_rng(sum(map(ord, name)))
    intact = b"".join(frames[1] for frames in genuine(name))
    expected = [bits(total) for total in received(name, intact)]
    raised, peers = 0, set()
    for number in range(1500):
        data = bytearray(intact)
        DAMAGES[number % len(DAMAGES)](data, rng)
        try:
            totals = list(received(name, bytes(data)))
        except WireError as error:
            peers.add(error.peer)
            raised += 1
        else:
            assert [bits(total) for total in totals] == expected
            assert bytes(data) == intact
    assert raised > 1300
    assert peers == {1}


@pytest.mark.parametrize("name", FUZZED)
def test_damage_with_a_right_checksum_raises_or_is_read_as_it_stands(name, little_memory):
    """1,500 for each compressor; only a sender that computes wrongly can write such frames."""
    rng = np.random.default_rng(sum(map(ord, name)) + 1)
    mine = own(name)
    raised = read = 0
    for number in range(1500):
        frames = [bytearray(frames[1]) for frames in genuine(name)]
        victim = int(rng.choice([0, 0, 0, 1, 2]))
        damage = DAMAGES[number % len(DAMAGES)]
        if damage in (truncate, extend, cut_out, insert):  # of the payload, and say so
            payload = frames[victim][36 : 36 + HEADER.unpack(frames[victim][:32])[-1]]
            damage(payload, rng)
            struct.pack_into("<Q", frames[victim], 24, len(payload))
            frames[victim][36:] = payload + bytes(-len(payload) % 4)
        else:
            damage(frames[victim], rng)
        frames[victim] = bytearray(sealed(bytes(frames[victim])))
        slot = slot_of(SHAPES[victim], f"p{victim}", victim)
        try:
            said = reference(bytes(frames[victim]), slot, 1, FUZZED[name], rate_of(name, victim))
        except ValueError:
            with pytest.raises(WireError) as caught:
                list(received(name, b"".join(frames)))
            assert caught.value.peer == 1
            raised += 1
        else:
            with np.errstate(all="ignore"):
                expected = None if said is None else mine[victim] + said
            total = list(received(name, b"".join(frames)))[victim]
            assert (total is None) == (expected is None)
            assert total is None or np.array_equal(total.numpy(), expected, equal_nan=True)
            read += 1
    assert raised > 100
    assert read > 50


@pytest.mark.parametrize("name", FUZZED)
def test_frames_in_the_wrong_place_are_refused(name):
    ours, theirs = ([frames[rank] for frames in genuine(name)] for rank in range(2))
    for wrong in (
        theirs[::-1],
        [theirs[0], theirs[0], theirs[2]],
        [ours[0], theirs[1], theirs[2]],
        theirs[:2],
        theirs + theirs[:1],
        [*theirs[:2], genuine("bf16" if name != "bf16" else "topk_0.3")[2][1]],
        [sealed(theirs[0][:16] + struct.pack("<Q", 10**15) + theirs[0][24:]), *theirs[1:]],
    ):
        with pytest.raises(WireError):
            list(received(name, b"".join(wrong)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sender": 0}, "sender 1"),
        ({"parameter": 3}, "parameter index 2"),
        ({"algorithm": 9}, "algorithm id 5"),
        ({"dtype": torch.float64}, "dtype torch.float32"),
        ({"numel": 301}, "element count 300"),
        ({"rate": 0.125}, "rate 0.3"),
        ({"rate": math.nan}, "rate 0.3"),
    ],
    ids=str,
)
def test_a_frame_of_something_else_is_refused_by_name(change, expected):
    frames = [frames[1] for frames in genuine("topk_0.3")]
    other = pack(dataclasses.replace(unpack(octets(frames[2]), 1), **change))
    with pytest.raises(WireError, match=expected) as caught:
        list(received("topk_0.3", b"".join(frames[:2]) + bits(other)))
    assert (caught.value.peer, caught.value.parameter) == (1, "p2")


@pytest.mark.parametrize("rate", [math.inf, math.nan, -1.0, 0.0, 1e30])
@pytest.mark.parametrize("name", ["adacomp", "adacomp_5", "topk_0.3", "terngrad", "bf16"])
def test_an_impossible_rate_is_refused(name, rate):
    frames = [frames[1] for frames in genuine(name)]
    other = bits(pack(dataclasses.replace(unpack(octets(frames[0]), 1), rate=rate)))
    with pytest.raises(WireError):
        list(received(name, other + b"".join(frames[1:])))


def sparse_gradient(seed: int) -> torch.Tensor:
    rows = torch.tensor([[seed, 5, 9]])
    return torch.sparse_coo_tensor(rows, random(3, 4, seed=seed), (10, 4), check_invariants=True)


def sparse_exchange(theirs: bytes, gradient: torch.Tensor) -> torch.Tensor:
    exchange = SparseGatherer().exchange(slot_of(gradient.shape, "embedding", step=Step(size=2)), gradient)
    try:
        exchange.send([next(exchange).frame, octets(theirs)])
    except StopIteration as end:
        return end.value.values
    raise AssertionError("asks on")


def test_sparse_gradients_are_added_up():
    outcome = run(SparseGatherer(), [sparse_gradient(0), sparse_gradient(1)])
    exact = sparse_gradient(0).to_dense() + sparse_gradient(1).to_dense()
    for total in outcome.totals:
        assert total.is_sparse
        assert torch.equal(total.to_dense(), exact)


@pytest.mark.parametrize("numel", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_gradients_may_be_empty_and_of_any_floating_type(numel, dtype):
    gradient = sparse_gradient(0).to(dtype)
    other = torch.sparse_coo_tensor(
        torch.arange(numel)[None], torch.ones(numel, 4).to(dtype), (10, 4), check_invariants=True
    )
    total = run(SparseGatherer(), [gradient, other]).totals[1]
    assert total.dtype == dtype
    assert torch.equal(total.to_dense(), gradient.to_dense() + other.to_dense())


@pytest.mark.parametrize("shape", [(10, 4), (12,)], ids=str)
@pytest.mark.parametrize("right_checksum", [False, True])
def test_damaged_sparse_gradients_raise_or_are_read_as_they_stand(shape, right_checksum, little_memory):
    values = random(3, *shape[1:])
    mine, other = (
        torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)
        for rows in ([0, 5, 9], [1, 2, 3])
    )
    intact = bits(run(SparseGatherer(), [mine, other]).frames[1])
    whole = sparse_exchange(intact, mine).to_dense()
    rng = np.random.default_rng(len(shape))
    raised = 0
    for number in range(1500):
        data = bytearray(intact)
        kind = number % 3
        if kind == 0:
            where = 36 + 8 * int(rng.integers(5))
            value = [0, 1, 2, 4, 10, 2**63, 2**64 - 1, 2**62, 2**32, int(rng.integers(20))][rng.integers(10)]
            struct.pack_into("<Q", data, where, value)
        else:
            (flip, overwrite)[kind - 1](data, rng)
        data = sealed(bytes(data)) if right_checksum else bytes(data)
        try:
            total = sparse_exchange(data, mine)
        except WireError:
            raised += 1
        else:
            assert total.shape == torch.Size(shape)
            assert right_checksum or torch.equal(total.to_dense(), whole)
    assert raised > 300


@pytest.mark.parametrize(
    ("dimensions", "entries", "rest"),
    [(2, 2, struct.pack("<4q2f", 1, 2, 3, 4, 1, 2)), (0, 1, struct.pack("<12f", *range(12))), (0, 0, b"")],
)
def test_a_sparse_gradient_with_other_dimensions_is_refused(dimensions, entries, rest):
    gradient = torch.sparse_coo_tensor([[1, 3]], torch.tensor([1.0, 2.0]), (12,), check_invariants=True)
    payload = octets(struct.pack("<QQ", dimensions, entries) + rest)
    frame = Frame(SparseGatherer.algorithm, torch.float32, 1, 0, 0.0, 12, payload)
    with pytest.raises(WireError):
        sparse_exchange(bits(pack(frame)), gradient)


def test_a_sparse_gradient_of_a_missing_rank_is_noticed():
    with pytest.raises(WireError):
        run(SparseGatherer(), [sparse_gradient(rank) for rank in range(3)], tamper=lambda frames: frames[:2])


def test_the_length_prefix_under_horovod_is_not_believed():
    """A wrong one must neither loop for ever nor lose the ranks behind it."""
    horovod = pytest.importorskip("hvd_compress.transports.horovod")
    good = horovod._rows([octets(b"12345")])
    gathered = torch.cat([good, good, good])
    assert [bits(buffer) for buffer in horovod._cut(gathered)] == [b"12345"] * 3
    for length in (-8, -16, -1, 2**62, 1000):
        spoilt = gathered.clone()
        spoilt[len(good)] = length  # of the second rank
        with pytest.raises((WireError, ValueError)):
            horovod._cut(spoilt)
