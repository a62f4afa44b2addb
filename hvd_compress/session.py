"""One model's exchange over many steps: its parameters, the engine, and the state that outlives a step."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .adaptive import Controller
from .binding import Binding
from .compressors import Compressor, NoneCompressor, Slot, SparseGatherer, rate_of, relative_error
from .engine import Engine, Ticket, cut
from .log import log
from .memory import FACTOR, THRESHOLD, ErrorFeedback, owner, share
from .telemetry import Telemetry
from .transports.base import Transport

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

    def __init__(self, compressor: Compressor, bucket_bytes: int) -> None:
        self.compressor = compressor
        self.bucket_bytes = bucket_bytes
        self.memory = ErrorFeedback()
        self.telemetry = Telemetry()
        self.controller: Controller | None = None  # of rates; what it sends goes under the index after the parameters'
        self._binding: Binding | None = None
        self._engine: Engine | None = None
        self._step = 0
        self._finished = False  # some gradient of this step is finished
        self._finite = True  # no tensor of this step was seen to be non-finite
        self._counted = False  # telemetry knows of this step
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
        if self._binding is None:
            raise ValueError(f"{self!r} does not know its parameters: call it with model.named_parameters()")
        return self._binding

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
        for slot in self.slots:
            slot.rank, slot.size, slot.cache = transport.rank, transport.size, None
        self._divisor = self._wanted_divisor = 1.0
        buckets = cut(sizes, self.bucket_bytes)
        if self.controller is not None:
            self.controller.attach(transport)
            buckets.append([len(self.slots)])
        self._engine = make_engine(transport, buckets)
        self._engine.telemetry = self.telemetry
        return self._engine

    def detach(self) -> None:
        """Drop the transport and what is under way on it, as when the ranks change; residuals, step and counts stay."""
        if self._engine:
            self._engine.close()
        self._engine = None
        self._drop_step()

    @spanned
    def submit(self, index: int, gradient: Tensor, *, in_place: bool = False) -> Ticket:
        """Start the exchange of the gradient of parameter `index`; it must stay as it is until `finish`.

        in_place: the result may take its place, and its memory.
        """
        assert self._engine is not None, "attach first"
        self.settle()
        return self._start(index, self._compressor_of(index, gradient), gradient, in_place=in_place)

    def _start(self, index: int, compressor: Compressor, gradient: Tensor, *, in_place: bool) -> Ticket:
        assert self._engine is not None
        slot = self.slots[index]
        # `data`, because a version counter of its own tells what is written there from what the user changes.
        slot.out = gradient.data.view(-1) if in_place and _is_flat32(gradient) else None
        slot.divisor, slot.divided, slot.bound = self._divisor, False, None
        if self.controller is not None:
            self.controller.submitting(self._engine, slot, gradient)
        if self.telemetry.recording:
            self._look(compressor, slot, gradient)
        return self._engine.submit(index, compressor.exchange(slot, gradient))

    @spanned
    def finish(self, ticket: Ticket, like: Tensor, *, average: bool) -> Tensor:
        """The sum or the mean over all ranks, in the shape and dtype of `like`; NaN if not finite on some rank."""
        assert self._engine is not None, "attach first"
        if self.controller is not None:
            self.controller.finishing(self._engine)
        total = self._engine.finish(ticket)
        self._finished = True
        self._record(ticket.index, like, ticket.sent_bytes)
        if total is None:
            self._finite = False
            return torch.full(like.shape, math.nan, dtype=like.dtype, device=like.device)
        slot = self.slots[ticket.index]
        slot.out = None  # else the gradient's memory would stay in use until the next step
        divisor = float(self.size if average else 1)
        if (divided := slot.divisor if slot.divided else 1.0) != divisor:
            total = total * (divided / divisor) if divided != 1 else total / divisor
        self._wanted_divisor = divisor
        if not like.is_sparse:
            total = total.view(like.shape)
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

    def settle(self) -> None:
        """End the step whose gradients were finished, if any: residuals change, or stay if not all was finite."""
        if not self._finished:
            return
        if self._finite:
            self.memory.commit()
        self.telemetry.settled(self._step)
        self._step += 1
        if self.controller is not None:
            self.controller.settled(self._step)
        self._drop_step()
        self._divisor = self._wanted_divisor

    def discard(self) -> None:
        """Forget the step whose gradients were finished, if any: residuals stay as they were."""
        self._finite = self._finite and not self._finished
        self.settle()

    def _drop_step(self) -> None:
        self.memory.discard()
        if self.controller is not None:
            self.controller.drop()
        self._finished, self._finite, self._counted = False, True, False
        self._seen.clear()

    def _watch(self, reduced: Tensor) -> None:
        """Look for non-finite values in a tensor that is reduced, hence the same on every rank."""
        if self.compressor.stateful:
            values = reduced.coalesce().values() if reduced.is_sparse else reduced
            # One pass: a sum in float64 is finite exactly if all values are, short of 1e308.
            self._finite = self._finite and math.isfinite(float(values.sum(dtype=torch.float64)))

    def _look(self, compressor: Compressor, slot: Slot, gradient: Tensor) -> None:
        """Before its exchange changes anything: at what rate a gradient travels, and what of it will be lost."""
        lossy = self.telemetry.errors and not gradient.is_sparse
        error = relative_error(compressor, slot, gradient) if lossy else None
        self._seen[slot.index] = {"rate": rate_of(compressor, slot), "error": error}

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
        self.settle()
        if self._loss_scale is not None and scale != self._loss_scale:
            self.memory.rescale(scale / self._loss_scale)
        self._loss_scale = scale

    @property
    def progress(self) -> Progress:
        """What is the same on all ranks of what outlives a step."""
        self.settle()
        plan = () if self.controller is None else (self.controller.state_dict(),)
        return (self._step, self._loss_scale, *plan)

    @progress.setter
    def progress(self, progress: Progress) -> None:
        self._step, self._loss_scale, *plan = progress
        if self.controller is not None and plan:
            self.controller.load_state_dict(plan[0])

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals, and the step. Not collective; `gather_state_dict` is."""
        if self._loaded:
            return dict(self._loaded[0])
        self.settle()
        state: dict[str, Any] = {
            "step": self._step,
            "loss_scale": self._loss_scale,
            "size": self.size,
            "residuals": {self.rank: self.memory.state_dict()},
        }
        if self.controller is not None:
            state["adaptive"] = self.controller.state_dict()
            accumulated = self.controller.accumulated
            state["accumulated"] = {self.rank: {key: total.cpu().clone() for key, total in accumulated.items()}}
        return state

    def gather_state_dict(self) -> dict[str, Any]:
        """All ranks' residuals, and the step, for a checkpoint that one rank writes. To be called on every rank."""
        state = self.state_dict()
        if self._engine is None or self.size == 1:
            return state
        buffer = io.BytesIO()
        torch.save({kind: state[kind] for kind in ("residuals", "accumulated") if kind in state}, buffer)
        part = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        for theirs in self._engine.transport.allgather("hvd_compress.state", [part]).wait():
            for kind, of_rank in torch.load(io.BytesIO(theirs.numpy().tobytes()), weights_only=True).items():
                state[kind].update(of_rank)
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, resize: Literal["sum", "reset"] = "sum") -> None:
        """Continue from `state`: of `gather_state_dict`, or of `state_dict` on the same rank.

        resize: what to do when the number of ranks has changed: "sum" shares the sum of all residuals out equally,
            "reset" starts with none, and says so.

        Raises ValueError for residuals that fit no parameter, or that are not all there and would be needed; the latter
        at the first exchange, when rank and size are known.
        """
        if resize not in ("sum", "reset"):
            raise ValueError(f"resize must be 'sum' or 'reset': {resize!r}")
        self._check_residuals(state["residuals"].values())
        if self._engine:
            self._take_over(state, resize, self.rank, self.size)
        else:
            self._loaded = state, resize
        self._drop_step()
        self.progress = state["step"], state["loss_scale"]

    def _check_residuals(self, of_ranks: Iterable[Mapping[str, Tensor]]) -> None:
        numel = {slot.name: slot.shape.numel() for slot in self.slots}
        for residuals in of_ranks:
            for key, residual in residuals.items():
                name, kind = (key, "") if key in numel else owner(key)
                fits = name in numel if kind in (FACTOR, THRESHOLD) else residual.numel() == numel.get(name)
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


def _is_flat32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.layout == torch.strided and tensor.is_contiguous()
