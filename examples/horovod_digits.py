"""Train a CNN on handwritten digits under Horovod, once with each of several compressions, and compare them."""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import torch
from torch.nn.functional import cross_entropy

import digits
from common import Shard, check_equal, fingerprint, parse_options
from hvd_compress import Compression
from report import Report


def train(method: str, options: argparse.Namespace, report: Report) -> None:
    torch.manual_seed(options.seed)
    train_set, test_set = digits.load()
    shard = Shard(train_set, hvd.rank(), hvd.size(), seed=options.seed, batch_size=32)
    model = digits.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # Two lines are added to a Horovod script: the import of Compression, and the choice of one, such as
    #     compression = Compression.adacomp(model.named_parameters())
    compression = getattr(Compression, method)(model.named_parameters())
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    steps = shard.steps(options.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps, cycle_momentum=False)
    for images, labels in report.track(method, shard.batches(options.epochs), steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        report.show(loss=loss.item())

    check_equal(hvd.allgather_object(fingerprint(model)))
    report.add(method, digits.accuracy(model, test_set), compression.telemetry)


def main() -> None:
    options = parse_options(__doc__, methods="none,terngrad,adacomp,topk", epochs=20)
    hvd.init()
    with Report("test accuracy, %", options, hvd.rank(), hvd.size()) as report:
        for method in options.methods:
            train(method, options, report)


if __name__ == "__main__":
    main()
