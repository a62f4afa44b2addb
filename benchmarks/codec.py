"""Time the kernels against the memory, and against the torch operations that they replace, interleaved in one run.

Prints a table of GB/s of gradient read and of ratios within the run, then one of the decoders at several numbers of
ranks; --out writes medians as a JSON list. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import decoders
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hvd_compress import kernels
from hvd_compress.kernels import native, reference
from report import write_rows

SIZES = {"64K": 1 << 16, "1M": 1 << 20, "25M": 25_000_000}
MOST_DECODED = SIZES[
    "1M"
]  # elements that decoders are timed with: their payloads are as many times as long as there are ranks
KEY = kernels.stream_key(0)
RANKS = 4
_SCALE = 1e-3  # of the gradients
_SECONDS = {"native": 0.4, "reference": 2.0}  # that the rounds of one kernel at one size may take, about
_ROUNDS = {"native": (9, 200), "reference": (3, 15)}


class Buffers:
    """A gradient, a residual in balance with it at 1 %, room for results, and what four ranks sent."""

    def __init__(self, numel: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.numel = numel
        self.gradient = torch.randn(numel, generator=generator).mul_(_SCALE)
        self.residual = torch.randn(numel, generator=generator).mul_(3 * _SCALE)
        self.kept = torch.zeros(numel)
        self.out = torch.zeros(numel)
        self.payload = torch.zeros(4 * numel + 64, dtype=torch.uint8)
        self.ternary = []
        for rank in range(RANKS):
            payload = torch.zeros(4 + kernels.ternary_bytes(numel), dtype=torch.uint8)
            native.ternary_encode(self.gradient, 4 * _SCALE, 4 * _SCALE, kernels.stream_key(rank), False, payload)
            self.ternary.append(payload)
        sample = (self.gradient + self.residual).abs()[: 1 << 20]
        self.one_percent = float(torch.quantile(sample, 0.99))


def ternary(module: ModuleType, b: Buffers) -> object:
    """Unclipped: the largest magnitude, then the codes."""
    scaler = module.largest(b.gradient)
    return module.ternary_encode(b.gradient, scaler, scaler, KEY, False, b.payload)


def ternary_clipped(module: ModuleType, b: Buffers) -> object:
    """As Compression.terngrad by default: clipped to 2.5 standard deviations."""
    largest, sigma = module.moments(b.gradient)
    bound = min(float(np.float32(2.5 * sigma)), largest)
    return module.ternary_encode(b.gradient, bound, bound, KEY, False, b.payload)


def topk(density: float) -> Callable[[ModuleType, Buffers], object]:
    def run(module: ModuleType, b: Buffers) -> object:
        return module.topk_encode(b.gradient, b.residual, b.kept, max(int(density * b.numel), 1), b.payload)

    return run


def narrow(density: float, bits: int) -> Callable[[ModuleType, Buffers], object]:
    """As `topk`, with values of so many bits."""

    def run(module: ModuleType, b: Buffers) -> object:
        length = module.topk_encode(b.gradient, b.residual, b.kept, max(int(density * b.numel), 1), b.payload)
        return module.narrow_encode(b.payload[:length], b.numel, bits, b.kept)

    return run


def adacomp(bin_size: int) -> Callable[[ModuleType, Buffers], object]:
    return lambda module, b: module.adacomp_encode(b.gradient, b.residual, b.kept, bin_size, b.payload)


def prune(module: ModuleType, b: Buffers) -> object:
    """At a threshold below which 90 % of the elements are."""
    return module.prune_encode(b.gradient, 1.645 * _SCALE, KEY, b.payload)


KERNELS: dict[str, Callable[[ModuleType, Buffers], object]] = {
    "ternary_encode": ternary,
    "ternary_clipped_encode": ternary_clipped,
    "ternary_decode4": lambda module, b: module.ternary_sum(b.ternary, float(RANKS), b.out),
    "quantize4_encode": lambda module, b: module.quantise_encode(b.gradient, 4, 512, False, KEY, False, b.payload),
    "onebit_encode": lambda module, b: module.sign_encode(b.gradient, b.residual, b.kept, 256, b.payload),
    "adacomp50_encode": adacomp(50),
    "adacomp500_encode": adacomp(500),
    "threshold1e-2_encode": lambda module, b: module.threshold_encode(
        b.gradient, b.residual, b.kept, b.one_percent, b.payload
    ),
    "topk1e-2_encode": topk(1e-2),
    "topk1e-3_encode": topk(1e-3),
    "topk1e-2_8_encode": narrow(1e-2, 8),
    "prune_encode": prune,
}

MEMORY: dict[str, Callable[[Buffers], object]] = {
    "memcpy": lambda b: np.copyto(b.out.numpy(), b.gradient.numpy()),
    "read": lambda b: native.largest(b.gradient),
    "triad": lambda b: b.kept.add_(b.gradient),
}


@dataclass(frozen=True)
class Bar:
    """What a kernel should reach: at least `share` of the bandwidth of `of`, and `times` the torch operations."""

    of: str
    share: float
    times: float = 0.0


BARS = {
    "ternary_encode": Bar("memcpy", 0.75, 20),
    "ternary_decode4": Bar("memcpy", 1.0),
    "quantize4_encode": Bar("memcpy", 0.8),
    "onebit_encode": Bar("triad", 0.7),
    "adacomp50_encode": Bar("triad", 0.45, 12),
    "adacomp500_encode": Bar("triad", 0.5, 12),
    "threshold1e-2_encode": Bar("triad", 0.8),
    "topk1e-2_encode": Bar("triad", 0.5, 30),
    "topk1e-3_encode": Bar("triad", 0.7, 30),
    "topk1e-2_8_encode": Bar("triad", 0.5, 30),
    "prune_encode": Bar("memcpy", 0.9),
}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rounds_of(kind: str, seconds: float) -> int:
    least, most = _ROUNDS[kind]
    return max(least, min(most, int(_SECONDS[kind] / max(seconds, 1e-9))))


def measure(name: str, buffers: Buffers) -> dict[str, object]:
    """Medians of one kernel, and of the memory between its runs."""
    run = KERNELS[name]
    fast: dict[str, Callable[[], object]] = {"native": lambda: run(native, buffers)}
    fast |= {what: (lambda function=function: function(buffers)) for what, function in MEMORY.items()}
    slow: dict[str, Callable[[], object]] = {"reference": lambda: run(reference, buffers)}
    if name.startswith("topk"):
        k = max(int(float(name[4:8]) * buffers.numel), 1)
        slow["torch_topk"] = lambda: torch.topk(buffers.gradient.abs(), k, sorted=False)
    seconds: dict[str, list[float]] = {}
    for kind, functions in (("native", fast), ("reference", slow)):
        once = max([timed(function) for function in functions.values()])  # warms up, too
        for _ in range(rounds_of(kind, once)):
            for what, function in functions.items():
                seconds.setdefault(what, []).append(timed(function))
    return {"kernel": name, "numel": buffers.numel, **{what: statistics.median(t) for what, t in seconds.items()}}


def show(rows: Sequence[dict], previous: Sequence[dict]) -> None:
    table = Table(title=f"kernels at level {kernels.in_use()}, one thread; ratios are of medians within this run")
    for title in ("kernel", "numel", "GB/s", "memcpy", "read", "y+=x", "of memcpy", "of y+=x", "x torch", "bar", ""):
        table.add_column(title, justify="left" if title in ("kernel", "bar", "") else "right")
    if previous:
        table.add_column("x before", justify="right")
    before = {(row["kernel"], row["numel"]): row["native"] for row in previous if "ranks" not in row}
    for row in rows:
        mine = row["native"]
        bandwidths = [f"{4e-9 * row['numel'] / row[what]:.1f}" for what in ("native", "memcpy", "read", "triad")]
        ratios = [f"{100 * row[what] / mine:.0f} %" for what in ("memcpy", "triad")]
        cells = [row["kernel"], f"{row['numel']:,}", *bandwidths, *ratios, f"{times(row):.1f}", *judged(row)]
        was = before.get((row["kernel"], row["numel"]))
        table.add_row(*cells, *([f"{was / mine:.2f}" if was else "-"] if previous else []))
    Console(width=150).print(table)


def times(row: dict) -> float:
    """How many times as fast as torch: for top-k torch.topk alone, of a gradient without a residual."""
    return row.get("torch_topk", row["reference"]) / row["native"]


def judged(row: dict) -> tuple[str, str]:
    bar = BARS.get(row["kernel"])
    if bar is None or row["numel"] != SIZES["25M"]:
        return "", ""
    reached = row[bar.of] / row["native"] >= bar.share and times(row) >= bar.times
    text = f"{100 * bar.share:.0f} % of {bar.of}" + (f", {bar.times:.0f} x torch" if bar.times else "")
    return text, "reached" if reached else "missed"


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*KERNELS, *decoders.DECODERS]
    parser.add_argument("--kernels", default=os.environ.get("KERNELS", ""), help="names, with commas; default all")
    parser.add_argument("--sizes", default=os.environ.get("SIZES", "64K,1M,25M"), help="of " + ", ".join(SIZES))
    parser.add_argument("--ranks", default=os.environ.get("RANKS", "4,8,32"), help="at which decoders are timed")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="file for the rows, as JSON")
    parser.add_argument("--previous", type=Path, default=os.environ.get("PREVIOUS") or None, help="such a file")
    options = parser.parse_args(arguments)
    options.kernels = options.kernels.split(",") if options.kernels else every
    options.sizes = options.sizes.split(",")
    if unknown := sorted({*options.kernels} - {*every}) + sorted({*options.sizes} - {*SIZES}):
        parser.error(f"unknown: {', '.join(unknown)}. Kernels: {', '.join(every)}; sizes: {', '.join(SIZES)}")
    try:
        options.ranks = sorted({int(count) for count in options.ranks.split(",")})
    except ValueError:
        parser.error(f"ranks must be numbers, with commas: {options.ranks}")
    if options.ranks[0] < 1:
        parser.error(f"ranks must be at least 1: {options.ranks[0]}")
    if kernels.in_use() == "torch":
        parser.error("there are no C++ kernels to measure: see docs/installing.md")
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(1)
    previous = json.loads(options.previous.read_text()) if options.previous else []
    rows = []
    names = [name for name in options.kernels if name in KERNELS]
    for size in options.sizes if names else ():
        buffers = Buffers(SIZES[size])
        rows += [measure(name, buffers) for name in names]
    if rows:
        show(rows, previous)
    numel = min(max(SIZES[size] for size in options.sizes), MOST_DECODED)
    names = [name for name in options.kernels if name in decoders.DECODERS]
    decoded = [row for name in names for row in decoders.measure(name, options.ranks, numel)]
    if decoded:
        decoders.show(decoded, previous)
    if options.out:
        write_rows(options.out, rows + decoded)


if __name__ == "__main__":
    main()
