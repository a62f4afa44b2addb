"""The parameters that a compression is bound to: which of them are compressed, and whose gradient a tensor is."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from .calls import callers
from .compressors import Parameter, Slot, SummedCompressor
from .compressors.base import Compressor
from .memory import ErrorFeedback

NamedParameters = Iterable[tuple[str, Tensor]]


class Binding:
    """Parameters in the order in which they were named; raises ValueError for names that cannot work."""

    def __init__(
        self,
        named_parameters: NamedParameters,
        compressor: Compressor,
        memory: ErrorFeedback,
        *,
        min_numel: int,
        exclude: Sequence[str],
        seed: int,
    ) -> None:
        pairs = list(named_parameters) if isinstance(named_parameters, Iterable) else []
        _check(pairs, exclude)
        self.parameters = [parameter for _, parameter in pairs]
        # What is exchanged of complex parameters are pairs of real numbers.
        exchanged = [real(p.detach()) if p.is_complex() else p for p in self.parameters]
        if isinstance(compressor, SummedCompressor):  # costs nothing extra, so that no tensor is too small for it
            dimensions = min_numel = 0
        else:  # biases and the like are not worth it; but where all parameters are flat vectors, these are the model
            dimensions = 2 if any(p.dim() > 1 for p in self.parameters) else 1
        self.compressed = [
            p.is_floating_point()
            and p.dim() >= dimensions
            and p.numel() >= max(min_numel, 1)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
            for name, p in pairs
        ]
        named = zip(pairs, exchanged, self.compressed)
        self.slots = [
            Slot(Parameter(name, index, tensor.shape, seed, compressed, tensor), memory=memory)
            for index, ((name, _), tensor, compressed) in enumerate(named)
        ]
        self.index_of = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        self._next: dict[int, int] = {}  # whose hook came after whose
        self._last = -1

    def identify(self, gradient: Tensor) -> int:
        """The index of the parameter whose `grad` this tensor is. Raises for tensors that are no gradient."""
        index = self._next.get(self._last, -1)  # hooks fire in much the same order every step
        if index < 0 or self.parameters[index].grad is not gradient:
            index = next((i for i, p in enumerate(self.parameters) if p.grad is gradient), -1)
        if index < 0:
            raise self._unknown(gradient)
        self._next[self._last] = index
        self._last = index
        return index

    def describe(self) -> list[tuple[str, list[int], str]]:
        return [(slot.name, list(slot.parameter.shape), str(p.dtype)) for slot, p in zip(self.slots, self.parameters)]

    def _unknown(self, tensor: Tensor) -> Exception:
        if any(parameter is tensor for parameter in self.parameters):
            return NotImplementedError(
                "op=hvd.Adasum reduces parameters, not gradients, and cannot carry compressed ones: "
                "use op=hvd.Average or op=hvd.Sum"
            )
        return ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is not the gradient of any parameter of this compression. Bind "
            "it to all parameters of the optimizer, Compression...(model.named_parameters()), and leave "
            "sparse_as_dense=False: sparse gradients pass uncompressed."
        )


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, a view, as they are exchanged; all else as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def parameters_of_optimizer(optimizer: torch.optim.Optimizer) -> NamedParameters:
    """Its parameters, named by their places, alike on every rank: for a compression that is passed unbound."""
    groups = enumerate(optimizer.param_groups)
    return [(f"{g}.{i}", p) for g, group in groups for i, p in enumerate(group["params"])]


def calling_optimizer(compression: object) -> torch.optim.Optimizer | None:
    """The optimizer that was given `compression` and is calling it: Horovod's does not introduce itself.

    Its method is among the calls under way. None if something else calls.
    """
    for caller in callers():
        if isinstance(caller, torch.optim.Optimizer) and getattr(caller, "_compression", None) is compression:
            return caller
    return None


def _check(pairs: Sequence[tuple[str, Tensor]], exclude: Collection[str]) -> None:
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor) for pair in pairs):
        raise ValueError("named_parameters must be (name, parameter) pairs, such as model.named_parameters()")
    if not pairs:
        raise ValueError(
            "named_parameters has no (name, parameter) pairs. Pass model.named_parameters(), and call it anew for "
            "every use: a generator can be read only once."
        )
    names = [name for name, _ in pairs]
    seen: set[str] = set()
    if twice := [name for name in names if name in seen or seen.add(name)]:  # type: ignore[func-returns-value]
        raise ValueError(f"named_parameters names more than one parameter {', '.join(twice)}")
    names_of: dict[int, str] = {}
    for name, parameter in pairs:
        if (first := names_of.setdefault(id(parameter), name)) != name:
            raise ValueError(f"one parameter is under two names, {first!r} and {name!r}: leave out one of them")
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude={pattern!r} matches no parameter; their names are {', '.join(names)}")
