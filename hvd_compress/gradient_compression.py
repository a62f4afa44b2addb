"""What a user holds: a compressor with its options and parameters, in the form that Horovod's `compression=` takes."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import environment, fingerprint
from .adaptive import Controller
from .agreement import BYTES, agree, mismatch
from .binding import Binding, NamedParameters, calling_optimizer, parameters_of_optimizer
from .by_name import compressor_of, name_of
from .compressors import AUTO, Compressor, SummedCompressor
from .engine import Engine
from .log import SINGLE_RANK, log, warn_once
from .paced_engine import PacedEngine
from .schedules import describe
from .session import CLOSING, NONE, Progress, Session, spanned
from .step_check import GradientChangedError, Taken, advise, called_by_grad_scaler, came_too_often, problem_of
from .version import __version__

_ids = itertools.count()  # of this process; other ranks may have made other compressions besides

_COMMON_OPTIONS = (
    "min_numel",
    "exclude",
    "seed",
    "process_set",
    "bucket_bytes",
    "overlap",
    "topology",
    "ranks_per_node",
    "delay",
)
_OF_THE_METHOD = ("topology", "ranks_per_node")  # of these options: another method may have no such topology
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


class GradientCompression(Session):
    """A compressor bound to named parameters; made by `Compression`.

    Pass it to an unmodified `horovod.torch.DistributedOptimizer` or to `hvd_compress.mpi.DistributedOptimizer`. Every
    rank must make it alike: same options, same parameters in the same order.

    named_parameters: (name, parameter) pairs, as of `model.named_parameters()`.
    min_numel: smaller tensors are not compressed, nor are those with one dimension, unless all have one.
    exclude: names, or patterns in the style of `fnmatch`, of parameters that are not compressed.
    seed: of the random numbers of stochastic compressors.
    process_set: the horovod.torch.ProcessSet that the optimizer reduces over; None for all ranks.
    bucket_bytes: gradients are exchanged together in buckets of about this size.
    topology: "gather", everyone sends to everyone; "scatter", every rank adds up a part of each bucket, so that traffic
        does not grow with the ranks; "hierarchical", gradients are added up uncompressed inside a node, and each of its
        ranks exchanges a share with other nodes; "auto", one of the first two, by the method and the number of ranks.
    ranks_per_node: for topology="hierarchical"; None to see which ranks are on the same host.
    delay: 1 for steps that apply the gradients of the step before, whose exchange has all of this one's time; see
        docs/delay.md. The first step applies zeros; `flush` applies the last gradients.
    overlap: under Horovod, whether exchanges of several rounds go on during backward, which waits for them then.

    Raises ValueError for options or parameters that cannot work.
    """

    def __init__(
        self,
        compressor: Compressor,
        named_parameters: NamedParameters | None = None,
        *,
        min_numel: int = 1024,
        exclude: str | Sequence[str] = (),
        seed: int = 0,
        process_set: Any = None,
        bucket_bytes: int = 8 << 20,
        overlap: bool = True,
        topology: str = AUTO,
        ranks_per_node: int | None = None,
        delay: int = 0,
    ) -> None:
        if min_numel < 0:
            raise ValueError(f"min_numel must not be negative: {min_numel}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1: {bucket_bytes}")
        if environment.is_off():
            warn_once(f"{environment.OFF} is set: compression is switched off, gradients travel as they are")
            compressor, topology, ranks_per_node, delay = compressor.switched_off(NONE), AUTO, None, 0
        super().__init__(compressor, bucket_bytes, topology, ranks_per_node, delay)
        self.min_numel = min_numel
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.seed = seed
        self.process_set = process_set
        self.overlap = overlap
        if named_parameters is not None:
            self._bind(named_parameters)
        self._roll = fingerprint.roll(process_set)
        self._roll.members.add(self)
        self._id = next(_ids)
        self._enlist()
        self._mark = self._mean_mark = 0.0
        self._carriers: dict[tuple[torch.dtype, torch.device], Tensor] = {}  # to copy
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = _nobody  # Horovod's, a weak reference
        self._taken = Taken()
        self._watches_accumulation = False
        self._paced_from = 0  # the step
        _say_if_single_rank(compressor)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"Compression.{self._name}({options})"

    def __call__(self, named_parameters: NamedParameters, **options: Any) -> GradientCompression:
        """Bind what is not bound yet, as in `Compression.bf16(model.named_parameters(), min_numel=4096)`."""
        if self.bound:
            raise TypeError(f"{self!r} is bound to its parameters already")
        common = {name: getattr(self, name) for name in _COMMON_OPTIONS}
        self.delist()  # what is compared is what is used
        return bound_compression(self.compressor, named_parameters, common | options)

    def __reduce__(self) -> tuple[Any, ...]:
        """As what it is and owes, without its connections: a copy is attached anew, on the same rank."""
        named = [(slot.name, p) for slot, p in zip(self.slots, self.parameters)] if self.bound else None
        options = {name: getattr(self, name) for name in _COMMON_OPTIONS}
        return _remake, (self.compressor, named, options, self.controller, self.state_dict() if named else None)

    def adapt(self, controller: Controller) -> GradientCompression:
        """Let `controller` choose the rate of each parameter from now on; returns this. Before the first exchange."""
        if self._engine is not None or self.controller is not None:
            raise ValueError(f"{self!r} has a controller already, or has exchanged gradients: make a new one to adapt")
        controller.bind(self.compressor, self.slots)
        self.controller = controller
        self._enlist()
        return self

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the loss of this step on this rank, without a loss scale: for rates that follow it, as `fractrain`."""
        if self.controller is not None:
            self.controller.record_loss(float(loss))

    @property
    def _name(self) -> str:
        return name_of(type(self.compressor))

    def _options(self) -> dict[str, Any]:
        return self.compressor.options() | {name: getattr(self, name) for name in _COMMON_OPTIONS}

    def _bind(self, named_parameters: NamedParameters) -> None:
        self._binding = Binding(
            named_parameters,
            self.compressor,
            self.memory,
            min_numel=self.min_numel,
            exclude=self.exclude,
            seed=self.seed,
        )

    def description(self) -> fingerprint.Description:
        """What must be the same on every rank."""
        options = {name: describe(value) for name, value in self._options().items() if name != "process_set"}
        parameters = self.binding.describe() if self.bound else None
        frozen = [n for n, p in zip(self.names, self.parameters) if not p.requires_grad] if self.bound else None
        found: dict[str, Any] = {"parameters": parameters, "frozen": frozen}
        if self.controller is not None:
            found["controller"] = self.controller.description()
        return {"version": __version__, "compressor": self._name} | options | found

    @property
    def names(self) -> list[str]:
        """Of the parameters, as bound."""
        return [slot.name for slot in self.slots]

    def _enlist(self) -> None:
        if self.bound or not isinstance(self.compressor, SummedCompressor):
            self._roll.unchecked[self._id] = self.description()

    def delist(self) -> None:
        """Take this off the list of what Horovod's ranks compare, for whoever compares it elsewhere."""
        self._roll.unchecked.pop(self._id, None)

    def _is_stale(self) -> bool:
        return self._engine is not None and not self._engine.collecting and not self._engine.transport.is_current()

    def rejoin(self, progress: Progress) -> None:
        """Start anew on a changed set of ranks, with all other compressions of the old one; residuals stay."""
        self._roll.restart()
        for member in {self, *filter(GradientCompression._is_stale, self._roll.members)}:
            member.settle()
            member.detach()
            member._taken = Taken()
            member._enlist()
        self.progress = progress

    # Horovod's interface

    @spanned
    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Called by Horovod for every gradient: start its exchange, and return what Horovod is to add up.

        That is the tensor itself where Horovod can add what is sent. Else it is a carrier: a 1, which comes back as 1
        from an average and as the number of ranks from a sum, and a mark, by which sets of ranks are told apart.
        """
        if isinstance(self.compressor, SummedCompressor) and not self.bound:
            _say_if_it_stays(self._name)
            self._taken.add(-1, tensor)
            size = _horovod_size(self.process_set)
            return self.compressor.summand(tensor, size), _AddedUp(self.compressor, tensor, tensor._version, size)
        if self._is_stale():  # elastic Horovod does not tell when ranks only leave
            self.rejoin(self.progress)
        if self._engine is None:
            self._connect()
        assert self._engine is not None
        index = self.binding.identify(tensor)
        self.begin()
        self._taken.add(index, tensor)
        # One rank, as of an elastic job or a process set, has nothing to send, but still needs a momentum.
        alone = self.size == 1 and not self.compressor.replaces
        compressor = NONE if alone else self._compressor_of(index, tensor)
        if isinstance(compressor, SummedCompressor) and not self.delays:
            if self.controller is not None:
                self.controller.submitting(self._engine, self.slots[index], tensor)
            if self.telemetry.recording:
                self._look(compressor, self.slots[index], tensor)
            summand = compressor.summand(tensor, self.size)
            self._record(index, tensor, summand.numel() * summand.element_size())
            self._engine.transport.give_way()
            return summand, _AddedUp(compressor, tensor, tensor._version, self.size)
        frozen = not self.parameters[index].requires_grad  # then Horovod reduces zeros
        ticket = self._start(index, compressor, tensor, in_place=True, frozen=frozen)
        carrier = self._carrier(tensor)
        ticket.sent_bytes += carrier.numel() * carrier.element_size()
        self._engine.transport.give_way()
        return carrier, (ticket, tensor)

    def _carrier(self, tensor: Tensor) -> Tensor:
        """Of the gradient's own type: the tensors of one of Horovod's groups must not differ in it."""
        kind = tensor.dtype, tensor.device
        if kind not in self._carriers:
            dtype = NONE.summand(tensor[:0]).dtype
            self._carriers[kind] = torch.tensor([1.0, self._mark], dtype=dtype, device=tensor.device)
        return self._carriers[kind].clone()

    @spanned
    def decompress(self, tensor: Tensor, context: Any) -> Tensor:
        """Called by Horovod with what it added up: finish the exchange, and return the aggregated gradient."""
        if self._taken.gradients:
            self._close_step()
        if isinstance(context, tuple):
            ticket, gradient = context
            assert self._engine is not None
            if not self.delays:
                self._engine.finish(ticket)  # first: it may know better than the carrier what is wrong
            return self.finish(ticket, gradient, average=self._is_average(tensor))
        self._finished = True
        if self.controller is not None and self._engine is not None:
            self.controller.finishing(self._engine)
        self._watch(tensor)
        if context is None:  # Horovod adds up sparse gradients without asking compress
            return tensor
        gradient = context.gradient
        if gradient._version != context.version:
            raise GradientChangedError.of([f"a parameter of shape {tuple(gradient.shape)}"])
        restored: Tensor = context.compressor.restore(tensor, gradient.shape, gradient.dtype, context.size)
        return restored

    def _close_step(self) -> None:
        """All gradients of the step are handed in: have the ranks compare what they have seen of it.

        Raises on every rank: MismatchError where they differ, ValueError for an optimizer that this cannot serve,
        GradientChangedError for gradients that were changed meanwhile.
        """
        engine, step = self._engine, self._step
        taken, self._taken = self._taken, Taken()
        by_scaler = called_by_grad_scaler()
        if isinstance(self.compressor, SummedCompressor) or not isinstance(engine, PacedEngine):
            if by_scaler:
                raise GradientChangedError.by_scaler()
            return
        changed = [self.names[index] for index in taken.changed()]
        problem = problem_of(self._optimizer(), self.compressor, self.binding)
        trained = bytes(p.requires_grad for p in self.parameters)
        exchange = agree(
            self.rank,
            (step, sorted(taken.gradients), changed, trained, problem),
            lambda: taken.states(self.binding, problem, step),
            mismatch(step, _ALIKE),
            habits=sorted(taken.late),
        )
        ticket = engine.submit(len(self.slots) + CLOSING, exchange)
        engine.put_first(ticket)
        self.telemetry.agreement_bytes += BYTES
        if changed or problem or by_scaler:
            engine.try_finish(ticket, _PATIENCE_SECONDS)
            if by_scaler:
                raise GradientChangedError.by_scaler()
            raise GradientChangedError.of(changed) if changed else ValueError(problem)
        alike = engine.finish(ticket)
        if not (self.overlap and alike is not None and bool(alike)):
            self._paced_from = step + _UNPACED_STEPS
        engine.pace(step >= self._paced_from)

    def _is_average(self, carrier: Tensor) -> bool:
        """Whether Horovod averaged or summed; raises RuntimeError if it did neither, or over other ranks than ours."""
        one, mark = carrier.tolist()
        rounding, counted = 0.005, self.size
        if carrier.dtype == torch.float16:  # added up one by one its error grows, and from 2048 on a 1 is lost
            rounding, counted = 0.005 + self.size / 4096, min(self.size, 2048)
        if abs(mark - one * self._mean_mark) < rounding * one * self._mean_mark:
            if 0.75 * counted / self.size < one < 1.25:
                return True
            if 0.75 * counted < one < 1.25 * self.size:
                return False
        raise RuntimeError(
            "Horovod did not sum or average over the ranks of this compression. Use op=hvd.Average or op=hvd.Sum, and "
            "give the optimizer and the compression the same process_set="
        )

    def _connect(self) -> None:
        from .transports.horovod import HorovodTransport

        optimizer = calling_optimizer(self)
        if optimizer is not None:
            self._optimizer = weakref.ref(optimizer)
            _watch_steps()
        if not self.bound:
            _say_if_it_stays(self._name)
            self._bind(parameters_of_optimizer(optimizer or self._refuse_unbound()))
        if not self._watches_accumulation:
            self._watches_accumulation = True
            self._watch_accumulation()
        transport = HorovodTransport(self.process_set)
        if optimizer is not None and transport.size > 1:
            advise(optimizer, self.compressor, transport.rank)
        if transport.size > 1 and self._id not in self._roll.numbers:
            self._roll.unchecked.setdefault(self._id, self.description())  # where this is a copy
            for member in self._roll.members:  # parameters may have been frozen meanwhile
                if member._id in self._roll.unchecked:
                    member._enlist()
            self._roll.check(transport)
        marks = [_mark(member) for member in transport.members]
        self._mark, self._mean_mark = marks[transport.rank], sum(marks) / len(marks)
        self._carriers.clear()
        prefix = f"hvd_compress.{self._roll.numbers.get(self._id, 0)}"
        engine = functools.partial(PacedEngine if transport.shared else Engine, prefix=prefix)
        self.attach(transport, engine, compressed_only=not self.delay)
        if transport.rank == 0 and not any(self.binding.compressed):
            log.warning("%r compresses nothing: all parameters are small, vectors, or excluded", self)

    def _watch_accumulation(self) -> None:
        """See a gradient that is added to when it is under way before Horovod does, whose error names but one of two
        causes."""
        mine = weakref.ref(self)

        def came(index: int, _: Tensor) -> None:
            compression = mine()
            if compression is not None and index in compression._taken.gradients:
                passes = getattr(compression._optimizer(), "backward_passes_per_step", 1)
                raise came_too_often(compression.names[index], passes)

        for index, parameter in enumerate(self.parameters):
            if parameter.requires_grad and parameter.is_leaf:
                parameter.register_post_accumulate_grad_hook(functools.partial(came, index))


def _nobody() -> None:
    """In place of a reference to an optimizer that is not known."""


@functools.cache
def _watch_steps() -> None:
    """Let optimizers tell their compressions that a step was made, so that residuals follow it."""

    def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        compression = getattr(optimizer, "_compression", None)
        if isinstance(compression, GradientCompression):
            compression.step_made()

    register_optimizer_step_post_hook(stepped)


def _remake(
    compressor: Compressor,
    named_parameters: NamedParameters | None,
    options: dict[str, Any],
    controller: Controller | None,
    state: dict[str, Any] | None,
) -> GradientCompression:
    compression = GradientCompression(compressor, named_parameters, **options)
    if controller is not None:
        compression.adapt(controller)
    compression.delist()  # until it is used: other ranks may have made no copy
    if state is not None:
        compression.load_state_dict(state)
    return compression


def _mark(rank: int) -> float:
    """A small number, exact in float16, whose mean over one set of ranks is hardly that over another."""
    return 1.0 + pow(7, rank, 97) / 64


def _horovod_size(process_set: Any) -> int:
    hvd = sys.modules.get("horovod.torch")
    if hvd is None or not hvd.is_initialized():
        return 1
    return int(hvd.size() if process_set is None else process_set.size())


def bound_compression(
    compressor: Compressor, named_parameters: NamedParameters, options: Mapping[str, Any]
) -> GradientCompression:
    """As the script asks for it; or as the operator does, by HVD_COMPRESS_METHOD."""
    if asked := environment.method():
        compressor, options = _instead(compressor, options, asked)
    return GradientCompression(compressor, named_parameters, **options)


def _instead(compressor: Compressor, options: Mapping[str, Any], asked: str) -> tuple[Compressor, dict[str, Any]]:
    variable = f"{environment.METHOD}={asked}"
    try:
        other, own = compressor_of(asked, _COMMON_OPTIONS)
    except ValueError as error:
        raise ValueError(f"{environment.METHOD}: {error}") from None
    if compressor.replaces and compressor != other:
        raise ValueError(
            f"{variable} cannot take the place of {compressor!r}, which has the {compressor.replaces} that the "
            "optimizer has not. Remedy: unset the variable for this script"
        )
    warn_once(f"{variable} is set: gradients travel so, whatever the script asks for")
    kept = {name: value for name, value in options.items() if name not in _OF_THE_METHOD}
    return compressor.switched_off(other), kept | own


@functools.cache
def _say_if_it_stays(name: str) -> None:
    if asked := environment.method():
        log.warning(
            "%s=%s changes nothing for Compression.%s as it is, which does not know the parameters' names: pass "
            "Compression.%s(model.named_parameters())",
            *(environment.METHOD, asked, name, name),
        )


def _say_if_single_rank(compressor: Compressor) -> None:
    """Horovod calls no compression at one rank, unless the job is elastic, so there is no later moment to say it."""
    hvd = sys.modules.get("horovod.torch")
    elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
    if hvd is not None and hvd.is_initialized() and hvd.size() == 1 and not (elastic and compressor.replaces):
        say_single_rank(compressor)


def say_single_rank(compressor: Compressor) -> None:
    missing = f"; nor is there any {compressor.replaces}, so give it to the optimizer" if compressor.replaces else ""
    warn_once(SINGLE_RANK + missing)
