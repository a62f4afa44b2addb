"""The text of Python's own standard library, and small recurrent networks that predict its next character."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

_SYMBOLS = 128  # ASCII; what is not becomes a question mark
_WINDOW = 64


class CharLM(nn.Module):
    """231,000 parameters, nine tenths of them in the LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_SYMBOLS, 64)
        self.lstm = nn.LSTM(64, 192, batch_first=True)
        self.output = nn.Linear(192, _SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        """Logits, [batch, symbols, length], of the characters that follow those of `text`, [batch, length]."""
        return self.output(self.lstm(self.embedding(text))[0]).transpose(1, 2)


class CharGRU(nn.Module):
    """855,000 parameters, in two layers of 256 units."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_SYMBOLS, 256)
        self.gru = nn.GRU(256, 256, num_layers=2, batch_first=True)
        self.output = nn.Linear(256, _SYMBOLS)

    def forward(self, text: Tensor) -> Tensor:
        """As of CharLM."""
        return self.output(self.gru(self.embedding(text))[0]).transpose(1, 2)


def load(train_characters: int = 600_000, test_characters: int = 50_000) -> tuple[TensorDataset, TensorDataset]:
    """Windows of characters, and the same shifted by one; those to validate with are from files of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    held_out = len(files) // 10
    return _windows(files[held_out:], train_characters), _windows(files[:held_out], test_characters)


def _windows(files: list[Path], characters: int) -> TensorDataset:
    text = b"".join(file.read_text("utf-8").encode("ascii", "replace") for file in files)
    codes = torch.tensor(list(text[: characters + 1]))
    whole = (len(codes) - 1) // _WINDOW * _WINDOW
    return TensorDataset(codes[:whole].view(-1, _WINDOW), codes[1 : whole + 1].view(-1, _WINDOW))


@torch.no_grad()
def nats_per_character(model: nn.Module, test: TensorDataset) -> float:
    text, following = test.tensors
    return cross_entropy(model(text), following).item()
