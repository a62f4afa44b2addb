"""The user's own model, from FILE:FUNCTION: its parameters, and how long it computes here."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..prediction import Compute

_STEPS = 7  # the first two make memory

Loss = Callable[[nn.Module], Tensor]


def load(text: str) -> tuple[nn.Module, Loss | None]:
    """What FUNCTION of FILE returns: a model, or a pair of one and a function of a model that computes its loss.

    Raises ValueError for what cannot be had, with the reason.
    """
    path, _, name = text.rpartition(":")
    if not path or not name.isidentifier():
        raise ValueError(f"{text!r} is no FILE:FUNCTION, such as train.py:make_model")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # as if it were run, for what it imports
    try:
        spec.loader.exec_module(module)
        made = getattr(module, name)()
    except Exception as error:  # of the user's own code
        raise ValueError(f"{text}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    model, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not (loss is None or callable(loss)):
        raise ValueError(
            f"{text} must return a torch.nn.Module, or a pair, a model and a function of it that gives a loss: {made!r}"
        )
    return model, loss


def timed(model: nn.Module, loss: Loss) -> Compute:
    """Forward and backward of a few steps; the medians. Waits for a GPU, if the model is on one."""
    seconds: list[tuple[float, float]] = []
    for _ in range(_STEPS):
        model.zero_grad()
        start = time.perf_counter()
        value = loss(model)
        float(value.detach())
        middle = time.perf_counter()
        value.backward()
        _wait_for(value)
        seconds.append((middle - start, time.perf_counter() - middle))
    forward, backward = zip(*seconds[2:])
    return Compute(statistics.median(backward), statistics.median(forward))


def _wait_for(value: Any) -> None:
    if value.device.type == "cuda":
        import torch

        torch.cuda.synchronize(value.device)
