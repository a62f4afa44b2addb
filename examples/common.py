"""What the examples share and is not their story: options, a rank's share of the data, the comparison of replicas."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from hvd_compress import Compression

# Those that change one argument of a script: the others need masks, another compression, or another optimizer.
_OTHERS = ("masked", "lgreco", "accordion", "dgc")
METHODS = [name for name in vars(Compression) if not name.startswith("_") and name not in _OTHERS]


def parse_options(description: str, *, methods: str, epochs: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--methods", type=_methods, default=methods, help=f"some of {','.join(METHODS)}")
    parser.add_argument(
        "--epochs", type=_positive, default=epochs, help="passes over the training data, or a part of one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="draw the loss by step and by bytes there")
    return parser.parse_args()


def _picture(text: str) -> Path:
    """Checked before anything is trained."""
    if not find_spec("matplotlib"):
        raise argparse.ArgumentTypeError("a plot needs matplotlib: pip install matplotlib")
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"no picture can be written there, a .png, .svg or .pdf: {text}")
    return path


def _methods(text: str) -> list[str]:
    methods = text.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        raise argparse.ArgumentTypeError(f"no such method: {', '.join(unknown)} (choose from {', '.join(METHODS)})")
    return methods


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0: {text}")
    return float(text)


class Shard:
    """This rank's share of a dataset, as batches; the same number of them on every rank."""

    def __init__(self, dataset: Dataset, rank: int, size: int, *, seed: int, batch_size: int) -> None:
        self._sampler = DistributedSampler(dataset, size, rank, seed=seed)
        self._loader = DataLoader(dataset, batch_size, sampler=self._sampler, drop_last=True)

    def batches(self, epochs: float) -> Iterator[Any]:
        """Shuffled anew for each epoch."""
        return itertools.islice(self._endless(), self.steps(epochs))

    def _endless(self) -> Iterator[Any]:
        for epoch in itertools.count():
            self._sampler.set_epoch(epoch)
            yield from self._loader

    def steps(self, epochs: float) -> int:
        return math.ceil(epochs * len(self._loader))


def fingerprint(model: nn.Module) -> str:
    """Equal for models whose parameters are equal bit for bit."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def check_equal(fingerprints: list[str]) -> None:
    """Raise unless all ranks have the same model; given all ranks' fingerprints, on every rank alike."""
    if strays := [rank for rank, theirs in enumerate(fingerprints) if theirs != fingerprints[0]]:
        raise RuntimeError(f"the parameters of ranks {strays} differ from those of rank 0")


def on_terminal() -> bool:
    """Whether a person watches what this process prints.

    mpirun gives its ranks a pseudo-terminal even where its own output is a file, so under it the launcher's counts.
    """
    if not sys.stdout.isatty():
        return False
    if "PMIX_RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:
        return True
    try:
        with open(f"/proc/{os.getppid()}/fd/1", "w") as launcher:
            return launcher.isatty()
    except OSError:  # a system without /proc, or a launcher of somebody else
        return False
