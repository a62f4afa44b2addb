"""Train a CNN on handwritten digits under plain mpirun, once with each of several compressions, and compare them."""

from __future__ import annotations

import argparse

import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy

import digits
from common import Shard, check_equal, fingerprint, parse_options
from hvd_compress import Compression
from hvd_compress.mpi import DistributedOptimizer, broadcast_parameters
from report import Report

comm = MPI.COMM_WORLD


def train(method: str, options: argparse.Namespace, report: Report) -> None:
    torch.manual_seed(options.seed)
    train_set, test_set = digits.load()
    shard = Shard(train_set, comm.rank, comm.size, seed=options.seed, batch_size=32)
    model = digits.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # The lines that make a script data-parallel: a compression, such as Compression.adacomp(model.named_parameters()),
    # the optimizer that takes it, and equal weights to start from.
    compression = getattr(Compression, method)(model.named_parameters())
    optimizer = DistributedOptimizer(optimizer, model.named_parameters(), compression)
    broadcast_parameters(model.state_dict())

    steps = shard.steps(options.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps, cycle_momentum=False)
    for images, labels in report.track(method, shard.batches(options.epochs), steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        report.show(loss=loss.item())

    check_equal(comm.allgather(fingerprint(model)))
    report.add(method, digits.accuracy(model, test_set), compression.telemetry)


def main() -> None:
    options = parse_options(__doc__, methods="none,terngrad,adacomp,topk", epochs=20)
    with Report("test accuracy, %", options, comm.rank, comm.size) as report:
        for method in options.methods:
            train(method, options, report)


if __name__ == "__main__":
    main()
