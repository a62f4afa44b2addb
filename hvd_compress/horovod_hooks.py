"""Horovod's side of a compression: `compress` for every gradient, `decompress` for what Horovod has added up.

Where Horovod can add what is sent, it gets that. Else it gets a carrier: a 1, which comes back as 1 from an average and
as the number of ranks from a sum, and a mark, by which sets of ranks are told apart; the gradient travels by itself.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .agreement import BYTES, agree, mismatch
from .anchor import anchored
from .binding import calling_optimizer
from .compressors import SummedCompressor
from .engine import Engine, Ticket
from .paced_engine import PacedEngine
from .session import CLOSING, NONE, Session
from .step_check import GradientChangedError, Taken, advise, called_by_grad_scaler, came_too_often, problem_of
from .transports.base import Transport

_ALIKE = (
    "Freeze and unfreeze parameters on every rank between the same two steps; give every rank a gradient of the same "
    "layout, dense or sparse, for each parameter, and change gradients after optimizer.synchronize() alone."
)
_UNPACED_STEPS = 1000  # after one in which some rank alone had no gradient for a parameter
_PATIENCE_SECONDS = 5.0  # for the other ranks, where an error of this one is certain


@dataclass(frozen=True)
class _AddedUp:
    """Context of a tensor that Horovod itself adds up: how the gradient comes of it."""

    compressor: SummedCompressor
    gradient: Tensor
    version: int  # of the gradient, when the summand was made of it
    size: int  # of the set of ranks
    anchor: Tensor


@dataclass(frozen=True)
class _Carried:
    """Context of a carrier, while the gradient travels by itself."""

    ticket: Ticket
    gradient: Tensor
    anchor: Tensor


class HorovodHooks:
    """Of one compression, which has connected to its ranks where it is bound."""

    def __init__(self, compression: Session) -> None:
        self._compression = weakref.ref(compression)
        self.taken = Taken()  # in this step
        self._carriers: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # to copy
        self._mark = self.mean_mark = 0.0  # of this rank, and over the ranks
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = _nobody  # a weak reference
        self._watches_accumulation = False
        self._paced_from = 0  # the step

    @property
    def compression(self) -> Session:
        compression = self._compression()
        assert compression is not None, "who calls holds it"
        return compression

    def compress_unbound(self, compressor: SummedCompressor, tensor: Tensor) -> tuple[Tensor, Any]:
        """A gradient that is nothing but a summand, whosever it is."""
        self.taken.add(-1, tensor)
        size = _horovod_size(self.compression.options.process_set)
        summand, anchor = anchored(compressor.summand(tensor, size))
        return summand, _AddedUp(compressor, tensor, tensor._version, size, anchor)

    def compress(self, engine: Engine, tensor: Tensor) -> tuple[Tensor, Any]:
        """Start the exchange of a gradient, and return what Horovod is to add up."""
        compression = self.compression
        index = compression.binding.identify(tensor)
        compression.begin()
        self.taken.add(index, tensor)
        # One rank, as of an elastic job or a process set, has nothing to send, but still needs a momentum.
        alone = compression.size == 1 and not compression.compressor.replaces
        compressor = NONE if alone else compression.compressor_of(index, tensor)
        if isinstance(compressor, SummedCompressor) and not compression.delays:
            summand, anchor = anchored(compression.summand(index, compressor, tensor))
            return summand, _AddedUp(compressor, tensor, tensor._version, compression.size, anchor)
        frozen = not compression.parameters[index].requires_grad  # then Horovod reduces zeros
        ticket = compression.start(index, compressor, tensor, in_place=True, frozen=frozen)
        carrier, anchor = anchored(self._carrier(tensor))
        ticket.sent_bytes += carrier.numel() * carrier.element_size()
        return carrier, _Carried(ticket, tensor, anchor)

    def _carrier(self, tensor: Tensor) -> Tensor:
        """Of the gradient's own type: the tensors of one of Horovod's groups must not differ in it."""
        kind = tensor.dtype, tensor.device
        if kind not in self._carriers:
            dtype = NONE.summand(tensor[:0]).dtype
            self._carriers[kind] = torch.tensor([1.0, self._mark], dtype=dtype, device=tensor.device)
        return self._carriers[kind].clone()

    def decompress(self, engine: Engine | None, tensor: Tensor, context: Any) -> Tensor:
        """Finish the exchange, and return the aggregated gradient."""
        compression = self.compression
        if self.taken.gradients:
            self._close_step(engine)
        if isinstance(context, _Carried):
            ticket, gradient = context.ticket, context.gradient
            assert engine is not None
            if not compression.delays:
                engine.finish(ticket)  # first: it may know better than the carrier what is wrong
            return compression.finish(ticket, gradient, average=self.is_average(tensor))
        compression.added_up(tensor)
        if context is None:  # Horovod adds up sparse gradients without asking compress
            return tensor
        gradient = context.gradient
        if gradient._version != context.version:
            raise GradientChangedError.of([f"a parameter of shape {tuple(gradient.shape)}"])
        restored: Tensor = context.compressor.restore(tensor, gradient.shape, gradient.dtype, context.size)
        return restored

    def _close_step(self, engine: Engine | None) -> None:
        """All gradients of the step are handed in: have the ranks compare what they have seen of it.

        Raises on every rank: MismatchError where they differ, ValueError for an optimizer that this cannot serve,
        GradientChangedError for gradients that were changed meanwhile.
        """
        compression = self.compression
        taken, self.taken = self.taken, Taken()
        by_scaler = called_by_grad_scaler()
        if isinstance(compression.compressor, SummedCompressor) or not isinstance(engine, PacedEngine):
            if by_scaler:
                raise GradientChangedError.by_scaler()
            return
        step, binding = compression.steps, compression.binding
        changed = [compression.names[index] for index in taken.changed()]
        problem = problem_of(self._optimizer(), compression.compressor, binding)
        trained = bytes(p.requires_grad for p in compression.parameters)
        exchange = agree(
            compression.rank,
            (step, sorted(taken.gradients), changed, trained, problem),
            lambda: taken.states(binding, problem, step),
            mismatch(step, _ALIKE),
            habits=sorted(taken.late),
        )
        ticket = engine.submit(len(compression.slots) + CLOSING, exchange)
        engine.put_first(ticket)
        compression.telemetry.agreement_bytes += BYTES
        if changed or problem or by_scaler:
            engine.try_finish(ticket, _PATIENCE_SECONDS)
            if by_scaler:
                raise GradientChangedError.by_scaler()
            raise GradientChangedError.of(changed) if changed else ValueError(problem)
        alike = engine.finish(ticket)
        if not (compression.options.overlap and alike is not None and bool(alike)):
            self._paced_from = step + _UNPACED_STEPS
        engine.pace(step >= self._paced_from)

    def is_average(self, carrier: Tensor) -> bool:
        """Whether Horovod averaged or summed; raises RuntimeError if it did neither, or over other ranks than ours."""
        one, mark = carrier.tolist()
        size = self.compression.size
        rounding, counted = 0.005, size
        if carrier.dtype == torch.float16:  # added up one by one its error grows, and from 2048 on a 1 is lost
            rounding, counted = 0.005 + size / 4096, min(size, 2048)
        if abs(mark - one * self.mean_mark) < rounding * one * self.mean_mark:
            if 0.75 * counted / size < one < 1.25:
                return True
            if 0.75 * counted < one < 1.25 * size:
                return False
        raise RuntimeError(
            "Horovod did not sum or average over the ranks of this compression. Use op=hvd.Average or op=hvd.Sum, and "
            "give the optimizer and the compression the same process_set="
        )

    def forget_step(self) -> None:
        """The ranks have changed: what was taken is of those that were."""
        self.taken = Taken()

    # Once

    def find_optimizer(self) -> torch.optim.Optimizer | None:
        """The one whose gradients these are, if it is among the callers: it is watched from now on."""
        optimizer = calling_optimizer(self.compression)
        if optimizer is not None:
            self._optimizer = weakref.ref(optimizer)
            _watch_steps()
        return optimizer

    def attach(self, transport: Transport, members: Sequence[int], optimizer: torch.optim.Optimizer | None) -> None:
        """Start on these ranks; members: their numbers among all of Horovod's."""
        compression = self.compression
        if not self._watches_accumulation:
            self._watches_accumulation = True
            self._watch_accumulation()
        if optimizer is not None and transport.size > 1:
            advise(optimizer, compression.compressor, transport.rank)
        marks = [mark(member) for member in members]
        self._mark, self.mean_mark = marks[transport.rank], sum(marks) / len(marks)
        self._carriers.clear()

    def _watch_accumulation(self) -> None:
        """See a gradient that is added to when it is under way before Horovod does, whose error names but one of two
        causes."""
        mine = weakref.ref(self)

        def came(index: int, _: Tensor) -> None:
            hooks = mine()
            if hooks is not None and index in hooks.taken.gradients:
                passes = getattr(hooks._optimizer(), "backward_passes_per_step", 1)
                raise came_too_often(hooks.compression.names[index], passes)

        for index, parameter in enumerate(self.compression.parameters):
            if parameter.requires_grad and parameter.is_leaf:
                parameter.register_post_accumulate_grad_hook(functools.partial(came, index))


def _nobody() -> None:
    """In place of a reference to an optimizer that is not known."""


@functools.cache
def _watch_steps() -> None:
    """Let optimizers tell their compressions that a step was made, so that residuals follow it."""

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        compression = getattr(optimizer, "_compression", None)
        if isinstance(compression, Session):
            compression.step_made()

    register_optimizer_step_post_hook(stepped)


def mark(rank: int) -> float:
    """A small number, exact in float16, whose mean over one set of ranks is hardly that over another."""
    return 1.0 + pow(7, rank, 97) / 64


def _horovod_size(process_set: Any) -> int:
    hvd = sys.modules.get("horovod.torch")
    if hvd is None or not hvd.is_initialized():
        return 1
    return int(hvd.size() if process_set is None else process_set.size())
