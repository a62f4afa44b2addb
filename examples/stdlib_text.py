"""Texts that every Python has, and small networks that predict their next character."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

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


class CharGPT(nn.Module):
    """Two layers of causal attention: 438,000 parameters."""

    def __init__(self, width: int = 128, symbols: int = _SYMBOLS, length: int = _WINDOW) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.output = nn.Linear(width, symbols, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """As of CharLM."""
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        return self.output(self.layers(self.symbols(text) + self.places, mask, is_causal=True)).transpose(1, 2)


def load(train_characters: int = 600_000, test_characters: int = 50_000) -> tuple[TensorDataset, TensorDataset]:
    """Windows of characters of the standard library, and the same shifted by one; those to validate with are from files
    of their own."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return _split([file.read_text("utf-8") for file in files], train_characters, test_characters)


def load_reference(train_characters: int, test_characters: int) -> tuple[TensorDataset, TensorDataset]:
    """As `load`, of English: the language reference that help() shows, some 700,000 characters."""
    return _split([text for _, text in sorted(topics.items())], train_characters, test_characters)


def _split(texts: list[str], train_characters: int, test_characters: int) -> tuple[TensorDataset, TensorDataset]:
    random.Random(0).shuffle(texts)
    held_out = len(texts) // 10
    return _windows(texts[held_out:], train_characters), _windows(texts[:held_out], test_characters)


def _windows(texts: list[str], characters: int) -> TensorDataset:
    text = "".join(texts).encode("ascii", "replace")
    codes = torch.tensor(list(text[: characters + 1]))
    whole = (len(codes) - 1) // _WINDOW * _WINDOW
    return TensorDataset(codes[:whole].view(-1, _WINDOW), codes[1 : whole + 1].view(-1, _WINDOW))


@torch.no_grad()
def nats_per_character(model: nn.Module, test: TensorDataset) -> float:
    text, following = test.tensors
    return cross_entropy(model(text), following).item()
