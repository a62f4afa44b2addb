"""Steps of each rank's own, with a compressed exchange every so many: for links too slow to exchange every gradient."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from . import fingerprint
from .binding import real
from .compressors import NoneCompressor
from .connection import connect
from .fingerprint import MismatchError
from .gradient_compression import GradientCompression
from .ordered_engine import OrderedEngine
from .training.outer import Averaging, Nesterov, Outer, SparseLoCo
from .training.rounds import Rounds, Shared, hash_of
from .transports.base import Transport

__all__ = ["Averaging", "LocalSteps", "Nesterov", "Outer", "SparseLoCo"]

_NAME = "hvd_compress.local_steps"
_SLACK = 2  # rounds that the optimizer may make on its own before a missing local.step() is an error


@dataclass(frozen=True)
class _Report:
    """What a rank tells the others before an exchange, which they decide by."""

    steps: int  # since the exchange before; with fragments, since the oldest one's
    ends: bool  # it makes no further step
    finite: bool
    trained: str  # which parameters are: a hash
    shared: str | None  # the parameters that it started from, a hash; where they were not compared yet


class LocalSteps:
    """Lets each rank train by itself for `every` steps, then exchanges where they have led, compressed.

        with LocalSteps(optimizer, compression, every=30) as local:
            for inputs, wanted in batches:
                optimizer.zero_grad()
                cross_entropy(model(inputs), wanted).backward()
                optimizer.step()
                local.step()

    With theta the shared parameters, the same on every rank, and theta_i what the steps of rank i have made of them,
    the ranks exchange theta_i - theta as others do gradients, by any method and topology, with its error feedback.
    `outer` makes of the mean a move of theta, from which all ranks go on.

    optimizer: the one whose steps these are, of this rank alone: not a distributed one, unless of ranks inside a site.
        Its state stays this rank's.
    compression: bound to the parameters, and used for nothing else.
    every: steps between exchanges of a parameter.
    outer: Averaging(), the default, Nesterov() as in DiLoCo, or SparseLoCo().
    fragments: the parameters are cut into as many parts of about the same size, exchanged in turn, every / fragments
        steps apart (Douillard et al., 2025, arXiv 2501.18512): as many bytes, in smaller portions.
    over: an mpi4py communicator, a torch.distributed process group or a Horovod process set; None for all ranks of what
        the script has started.

    To be made when the parameters are equal on all ranks, as after a broadcast. Buffers, such as the statistics of a
    batch normalisation, stay each rank's own. It holds a copy of the parameters, and what `outer` and `compression`
    keep. Raises ValueError for what cannot work; where ranks differ in it, MismatchError on all of them at the first
    exchange.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        compression: GradientCompression,
        *,
        every: int = 30,
        outer: Outer | None = None,
        fragments: int = 1,
        over: Any = None,
    ) -> None:
        self.compression = compression
        self._rounds = Rounds([p.numel() for p in compression.parameters], every, fragments)
        own = [real(parameter.detach()) for parameter in compression.parameters]
        self._shared = Shared(own, Averaging() if outer is None else outer)
        self._check(optimizer)
        self._over = over
        self._transport: Transport | None = None  # until the first exchange
        self._compared = False  # that all ranks share the same parameters
        self._unnoticed = 0  # steps of the optimizer since the last call of step()
        self._optimizer_hook = optimizer.register_step_post_hook(self._optimizer_stepped)

    @property
    def outer(self) -> Outer:
        return self._shared.outer

    @property
    def every(self) -> int:
        return self._rounds.every

    @property
    def steps(self) -> int:
        """Of this rank."""
        return self._rounds.steps

    @property
    def rounds(self) -> int:
        """Exchanges so far, the same on every rank."""
        return self._rounds.rounds

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        compression, compressor = self.compression, self.compression.compressor
        if compression.options.delay:
            raise ValueError(f"{compression!r} is late by a step, and rounds are not: leave out delay=1")
        if compressor.replaces or compressor.keeps_momentum:
            raise ValueError(
                f"{compression!r} has a momentum of gradients, and what is exchanged here are no gradients. Remedy: "
                "Compression.topk, or onebit without momentum; outer=Nesterov() has a momentum"
            )
        if self.outer.decay != 1 and not (compressor.stateful or isinstance(compressor, NoneCompressor)):
            raise ValueError(
                f"{self.outer!r} is for a compression with error feedback, such as topk, and {compression!r} has none. "
                "Remedy: outer=Averaging() or Nesterov()"
            )
        known = compression.binding.index_of
        if any(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                "the compression does not know all parameters of the optimizer: make it of model.named_parameters()"
            )

    def _connected(self) -> Transport:
        """The transport; the first time, and after ranks have changed, the ranks compare what they were made with."""
        if self._transport is not None and self._transport.is_current():
            return self._transport
        compression, transport = self.compression, connect(self._over)
        compression.unregister()
        description = compression.description() | {
            "every": self.every,
            "fragments": len(self._rounds.fragments),
            "outer": repr(self.outer),
        }
        fingerprint.check(transport, f"{_NAME}.check", {"0": description})
        compression.attach(transport, functools.partial(OrderedEngine, prefix=_NAME, threaded=False))
        self._transport, self._compared = transport, False
        return transport

    # Steps

    def step(self) -> None:
        """To be called after each step of the optimizer, or of a GradScaler, which may have skipped it.

        Exchanges when it is time, and then returns when all ranks have come as far. Raises on every rank alike, with
        the parameters as they were: FloatingPointError where those of some rank are not finite, MismatchError where the
        ranks do not train the same ones, or started from different ones.
        """
        self._unnoticed = 0
        for _ in range(self._rounds.step()):
            self._round(ends=False)

    def finish(self) -> None:
        """Exchange what is left at the end of training; afterwards all ranks have the same parameters.

        On every rank. Some may have made more steps than others: who ends first goes on taking part until all have.
        """
        while not self._round(ends=True):
            pass

    def close(self) -> None:
        """Take part no longer; parameters stay as they are."""
        self._optimizer_hook.remove()
        self.leave()

    def leave(self) -> None:
        """Drop the connection, as when the ranks change; the next exchange makes a new one, on every rank."""
        self.compression.detach()
        self._transport = None

    def __enter__(self) -> LocalSteps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _optimizer_stepped(self, *_: object) -> None:
        self._unnoticed += 1
        if self._unnoticed > _SLACK * self.every:
            raise RuntimeError(
                f"the optimizer has made {self._unnoticed} steps without a call of LocalSteps.step(), so that nothing "
                "was exchanged: call it after each step of the optimizer"
            )

    # Exchange

    def _round(self, *, ends: bool) -> bool:
        """Exchange the fragment whose turn it is, or all at the end; returns whether it was the end on every rank."""
        reports = self._reports(self._connected(), ends)
        is_last = all(report.ends for report in reports)
        rounds = self._rounds
        if not is_last:
            self._exchange(rounds.fragments[rounds.turn])
            rounds.exchanged()
        elif any(report.steps for report in reports):
            self._exchange([index for indices in rounds.fragments for index in indices])
            rounds.ended()
        return is_last

    def _reports(self, transport: Transport, ends: bool) -> list[_Report]:
        """Every rank's; raises on all of them for what cannot go on."""
        compression = self.compression
        tensors = [parameter.detach() for parameter in compression.parameters]
        mine = _Report(
            self._rounds.longest,
            ends,
            all(bool(torch.isfinite(tensor).all()) for tensor in tensors),
            hash_of(repr([p.requires_grad for p in compression.parameters]).encode()),
            None if self._compared else self._shared.hash(),
        )
        reports = [_Report(**told) for told in transport.gather_objects(_NAME, vars(mine)).wait()]
        if broken := [rank for rank, report in enumerate(reports) if not report.finite]:
            raise FloatingPointError(
                f"parameters of rank {', '.join(map(str, broken))} are not finite, and would be everyone's after the "
                f"exchange of step {self.steps}. Remedy: go back to a checkpoint; clip gradients, or lower the "
                "learning rate of the optimizer"
            )
        if len({report.trained for report in reports}) > 1:
            raise MismatchError(
                f"the ranks train different parameters in step {self.steps}: freeze and unfreeze them on every rank "
                "between the same two steps"
            )
        if len({report.shared for report in reports}) > 1:
            raise MismatchError(
                "the ranks started from different parameters. Broadcast those of one rank before LocalSteps is made, "
                "and load states of LocalSteps that were saved after the same exchange"
            )
        self._compared = True
        return reports

    @torch.no_grad()
    def _exchange(self, indices: Sequence[int]) -> None:
        """Move these parameters, the shared ones and this rank's, to where all ranks go on from."""
        compression = self.compression
        indices = [index for index in indices if compression.parameters[index].requires_grad]
        mine = {index: real(compression.parameters[index].detach()) for index in indices}
        moved = {index: self._shared.delta(index, tensor) for index, tensor in mine.items()}
        if compression.size > 1:
            compression.memory.rescale(self.outer.decay, {compression.names[index] for index in indices})
            tickets = {index: compression.submit(index, delta, in_place=True) for index, delta in moved.items()}
            for index, ticket in tickets.items():
                moved[index] = compression.finish(ticket, moved[index], average=True)
            compression.step_made()
            compression.settle()
        for index, mean in moved.items():
            mine[index].copy_(self._shared.move(index, mean))

    # State

    def state_dict(self) -> dict[str, Any]:
        """The shared parameters, the outer moments, and how far this rank is; a copy.

        Right after an exchange, with fragments=1, model and LocalSteps of one rank are those of all; else each saves
        its own. Optimizer and compression have a state besides.
        """
        return self._rounds.state_dict() | self._shared.state_dict(self.compression.names)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, of any number of ranks. Raises ValueError for one of other parameters or fragments."""
        names = self.compression.names
        self._shared.check(state, names)
        self._rounds.check(state)
        self._rounds.load_state_dict(state)
        self._shared.load_state_dict(state, names)
        self._compared = False
