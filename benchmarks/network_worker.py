"""One rank of the network benchmark: trains by all methods in turn, and times them. Started by network.py."""

from __future__ import annotations

import argparse
import atexit
import math
import os
import random
import statistics
import time
from pathlib import Path

import torch
from network_methods import ALONE, MODELS, WARM_UP_STEPS, Trained, needs_horovod
from torch import Tensor
from turns import Turns

from report import write_rows

_BLOCK_SECONDS = 1.0  # that a method trains for, about, before it is the next one's turn
_ROUNDS = (5, 30)


class _Horovod:
    """The other ranks, for what the benchmark itself has to tell them."""

    def __init__(self, options: argparse.Namespace) -> None:
        import horovod.torch as hvd

        hvd.init()
        if not hvd.mpi_enabled():
            raise RuntimeError("this benchmark is of Horovod over MPI: start it with mpirun")
        self._hvd = hvd
        self.rank, self.barrier = hvd.rank(), hvd.barrier

    def gather(self, values: Tensor) -> Tensor:
        """float64 [n] of every rank: [ranks, n]."""
        gathered: Tensor = self._hvd.allgather(values.unsqueeze(0), name="hvd_compress.benchmark")
        return gathered


class _Torch:
    """The same without Horovod."""

    def __init__(self, options: argparse.Namespace) -> None:
        from mpi4py import MPI  # which only tells the rank

        self.rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        os.environ["GLOO_SOCKET_IFNAME"] = options.interface
        address = f"tcp://{options.master}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=self.rank, world_size=size)
        atexit.register(torch.distributed.destroy_process_group)
        self.barrier = torch.distributed.barrier

    def gather(self, values: Tensor) -> Tensor:
        everyone = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, values)
        return torch.stack(everyone)


class Rank:
    """What this rank trains, and what it sees of the network."""

    def __init__(self, options: argparse.Namespace, others: _Horovod | _Torch) -> None:
        make, batch = MODELS[options.parameters]
        self.others = others
        generator = torch.Generator().manual_seed(1 + others.rank)
        self.batches = [batch(generator) for _ in range(8)]
        self.steps = 0
        self._counter = Path("/sys/class/net", options.interface, "statistics/tx_bytes")
        self._sharers = options.sharers
        self.trained = [Trained(method, make) for method in options.methods]
        for trained in self.trained:
            for step in range(trained.preparation):
                trained.step(self.batches[step % len(self.batches)])
        self.numel = sum(parameter.numel() for parameter in self.trained[0].plain.parameters())

    def sent_bytes(self) -> float:
        return int(self._counter.read_text()) / self._sharers

    def block(self, trained: Trained, steps: int) -> tuple[float, float]:
        """Seconds of a step on the slowest rank, and bytes that left this host in a step, after all ranks have met."""
        self.others.barrier()
        bytes_before, start = self.sent_bytes(), time.perf_counter()
        for _ in range(steps):
            loss = trained.step(self.batches[self.steps % len(self.batches)])
            self.steps += 1
        seconds = (time.perf_counter() - start) / steps
        slowest = self.others.gather(torch.tensor([seconds], dtype=torch.float64)).max()
        if not math.isfinite(loss):
            raise RuntimeError(f"{trained.method}: the loss is {loss}")
        return float(slowest), (self.sent_bytes() - bytes_before) / steps

    def check_replicas(self, trained: Trained) -> None:
        """Raise RuntimeError if the ranks' models differ: then what was timed was no training."""
        total = torch.stack([p.detach().double().sum() for p in trained.plain.parameters()])
        theirs = self.others.gather(total)
        if trained.method not in ALONE and not bool((theirs == theirs[0]).all()):
            raise RuntimeError(f"{trained.method}: the ranks' models differ")


def measure(rank: Rank, seconds: float, turns: Turns) -> list[dict[str, object]]:
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
        turns.wait()
        shuffle.shuffle(order)
        for trained in order:
            found.setdefault(trained.method, []).append(rank.block(trained, steps[trained.method]))
    for trained in rank.trained:
        rank.check_replicas(trained)
    return [_row(rank, trained, found[trained.method], steps[trained.method]) for trained in rank.trained]


def _row(rank: Rank, trained: Trained, blocks: list[tuple[float, float]], steps: int) -> dict[str, object]:
    seconds, sent = zip(*blocks)
    mean_sent = rank.others.gather(torch.tensor([statistics.median(sent)], dtype=torch.float64)).mean()
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
    Turns.add_to(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = (_Horovod if any(map(needs_horovod, options.methods)) else _Torch)(options)
    turns = Turns(options.turns, others.rank)
    turns.wait()
    rank = Rank(options, others)
    rows = measure(rank, options.seconds, turns)
    if others.rank == 0:
        write_rows(options.out, [{"numel": rank.numel} | row for row in rows])
    others.barrier()


if __name__ == "__main__":
    main()
