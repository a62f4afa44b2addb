"""Train a CNN on handwritten digits in one process, without and with pruned activation gradients, and compare them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch.nn.functional import cross_entropy

import digits
from common import Shard
from hvd_compress.training import Realised, prune_activation_gradients

# What find_places() would choose of this network, the convolution "2" (nobody needs the gradient of the data, hence not
# "0"), and the linear layers besides: the gradient of the input of "6" goes on through the pooling to that convolution.
PLACES = {"2": "input", "6": "input", "8": "input"}


def train(rate: float, options: argparse.Namespace) -> tuple[float, Mapping[str, Realised]]:
    """Test accuracy in percent, and what was pruned; a rate of 0 prunes nothing."""
    torch.manual_seed(options.seed)
    train_set, test_set = digits.load()
    shard = Shard(train_set, 0, 1, seed=options.seed, batch_size=32)
    model = digits.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, shard.steps(options.epochs), cycle_momentum=False)

    pruning = None
    if rate:
        pruning = prune_activation_gradients(model, rate, modules=PLACES, seed=options.seed, count_zeros=True)
    for images, labels in shard.batches(options.epochs):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
    return digits.accuracy(model, test_set), pruning.realised() if pruning else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.9, help="fraction of the elements to prune")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training data")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the data's order and the pruning")
    options = parser.parse_args()

    exact, _ = train(0, options)
    print(f"exact gradients:  test accuracy {exact:.2f} %", flush=True)
    pruned, realised = train(options.rate, options)
    print(f"pruned gradients: test accuracy {pruned:.2f} %")
    print(f"{'module':>8}{'below the threshold':>22}{'zero':>8}")
    for name, fractions in realised.items():
        print(f"{name:>8}{fractions.below:22.3f}{fractions.zero:8.3f}")


if __name__ == "__main__":
    main()
