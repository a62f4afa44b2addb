"""One forward pass: which function runs, and what is kept of the tensors that it saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from .. import kernels
from .kept import Handle, Kept, Mask, Nothing, Quantised, flattened, is_dense, is_plain, without_loss
from .precision import Precision
from .rules import INSIDE, LINEAR, POSITIVE, RULES, SHAPE

_QUANTISED = (torch.float32, torch.float16, torch.bfloat16)
_STATISTIC = 8  # a tensor so many times smaller than what its function was given is one, such as the means of rows


@dataclass(frozen=True)
class Saved:
    """What a forward pass has kept for backward, in bytes, of all tensors or of one layer."""

    dense_bytes: int  # without compression: of the memory that the tensors lie in, each counted once
    saved_bytes: int

    @property
    def ratio(self) -> float:
        return self.dense_bytes / self.saved_bytes if self.saved_bytes else math.nan


@dataclass
class _Call:
    """A function of RULES that is under way."""

    rule: str
    bounds: tuple[float, float]  # of INSIDE
    parameters: frozenset[tuple[int, torch.dtype]]  # elements and type of those among its arguments
    largest: int  # elements of the largest argument

    def copies(self, tensor: Tensor) -> bool:
        """Whether it may be what autocast has made of a parameter."""
        return any(tensor.numel() == numel and tensor.dtype != dtype for numel, dtype in self.parameters)


@dataclass
class _Memory:
    """What saved tensors lie in."""

    reference: StorageWeakRef
    nbytes: int
    counted: bool = False  # among what would be kept without compression
    stays: bool = False  # since some function needs it as it is; then others need no copy


class Pass(TorchFunctionMode):
    """Watches a model's forward from its call to its return.

    where: names of the modules whose forward is under way, outermost first. key: of the random numbers by which the
        tensor of this number is rounded.
    """

    def __init__(self, model: nn.Module, precision: Precision, where: list[str], key: Callable[[int], int]) -> None:
        super().__init__()
        self._precision, self._where, self._key = precision, where, key
        self._call: _Call | None = None
        self._own = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._known: dict[Any, tuple[StorageWeakRef, list[Kept]]] = {}  # by place in memory
        self._memory: dict[int, _Memory] = {}  # by address
        self._bytes: dict[str, list[int]] = {}  # dense and saved, by layer
        self._count = 0  # of quantised tensors
        self.elements: dict[str, list[int]] = {}  # of each tensor that was quantised by the rule linear, by layer

    def saved(self) -> Saved:
        return Saved(*(sum(sizes[place] for sizes in self._bytes.values()) for place in range(2)))

    def by_layer(self) -> dict[str, Saved]:
        return {layer: Saved(*sizes) for layer, sizes in self._bytes.items()}

    def over(self) -> None:
        """The forward pass has ended."""
        self._known.clear()
        self._memory.clear()

    # What runs

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        name = getattr(function, "__name__", "")
        rule = RULES.get(name)
        if name == "multi_head_attention_forward" and options.get("need_weights", True):
            rule = None  # it calls softmax
        if rule is None or self._call is not None:
            return function(*arguments, **options)
        given = [*_tensors(arguments), *_tensors(options.values())]
        own = frozenset((t.numel(), t.dtype) for t in given if is_plain(t) and _address(t) in self._own)
        low, high = (0.0, 6.0) if name == "relu6" else (-1.0, 1.0)
        bounds = float(options.get("min_val", low)), float(options.get("max_val", high))
        largest = max((tensor.numel() for tensor in given), default=0)
        self._call = _Call(rule, bounds, own, largest)
        try:
            return function(*arguments, **options)
        finally:
            self._call = None

    # What is kept

    @torch.no_grad()
    def pack(self, tensor: Tensor) -> Any:
        """Called by autograd for every tensor that it saves: what it holds in place of it."""
        if not is_plain(tensor) or tensor.numel() == 0 or _address(tensor) in self._own:
            return tensor
        tensor = tensor.detach()
        sizes, memory = self._bytes.setdefault(self._where[-1], [0, 0]), self._memory_of(tensor)
        if not memory.counted:
            memory.counted = True
            sizes[0] += memory.nbytes
        kept = None if memory.stays else self._keep(tensor)
        if kept is None:
            sizes[1] += 0 if memory.stays else memory.nbytes
            memory.stays = True
            return tensor
        if not kept.counted:
            kept.counted = True
            sizes[1] += kept.nbytes
        return Handle(kept, tensor)

    def _keep(self, tensor: Tensor) -> Kept | None:
        call, layer = self._call, self._where[-1]
        if (
            tensor.numel() < self._precision.min_numel or 0 in tensor.stride()
        ):  # one that is expanded takes less already
            return None
        if not tensor.is_floating_point():
            return self._once(tensor, "without loss", without_loss)
        if call is None or tensor.dtype not in _QUANTISED:
            return None
        if tensor.numel() * _STATISTIC <= call.largest or call.copies(tensor):
            return None
        if not (bits := self._precision.bits_of(layer, call.rule)):
            return None
        if call.rule == SHAPE:
            return self._once(tensor, SHAPE, lambda _: Nothing())
        if call.rule == POSITIVE:  # leaky ReLU wants to know what is negative
            return self._once(tensor, POSITIVE, lambda values: Mask(~(values <= 0), -1, 1))
        if call.rule == INSIDE:
            low, high = call.bounds
            inside = (low + high) / 2
            return self._once(tensor, f"{INSIDE} {call.bounds}", lambda v: Mask((v > low) & (v < high), high, inside))
        return self._once(tensor, "", lambda values: self._quantised(values, bits, call.rule), at_least=bits)

    def _quantised(self, values: Tensor, bits: int, rule: str) -> Kept | None:
        payload = torch.empty(kernels.affine_bytes(values.numel(), bits), dtype=torch.uint8, device=values.device)
        if rule == LINEAR:
            self.elements.setdefault(self._where[-1], []).append(values.numel())
        self._count += 1
        if kernels.of(values).affine_encode(values, bits, self._key(self._count), payload) == kernels.NOT_FINITE:
            return None  # so that whoever looks for what overflowed in the gradients finds it there
        return Quantised(payload, bits)

    def _once(self, tensor: Tensor, kind: str, keep: Callable[[Tensor], Kept | None], at_least: int = 0) -> Kept | None:
        """What another function has left of this tensor already, in as many bits, or what `keep` makes of its elements.

        By its place in memory, as long as that is the same memory: other tensors come to lie where one was freed.
        """
        layout = None if is_dense(tensor) else (tensor.shape, tensor.stride())
        place = (_address(tensor), tensor.storage_offset(), tensor.numel(), tensor._version, tensor.dtype, kind, layout)
        storage, known = self._known.get(place, (None, []))
        if storage is None or storage.expired():
            known = []
            self._known[place] = StorageWeakRef(tensor.untyped_storage()), known
        for kept in known:
            if kept.bits >= at_least:
                return kept
        if (new := keep(flattened(tensor))) is not None:
            known.append(new)
        return new

    def _memory_of(self, tensor: Tensor) -> _Memory:
        address, storage = _address(tensor), tensor.untyped_storage()
        memory = self._memory.get(address)
        if memory is None or memory.reference.expired():
            memory = self._memory[address] = _Memory(StorageWeakRef(storage), storage.nbytes())
        return memory


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """Those among arguments, and in lists of them."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            found += [one for one in argument if isinstance(one, Tensor)]
        elif isinstance(argument, Tensor):
            found.append(argument)
    return found
