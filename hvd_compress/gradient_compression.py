"""What a user holds: a compressor with its options and parameters, in the form that Horovod's `compression=` takes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import environment, fingerprint
from .adaptive import Controller
from .binding import Binding, NamedParameters, parameters_of_optimizer
from .by_name import compressor_of, name_of
from .compressors import AUTO, Compressor, SummedCompressor
from .engine import Engine
from .horovod_hooks import HorovodHooks
from .log import SINGLE_RANK, log, warn_once
from .options import NAMES, Options
from .paced_engine import PacedEngine
from .schedules import describe
from .session import NONE, Progress, Session, spanned
from .version import __version__

_ids = itertools.count()  # of this process; other ranks may have made other compressions besides
_OF_THE_METHOD = ("topology", "ranks_per_node")  # of the options: another method may have no such topology


class GradientCompression(Session):
    """A compressor bound to named parameters; made by `Compression`.

    Pass it to an unmodified `horovod.torch.DistributedOptimizer` or to `hvd_compress.mpi.DistributedOptimizer`. Every
    rank must make it alike: same options, same parameters in the same order.

    named_parameters: (name, parameter) pairs, as of `model.named_parameters()`.
    min_numel: smaller tensors are not compressed, nor are those with one dimension, unless all have one.
    exclude: names, or patterns in the style of `fnmatch`, of parameters that are not compressed.
    seed: of the random numbers of stochastic compressors.
    process_set: the horovod.torch.ProcessSet that the optimizer reduces over; None for all ranks.
    bucket_bytes: gradients are exchanged together in buckets of about this size; None for 8 MB, and for 25 MB in
        DistributedDataParallel, as its own are.
    topology: "gather", everyone sends to everyone; "scatter", every rank adds up a part of each bucket, so that traffic
        does not grow with the ranks; "hierarchical", gradients are added up uncompressed inside a node, and each of its
        ranks exchanges a share with other nodes; "auto", one of the first two, by the method and the number of ranks.
    ranks_per_node: for topology="hierarchical"; None to see which ranks are on the same host.
    delay: 1 for steps that apply the gradients of the step before, whose exchange has all of this one's time; see
        docs/delay.md. The first step applies zeros; `flush` applies the last gradients.
    overlap: under Horovod, whether exchanges of several rounds go on during backward, which waits for them then.

    Raises ValueError for options or parameters that cannot work.
    """

    def __init__(self, compressor: Compressor, named_parameters: NamedParameters | None = None, **options: Any) -> None:
        given = Options(**options)
        if environment.is_off():
            warn_once(f"{environment.OFF} is set: compression is switched off, gradients travel as they are")
            compressor = compressor.switched_off(NONE)
            given = dataclasses.replace(given, topology=AUTO, ranks_per_node=None, delay=0)
        super().__init__(compressor, given)
        if named_parameters is not None:
            self._bind(named_parameters)
        self._registry = fingerprint.registry_of(given.process_set)
        self._registry.members.add(self)
        self._id = next(_ids)
        self._register()
        self._horovod = HorovodHooks(self)
        _say_if_single_rank(compressor)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"Compression.{self._name}({options})"

    def __call__(self, named_parameters: NamedParameters, **options: Any) -> GradientCompression:
        """Bind what is not bound yet, as in `Compression.bf16(model.named_parameters(), min_numel=4096)`."""
        if self.bound:
            raise TypeError(f"{self!r} is bound to its parameters already")
        self.unregister()  # what is compared is what is used
        return bound_compression(self.compressor, named_parameters, self.options.by_name() | options)

    def __reduce__(self) -> tuple[Any, ...]:
        """As what it is and owes, without its connections: a copy is attached anew, on the same rank."""
        named = list(zip(self.names, self.parameters)) if self.bound else None
        state = self.state_dict() if named else None
        return _remake, (self.compressor, named, self.options.by_name(), self.controller, state)

    def adapt(self, controller: Controller) -> GradientCompression:
        """Let `controller` choose the rate of each parameter from now on; returns this. Before the first exchange."""
        if self.attached is not None or self.controller is not None:
            raise ValueError(f"{self!r} has a controller already, or has exchanged gradients: make a new one to adapt")
        controller.bind(self.compressor, self.slots)
        self._state.controller = controller
        self._register()
        return self

    def record_loss(self, loss: Tensor | float) -> None:
        """Tell the loss of this step on this rank, without a loss scale: for rates that follow it, as `fractrain`."""
        if self.controller is not None:
            self.controller.record_loss(float(loss))

    @property
    def rates(self) -> dict[str, float]:
        """By parameter: at which rate, in bits, density or rank, its last gradient travelled, or the first one will.

        Of an adaptive method, the same on all ranks; empty where nobody chooses.
        """
        return {} if self.controller is None else self.controller.rates_in_force()

    @property
    def _name(self) -> str:
        return name_of(type(self.compressor))

    def _options(self) -> dict[str, Any]:
        return self.compressor.options() | self.options.by_name()

    def _bind(self, named_parameters: NamedParameters) -> None:
        options = self.options
        self._binding = Binding(
            named_parameters,
            self.compressor,
            self.memory,
            min_numel=options.min_numel,
            exclude=options.exclude,
            seed=options.seed,
        )

    # What must be the same on every rank

    def description(self) -> fingerprint.Description:
        """All of it."""
        options = {name: describe(value) for name, value in self._options().items() if name != "process_set"}
        parameters = self.binding.describe() if self.bound else None
        frozen = [n for n, p in zip(self.names, self.parameters) if not p.requires_grad] if self.bound else None
        found: dict[str, Any] = {"parameters": parameters, "frozen": frozen}
        if self.controller is not None:
            found["controller"] = self.controller.description()
        return {"version": __version__, "compressor": self._name} | options | found

    def _register(self) -> None:
        if self.bound or not isinstance(self.compressor, SummedCompressor):
            self._registry.unchecked[self._id] = self.description()

    def unregister(self) -> None:
        """Take this out of what Horovod's ranks compare, for whoever compares it elsewhere."""
        self._registry.unchecked.pop(self._id, None)

    def _is_stale(self) -> bool:
        return self._engine is not None and not self._engine.collecting and not self._engine.transport.is_current()

    def rejoin(self, progress: Progress) -> None:
        """Start anew on a changed set of ranks, with all other compressions of the old one; residuals stay."""
        self._registry.restart()
        for member in {self, *filter(GradientCompression._is_stale, self._registry.members)}:
            member.settle()
            member.detach()
            member._horovod.forget_step()
            member._register()
        self.progress = progress

    # Horovod's interface

    @spanned
    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Called by Horovod for every gradient: start its exchange, and return what Horovod is to add up."""
        if isinstance(self.compressor, SummedCompressor) and not self.bound:
            _say_if_it_stays(self._name)
            return self._horovod.compress_unbound(self.compressor, tensor)
        if self._is_stale():  # elastic Horovod does not tell when ranks only leave
            self.rejoin(self.progress)
        return self._horovod.compress(self._engine or self._connect(), tensor)

    @spanned
    def decompress(self, tensor: Tensor, context: Any) -> Tensor:
        """Called by Horovod with what it added up: finish the exchange, and return the aggregated gradient."""
        return self._horovod.decompress(self._engine, tensor, context)

    def _connect(self) -> Engine:
        from .transports.horovod import HorovodTransport

        optimizer = self._horovod.find_optimizer()
        if not self.bound:
            _say_if_it_stays(self._name)
            self._bind(parameters_of_optimizer(optimizer or self._refuse_unbound()))
        transport = HorovodTransport(self.options.process_set)
        self._horovod.attach(transport, transport.members, optimizer)
        if transport.size > 1 and self._id not in self._registry.numbers:
            self._registry.unchecked.setdefault(self._id, self.description())  # where this is a copy
            for member in self._registry.members:  # parameters may have been frozen meanwhile
                if member._id in self._registry.unchecked:
                    member._register()
            self._registry.check(transport)
        prefix = f"hvd_compress.{self._registry.numbers.get(self._id, 0)}"
        engine = functools.partial(PacedEngine if transport.shared else Engine, prefix=prefix)
        if transport.rank == 0 and not any(self.binding.compressed):
            log.warning("%r compresses nothing: all parameters are small, vectors, or excluded", self)
        return self.attach(transport, engine, compressed_only=not self.options.delay)


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
    compression.unregister()  # until it is used: other ranks may have made no copy
    if state is not None:
        compression.load_state_dict(state)
    return compression


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
        other, own = compressor_of(asked, NAMES)
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
