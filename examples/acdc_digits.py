"""Train a CNN on handwritten digits under Horovod by AC/DC, to a sparse model and its dense twin, and compare them."""

from __future__ import annotations

import argparse
import statistics

import horovod.torch as hvd
import torch
from torch.nn.functional import cross_entropy

import digits
from common import Shard, check_equal, fingerprint
from hvd_compress import Compression
from hvd_compress.training import ACDC, Schedule

PHASES = Schedule((20, 20, 30, 30))  # percent of the training: dense, compressed, dense, compressed


def train(sparsity: float, options: argparse.Namespace) -> None:
    """A sparsity of 0 is dense training, to compare with."""
    torch.manual_seed(options.seed)
    train_set, test_set = digits.load()
    shard = Shard(train_set, hvd.rank(), hvd.size(), seed=options.seed, batch_size=32)
    model = digits.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    steps = shard.steps(options.epochs)

    acdc, compression = None, Compression.none
    if sparsity:
        acdc = ACDC(model, optimizer, schedule=PHASES.scaled(steps / PHASES.total), sparsity=sparsity)
        compression = Compression.masked(acdc)  # while weights are pruned, gradients of kept ones travel alone
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, steps, cycle_momentum=False)
    sent = {"dense": [], "compressed": []}  # bytes of each step
    for step, (images, labels) in enumerate(shard.batches(options.epochs)):
        if acdc:
            acdc.begin(step)
            compression.telemetry.reset()
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
        if acdc:
            sent["compressed" if acdc.compressed else "dense"].append(compression.telemetry.total.sent_bytes)

    check_equal(hvd.allgather_object(fingerprint(model)))
    say(f"{'sparse model' if acdc else 'dense training'}: test accuracy {digits.accuracy(model, test_set):.2f} %")
    if acdc:
        say(f"  zeros among the prunable weights: {100 * acdc.realised_sparsity():.2f} %")
        model.load_state_dict(acdc.dense_state_dict())
        say(f"dense twin: test accuracy {digits.accuracy(model, test_set):.2f} %")
        for phase, of_steps in sent.items():
            say(f"  bytes per step and rank in {phase} phases: {statistics.median(of_steps):,.0f}")


def say(text: str) -> None:
    if hvd.rank() == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of the weights to prune")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    options = parser.parse_args()
    hvd.init()
    for sparsity in (0.0, options.sparsity):
        train(sparsity, options)


if __name__ == "__main__":
    main()
