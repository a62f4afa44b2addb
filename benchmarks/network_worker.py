"""One rank of the network benchmark: trains by all methods in turn, and times them. Started by network.py."""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from network_methods import MODELS, WARM_UP_STEPS, Trained

from report import write_rows

_BLOCK_SECONDS = 1.0  # that a method trains for, about, before it is the next one's turn
_ROUNDS = (5, 30)


class Rank:
    """What this rank trains, and what it sees of the network."""

    def __init__(self, options: argparse.Namespace) -> None:
        make, batch = MODELS[options.parameters]
        generator = torch.Generator().manual_seed(1 + hvd.rank())
        self.batches = [batch(generator) for _ in range(8)]
        self.steps = 0
        self._counter = Path("/sys/class/net", options.interface, "statistics/tx_bytes")
        self._sharers = options.sharers
        if any(method.startswith(("ddp", "hook")) for method in options.methods):
            _join(options)
        self.trained = [Trained(method, make) for method in options.methods]
        for trained in self.trained:
            for step in range(trained.preparation):
                trained.step(self.batches[step % len(self.batches)])
        self.numel = sum(parameter.numel() for parameter in self.trained[0].plain.parameters())

    def sent_bytes(self) -> float:
        return int(self._counter.read_text()) / self._sharers

    def block(self, trained: Trained, steps: int) -> tuple[float, float]:
        """Seconds of a step on the slowest rank, and bytes that left this host in a step, after all ranks have met."""
        hvd.barrier()
        bytes_before, start = self.sent_bytes(), time.perf_counter()
        for _ in range(steps):
            loss = trained.step(self.batches[self.steps % len(self.batches)])
            self.steps += 1
        seconds = (time.perf_counter() - start) / steps
        slowest = hvd.allreduce(torch.tensor(seconds, dtype=torch.float64), op=hvd.Max, name="slowest")
        if not math.isfinite(loss):
            raise RuntimeError(f"{trained.method}: the loss is {loss}")
        return float(slowest), (self.sent_bytes() - bytes_before) / steps

    def check_replicas(self, trained: Trained) -> None:
        """Raise RuntimeError if the ranks' models differ: then what was timed was no training."""
        total = torch.stack([p.detach().double().sum() for p in trained.plain.parameters()])
        theirs = hvd.allgather(total.unsqueeze(0), name=f"check.{trained.method}")
        if trained.method != "bound" and not bool((theirs == theirs[0]).all()):
            raise RuntimeError(f"{trained.method}: the ranks' models differ")


def _join(options: argparse.Namespace) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = options.interface
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{options.master}", rank=hvd.rank(), world_size=hvd.size()
    )


def measure(rank: Rank, seconds: float) -> list[dict[str, object]]:
    """Rounds in which every method has a block, in changing order; of each the median."""
    steps, estimate = {}, {}
    for trained in rank.trained:
        once = [rank.block(trained, trained.period)[0] for _ in range(WARM_UP_STEPS)][-2:]
        estimate[trained.method] = min(once)
        steps[trained.method] = trained.period * max(1, min(10, round(_BLOCK_SECONDS / min(once) / trained.period)))
    least, most = _ROUNDS
    whole = sum(steps[method] * estimate[method] for method in steps)
    rounds = max(least, min(most, int(seconds / whole)))
    for trained in rank.trained:
        if trained.compression is not None:
            trained.compression.telemetry.watch()  # where its own time goes; it costs nothing that can be seen here
    order, shuffle = list(rank.trained), random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for trained in order:
            found.setdefault(trained.method, []).append(rank.block(trained, steps[trained.method]))
    for trained in rank.trained:
        rank.check_replicas(trained)
    return [_row(trained, found[trained.method], steps[trained.method]) for trained in rank.trained]


def _row(trained: Trained, blocks: list[tuple[float, float]], steps: int) -> dict[str, object]:
    seconds, sent = zip(*blocks)
    mean_sent = hvd.allreduce(torch.tensor(statistics.median(sent), dtype=torch.float64), name="sent")
    row = {
        "method": trained.method,
        "step_seconds": statistics.median(seconds),
        "fastest_seconds": min(seconds),
        "bytes_per_rank_per_step": float(mean_sent),
        "rounds": len(blocks),
        "steps_per_round": steps,
    }
    if trained.compression is not None and (spans := trained.compression.telemetry.spans) is not None:
        row |= {f"{kind}_seconds": spent / len(blocks) / steps for kind, spent in spans.seconds.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", choices=MODELS, required=True)
    parser.add_argument("--methods", type=lambda text: text.split(","), required=True)
    parser.add_argument("--interface", required=True, help="whose bytes are counted")
    parser.add_argument("--sharers", type=int, default=1, help="ranks that share it")
    parser.add_argument("--master", required=True, help="address and port of rank 0, for torch.distributed")
    parser.add_argument("--seconds", type=float, required=True, help="that all rounds may take, about")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    if not hvd.mpi_enabled():
        raise RuntimeError("this benchmark is of Horovod over MPI: start it with mpirun")
    rank = Rank(options)
    rows = measure(rank, options.seconds)
    if hvd.rank() == 0:
        write_rows(options.out, [{"numel": rank.numel} | row for row in rows])
    hvd.barrier()


if __name__ == "__main__":
    main()
