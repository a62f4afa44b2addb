"""One model's exchange over many steps: its parameters, the engine, and the state that outlives a step."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from . import environment
from .adaptive import Controller
from .agreement import BYTES, agree, mismatch
from .binding import Binding, real
from .checkpoint import Progress, State, check_residuals
from .compressors import (
    Compressor,
    NoneCompressor,
    Slot,
    SparseGatherer,
    Step,
    SummedCompressor,
    relative_error,
)
from .compressors.gradients import max_abs
from .engine import Engine, Ticket, cut
from .late import Late
from .log import log
from .memory import DELAYED, FRAMES, POSITIONS, SUMS, ErrorFeedback, Held, added, merged, storage_bytes
from .options import Options
from .requests import Total
from .routing import Routing
from .states import gather
from .telemetry import Telemetry, summary
from .transports.base import Transport

CONTROL, OPENING, CLOSING = range(3)  # indices after those of the parameters

BUCKET_BYTES = 8 << 20  # of gradients that travel together
NONE = NoneCompressor()
_SPARSE = SparseGatherer()

Method = TypeVar("Method", bound=Callable[..., Any])


def spanned(method: Method) -> Method:
    """A method of a Session that records how long it takes, if that is watched."""

    @functools.wraps(method)
    def recorded(self: Session, *arguments: Any, **options: Any) -> Any:
        if (spans := self.telemetry.spans) is None:
            return method(self, *arguments, **options)
        spans.begin()
        try:
            return method(self, *arguments, **options)
        finally:
            spans.end("python")

    return recorded  # type: ignore[return-value]


@dataclass
class _StepUnderWay:
    """What is known of it; dropped at its end."""

    begun: bool = False  # some gradient was handed in
    finished: bool = False  # some gradient is finished
    finite: bool = True  # no tensor was seen to be non-finite
    counted: bool = False  # telemetry knows of it
    applied: bool = False  # the optimizer has told that it made a step by these gradients
    opening: Ticket | None = None  # by which the ranks compare what decides the collectives
    frozen: dict[int, Slot] = field(default_factory=dict)  # of parameters that are frozen meanwhile
    looked_at: dict[int, dict[str, Any]] = field(default_factory=dict)  # by parameter: what telemetry is to record


class Session:
    """Exchanges the gradients of bound parameters by a compressor, step after step.

    A step ends when the first gradient is handed in after some were finished. Only then is it known whether all its
    tensors were finite on all ranks, and residuals change: all of them, or none.
    """

    def __init__(self, compressor: Compressor, options: Options) -> None:
        if options.delay and compressor.changes_meaning:
            raise ValueError(
                f"delay=1 is not possible with {compressor}, whose optimizer must know what it is given in this step: "
                "leave it out"
            )
        self.compressor = compressor
        self.options = options
        self.routing = Routing(compressor, options.topology, options.ranks_per_node)
        self.telemetry = Telemetry()
        self._state = State()
        self._late = Late(self.memory)
        self._binding: Binding | None = None
        self._engine: Engine | None = None
        self._now = _StepUnderWay()
        self._facts: Step | None = None  # that slots are given, until any of them changes
        self._sees_steps = False  # the optimizer tells when it has made a step
        self._traffic_is_told = False
        # Exchanges divide sums by what the last step asked for; the same on every rank, else their bits would differ.
        self._divisor = self._wanted_divisor = 1.0

    @property
    def bound(self) -> bool:
        return self._binding is not None

    @property
    def binding(self) -> Binding:
        return self._binding or self._refuse_unbound()

    def _refuse_unbound(self) -> NoReturn:
        raise ValueError(f"{self!r} does not know its parameters: call it with model.named_parameters()")

    @property
    def parameters(self) -> list[Tensor]:
        """As bound; the slot of a parameter has the same index."""
        return self.binding.parameters

    @property
    def slots(self) -> list[Slot]:
        return self.binding.slots

    @property
    def names(self) -> list[str]:
        """Of the parameters, as bound."""
        return [slot.name for slot in self.slots]

    @property
    def memory(self) -> ErrorFeedback:
        return self._state.memory

    @property
    def controller(self) -> Controller | None:
        """Of rates; what it sends goes under the index after the parameters'."""
        return self._state.controller

    @property
    def steps(self) -> int:
        """How many were made so far: the number of the present one, as its exchanges know it."""
        return self._state.steps

    @property
    def rank(self) -> int:
        """This rank; 0 before the first exchange."""
        return self._engine.transport.rank if self._engine else 0

    @property
    def attached(self) -> Transport | None:
        """What the gradients travel by; None before the first exchange."""
        return self._engine.transport if self._engine else None

    @property
    def size(self) -> int:
        """How many ranks take part; 1 before the first exchange."""
        return self._engine.transport.size if self._engine else 1

    # Ranks

    def attach(
        self,
        transport: Transport,
        make_engine: Callable[..., Engine] = Engine,
        *,
        compressed_only: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> Engine:
        """Exchange over `transport` from now on; `make_engine(transport, plan)` runs the exchanges.

        bucket_bytes: where the user has not said how much is to travel together.
        """
        everything = not compressed_only or self.compressor.takes_all
        plan = [index for index, slot in enumerate(self.slots) if everything or slot.parameter.compressed]
        sizes = {index: self.parameters[index].numel() * self.parameters[index].element_size() for index in plan}
        self.settle()
        self.detach()
        self._state.attach(transport.rank, transport.size)
        self._traffic_is_told = False
        self._divisor = self._wanted_divisor = 1.0
        for slot in self.slots:
            slot.step, slot.cache = Step(self._state.steps, transport.rank, transport.size), None
        buckets = cut(sizes, self.options.bucket_bytes or bucket_bytes)
        self.routing.attach(transport, buckets, self.slots)
        self._fold()
        # What is not of a parameter goes under the indices after the parameters'.
        buckets += [[len(self.slots) + extra] for extra in (CONTROL, OPENING, CLOSING)]
        if self.controller is not None:
            self.controller.attach(transport)
        self._engine = make_engine(transport, buckets)
        self._engine.telemetry = self.telemetry
        self._record_as_the_operator_asks(transport.rank)
        return self._engine

    def _fold(self) -> None:
        """Keep what is unsent of sums where this rank still owns them: bucket or ranks may be others than before."""
        self.memory.fold(self.routing.owned(), {slot.name: slot.parameter.numel for slot in self.slots})

    def _record_as_the_operator_asks(self, rank: int) -> None:
        telemetry = self.telemetry
        if rank == 0 and self.size > 1 and log.isEnabledFor(logging.INFO):
            telemetry.watch_time()
            _to_sum_up[id(telemetry)] = repr(self), telemetry, self.size
        if telemetry.file is None and (path := environment.file_for(environment.TELEMETRY, rank)) is not None:
            telemetry.write_to(path)
        if telemetry.trace is None and (path := environment.file_for(environment.TRACE, rank)) is not None:
            telemetry.trace_to(path, rank=rank)

    def detach(self) -> None:
        """Drop the transport and what is under way on it, as when the ranks change; residuals, step and counts stay."""
        if self._engine:
            self._engine.close()
        self._engine = None
        self._late.running.clear()
        self._drop_step()

    # Exchange

    @property
    def delays(self) -> bool:
        """Whether a step applies the gradients of the one before: a single rank has nothing to wait for."""
        return bool(self.options.delay) and self.size > 1

    @spanned
    def submit(self, index: int, gradient: Tensor, *, in_place: bool = False) -> Ticket:
        """Start the exchange of the gradient of parameter `index`; it must stay as it is until `finish`, with delay
        until the next step begins.

        in_place: the result may take its place, and its memory.
        """
        self.begin()
        return self.start(index, self.compressor_of(index, gradient), gradient, in_place=in_place)

    def begin(self) -> None:
        """Before a gradient is handed in: end the step before, and have the ranks agree on this one if it is the first.

        Raises MismatchError or MaskError on every rank if they do not, at once where the transport allows to wait.
        """
        engine = self._engine
        assert engine is not None, "attach first"
        self._end_step()
        if self._now.begun:
            return
        if not self._traffic_is_told:  # by now masks are there, which may be made after the compression
            self._traffic_is_told = True
            self.routing.say_if_more_than_dense(self.rank, self.size)
        self._now.begun = True
        if self.compressor.varies and self.size > 1:
            states = self.compressor.terms(self.slots, self._state.steps)
            exchange = agree(self.rank, sorted(states.items()), lambda: states, self._disagreement)
            self._now.opening = engine.submit(len(self.slots) + OPENING, exchange)
            self.telemetry.agreement_bytes += BYTES
            engine.confirm(self._now.opening)

    def _end_step(self) -> None:
        """A step begins: settle the one before, or discard it where the optimizer, which would tell, has made none."""
        if self._awaits_step:
            self.discard()
        self.settle()

    @property
    def _awaits_step(self) -> bool:
        """Whether gradients are finished, and the optimizer, which tells of its steps, has made none by them yet."""
        # A step that a GradScaler skips, since what it was to apply was not finite, throws nothing away.
        handed_over = self._now.finished or (bool(self._late.running) and self._late.finite)
        return handed_over and self._sees_steps and not self._now.applied

    def _disagreement(self, what: str, ranks_by_state: Mapping[str, list[int]]) -> Exception:
        special = self.compressor.disagreement(what, ranks_by_state, self.size)
        remedy = "Give every rank the same masks and schedules, and change them between the same two steps."
        return special or mismatch(self._state.steps, remedy)(what, ranks_by_state)

    def compressor_of(self, index: int, gradient: Tensor) -> Compressor:
        """Who exchanges the gradient of parameter `index` in this step, which has begun."""
        slot = self.slots[index]
        if self._facts is None:
            self._facts = Step(self._state.steps, self.rank, self.size, self._state.loss_scale, self._divisor)
        slot.step = self._facts
        return _SPARSE if gradient.is_sparse else self.compressor.chosen(slot) or NONE

    def start(
        self, index: int, compressor: Compressor, gradient: Tensor, *, in_place: bool, frozen: bool = False
    ) -> Ticket:
        """Start the exchange of a gradient in a step that has begun, by `compressor_of`.

        frozen: the parameter is not trained any more, and is not to be moved.
        """
        assert self._engine is not None
        slot = self.slots[index]
        if self.delays:  # the parameter's own tensor is going to have the result of another exchange meanwhile
            gradient = gradient.detach()
        if frozen:  # its residual must not move it
            slot = self._now.frozen[index] = dataclasses.replace(slot, memory=ErrorFeedback())
        # By `data`: what is written there does not count as a change of the gradient by the user.
        slot.out = gradient.data.view(-1) if in_place and _is_flat32(gradient) else None
        self._before_exchange(compressor, slot, gradient)
        return self._engine.submit(index, self.routing.exchange_of(compressor, slot, gradient))

    def _before_exchange(self, compressor: Compressor, slot: Slot, gradient: Tensor) -> None:
        assert self._engine is not None
        if self.controller is not None:
            self.controller.submitting(self._engine, slot, gradient)
        if self.telemetry.recording:
            self._look(compressor, slot, gradient)

    @spanned
    def finish(self, ticket: Ticket, like: Tensor, *, average: bool) -> Tensor:
        """The sum or the mean over all ranks, in the shape and dtype of `like`; NaN if not finite on some rank.

        With delay, that of the step before, zeros in the first one; this exchange goes on until the next step begins.
        """
        assert self._engine is not None, "attach first"
        if not self.delays:
            return self._finish(ticket, like, average)
        name = self.slots[ticket.index].name
        if like.is_sparse:
            raise ValueError(f"delay=1 takes dense gradients alone, and that of {name!r} is not")
        if self._engine.collecting:
            self._engine.flush()
        self._late.add(ticket, like, average=average)
        total = self._late.take(name)
        return torch.zeros_like(like) if total is None else _laid_out(total.to(like.device, like.dtype), like)

    def delayed_of_others(self) -> dict[int, Tensor]:
        """By parameter, as its gradient: what the last step has for those that have none in this one; once."""
        others = self._late.take_of_others(self.slots) if self.delays else {}
        return {index: self._as_gradient(index, total) for index, total in others.items()}

    def _as_gradient(self, index: int, total: Tensor) -> Tensor:
        """A new tensor like the parameter, of `total` [numel]."""
        gradient = torch.empty_like(self.parameters[index])
        real(gradient).copy_(total.view(self.slots[index].parameter.shape))
        return gradient

    def _finish_late(self) -> None:
        """Wait for the exchanges of the last step, unless its ranks are gone."""
        running, self._late.running = self._late.running, []
        if self._engine is None or (running and not self._engine.transport.is_current()):
            return
        for ticket, like, average in running:
            self._late.ended(self.slots[ticket.index].name, self._finish(ticket, like, average))

    def _finish(self, ticket: Ticket, like: Tensor, average: bool) -> Tensor:
        assert self._engine is not None
        if self._now.opening is not None:
            opening, self._now.opening = self._now.opening, None
            self._engine.finish(opening)
        if self.controller is not None:
            self.controller.finishing(self._engine)
        total: Total | None = self._engine.finish(ticket)
        self._now.finished = True
        self._record(ticket.index, like, ticket.sent_bytes)
        if total is None:
            self._now.finite = False
            return torch.full(like.shape, math.nan, dtype=like.dtype, device=self.parameters[ticket.index].device)
        slot = self._now.frozen.pop(ticket.index, self.slots[ticket.index])
        slot.out = None  # else the gradient's memory would stay in use until the next step
        self._wanted_divisor = float(self.size if average else 1)
        total = _divided_by(self._wanted_divisor, total)
        if self.controller is not None and not like.is_sparse:
            self.controller.received(slot, total)
        values = total.values if like.is_sparse else _laid_out(total.values, like)
        if values.dtype != like.dtype:
            values = values.to(like.dtype)
        if total.bound is None or values.dtype != torch.float32:
            self._watch(values)
        else:
            self._now.finite = self._now.finite and total.bound < math.inf
        return values

    def gives_momentum(self, parameter: Tensor) -> bool:
        """Whether what the last exchange gave for this parameter is momentum, in place of the gradient.

        Raises KeyError for a parameter of which this does not know.
        """
        slot = self.slots[self.binding.index_of[id(parameter)]]
        return self.size > 1 and slot.parameter.compressed and self.compressor.gives_momentum(slot)

    # Gradients that Horovod itself adds up

    def summand(self, index: int, compressor: SummedCompressor, gradient: Tensor) -> Tensor:
        """What it is to add for the gradient of parameter `index`, in a step that has begun."""
        self._before_exchange(compressor, self.slots[index], gradient)
        summand = compressor.summand(gradient, self.size)
        self._record(index, gradient, summand.numel() * summand.element_size())
        return summand

    def added_up(self, tensor: Tensor) -> None:
        """It has added these."""
        self._now.finished = True
        if self.controller is not None and self._engine is not None:
            self.controller.finishing(self._engine)
        self._watch(tensor)

    # The end of a step

    def settle(self) -> None:
        """End the step whose gradients were finished, if any: residuals change, or stay if not all was finite."""
        self._finish_late()
        if not self._now.finished:
            return
        self._late.keep(finite=self._now.finite)
        if self._now.finite:
            self.memory.commit()
        self.telemetry.settled(self._state.steps)
        self._state.steps += 1
        if self.controller is not None:
            self.controller.settled(self._state.steps)
        self._drop_step()
        self._divisor = self._wanted_divisor

    def step_made(self) -> None:
        """The optimizer has made a step by the gradients that were finished; it tells each time, from now on."""
        self._sees_steps, self._now.applied = True, self._now.finished or bool(self._late.running)

    def discard(self) -> None:
        """Forget the gradients that were synchronized last, since no step was made by them: residuals stay.

        For a script that throws synchronized gradients away; on every rank. With delay, not where what it was given was
        not finite, as when a GradScaler skips a step: the gradients under way are those of another step.
        """
        if self._late.running and not self._late.finite:
            return
        self._finish_late()
        self._late.forget()
        self._now.finite = self._now.finite and not self._now.finished
        self.settle()

    def flush(self, optimizer: torch.optim.Optimizer) -> bool:
        """With delay=1, make the step that is under way: at the end of training, and before the model is evaluated.

        To be called on every rank, after a step; the next one applies zeros then, as the first does. Checkpoints need
        it not, since they hold what is under way. Returns whether there was one, and no gradient that is not finite.
        """
        self.settle()
        totals = self._late.take_of_others(self.slots)
        if not totals or not all(max_abs(total) < math.inf for total in totals.values()):
            return False
        for index, total in totals.items():
            if self.parameters[index].requires_grad:
                self.parameters[index].grad = self._as_gradient(index, total).div_(self.loss_scale or 1.0)
        with getattr(optimizer, "skip_synchronize", nullcontext)():
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return True

    def _drop_step(self) -> None:
        self.memory.discard()
        if self.controller is not None:
            self.controller.drop()
        self._now, self._facts = _StepUnderWay(), None
        self._late.forget()

    # Telemetry

    def _watch(self, reduced: Tensor) -> None:
        """Look for non-finite values in a tensor that is reduced, hence the same on every rank."""
        if self.compressor.stateful:
            values = reduced.coalesce().values() if reduced.is_sparse else reduced
            self._now.finite = self._now.finite and max_abs(values) < math.inf

    def _look(self, compressor: Compressor, slot: Slot, gradient: Tensor) -> None:
        """Before its exchange changes anything: at what rate a gradient travels, and what of it will be lost."""
        lossy = self.telemetry.errors and not gradient.is_sparse
        error = relative_error(compressor, slot, gradient) if lossy else None
        self._now.looked_at[slot.parameter.index] = {"rate": compressor.rate_of(slot), "error": error}

    def _record(self, index: int, gradient: Tensor, sent_bytes: int) -> None:
        telemetry, slot = self.telemetry, self.slots[index]
        telemetry.steps += not self._now.counted
        self._now.counted = True
        raw_bytes = gradient.numel() * gradient.element_size()
        found = {"compressed": slot.parameter.compressed, **self._now.looked_at.pop(index, {})}
        telemetry.record(slot.name, raw_bytes, sent_bytes, step=self._state.steps, **found)

    def summary(self) -> str:
        """What was sent so far, how long this rank waited where that is watched, and what no compression would take on
        this link. HVD_COMPRESS_LOG=info has rank 0 say it at the end of the job.
        """
        return summary(self.telemetry, self.size)

    def memory_held(self) -> Held:
        """What this rank holds now of all that outlives a step, measured; see `memory_needed`."""
        frames = (slot.workspace.frame for slot in self.slots)
        positions = (tensor for slot in self.slots for tensor in self.compressor.cached(slot))
        beside = {
            FRAMES: storage_bytes(frame for frame in frames if frame is not None),
            POSITIONS: storage_bytes(positions),
            SUMS: storage_bytes(self._state.accumulated.values()),
            DELAYED: self._late.held_bytes,
        }
        return Held(added([self.memory.held(), beside]), self._model_bytes)

    def memory_needed(self) -> Held:
        """What a rank is going to hold from the second step on, at present rates, whatever the number of ranks.

        For float32 gradients that are not sparse; a single rank, which sends nothing, holds nothing. Neither is what a
        step needs while it lasts in it, nor a mask, an elastic job's copy of what was committed, or a record.
        """
        slots = [slot for slot in self.slots if slot.parameter.compressed or self.compressor.takes_all]
        sums = self.controller.most_held() if self.controller is not None else 0
        delayed = self._model_bytes if self.options.delay else 0
        parts = [*map(self.routing.held, slots), {SUMS: sums, DELAYED: delayed}]
        return Held(added(parts), self._model_bytes)

    @property
    def _model_bytes(self) -> int:
        return sum(4 * parameter.numel() for parameter in self.parameters)

    # State

    @property
    def loss_scale(self) -> float | None:
        """The factor that the loss, hence every gradient, is multiplied by: `torch.amp.GradScaler.get_scale()`.

        Set it before each backward pass; when it changes, residuals change with it.
        """
        return self._state.loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"loss_scale must be positive and finite: {scale}")
        self._end_step()
        self._state.change_unit(scale)
        self._facts = None

    @property
    def progress(self) -> Progress:
        """What is the same on all ranks of what outlives a step: of the last one that was made."""
        if not self._awaits_step:
            self.settle()
        return self._state.progress

    @progress.setter
    def progress(self, progress: Progress) -> None:
        """Take over that of another rank: residuals stay what they are, in units of its loss scale."""
        self._state.go_on_from(progress)
        self._facts = None

    def snapshot(self) -> dict[str, Any]:
        """All that the next step of this process depends on, whatever its rank will be; a copy."""
        if not self._awaits_step:
            self.settle()
        return self._state.snapshot()

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        """Go on as if no step had been made since `snapshot`."""
        self._drop_step()
        self._state.go_back(snapshot)

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, and the step: for a file of each rank. Not collective; `gather_state_dict` is.

        Between synchronizing gradients and the optimizer's step by them it is the state before that step, as the
        parameters are.

        `load_state_dict` takes it on the same rank of as many; on any rank of any number, all ranks' together.
        """
        if not self._awaits_step and not self._state.waits:
            self.settle()
        return self._state.of_rank(self.rank, self.size)

    def gather_state_dict(self, root: int = 0) -> dict[str, Any]:
        """To be called on every rank: rank `root` gets all ranks' residuals, and the step, for one file; the others get
        their own `state_dict`.

        Rank `root` holds a copy of all ranks' residuals then. The others hold some 64 MB besides their own.
        """
        if not 0 <= root < self.size:
            raise ValueError(f"root must be a rank, at least 0 and less than {self.size}: {root}")
        state = self.state_dict()
        if self._engine is not None and self.size > 1 and not self._state.waits:
            for kind in sorted({"residuals", "accumulated"} & state.keys()):
                gathered = gather(self._engine.transport, f"hvd_compress.{kind}", state[kind][self.rank], root)
                state[kind] = gathered or state[kind]
        return state

    def load_state_dict(
        self, state: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, resize: Literal["sum", "reset"] = "sum"
    ) -> None:
        """Continue from `state`: of `gather_state_dict`; of `state_dict` on the same rank; or of that of several ranks,
        as `[torch.load(file, mmap=True) for file in files]`.

        resize: what to do when the number of ranks has changed: "sum" shares the sum of all residuals out equally,
            "reset" starts with none, and says so.

        Raises ValueError for residuals that fit no parameter, for states of different moments, and for residuals that
        are not all there and would be needed; the latter at the first exchange, when rank and size are known.
        """
        if resize not in ("sum", "reset"):
            raise ValueError(f"resize must be 'sum' or 'reset': {resize!r}")
        state = state if isinstance(state, Mapping) else merged(state)
        check_residuals(state["residuals"].values(), self.slots)
        self._finish_late()
        self._state.load(state, resize, (self.rank, self.size) if self._engine else None)
        self._drop_step()
        if self._engine:
            self._fold()


_to_sum_up: dict[int, tuple[str, Telemetry, int]] = {}  # with whose it is, and how many ranks


@atexit.register
def _sum_up() -> None:
    """What an operator who asks for information learns at the end."""
    for whose, telemetry, ranks in _to_sum_up.values():
        log.info("%s: %s", whose, summary(telemetry, ranks))


def _laid_out(total: Tensor, like: Tensor) -> Tensor:
    """`total` in the shape of `like`, and in its order in memory, such as channels_last."""
    total = total.view(like.shape)
    if like.is_contiguous():
        return total
    return torch.empty_like(like, dtype=total.dtype, device=total.device).copy_(total)


def _divided_by(divisor: float, total: Total) -> Total:
    if total.divisor == divisor:
        return total
    # Not by 1 / divisor: that would round twice.
    values = total.values / divisor if total.divisor == 1 else total.values * (total.divisor / divisor)
    return total._replace(values=values, divisor=divisor)


def _is_flat32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.layout == torch.strided and tensor.is_contiguous()
