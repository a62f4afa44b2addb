"""Train a character-level LSTM on Python's standard library under Horovod, clipping the compressed gradients."""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import stdlib_text
from common import Shard, check_equal, fingerprint, parse_options
from hvd_compress import Compression
from report import Report


def train(method: str, options: argparse.Namespace, report: Report) -> None:
    torch.manual_seed(options.seed)
    train_set, test_set = stdlib_text.load()
    shard = Shard(train_set, hvd.rank(), hvd.size(), seed=options.seed, batch_size=8)
    model = stdlib_text.CharLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)

    # Compression needs no more than in horovod_digits.py; clipping, below, is what any Horovod script does.
    compression = getattr(Compression, method)(model.named_parameters())
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    steps = shard.steps(options.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, steps, cycle_momentum=False)
    for text, following in report.track(method, shard.batches(options.epochs), steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(text), following)
        loss.backward()
        optimizer.synchronize()  # every gradient is now the average over the ranks: all ranks clip alike
        clip_grad_norm_(model.parameters(), 0.5)
        with optimizer.skip_synchronize():
            optimizer.step()
        schedule.step()
        report.show(loss=loss.item())

    check_equal(hvd.allgather_object(fingerprint(model)))
    report.add(method, stdlib_text.nats_per_character(model, test_set), compression.telemetry)


def main() -> None:
    options = parse_options(__doc__, methods="none,topk", epochs=1)
    hvd.init()
    with Report("validation, nats/char", options, hvd.rank(), hvd.size()) as report:
        for method in options.methods:
            train(method, options, report)


if __name__ == "__main__":
    main()
