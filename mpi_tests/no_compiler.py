"""Imports torch without its compiler, which the first step of an optimizer would import: as long again as torch itself.

Nothing in the suite is compiled but what a test asks for: whatever else is wanted of torch._dynamo brings the real one.
The examples, which the suite runs as users do, have it from the start.
"""

from __future__ import annotations

import gc
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

_NAME = "torch._dynamo"


class _Submodule:
    """What torch.distributed asks of a submodule where nothing is compiled; for the rest, the real one."""

    def __init__(self, name: str, **answers: Callable[[], Any]) -> None:
        self._name = name
        self.__dict__ |= answers

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{_NAME}.{self._name}"), name)


class _StandIn(types.ModuleType):
    trace_rules = _Submodule("trace_rules", clear_lru_cache=lambda: None)
    utils = _Submodule("utils", get_optimize_ddp_mode=lambda: "no_optimization")

    @staticmethod
    def disable(function: Callable[..., Any], *_: object, **__: object) -> Callable[..., Any]:
        return function

    @staticmethod
    def graph_break() -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module that there is
            raise AttributeError(name)
        if sys.modules.get(_NAME) is self:
            del sys.modules[_NAME]
            importlib.import_module(_NAME)
        return getattr(sys.modules[_NAME], name)


def install() -> None:
    """In the place of the first `import torch`."""
    gc.disable()  # importing leaves no garbage, and looking for it takes a fifth of the time
    import torch
    import torch.testing

    gc.enable()
    # Comparing tensors would import it, too, by way of distributed tensors.
    torch.testing._comparison._HAS_DTENSOR = False
    sys.modules[_NAME] = torch._dynamo = _StandIn(_NAME)
