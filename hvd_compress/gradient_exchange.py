"""Which gradient of an optimizer is exchanged, when, and in which layout: what the ranks have agreed on decides."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import disagreement
from .binding import real
from .engine import Ticket
from .facts import Agreement, Fact, Facts, General
from .gradient_compression import GradientCompression
from .log import log
from .step_check import MORE_PASSES, came_too_often


@dataclass
class _Taken:
    """A gradient as it was when its hook fired last."""

    gradient: Tensor
    version: int
    fired: int  # backward passes that it is of

    def is_changed(self, gradient: Tensor) -> bool:
        return gradient is not self.gradient or gradient._version != self.version


@dataclass
class _Running:
    """A gradient whose exchange has begun."""

    ticket: Ticket
    gradient: Tensor


class GradientExchange:
    """Hands the gradients of the bound parameters to the engine, and gives the parameters what comes of them.

    A parameter whose gradient is known to be dense on all ranks is handed in by its hook, during backward. All others
    wait for `synchronize`, in the order in which their hooks fired: those that had no gradient so far on any rank,
    those with sparse ones, and those whose hook fires several times in a backward pass.

    members: indices of the parameters that the optimizer has.
    scaler: the GradScaler that the optimizer's steps are made by; it says in which unit the next gradients are.
    """

    def __init__(
        self, compression: GradientCompression, agreement: Agreement, *, average: bool, backward_passes: int
    ) -> None:
        self.compression = compression
        self.agreement = agreement
        self.average = average
        self.members: set[int] = set()
        self.scaler: weakref.ref[Any] | None = None
        self._backward_passes = backward_passes
        self._dense: set[int] = set()
        self._often: set[int] = set()
        self._taken: dict[int, _Taken] = {}  # since the last synchronization; whose hook fired last comes last
        self._running: dict[int, _Running] = {}
        self._thrown: dict[int, _Running] = {}  # of gradients that are gone, to be finished all the same

    def take(self, index: int) -> None:
        """Called by a hook: the parameter has a gradient, of one backward pass more.

        Raises RuntimeError when it was handed in already, and was added to since.
        """
        parameter = self.compression.parameters[index]
        gradient, last = parameter.grad, self._taken.get(index)
        if self.compression.size == 1 or gradient is None:  # another hook may have used it up
            return
        grown = last is not None and (gradient is last.gradient or gradient.grad_fn is not None)
        if index in self._running:
            if grown:
                raise came_too_often(self.compression.slots[index].name, self._backward_passes)
            self._throw()  # model.zero_grad() came in between
        fired = last.fired + 1 if last is not None and grown else 1
        eager = index in self._dense and index not in self._often and not self._thrown
        if eager and fired == self._backward_passes:
            if gradient.is_sparse:
                parameter.grad = gradient = gradient.to_dense()
            self._hand_in(index, gradient)
        self._taken.pop(index, None)
        self._taken[index] = _Taken(gradient, gradient._version, fired)

    def throw_away(self) -> None:
        """Called by zero_grad(): gradients that were not synchronized are to have no effect."""
        for index in self._running:  # whose memory may yet be written to
            parameter = self.compression.parameters[index]
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
        self._throw()
        self._taken.clear()

    def synchronize(self, *, fault: str | None = None, unscaled: bool = False, again: bool = False) -> None:
        """Combine gradients over the ranks.

        fault: what is wrong with this rank's optimizer.
        unscaled: this rank's gradients were changed, in a way that their version counters do not tell.
        again: only gradients whose hook fired since the last time; the others are combined already.

        Raises, on all ranks or on none, ValueError for a fault, MismatchError when the ranks train other parameters,
        and RuntimeError for gradients that were changed after their hook had fired.
        """
        if self.compression.size == 1:
            if fault:
                raise ValueError(fault)
            return
        mine = self._facts(again)
        mine.note_general(General.FAULT, bool(fault))
        for index in self._taken if unscaled else ():
            mine.note(index, Fact.CHANGED)
        agreed = self.agreement.put_together(mine)
        names = self.compression.names
        error = disagreement.find(self.agreement, mine, agreed, names, fault)
        if error or agreed.general(General.THREW):
            self._drain(agreed.where(Fact.HANDED_IN))
        if error:
            self._taken.clear()
            raise error
        self._learn(agreed)
        self._hand_in_rest(agreed)
        self._finish()

    def _throw(self) -> None:
        self._thrown.update(self._running)
        self._running.clear()

    def _hand_in(self, index: int, gradient: Tensor) -> None:
        if not self._running and not self._thrown and self.scaler and (scaler := self.scaler()) is not None:
            self.compression.loss_scale = scaler.get_scale()
        ticket = self.compression.submit(index, real(gradient.resolve_conj()), in_place=True)
        self._running[index] = _Running(ticket, gradient)

    def _facts(self, again: bool) -> Facts:
        parameters = self.compression.parameters
        for index in [index for index in self._taken if parameters[index].grad is None]:  # by model.zero_grad()
            del self._taken[index]
            if index in self._running:
                self._throw()
        facts = Facts(len(parameters))
        for index, parameter in enumerate(parameters):
            self._note(facts, index, parameter, again)
        facts.note_general(General.THREW, bool(self._thrown))
        facts.note_general(General.KEPT, bool(self._running))
        return facts

    def _note(self, facts: Facts, index: int, parameter: Tensor, again: bool) -> None:
        member = index in self.members
        facts.note(index, (Fact.TRAINED if parameter.requires_grad else Fact.FROZEN) if member else Fact.ABSENT)
        if index in self._running or index in self._thrown:
            facts.note(index, Fact.HANDED_IN)
        gradient, taken = parameter.grad, self._taken.get(index)
        if gradient is None or not (taken or (member and parameter.requires_grad and not again)):
            return
        facts.note(index, *((Fact.SPARSE, gradient.sparse_dim()) if gradient.is_sparse else (Fact.DENSE, 1)))
        if taken and taken.fired > self._backward_passes:
            facts.note(index, Fact.OFTEN)
        overwritten = index in self._thrown and gradient is self._thrown[index].gradient
        if overwritten or (taken and taken.is_changed(gradient)):
            facts.note(index, Fact.CHANGED)

    def _learn(self, agreed: Facts) -> None:
        """Whose gradients hooks may hand in from now on."""
        often = set(agreed.where(Fact.OFTEN)) - self._often
        if often and self.agreement.transport.rank == 0:
            names = ", ".join(self.compression.slots[index].name for index in sorted(often))
            log.info(
                "gradients of %s came more than backward_passes_per_step=%d times before step(): from now on they are "
                "exchanged after backward, not during it. %s",
                names,
                self._backward_passes,
                MORE_PASSES,
            )
        self._often |= often
        self._dense.update(agreed.where(Fact.DENSE))

    def _hand_in_rest(self, agreed: Facts) -> None:
        """All that any rank has a gradient of, those first whose hooks fired here, in that order."""
        wanted = set(agreed.where(Fact.DENSE)) | set(agreed.where(Fact.SPARSE))
        for index in [*self._taken, *sorted(wanted - self._taken.keys())]:
            if index not in self._running:
                sparse_dimensions = 0 if index in self._dense else agreed.of(index, Fact.SPARSE)
                self._hand_in(index, _laid_out(self.compression.parameters[index], sparse_dimensions))

    def _finish(self) -> None:
        for index, running in self._running.items():
            total = self._finished(running)
            parameter = self.compression.parameters[index]
            parameter.grad = torch.view_as_complex(total) if parameter.is_complex() else total
        for index, gradient in self.compression.delayed_of_others().items():
            self.compression.parameters[index].grad = gradient
        self._running.clear()
        self._taken.clear()

    def _drain(self, handed_in: Sequence[int]) -> None:
        """Finish what any rank has begun, and forget it."""
        self._throw()
        for index in handed_in:
            if index not in self._thrown:
                self._hand_in(index, torch.zeros_like(self.compression.parameters[index]))
        for running in (*self._thrown.values(), *self._running.values()):
            self._finished(running)
        self._thrown.clear()
        self._running.clear()
        self.compression.discard()

    def _finished(self, running: _Running) -> Tensor:
        return self.compression.finish(running.ticket, real(running.gradient.resolve_conj()), average=self.average)


def _laid_out(parameter: Tensor, sparse_dimensions: int) -> Tensor:
    """The gradient of `parameter`, zeros if it has none, in the layout that all ranks agreed on; 0 for dense."""
    gradient = parameter.grad
    if gradient is not None:
        return gradient.to_dense() if gradient.is_sparse and not sparse_dimensions else gradient
    if not sparse_dimensions:
        return torch.zeros_like(parameter, layout=torch.strided)
    indices = torch.empty((sparse_dimensions, 0), dtype=torch.int64, device=parameter.device)
    values = torch.empty((0, *parameter.shape[sparse_dimensions:]), dtype=parameter.dtype, device=parameter.device)
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
