"""The optimizer that applies gradients combined over the ranks: what it adds to the class of the one it wraps."""

from __future__ import annotations

import numbers
import sys
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .gradient_compression import GradientCompression
from .gradient_exchange import GradientExchange


class DistributedMixin(torch.optim.Optimizer):
    """Comes before the class of the wrapped optimizer, in a class that hvd_compress.mpi.DistributedOptimizer makes."""

    compression: GradientCompression

    def _distribute(self, optimizer: torch.optim.Optimizer, compression: GradientCompression) -> None:
        """Take over what `optimizer` has; raises ValueError for parameters that the compression does not know."""
        # A scheduler may have wrapped the instance's step(), around the step that does not synchronize.
        vars(self).update({name: value for name, value in vars(optimizer).items() if name != "step"})
        self.compression = compression
        self._wrapped = weakref.ref(optimizer)
        self._index_of = {id(parameter): index for index, parameter in enumerate(compression.parameters)}
        for group in self.param_groups:
            self._check_named(group["params"])
        self._layout = self._indices()

    def _start(self, exchange: GradientExchange) -> None:
        self._exchange = exchange
        self._hooks: dict[int, Any] = {}  # by index
        self._should_synchronize = True
        self._synchronized = False  # and no step was made since
        self._by_scaler = False  # a GradScaler had it synchronized
        self._look_over_groups()

    # Groups

    def _indices(self) -> list[list[int]]:
        """By group and place; -1 for parameters that the compression does not know."""
        return [[self._index_of.get(id(parameter), -1) for parameter in group["params"]] for group in self.param_groups]

    def _check_named(self, parameters: Iterable[Tensor]) -> None:
        for place, parameter in enumerate(parameters):
            if id(parameter) not in self._index_of:
                raise ValueError(
                    f"parameter {place} of a group, of shape {tuple(parameter.shape)}, is not in the named_parameters "
                    "of the compression: pass all of model.named_parameters() to both, later ones included, or make "
                    "the distributed optimizer anew"
                )

    def _look_over_groups(self) -> str | None:
        """Watch all parameters that are trained, those unfrozen lately too; returns what is wrong with them."""
        layout = self._indices()
        self._exchange.members = {index for indices in layout for index in indices if index >= 0}
        for index in self._exchange.members - self._hooks.keys():
            parameter = self.compression.parameters[index]
            if parameter.requires_grad:
                self._hooks[index] = parameter.register_post_accumulate_grad_hook(_Hook(self._exchange, index))
        for number, (known, found) in enumerate(zip(self._layout, layout)):
            if -1 in found:
                place = found.index(-1)
                name = f" {self.compression.slots[known[place]].name!r}" if place < len(known) else ""
                return (
                    f"the parameter{name} of group {number} was replaced by one that is not in the named_parameters of "
                    "the compression. Change the parameter in place, or make the distributed optimizer anew."
                )
        self._layout = layout
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        given = param_group["params"]
        pairs = [given] if isinstance(given, Tensor) else list(given)
        self._check_named(pair[1] if isinstance(pair, tuple) else pair for pair in pairs)
        super().add_param_group(param_group)
        self._look_over_groups()

    # Steps

    def synchronize(self) -> None:
        """Finish combining gradients over the ranks; afterwards every `p.grad` is the combined one.

        Parameters that no rank has a gradient of keep None. Raises, on every rank, RuntimeError for gradients that
        were changed since backward(), ValueError for parameters that were replaced, and MismatchError where a parameter
        is frozen on some ranks only.
        """
        self._combine(again=False)

    def _combine(self, *, again: bool) -> None:
        scaler = self._exchange.scaler() if self._exchange.scaler else None
        # GradScaler.unscale_ leaves this behind, but no mark on the gradients' version counters.
        unscaled = not again and scaler is not None and bool(scaler._found_inf_per_device(self))
        self._exchange.synchronize(fault=self._look_over_groups(), unscaled=unscaled, again=again)
        self._synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Generator[None, None, None]:
        """For a `step()` after `synchronize()`: it is not to synchronize again."""
        self._should_synchronize = False
        try:
            yield
        finally:
            self._should_synchronize = True

    def step(self, closure: Callable[[], Any] | None = None, *arguments: Any, **options: Any) -> Any:
        """Combine gradients over the ranks, unless skip_synchronize() says they are, and apply them.

        closure: every one of its evaluations is combined over the ranks, and so is the loss that it returns.
        """
        if closure is None and self._should_synchronize:
            if self._synchronized and not self._by_scaler:
                warnings.warn(
                    "step() synchronizes again after synchronize(): call it inside optimizer.skip_synchronize()",
                    stacklevel=2,
                )
            self._combine(again=self._synchronized)
        loss = super().step(*(self._over_ranks(closure),) * bool(closure), *arguments, **options)
        self.compression.step_made()
        self._synchronized = self._by_scaler = False
        if (wrapped := self._wrapped()) is not None:
            wrapped._opt_called = True  # type: ignore[attr-defined]  # for a scheduler that was made with it
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # step() of the wrapped class is, and calls the hooks

    def _over_ranks(self, closure: Callable[[], Any] | None) -> Callable[[], Any]:
        if closure is not None and self.compression.options.delay:
            raise ValueError(
                "step(closure) needs the gradient of the loss that the closure returns, and delay=1 gives that of the "
                "step before: leave out one of them"
            )

        def evaluate() -> Any:
            assert closure is not None
            with torch.enable_grad():
                loss = closure()
            if not self._should_synchronize:
                return loss
            self._combine(again=False)
            self.compression.step_made()  # an optimizer may go by several gradients in one step
            self.compression.settle()
            self._synchronized = False
            return self._combined_loss(loss)

        return evaluate

    def _combined_loss(self, loss: Any) -> Any:
        if self.compression.size == 1:
            return loss
        is_tensor = isinstance(loss, Tensor)
        loss = loss.detach() if is_tensor else loss
        is_number = loss.numel() == 1 and not loss.is_complex() if is_tensor else isinstance(loss, numbers.Real)
        total = self._exchange.agreement.sum(float(loss) if is_number else None)
        if total is None:
            return loss
        value = total / (self.compression.size if self._exchange.average else 1)
        return torch.full_like(loss, value) if is_tensor else value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of any optimizer. Gradients that no step was made with leave the residuals as they were."""
        self._exchange.throw_away()
        if self._synchronized:
            self.compression.discard()
        self._synchronized = self._by_scaler = False
        super().zero_grad(set_to_none)

    # GradScaler

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether step() unscales gradients itself: as the wrapped optimizer has it.

        GradScaler.step asks this before it touches a gradient, the only word it has with us until then. What it does
        next, look for Inf and unscale, is right for combined gradients alone, and then the same on every rank.
        """
        if (scaler := _scaler_that_steps()) is not None:
            self._exchange.scaler = weakref.ref(scaler)
            if self._should_synchronize:
                self._by_scaler |= not self._synchronized
                self._combine(again=self._synchronized)
            elif self.compression.loss_scale is None:
                self.compression.loss_scale = scaler.get_scale()
        own = vars(self).get("_step_supports_amp_scaling")
        return bool(getattr(super(), "_step_supports_amp_scaling", False) if own is None else own)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        vars(self)["_step_supports_amp_scaling"] = value

    # State

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load in place: whoever holds the groups or the state, as a scheduler that was made before, goes on so."""
        groups, held = self.param_groups, self.state
        super().__setstate__(state)
        if self.param_groups is not groups:
            groups[:] = self.param_groups
            self.param_groups = groups
        if self.state is not held:
            loaded = dict(self.state)
            held.clear()
            held.update(loaded)
            self.state = held

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a distributed {type(self).__name__} is tied to its ranks and cannot be copied or pickled: save "
            "optimizer.state_dict(), and load it into one that is made anew"
        )


class _Hook:
    """Hands a ready gradient to the exchange, as long as there is one."""

    def __init__(self, exchange: GradientExchange, index: int) -> None:
        self._exchange, self._index = weakref.ref(exchange), index

    def __call__(self, _: Tensor) -> None:
        if (exchange := self._exchange()) is not None:
            exchange.take(self._index)


def _scaler_that_steps() -> Any:
    """The GradScaler whose step() reads the attribute that calls this; None for any other reader."""
    reader = sys._getframe(2)
    owner = reader.f_locals.get("self")
    is_scaler = reader.f_code.co_name == "step" and hasattr(owner, "unscale_") and hasattr(owner, "get_scale")
    return owner if is_scaler else None
