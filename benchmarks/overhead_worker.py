"""One rank of the overhead benchmark: trains by one method, and says where its time and its memory went."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from network_methods import MODELS, WARM_UP_STEPS, Batch, Trained
from torch import nn

from report import write_rows

TENSORS, SIDE = 160, 100


def many_layers() -> nn.Module:
    """160 weights of 100 x 100: little to encode in each."""
    layers: list[nn.Module] = []
    for _ in range(TENSORS):
        layers += [nn.Linear(SIDE, SIDE, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def small_batch(generator: torch.Generator) -> Batch:
    return torch.randn(8, SIDE, generator=generator), torch.randint(SIDE, (8,), generator=generator)


def measure(
    method: str, name: str, make: Callable[[], nn.Module], draw: Callable[[torch.Generator], Batch], steps: int
) -> dict[str, Any]:
    """Medians of the seconds of a step, and of what the spans say of it; then the most memory that was ever held."""
    batch = draw(torch.Generator().manual_seed(1 + hvd.rank()))
    trained = Trained(method, make)
    for _ in range(WARM_UP_STEPS):
        trained.step(batch)
    compression = trained.compression
    if compression is not None:
        compression.telemetry.watch()
    found: list[dict[str, float]] = []
    for _ in range(steps):
        spans = compression.telemetry.spans if compression is not None else None
        before, start = dict(spans.seconds) if spans else {}, time.perf_counter()
        trained.step(batch)
        row = {"step": time.perf_counter() - start}
        found.append(row | {kind: spans.seconds[kind] - before[kind] for kind in before} if spans else row)
    medians = {f"{kind}_seconds": statistics.median([row[kind] for row in found]) for kind in found[0]}
    shapes = [p.shape for p in trained.plain.parameters()]
    return {
        "method": method,
        "model": name,
        "tensors": len(shapes),
        "numel": sum(shape.numel() for shape in shapes),
        **medians,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    rows = [
        measure(options.method, f"{TENSORS} layers", many_layers, small_batch, options.steps),
        measure(options.method, "10M", *MODELS["10M"], options.steps),  # second: it needs more memory than the first
    ]
    if hvd.rank() == 0:
        write_rows(options.out, [{"where": "horovod", "ranks": hvd.size()} | row for row in rows])
    hvd.barrier()


if __name__ == "__main__":
    main()
