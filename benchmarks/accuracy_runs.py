"""Trains one method with one seed: on the ranks of a job under Horovod, or on simulated ranks that share a model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accuracy_methods import (
    METHODS,
    TASKS,
    Setting,
    clip_of,
    local_steps_of,
    optimizer_of,
    scores,
    technique,
    weights_of,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from common import Shard, check_equal, fingerprint  # of the examples, whose directory accuracy_methods has added
from hvd_compress import GradientCompression
from hvd_compress.compressors import MaskedCompressor
from hvd_compress.local import LocalRanks

Combination = tuple[str, str, int]  # task, method, seed


class _Training:
    """What both kinds of ranks have in common."""

    def __init__(self, combination: Combination, ranks: Sequence[int], size: int) -> None:
        task, self.method, seed = combination
        self.key = {"task": task, "method": self.method, "ranks": size, "seed": seed}
        self.task = TASKS[task]
        torch.manual_seed(seed)
        train, self.test = self.task.load()
        batch_size = max(self.task.global_batch // size, 1)
        self.shards = [Shard(train, rank, size, seed=seed, batch_size=batch_size) for rank in ranks]
        self.model = self.task.model()
        self.epochs = self.task.epochs_of(size)
        self.setting = Setting(self.task, seed, self.shards[0].steps(self.epochs))
        self.setting.named = list(self.model.named_parameters())
        self.clip = clip_of(self.method, self.task)

    def begin(self, step: int) -> None:
        if self.setting.pruned:
            self.setting.pruned.begin(step)

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        if self.task.optimizer not in ("sgd", "adamw"):
            return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, self.task.lr, self.setting.steps, cycle_momentum=False)

    def clip_gradients(self) -> None:
        if self.clip:
            clip_grad_norm_(self.model.parameters(), self.clip)

    def row(self, sent_bytes: float, seconds: float) -> dict[str, Any]:
        found = scores(self.setting, self.model, self.test)
        return (
            self.key
            | found
            | {
                "metric_name": self.task.metric,
                "bytes_per_rank_per_step": sent_bytes / self.setting.steps,
                "epochs": self.epochs,
                "steps": self.setting.steps,
                "seconds": seconds,
            }
        )


def sent_bytes_of(compression: Any) -> int:
    """By this rank in all steps, what an adaptive method decides with included."""
    return compression.telemetry.total.sent_bytes + (compression.controller.sent_bytes if compression.controller else 0)


def train_in_job(combination: Combination) -> dict[str, Any]:
    """To be called on every rank, all with the same combination."""
    import horovod.torch as hvd

    training, start = _Training(combination, [hvd.rank()], hvd.size()), time.perf_counter()
    compression = METHODS[training.method](training.setting)
    optimizer = optimizer_of(training.method, training.setting, compression)
    hvd.broadcast_parameters(training.model.state_dict(), root_rank=0)
    local = local_steps_of(training.method, optimizer, compression)
    if local is None:
        optimizer = hvd.DistributedOptimizer(optimizer, training.setting.named, compression=compression)
    schedule = training.schedule(optimizer)
    with technique(training.method, training.setting, training.model, optimizer, compression, hvd.rank()):
        with local or nullcontext():
            for step, (inputs, wanted) in enumerate(training.shards[0].batches(training.epochs)):
                training.begin(step)
                optimizer.zero_grad()
                with weights_of(training.method, optimizer):
                    loss = cross_entropy(training.model(inputs), wanted)
                    loss.backward()
                compression.record_loss(loss.detach())
                if local:
                    training.clip_gradients()
                    optimizer.step()
                    local.step()
                else:
                    optimizer.synchronize()
                    training.clip_gradients()
                    with optimizer.skip_synchronize():
                        optimizer.step()
                schedule.step()
            compression.flush(optimizer)
        check_equal(hvd.allgather_object(fingerprint(training.model)))
        sent = hvd.allgather_object(sent_bytes_of(compression))
        return training.row(sum(sent) / len(sent), time.perf_counter() - start)


def train_simulated(combination: Combination, size: int) -> dict[str, Any]:
    """Ranks share a model, since their replicas would be equal, and take turns at its gradients."""
    training, start = _Training(combination, range(size), size), time.perf_counter()
    model, method, setting = training.model, training.method, training.setting
    compressions = [METHODS[method](setting) for _ in range(size)]
    optimizer = optimizer_of(method, setting, compressions[0])
    schedule = training.schedule(optimizer)
    with technique(method, setting, model, optimizer, compressions[0], rank=0):
        # Masked methods gather hashes besides, which have to be looked at.
        masked = isinstance(compressions[0].compressor, MaskedCompressor)
        ranks = LocalRanks(compressions, readers=None if masked else [0])
        for step, batches in enumerate(zip(*(shard.batches(training.epochs) for shard in training.shards))):
            training.begin(step)
            with weights_of(method, optimizer):
                of_ranks = [_gradients(model, compression, *b) for compression, b in zip(compressions, batches)]
            combined = ranks.exchange(of_ranks)[0]
            for name, parameter in model.named_parameters():
                parameter.grad = combined[name]
            training.clip_gradients()
            optimizer.step()
            schedule.step()
        compressions[0].flush(optimizer)
        sent = [sent_bytes_of(compression) for compression in compressions]
        return training.row(sum(sent) / size, time.perf_counter() - start)


def _gradients(model: nn.Module, compression: GradientCompression, inputs: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = cross_entropy(model(inputs), wanted)
    compression.record_loss(loss.detach())
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main() -> None:
    """A job's ranks: train the combinations of the file, and append rows as lines of JSON to the other file."""
    import horovod.torch as hvd

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("combinations", type=Path)
    parser.add_argument("rows", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hvd.init()
    for combination in json.loads(options.combinations.read_text()):
        row = train_in_job(tuple(combination))
        if hvd.rank() == 0:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
