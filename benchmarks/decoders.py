"""The decoders of every codec at several numbers of ranks: what an element costs for each rank that sent it.

That should not grow with the ranks; what a sum costs once, to write it, is shared among them. Seconds are those that
the thread ran: other processes, which interrupt a long call more often than a short one, do not count.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hvd_compress import kernels, wire
from hvd_compress.compressors import Parameter, Slot, TopKCompressor
from hvd_compress.compressors.frames import _add_some_dense, encode_dense
from hvd_compress.kernels import native

FEWEST = 4  # ranks, with whose cost that of more is compared
MOST = 1.25  # times as much a rank and element may cost with more of them
SCALE = 1e-3  # of the gradients
_BUCKET = 512
_SECONDS = 1.0  # that the rounds of one decoder may take, about
_ROUNDS = (7, 100)

Encode = Callable[[Tensor, int, Tensor], int]
Sum = Callable[[Sequence[Tensor], float, Tensor], float]


@dataclass(frozen=True)
class Decoder:
    """encode(gradient, rank, room) writes a payload and returns its length; `sum` is a kernel's."""

    encode: Encode
    sum: Sum


def _ternary(gradient: Tensor, rank: int, room: Tensor) -> int:
    largest, sigma = native.moments(gradient)
    bound = min(float(np.float32(2.5 * sigma)), largest)
    return native.ternary_encode(gradient, bound, bound, kernels.stream_key(rank), False, room)


def _quantised(bits: int) -> Decoder:
    return Decoder(
        lambda x, rank, room: native.quantise_encode(x, bits, _BUCKET, False, kernels.stream_key(rank), False, room),
        lambda payloads, divisor, out: native.quantise_sum(payloads, bits, _BUCKET, divisor, out),
    )


def _topk(density: float) -> Decoder:
    def encode(gradient: Tensor, rank: int, room: Tensor) -> int:
        return native.topk_encode(gradient, None, torch.empty_like(gradient), int(density * gradient.numel()), room)

    return Decoder(encode, native.sparse_sum)


def _narrow(density: float, bits: int) -> Decoder:
    exact = _topk(density)

    def encode(gradient: Tensor, rank: int, room: Tensor) -> int:
        entries = room[: exact.encode(gradient, rank, room)]
        payload = native.narrow_encode(entries, gradient.numel(), bits, torch.empty_like(gradient))
        room[: payload.numel()] = payload
        return payload.numel()

    return Decoder(encode, lambda payloads, divisor, out: native.narrow_sum(payloads, bits, divisor, out))


def _adacomp(bin_size: int) -> Decoder:
    def encode(gradient: Tensor, rank: int, room: Tensor) -> int:
        residual = gradient.roll(1).mul_(3)  # about as large as in training
        return native.adacomp_encode(gradient, residual, torch.empty_like(gradient), bin_size, room)

    width = kernels.token_width(bin_size)
    return Decoder(encode, lambda payloads, divisor, out: native.gaps_sum(payloads, width, divisor, out))


def _prune(gradient: Tensor, rank: int, room: Tensor) -> int:
    """At a threshold below which 90 % of the elements are."""
    return native.prune_encode(gradient, 1.645 * SCALE, kernels.stream_key(rank), room)


def _dense(gradient: Tensor, rank: int, room: Tensor) -> int:
    payload = encode_dense(gradient, torch.float32)[0]
    room[: payload.numel()] = payload
    return payload.numel()


def _dense_sum(payloads: Sequence[Tensor], divisor: float, out: Tensor) -> float:
    """Of frames that are sent dense, since their codec's payload would have been larger: torch operations."""
    slot = Slot(Parameter("", 0, out.shape))
    return _add_some_dense(TopKCompressor(), [wire.DENSE] * len(payloads), torch.float32, slot, payloads, divisor, out)


def _bfloat(gradient: Tensor, rank: int, room: Tensor) -> int:
    return native.bfloat_encode(gradient, room) or 2 * gradient.numel()


