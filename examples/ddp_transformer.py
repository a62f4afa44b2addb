"""Train a small GPT on Python's standard library in DistributedDataParallel, without and with compression."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import stdlib_text
from common import Shard, check_equal, fingerprint, parse_options
from hvd_compress import Compression, ddp
from report import Report


def train(method: str, options: argparse.Namespace, report: Report) -> None:
    torch.manual_seed(options.seed)
    train_set, test_set = stdlib_text.load()
    shard = Shard(train_set, dist.get_rank(), dist.get_world_size(), seed=options.seed, batch_size=16)
    net = stdlib_text.CharGPT()
    model = DistributedDataParallel(net)

    # All that compression needs; `none` is here so that its bytes are counted, too.
    compression = getattr(Compression, method)(net.named_parameters())
    model.register_comm_hook(compression, ddp.hook)

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    steps = shard.steps(options.epochs)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for text, following in report.track(method, shard.batches(options.epochs), steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(text), following)
        loss.backward()
        clip_grad_norm_(net.parameters(), 1.0)  # of the mean over the ranks, as always in DDP
        optimizer.step()
        schedule.step()
        report.show(loss=loss.item())

    fingerprints = [""] * dist.get_world_size()
    dist.all_gather_object(fingerprints, fingerprint(net))
    check_equal(fingerprints)
    report.add(method, stdlib_text.nats_per_character(net, test_set), compression.telemetry)


def main() -> None:
    options = parse_options(__doc__, methods="none,topk", epochs=1)
    dist.init_process_group("gloo")
    with Report("validation, nats/char", options, dist.get_rank(), dist.get_world_size()) as report:
        for method in options.methods:
            train(method, options, report)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
