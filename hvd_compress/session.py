"""One model's exchange over many steps: its parameters, the engine, and the state that outlives a step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from . import environment
from .adaptive import Controller
from .agreement import BYTES, agree, mismatch
from .binding import Binding, real
from .compressors import (
    AUTO,
    GATHER,
    HIERARCHICAL,
    TOPOLOGIES,
    Codec,
    Compressor,
    NoneCompressor,
    ScatterCodec,
    Slot,
    SparseGatherer,
    relative_error,
    warn_if_more_than_dense,
)
from .compressors.base import max_abs
from .engine import Engine, Ticket, cut
from .late import Late
from .log import log
from .memory import (
    CUT,
    DELAYED,
    FACTOR,
    FRAMES,
    OWNED,
    POSITIONS,
    SUMS,
    THRESHOLD,
    ErrorFeedback,
    Held,
    added,
    merged,
    owner,
    share,
    start_of,
    storage_bytes,
)
from .requests import Exchange, Member
from .states import gather
from .telemetry import Telemetry
from .topologies import Gather, Hierarchical, Nodes, Part, Piece, Scatter, Span, regions, spans_of
from .transports.base import Transport

CONTROL, OPENING, CLOSING = range(3)  # indices after those of the parameters
Progress = tuple[Any, ...]  # steps, loss scale; state of the controller, if there is one

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


class Session:
    """Exchanges the gradients of bound parameters by a compressor, step after step.

    A step ends when the first gradient is handed in after some were finished. Only then is it known whether all its
    tensors were finite on all ranks, and residuals change: all of them, or none.
    """

    def __init__(
        self,
        compressor: Compressor,
        bucket_bytes: int,
        topology: str = AUTO,
        ranks_per_node: int | None = None,
        delay: int = 0,
    ) -> None:
        if problem := _cannot(compressor, topology):
            raise ValueError(problem)
        if delay not in (0, 1):
            raise ValueError(f"delay must be 0 or 1 step: {delay}")
        if delay and compressor.changes_meaning:
            raise ValueError(
                f"delay=1 is not possible with {compressor}, whose optimizer must know what it is given in this step: "
                "leave it out"
            )
        if ranks_per_node is not None and (topology != HIERARCHICAL or ranks_per_node < 1):
            raise ValueError(
                f"ranks_per_node must be at least 1, and is for topology='hierarchical': {ranks_per_node}, {topology!r}"
            )
        self.compressor = compressor
        self.topology = topology
        self.ranks_per_node = ranks_per_node
        self.delay = delay
        self._nodes = Nodes(((0,),))
        self._pieces: dict[tuple[int, int], Slot] = {}  # that this rank brings to other nodes
        self._spans: dict[int, Span] = {}  # where each gradient that is compressed lies in its bucket
        self.bucket_bytes = bucket_bytes
        self.memory = ErrorFeedback()
        self._late = Late(self.memory)
        self.telemetry = Telemetry()
        self.controller: Controller | None = None  # of rates; what it sends goes under the index after the parameters'
        self._binding: Binding | None = None
        self._engine: Engine | None = None
        self._step = 0
        self._frozen: dict[int, Slot] = {}  # under way, of parameters that are frozen meanwhile
        self._traffic_is_told = False
        self._begun = False  # some gradient of this step was handed in
        self._finished = False  # some gradient of this step is finished
        self._finite = True  # no tensor of this step was seen to be non-finite
        self._counted = False  # telemetry knows of this step
        self._opening: Ticket | None = None  # by which the ranks compare what decides the collectives of this step
        self._sees_steps = False  # the optimizer tells when it has made a step,
        self._applied = False  # as it has by the gradients of this one
        self._seen: dict[int, dict[str, Any]] = {}  # by parameter: what telemetry is to record besides bytes
        # Exchanges divide sums by what the last step asked for; the same on every rank, else their bits would differ.
        self._divisor = self._wanted_divisor = 1.0
        self._loss_scale: float | None = None
        self._loaded: tuple[Mapping[str, Any], str] | None = None  # a state that waits for rank and size

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

    # Exchange

    def attach(
        self, transport: Transport, make_engine: Callable[..., Engine] = Engine, *, compressed_only: bool = False
    ) -> Engine:
        """Exchange over `transport` from now on; `make_engine(transport, plan)` runs the exchanges."""
        everything = not compressed_only or self.compressor.takes_all
        plan = [index for index, slot in enumerate(self.slots) if everything or slot.compressed]
        sizes = {index: self.parameters[index].numel() * self.parameters[index].element_size() for index in plan}
        self.settle()
        self.detach()
        if self._loaded:
            self._take_over(*self._loaded, transport.rank, transport.size)
            self.memory.rescale((self._loss_scale or 1.0) / (self._loaded[0]["loss_scale"] or self._loss_scale or 1.0))
            self._loaded = None
        self._traffic_is_told = False
        for slot in self.slots:
            slot.rank, slot.size, slot.cache = transport.rank, transport.size, None
        self._divisor = self._wanted_divisor = 1.0
        buckets = cut(sizes, self.bucket_bytes)
        self._spans = spans_of(buckets, self.slots)
        if self.topology == HIERARCHICAL:
            per_node = self.ranks_per_node
            self._nodes = Nodes.of_so_many(transport.size, per_node) if per_node else Nodes.on(transport.hosts())
            self._pieces.clear()
        self._fold()
        # What is not of a parameter goes under the indices after the parameters'.
        buckets += [[len(self.slots) + extra] for extra in (CONTROL, OPENING, CLOSING)]
        if self.controller is not None:
            self.controller.attach(transport)
        self._engine = make_engine(transport, buckets)
        self._engine.telemetry = self.telemetry
        self._record_as_the_operator_asks(transport.rank)
        return self._engine

    def _record_as_the_operator_asks(self, rank: int) -> None:
        telemetry = self.telemetry
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

    @property
    def delays(self) -> bool:
        """Whether a step applies the gradients of the one before: a single rank has nothing to wait for."""
        return bool(self.delay) and self.size > 1

    @spanned
    def submit(self, index: int, gradient: Tensor, *, in_place: bool = False) -> Ticket:
        """Start the exchange of the gradient of parameter `index`; it must stay as it is until `finish`, with delay
        until the next step begins.

        in_place: the result may take its place, and its memory.
        """
        self.begin()
        return self._start(index, self._compressor_of(index, gradient), gradient, in_place=in_place)

    def begin(self) -> None:
        """Before a gradient is handed in: end the step before, and have the ranks agree on this one if it is the first.

        Raises MismatchError or MaskError on every rank if they do not, at once where the transport allows to wait.
        """
        engine = self._engine
        assert engine is not None, "attach first"
        self._end_step()
        if self._begun:
            return
        if not self._traffic_is_told:  # by now masks are there, which may be made after the compression
            self._traffic_is_told = True
            self.say_if_more_than_dense()
        self._begun = True
        if self.compressor.varies and self.size > 1:
            states = self.compressor.terms(self.slots, self._step)
            exchange = agree(self.rank, sorted(states.items()), lambda: states, self._disagreement)
            self._opening = engine.submit(len(self.slots) + OPENING, exchange)
            self.telemetry.agreement_bytes += BYTES
            engine.confirm(self._opening)

    def _end_step(self) -> None:
        """A step begins: settle the one before, or discard it where the optimizer, which would tell, has made none."""
        if self._awaits_step:
            self.discard()
        self.settle()

    @property
    def _awaits_step(self) -> bool:
        """Whether gradients are finished, and the optimizer, which tells of its steps, has made none by them yet."""
        # A step that a GradScaler skips, since what it was to apply was not finite, throws nothing away.
        handed_over = self._finished or (bool(self._late.running) and self._late.finite)
        return handed_over and self._sees_steps and not self._applied

    def _disagreement(self, what: str, ranks_by_state: Mapping[str, list[int]]) -> Exception:
        special = self.compressor.disagreement(what, ranks_by_state, self.size)
        remedy = "Give every rank the same masks and schedules, and change them between the same two steps."
        return special or mismatch(self._step, remedy)(what, ranks_by_state)

    def _start(
        self, index: int, compressor: Compressor, gradient: Tensor, *, in_place: bool, frozen: bool = False
    ) -> Ticket:
        assert self._engine is not None
        slot = self.slots[index]
        if self.delays:  # the parameter's own tensor is going to have the result of another exchange meanwhile
            gradient = gradient.detach()
        if frozen:  # its residual must not move it
            slot = self._frozen[index] = dataclasses.replace(slot, memory=ErrorFeedback())
        # By `data`: what is written there does not count as a change of the gradient by the user.
        slot.out = gradient.data.view(-1) if in_place and _is_flat32(gradient) else None
        slot.divisor, slot.divided, slot.bound = self._divisor, False, None
        if self.controller is not None:
            self.controller.submitting(self._engine, slot, gradient)
        if self.telemetry.recording:
            self._look(compressor, slot, gradient)
        return self._engine.submit(index, self.exchange_of(compressor, slot, gradient))

    def exchange_of(self, compressor: Compressor, slot: Slot, gradient: Tensor) -> Exchange | Member:
        """The exchange of one gradient by `compressor`: by itself, or with others of its bucket."""
        if not (isinstance(compressor, Codec) and compressor.grouped(slot)):
            return compressor.exchange(slot, gradient)
        if isinstance(compressor, ScatterCodec) and self._cuts(slot):
            part = Part(slot, gradient, self._spans[slot.index])
            if self.topology == HIERARCHICAL:
                return Member(Hierarchical(compressor, self._nodes, compressor.alignment, self._pieces), part)
            if compressor.scatters(slot, self.topology):
                return Member(Scatter(compressor), part)
        return Member(Gather(compressor), Part(slot, gradient))

    def _cuts(self, slot: Slot) -> bool:
        return slot.size > 1 and slot.index in self._spans

    def _scatters(self, compressor: Compressor, slot: Slot) -> bool:
        return self._cuts(slot) and isinstance(compressor, ScatterCodec) and compressor.scatters(slot, self.topology)

    def _fold(self) -> None:
        """Keep what is unsent of sums where this rank still owns them: bucket or ranks may be others than before."""
        self.memory.fold(self._owned(), {slot.name: slot.shape.numel() for slot in self.slots})

    def _owned(self) -> set[tuple[str, int, int]]:
        """The pieces of gradients whose sums this rank owns: parameter, first element, elements."""
        codec, hierarchical = self.compressor, self.topology == HIERARCHICAL
        if not isinstance(codec, ScatterCodec):
            return set()
        slots = [slot for slot in self.slots if (self._cuts(slot) if hierarchical else self._scatters(codec, slot))]
        if not slots:
            return set()
        spans = tuple(self._spans[slot.index] for slot in slots)
        owners, place = slots[0].size, slots[0].rank
        if hierarchical:
            owners, place = self._nodes.ranks_per_node, self._nodes.place(place)[1]
        mine: tuple[Piece, ...] = regions(spans, codec.alignment, owners)[place]
        return {(slots[piece.part].name, piece.start, piece.numel) for piece in mine}

    @spanned
    def finish(self, ticket: Ticket, like: Tensor, *, average: bool) -> Tensor:
        """The sum or the mean over all ranks, in the shape and dtype of `like`; NaN if not finite on some rank.

        With delay, that of the step before, zeros in the first one; this exchange goes on until the next step begins.
        """
        assert self._engine is not None, "attach first"
        if not self.delays:
            return self._finish(ticket, like, average)
        if like.is_sparse:
            raise ValueError(
                f"delay=1 takes dense gradients alone, and that of {self.slots[ticket.index].name!r} is not"
            )
        if self._engine.collecting:
            self._engine.flush()
        self._late.add(ticket, like, average=average)
        total = self._late.take(self.slots[ticket.index].name)
        return torch.zeros_like(like) if total is None else _laid_out(total.to(like.device, like.dtype), like)

    def delayed_of_others(self) -> dict[int, Tensor]:
        """By parameter, as its gradient: what the last step has for those that have none in this one; once."""
        others = self._late.take_of_others(self.slots) if self.delays else {}
        return {index: self._as_gradient(index, total) for index, total in others.items()}

    def _as_gradient(self, index: int, total: Tensor) -> Tensor:
        """A new tensor like the parameter, of `total` [numel]."""
        gradient = torch.empty_like(self.parameters[index])
        real(gradient).copy_(total.view(self.slots[index].shape))
        return gradient

    def _finish_late(self) -> None:
        """Wait for the exchanges of the last step, unless its ranks are gone."""
        running, self._late.running = self._late.running, []
        if self._engine is None or (running and not self._engine.transport.is_current()):
            return
        for one in running:
            self._late.ended(self.slots[one.ticket.index].name, self._finish(one.ticket, one.like, one.average))

    def _finish(self, ticket: Ticket, like: Tensor, average: bool) -> Tensor:
        assert self._engine is not None
        if self._opening is not None:
            opening, self._opening = self._opening, None
            self._engine.finish(opening)
        if self.controller is not None:
            self.controller.finishing(self._engine)
        total = self._engine.finish(ticket)
        self._finished = True
        self._record(ticket.index, like, ticket.sent_bytes)
        if total is None:
            self._finite = False
            return torch.full(like.shape, math.nan, dtype=like.dtype, device=self.parameters[ticket.index].device)
        slot = self._frozen.pop(ticket.index, self.slots[ticket.index])
        slot.out = None  # else the gradient's memory would stay in use until the next step
        divisor = float(self.size if average else 1)
        if (divided := slot.divisor if slot.divided else 1.0) != divisor:
            total = total * (divided / divisor) if divided != 1 else total / divisor
        self._wanted_divisor = divisor
        if self.controller is not None and not like.is_sparse:
            self.controller.received(slot, total)
        if not like.is_sparse:
            total = _laid_out(total, like)
        if total.dtype != like.dtype:
            total = total.to(like.dtype)
        if slot.bound is None or total.dtype != torch.float32:
            self._watch(total)
        else:
            self._finite = self._finite and slot.bound < math.inf
        return total

    def _compressor_of(self, index: int, gradient: Tensor) -> Compressor:
        slot = self.slots[index]
        slot.step, slot.loss_scale = self._step, self._loss_scale
        return _SPARSE if gradient.is_sparse else self.compressor.chosen(slot) or NONE

    def gives_momentum(self, parameter: Tensor) -> bool:
        """Whether what the last exchange gave for this parameter is momentum, in place of the gradient.

        Raises KeyError for a parameter of which this does not know.
        """
        slot = self.slots[self.binding.index_of[id(parameter)]]
        return self.size > 1 and slot.compressed and self.compressor.gives_momentum(slot)

    def settle(self) -> None:
        """End the step whose gradients were finished, if any: residuals change, or stay if not all was finite."""
        self._finish_late()
        if not self._finished:
            return
        self._late.keep(finite=self._finite)
        if self._finite:
            self.memory.commit()
        self.telemetry.settled(self._step)
        self._step += 1
        if self.controller is not None:
            self.controller.settled(self._step)
        self._drop_step()
        self._divisor = self._wanted_divisor

    def step_made(self) -> None:
        """The optimizer has made a step by the gradients that were finished; it tells each time, from now on."""
        self._sees_steps, self._applied = True, self._finished or bool(self._late.running)

    def discard(self) -> None:
        """Forget the gradients that were synchronized last, since no step was made by them: residuals stay.

        For a script that throws synchronized gradients away; on every rank. With delay, not where what it was given was
        not finite, as when a GradScaler skips a step: the gradients under way are those of another step.
        """
        if self._late.running and not self._late.finite:
            return
        self._finish_late()
        self._late.forget()
        self._finite = self._finite and not self._finished
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
                self.parameters[index].grad = self._as_gradient(index, total).div_(self._loss_scale or 1.0)
        with getattr(optimizer, "skip_synchronize", nullcontext)():
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return True

    def _drop_step(self) -> None:
        self.memory.discard()
        if self.controller is not None:
            self.controller.drop()
        self._begun, self._finished, self._finite, self._counted = False, False, True, False
        self._applied = False
        self._opening = None
        self._seen.clear()
        self._late.forget()

    def _watch(self, reduced: Tensor) -> None:
        """Look for non-finite values in a tensor that is reduced, hence the same on every rank."""
        if self.compressor.stateful:
            values = reduced.coalesce().values() if reduced.is_sparse else reduced
            self._finite = self._finite and max_abs(values) < math.inf

    def _look(self, compressor: Compressor, slot: Slot, gradient: Tensor) -> None:
        """Before its exchange changes anything: at what rate a gradient travels, and what of it will be lost."""
        lossy = self.telemetry.errors and not gradient.is_sparse
        error = relative_error(compressor, slot, gradient) if lossy else None
        self._seen[slot.index] = {"rate": compressor.rate_of(slot), "error": error}

    def _record(self, index: int, gradient: Tensor, sent_bytes: int) -> None:
        telemetry, slot = self.telemetry, self.slots[index]
        telemetry.steps += not self._counted
        self._counted = True
        raw_bytes = gradient.numel() * gradient.element_size()
        seen = self._seen.pop(index, {})
        telemetry.record(slot.name, raw_bytes, sent_bytes, compressed=slot.compressed, step=self._step, **seen)

    # State

    @property
    def loss_scale(self) -> float | None:
        """The factor that the loss, hence every gradient, is multiplied by: `torch.amp.GradScaler.get_scale()`.

        Set it before each backward pass; when it changes, residuals change with it.
        """
        return self._loss_scale

    @loss_scale.setter
    def loss_scale(self, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"loss_scale must be positive and finite: {scale}")
        self._end_step()
        if self._loss_scale is not None and scale != self._loss_scale:
            self.memory.rescale(scale / self._loss_scale)
        self._loss_scale = scale

    @property
    def progress(self) -> Progress:
        """What is the same on all ranks of what outlives a step: of the last one that was made."""
        if not self._awaits_step:
            self.settle()
        plan = () if self.controller is None else (self.controller.state_dict(),)
        return (self._step, self._loss_scale, *plan)

    @progress.setter
    def progress(self, progress: Progress) -> None:
        """Take over that of another rank: residuals stay what they are, in units of its loss scale."""
        self._step, loss_scale, *plan = progress
        if self._loss_scale is not None and loss_scale is not None:
            self.memory.rescale(loss_scale / self._loss_scale)
        self._loss_scale = loss_scale
        if self.controller is not None and plan:
            self.controller.load_state_dict(plan[0])

    def memory_held(self) -> Held:
        """What this rank holds now of all that outlives a step, measured; see `memory_needed`."""
        slots = self.slots
        frames = storage_bytes(slot.frame for slot in slots if slot.frame is not None)
        positions = storage_bytes(tensor for slot in slots for tensor in self.compressor.cached(slot))
        sums = storage_bytes(self.controller.accumulated.values()) if self.controller is not None else 0
        beside = {FRAMES: frames, POSITIONS: positions, SUMS: sums, DELAYED: self._late.held_bytes}
        return Held(added([self.memory.held(), beside]), self._model_bytes)

    def memory_needed(self) -> Held:
        """What a rank is going to hold from the second step on, at present rates, whatever the number of ranks.

        For float32 gradients that are not sparse; a single rank, which sends nothing, holds nothing. Neither is what a
        step needs while it lasts in it, nor a mask, an elastic job's copy of what was committed, or a record.
        """
        parts = [self._held(slot) for slot in self.slots if slot.compressed or self.compressor.takes_all]
        sums = self.controller.most_held() if self.controller is not None else 0
        delayed = self._model_bytes if self.delay else 0
        return Held(added([*parts, {SUMS: sums, DELAYED: delayed}]), self._model_bytes)

    def _held(self, slot: Slot) -> dict[str, int]:
        compressor = self.compressor
        if self.topology == HIERARCHICAL and self._cuts(slot):
            if len(self._nodes.members) == 1:
                return {}
            share = -(-slot.shape.numel() // self._nodes.ranks_per_node)
            return compressor.held(dataclasses.replace(slot, shape=torch.Size([share])))
        if isinstance(compressor, ScatterCodec) and self._scatters(compressor, slot):
            return compressor.held_scattered(slot)
        return compressor.held(slot)

    def say_if_more_than_dense(self) -> None:
        """With so many ranks a method may move more than no compression."""
        shapes = [slot.shape for slot in self.slots if slot.compressed]
        size = len(self._nodes.members) if self.topology == HIERARCHICAL else self.size
        warn_if_more_than_dense(self.compressor, shapes, self.rank, size, self.topology)

    @property
    def _model_bytes(self) -> int:
        return sum(4 * parameter.numel() for parameter in self.parameters)

    def snapshot(self) -> dict[str, Any]:
        """All that the next step of this process depends on, whatever its rank will be; a copy."""
        progress = self.progress
        accumulated = self.controller.accumulated if self.controller is not None else {}
        return {
            "progress": progress,
            "residuals": self.memory.state_dict(),
            "accumulated": {key: total.detach().cpu().clone() for key, total in accumulated.items()},
            "loaded": self._loaded,
        }

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        """Go on as if no step had been made since `snapshot`."""
        self._drop_step()
        self._loaded = snapshot["loaded"]
        self.memory.load_state_dict(snapshot["residuals"])
        self._loss_scale = None  # residuals are in units of that of the snapshot
        self.progress = snapshot["progress"]
        if self.controller is not None:
            self.controller.load_accumulated(snapshot["accumulated"])

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, and the step: for a file of each rank. Not collective; `gather_state_dict` is.

        Between synchronizing gradients and the optimizer's step by them it is the state before that step, as the
        parameters are.

        `load_state_dict` takes it on the same rank of as many; on any rank of any number, all ranks' together.
        """
        if self._loaded:
            return dict(self._loaded[0])
        now = self.snapshot()
        state: dict[str, Any] = {
            "step": self._step,
            "loss_scale": self._loss_scale,
            "size": self.size,
            "residuals": {self.rank: now["residuals"]},
        }
        if self.controller is not None:
            state["adaptive"] = now["progress"][2]
            state["accumulated"] = {self.rank: now["accumulated"]}
        return state

    def gather_state_dict(self, root: int = 0) -> dict[str, Any]:
        """To be called on every rank: rank `root` gets all ranks' residuals, and the step, for one file; the others get
        their own `state_dict`.

        Rank `root` holds a copy of all ranks' residuals then. The others hold some 64 MB besides their own.
        """
        if not 0 <= root < self.size:
            raise ValueError(f"root must be a rank, at least 0 and less than {self.size}: {root}")
        state = self.state_dict()
        if self._engine is not None and self.size > 1 and not self._loaded:
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
        self._check_residuals(state["residuals"].values())
        self._finish_late()
        if self._engine:
            self._take_over(state, resize, self.rank, self.size)
            self._fold()
            self._loaded = None
        else:
            self._loaded = state, resize
        self._drop_step()
        self._loss_scale = None  # residuals are in units of that of the state
        self.progress = state["step"], state["loss_scale"]

    def _check_residuals(self, of_ranks: Iterable[Mapping[str, Tensor]]) -> None:
        numel = {slot.name: slot.shape.numel() for slot in self.slots}
        for residuals in of_ranks:
            for of, residual in residuals.items():
                name, kind = (of, "") if of in numel else owner(of)
                if kind == OWNED:
                    fits = start_of(of) + residual.numel() <= numel.get(name, 0)
                elif kind in (FACTOR, THRESHOLD, CUT):
                    fits = name in numel
                else:
                    fits = residual.numel() == numel.get(name)
                if not fits:
                    raise ValueError(
                        f"the state has a {kind or 'residual'} of {residual.numel()} elements for {name!r}; the "
                        f"parameters of this compression have {numel.get(name, 'no such name')}"
                    )

    def _take_over(self, state: Mapping[str, Any], resize: str, rank: int, size: int) -> None:
        self.memory.load_state_dict(share(state["residuals"], state["size"], rank, size, resize))
        if self.controller is not None and "adaptive" in state:
            self.controller.load_state_dict(state["adaptive"])
            self.controller.load_accumulated(share(state["accumulated"], state["size"], rank, size, resize))
        if resize == "reset" and state["size"] != size and rank == 0:
            log.warning("residuals of %d ranks are dropped at %d, as resize='reset' asks", state["size"], size)


def _laid_out(total: Tensor, like: Tensor) -> Tensor:
    """`total` in the shape of `like`, and in its order in memory, such as channels_last."""
    total = total.view(like.shape)
    if like.is_contiguous():
        return total
    return torch.empty_like(like, dtype=total.dtype, device=total.device).copy_(total)


def _is_flat32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.layout == torch.strided and tensor.is_contiguous()


def _cannot(compressor: Compressor, topology: str) -> str | None:
    """Why gradients cannot be exchanged by this topology, and the remedy; None if they can."""
    if topology not in TOPOLOGIES:
        return f"topology must be one of {', '.join(TOPOLOGIES)}: {topology!r}"
    if topology == AUTO or (topology == GATHER and isinstance(compressor, Codec)):
        return None
    if isinstance(compressor, ScatterCodec):
        why = compressor.whole()
        if topology == HIERARCHICAL and compressor.keeps_momentum:
            why = "the momentum that it has itself is that of a rank, not of a node"
    elif isinstance(compressor, Codec):
        why = "what it sends of a gradient depends on the whole of it"
    else:
        why = "it sends sums, or in rounds of its own, and nothing else"
    return why and f"topology={topology!r} is not possible with {compressor}: {why}. Give topology='auto'"
