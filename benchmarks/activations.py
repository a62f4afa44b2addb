"""What compressed activations save of memory and cost of time, on a CNN and a small transformer.

Steps with and without alternate, on one thread; medians. Saved is what is counted; held, between forward and backward,
and peak are what the system sees of a process of its own, above what that held before, with larger batches. OUT=FILE
keeps the rows as a JSON list.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hvd_compress import kernels
from hvd_compress.activations import CompressedActivations
from report import write_rows

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import stdlib_text

Made = tuple[nn.Module, Tensor, Tensor]
_BITS = (None, 8, 4, 2, 1)  # None: as they are


def cnn(batch: int) -> Made:
    """Three convolutions with batch normalisation and max pooling, on images of 32x32."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, 10))
    return model, torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10


def transformer(batch: int) -> Made:
    """The one of the accuracy benchmark: two layers, 128 wide, windows of characters."""
    model = stdlib_text.CharGPT()
    text = torch.randint(64, (batch, model.places.shape[0]))
    return model, text, text


MODELS: dict[str, tuple[Callable[[int], Made], int, int]] = {  # with batches to time, and to fill memory by
    "CNN": (cnn, 32, 256),
    "transformer": (transformer, 16, 256),
}


def made(name: str, batch: int) -> Made:
    torch.manual_seed(0)
    return MODELS[name][0](batch)


def phases(model: nn.Module, inputs: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Seconds of forward and of backward."""
    model.zero_grad()
    start = time.perf_counter()
    loss = cross_entropy(model(inputs), wanted)
    between = time.perf_counter()
    loss.backward()
    return between - start, time.perf_counter() - between


def compressed(model: nn.Module, bits: int | None) -> Any:
    return nullcontext() if bits is None else CompressedActivations(model, bits, nonlinear_bits=max(bits, 4))


def timed(name: str, rounds: int) -> list[dict[str, Any]]:
    model, inputs, wanted = made(name, MODELS[name][1])
    seconds: dict[int | None, list[tuple[float, float]]] = {bits: [] for bits in _BITS}
    saved = {}
    for turn in range(rounds + 1):
        for bits in _BITS:
            with compressed(model, bits) as activations:
                found = phases(model, inputs, wanted)
            if bits is not None:
                saved[bits] = activations.saved
            if turn:
                seconds[bits].append(found)
    rows = []
    for bits in _BITS:
        forward, backward = (statistics.median(of) for of in zip(*seconds[bits]))
        dense = saved[2].dense_bytes
        kept = dense if bits is None else saved[bits].saved_bytes
        rows.append({"bits": bits, "forward_seconds": forward, "backward_seconds": backward})
        rows[-1] |= {"dense_bytes": dense, "saved_bytes": kept}
    return rows


def resident(name: str, bits: int | None) -> dict[str, int]:
    """Bytes that a step adds to what the process holds, as the system sees it: after forward, and at the most."""
    model, inputs, wanted = made(name, MODELS[name][2])
    phases(*made(name, 2))  # what torch allocates once
    before = _status("VmRSS")
    with compressed(model, bits):
        phases(model, inputs, wanted)
        model.zero_grad()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        loss = cross_entropy(model(inputs), wanted)
        held = _status("VmRSS")
        loss.backward()
    return {"held_bytes": held - before, "peak_bytes": _status("VmHWM") - before}


def _status(of: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(of))
    return 1024 * int(line.split()[1])


def of_own_process(name: str, bits: int | None) -> dict[str, int]:
    """With an allocator that gives back at once what is freed, or the system would see what is not there any more."""
    command = [sys.executable, __file__, "--resident-of", json.dumps([name, bits])]
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings}).stdout
    found: dict[str, int] = json.loads(output)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("ROUNDS") or 25), help="of every measurement")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="file for the rows, as JSON")
    parser.add_argument("--resident-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.resident_of:
        print(json.dumps(resident(*options.resident_of)))
        return
    rows = []
    title = f"{platform.processor() or platform.machine()}, torch {torch.__version__}, kernels: {kernels.in_use()}"
    columns = (
        "model",
        "bits",
        "saved, MB",
        "times less",
        "held, MB",
        "peak, MB",
        "forward, ms",
        "backward, ms",
        "ratio",
    )
    table = Table(*columns, title=title)
    for name in MODELS:
        table.add_section()
        mine = [row | {"model": name} | of_own_process(name, row["bits"]) for row in timed(name, options.rounds)]
        plain = mine[0]
        for row in mine:
            table.add_row(
                name,
                "as they are" if row["bits"] is None else str(row["bits"]),
                f"{row['saved_bytes'] / 1e6:.2f}",
                f"{row['dense_bytes'] / row['saved_bytes']:.1f}",
                f"{row['held_bytes'] / 1e6:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"{1e3 * row['forward_seconds']:.1f}",
                f"{1e3 * row['backward_seconds']:.1f}",
                f"{row['backward_seconds'] / plain['backward_seconds']:.2f}",
            )
        rows += mine
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if options.out:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
