"""Time the pruning of activation gradients: the fused pass against torch operations, and what backward gains by it.

Medians on one thread, alternating; OUT=FILE keeps them as a JSON list.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hvd_compress import kernels
from hvd_compress.kernels import prune
from hvd_compress.training import prune_activation_gradients
from hvd_compress.training.activation_pruning import threshold_of
from report import write_rows

RATE = 0.9
LAYERS = {"64 channels, 16 images of 32x32": (64, 16, 32), "128 channels, 16 images of 16x16": (128, 16, 16)}


def median_ms(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Of each, interleaved, so that what else the machine does meets all alike."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def of_layer(channels: int, images: int, side: int, rounds: int) -> dict[str, float]:
    """The backward pass of one 3x3 convolution for three gradients of its output, and what pruning one costs."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    inputs = torch.randn(images, channels, side, side, generator=generator).requires_grad_()
    output = layer(inputs)
    gradient = torch.randn(output.shape, generator=generator)
    threshold = threshold_of(float(gradient.abs().mean()), RATE)
    pruned, _, _ = kernels.prune_dense(gradient, threshold, key=0)

    def backward(of: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(output, (inputs, layer.weight), of, retain_graph=True)

    return median_ms(
        {
            "backward, gradient as it is": backward(gradient),
            f"backward, pruned, {100 * float((pruned == 0).float().mean()):.0f} % zeros": backward(pruned),
            "backward, zeros only": backward(torch.zeros_like(gradient)),
            "pruning, fused pass": lambda: kernels.prune_dense(gradient, threshold, key=0),
            "pruning, torch operations": lambda: prune.prune_dense(gradient, threshold, key=0),
        },
        rounds,
    )


def of_training(rounds: int) -> dict[str, float]:
    """A step of a network of three convolutions with batch normalisation, 16 images of 32x32."""
    runs = {}
    for name in ("step, exact", "step, pruned"):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after in ((3, 32), (32, 64), (64, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        if "pruned" in name:
            prune_activation_gradients(model, RATE)
        runs[name] = _step(model)
        for _ in range(6):  # until the history of thresholds is full
            runs[name]()
    return median_ms(runs, rounds)


def _step(model: nn.Module) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="of every measurement")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="file for the rows, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    measured = {name: of_layer(*shape, options.rounds) for name, shape in LAYERS.items()}
    measured["three convolutions"] = of_training(options.rounds)
    table = Table(
        "what", "median, ms", title=f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )
    for place, found in measured.items():
        table.add_section()
        table.add_row(f"[bold]{place}", "")
        for what, ms in found.items():
            table.add_row(what, f"{ms:.2f}")
            rows.append({"place": place, "what": what, "median_ms": ms, "kernels": kernels.in_use()})
        if "pruning, fused pass" in found:
            times = found["pruning, torch operations"] / found["pruning, fused pass"]
            table.add_row("fused pass, times faster than torch operations", f"{times:.1f}")
    Console().print(table)
    if options.out:
        write_rows(options.out, rows)


if __name__ == "__main__":
    main()