DECODERS: dict[str, Decoder] = {
    "ternary_decode": Decoder(_ternary, native.ternary_sum),
    **{f"quantize{bits}_decode": _quantised(bits) for bits in (1, 2, 4, 8)},
    "bf16_decode": Decoder(_bfloat, native.bfloat_sum),
    "topk1e-2_decode": _topk(1e-2),
    "topk1e-3_decode": _topk(1e-3),
    "topk1e-2_8_decode": _narrow(1e-2, 8),
    "topk1e-2_4_decode": _narrow(1e-2, 4),
    "adacomp50_decode": _adacomp(50),
    "adacomp500_decode": _adacomp(500),
    "prune_decode": Decoder(_prune, native.prune_sum),
    "dense_decode": Decoder(_dense, _dense_sum),
}


@functools.lru_cache(maxsize=1)
def gradients(ranks: int, numel: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(numel, generator=generator).mul_(SCALE) for _ in range(ranks)]


def received(decoder: Decoder, ranks: int, numel: int) -> list[Tensor]:
    """A payload a rank, each where it is in a frame."""
    payloads = []
    room = torch.empty(6 * numel + 1024, dtype=torch.uint8)
    for rank, gradient in enumerate(gradients(ranks, numel)):
        length = decoder.encode(gradient, rank, room)
        assert length >= 0, f"the encoder returned {length}"
        frame = torch.empty(wire.frame_bytes(length), dtype=torch.uint8)
        payloads.append(frame[wire.HEADER_BYTES : wire.HEADER_BYTES + length].copy_(room[:length]))
    return payloads


def measure(name: str, ranks: Sequence[int], numel: int) -> list[dict[str, object]]:
    """A row for each number of ranks; they take turns, and the first turn warms up."""
    decoder = DECODERS[name]
    payloads = received(decoder, max(ranks), numel)
    out = torch.zeros(numel)
    seconds: dict[int, list[float]] = {count: [] for count in ranks}
    least, most = _ROUNDS
    turns = least
    while len(seconds[ranks[0]]) <= turns:
        for count in ranks:
            start = time.thread_time()
            decoder.sum(payloads[:count], float(count), out)
            seconds[count].append(time.thread_time() - start)
        if len(seconds[ranks[0]]) == 1:
            turns = max(least, min(most, int(_SECONDS / sum(taken[0] for taken in seconds.values()))))
    medians = {count: statistics.median(taken[1:]) for count, taken in seconds.items()}
    cost = {count: 1e9 * median / numel / count for count, median in medians.items()}
    few = cost.get(FEWEST)
    return [
        {"kernel": name, "numel": numel, "ranks": count, "native": medians[count], "ns": cost[count]}
        | ({"times_few": cost[count] / few} if few else {})
        for count in ranks
    ]


def show(rows: Sequence[dict], previous: Sequence[dict]) -> None:
    """`previous`: rows of an earlier run, of which those of decoders are compared."""
    table = Table(title=f"decoders at level {kernels.in_use()}, one thread; medians of the thread's own time")
    for title in ("kernel", "numel", "ranks", "ns a rank and element", f"of that at {FEWEST}", "bar", ""):
        table.add_column(title, justify="left" if title in ("kernel", "bar", "") else "right")
    if previous:
        table.add_column("x before", justify="right")
    before = {(row["kernel"], row["numel"], row["ranks"]): row["native"] for row in previous if "ranks" in row}
    for row in rows:
        ratio = row.get("times_few")
        judged = ratio is not None and row["ranks"] > FEWEST
        bar = (f"{MOST} at most", "reached" if ratio <= MOST else "missed") if judged else ("", "")
        cells = [row["kernel"], f"{row['numel']:,}", str(row["ranks"]), f"{row['ns']:.3f}"]
        was = before.get((row["kernel"], row["numel"], row["ranks"]))
        now = [f"{was / row['native']:.2f}" if was else "-"] if previous else []
        table.add_row(*cells, "-" if ratio is None else f"{ratio:.2f}", *bar, *now)
    Console(width=150).print(table)
