"""Handwritten digits, the 1797 images of 8x8 pixels that come with scikit-learn, and a small CNN to read them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def make_model() -> nn.Module:
    """284,000 parameters, nine tenths of them in the first linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def load() -> tuple[TensorDataset, TensorDataset]:
    """1297 images and labels to train on, 500 for the test; always the same."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8)
    train, test = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=0)
    labels = torch.from_numpy(labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Percent."""
    images, labels = test.tensors
    hits: Tensor = model(images).argmax(1) == labels
    return 100 * hits.double().mean().item()
