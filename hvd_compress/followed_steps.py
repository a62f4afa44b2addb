"""What becomes of DistributedDataParallel's gradients after backward: applied, by which GradScaler, or thrown away.

DDP's hook is not told of optimizers: all of them are looked at, as ddp.py registers it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .calls import callers
from .gradient_compression import GradientCompression
from .step_check import advise

_CALLERS = 12  # a GradScaler calls an optimizer's step, and that its hooks, through a few wrappers


class FollowedSteps:
    """Those by the gradients of one compression, which follows them: its residuals, and the scale of its losses."""

    def __init__(self, compression: GradientCompression) -> None:
        self._compression = weakref.ref(compression)  # which DDP holds
        self._seen = False  # an optimizer that has some of the parameters
        self._stepped = False  # since the gradients were finished last
        self._gone = False  # and since then gradients were thrown away
        self._watched: tuple[Tensor | None, Any] = None, None
        self._scaler: weakref.ref[Any] | None = None
        self._checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def begin(self, first: Tensor) -> None:
        """A pass begins: residuals follow the last one, unless its gradients were thrown away.

        Gradients that stay, and are added to, are handed in once more with what comes now: they did count.
        first: a parameter of the first bucket, looked at in the place of all.
        """
        compression = self._compression()
        assert compression is not None, "who calls holds it"
        if self._gone and self._seen and not self._stepped:
            compression.discard()
        if self._scaler is not None and (scaler := self._scaler()) is not None:
            compression.loss_scale = scaler.get_scale()
        self._watch(first)

    def finished(self) -> None:
        """All gradients of a pass are whole."""
        self._stepped = self._gone = False

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """Called for every optimizer; raises ValueError for one that the compression cannot serve."""
        compression = self._served(optimizer)
        if compression is None or optimizer in self._checked:
            return
        if conflict := compression.compressor.conflict(optimizer):
            raise ValueError(conflict)
        if compression.size > 1:
            advise(optimizer, compression.compressor, compression.rank)
        self._checked.add(optimizer)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Called for every optimizer: whether it has applied the gradients, and by which GradScaler."""
        compression = self._served(optimizer)
        if compression is None:
            return
        self._seen = self._stepped = True
        scaler: Any = next(filter(_is_scaler, itertools.islice(callers(), _CALLERS)), None)
        if scaler is not None and (self._scaler is None or self._scaler() is not scaler):
            self._scaler = weakref.ref(scaler)
            compression.loss_scale = scaler.get_scale()  # what these gradients were multiplied by

    def _watch(self, parameter: Tensor) -> None:
        """See whether gradients stand there still when new ones come."""
        watched, handle = self._watched
        if watched is parameter:
            return
        if handle is not None:
            handle.remove()
        mine = weakref.ref(self)

        def look(_: Tensor) -> None:
            if (steps := mine()) is not None:
                steps._look()

        self._watched = parameter, parameter.register_hook(look)

    def _look(self) -> None:
        assert self._watched[0] is not None
        gradient = self._watched[0].grad
        self._gone |= gradient is None or not gradient.any()

    def _served(self, optimizer: torch.optim.Optimizer) -> GradientCompression | None:
        """The compression, if it knows some parameter of this optimizer."""
        compression = self._compression()
        if compression is None:
            return None
        known = compression.binding.index_of
        its = (parameter for group in optimizer.param_groups for parameter in group["params"])
        return compression if any(id(parameter) in known for parameter in its) else None


def _is_scaler(caller: object) -> bool:
    return hasattr(caller, "unscale_") and hasattr(caller, "get_scale")
