"""The user's own model, from FILE:FUNCTION: its parameters, and how long it computes here."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..prediction import Compute

_STEPS = 7  # the first two make memory

Loss = Callable[[nn.Module], Tensor]


def maker(text: str) -> Callable[[], tuple[nn.Module, Loss | None]]:
    """Run FILE once; returns what calls FUNCTION for a model, or a pair of one and a function of it that gives a loss.

    It, too, raises ValueError for what cannot be had, with the reason.
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
    with _of_the_user(text, path):
        spec.loader.exec_module(module)

    def make() -> tuple[nn.Module, Loss | None]:
        with _of_the_user(text, path):
            made = getattr(module, name)()
        model, loss = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module) or not (loss is None or callable(loss)):
            raise ValueError(
                f"{text} must return a torch.nn.Module, or a pair, a model and a function of it that gives a loss: "
                f"{made!r}"
            )
        return model, loss

    return make


@contextlib.contextmanager
def _of_the_user(text: str, path: str) -> Iterator[None]:
    """The user's own code, as if FILE were run, for what it imports."""
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        yield
    except Exception as error:
        raise ValueError(f"{text}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


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
