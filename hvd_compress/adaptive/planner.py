"""Rank 0 decides: gradients are added up, the errors of all ranks go to it, and its plan to all."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..compressors import Compressor, Slot
from ..compressors.gradients import flat32, max_abs
from ..engine import Engine, Ticket
from ..memory import AGGREGATE, key, owner
from ..requests import Allreduce, Broadcast, Exchange, Total
from ..transports.base import Transport
from ..transports.local import LocalTransport
from ..wire import WireError
from . import journal
from .controller import RateController
from .lasting import lasting_errors, reached_share
from .layers import Layer, error_table, layers_of, message_table, payload_table, present_rate
from .link import Link
from .options import Options
from .policies import Policy, Statistics

_NORMS = "of what was received"  # in states; those without it are of something else
_LOSS = ":loss"  # among what is accumulated: float64 [2], the sum of what this rank was told and how many these were


class Planner(RateController):
    """Adds up gradients before a decision, and has rank 0 decide on the sum of all ranks' errors.

    The tables travel to rank 0 and the plan back beside the gradients of one step. It holds from the next step on: by
    then every rank has it, since all ask for it before they ask for the first gradient of that step.
    """

    def __init__(self, policy: Policy, options: Options) -> None:
        super().__init__(policy)
        self.options = options
        self._norms: dict[str, float] = {}  # at the last decision
        self._reached: dict[str, float] = {}  # shares of the gradients, see lasting.py
        self._losses: list[float] = []  # the same on all ranks: the mean before each decision
        self._ticket: Ticket | None = None
        self._pending: Tensor | None = None  # a plan for the next step
        self._line: dict[str, Any] | None = None  # rank 0: what the log will say of it
        self.link: Link | None = None  # measured in the first step, and in the one before each decision
        self._measures = False

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was made: what it has decided and added up is part of the session's state."""
        return type(self), (self.policy, self.options)

    def bind(self, compressor: Compressor, slots: Sequence[Slot]) -> None:
        super().bind(compressor, slots)
        payload_table(compressor, self._layers(0))  # raises for rates that cannot be
        if self.options.objective == "time" and self.options.link is None:
            self.link = Link(gathers=self.compressor.gathers)

    def description(self) -> str:
        options = {name: value for name, value in vars(self.options).items() if name != "log"}
        return f"{self.policy!r}, {options}"

    def attach(self, transport: Transport) -> None:
        super().attach(transport)
        if self.link is not None:
            if isinstance(transport, LocalTransport):
                raise ValueError(
                    "simulated ranks have no network to measure: give link=TimeCost(...), or objective='bytes'"
                )
            self.link.samples.clear()

    def submitting(self, engine: Engine, slot: Slot, gradient: Tensor) -> None:
        left = self.options.steps_to_decision(slot.step.number)
        if left == 0 and self._ticket is None:
            self._ticket = engine.submit(len(self.slots), self._decide(slot.step.number))
        ahead = left or self.options.interval
        if ahead <= self.options.window and self.policy.needs_errors:
            self._accumulate(slot, gradient)
        if self.link is not None and slot.step.size > 1 and (ahead == 1 or not self.link.samples):
            self._measures = True

    def received(self, slot: Slot, total: Total) -> None:
        ahead = self.options.steps_to_decision(slot.step.number) or self.options.interval
        if not (self.policy.needs_norms and slot.parameter.compressed) or ahead > (self.options.norm_window or ahead):
            return
        start = time.perf_counter()
        values = flat32(total.values)
        if (max_abs(values) if total.bound is None else total.bound) < math.inf:
            name = key(slot.name, AGGREGATE)
            if (sums := self.accumulated.get(name)) is None:
                sums = self.accumulated[name] = values.new_zeros(values.numel() + 1)
            sums[:-1].add_(values, alpha=1.0 / (slot.step.loss_scale or 1.0))
            sums[-1] += 1
        self.seconds += time.perf_counter() - start

    def record_loss(self, loss: float) -> None:
        if self.policy.needs_losses and math.isfinite(loss):
            sums = self.accumulated.setdefault(_LOSS, torch.zeros(2, dtype=torch.float64))
            sums += torch.tensor([loss, 1.0], dtype=torch.float64)

    def finishing(self, engine: Engine) -> None:
        if self._ticket is not None and self._pending is None:
            self._pending = engine.finish(self._ticket)
            self.sent_bytes += self._ticket.sent_bytes
        if self.link is not None and self._measures:
            self._measures = False
            self._measure(engine, self.link)

    def _measure(self, engine: Engine, link: Link) -> None:
        """All gradients of the step were handed in: an engine that keeps an order runs this after them."""
        if engine.collecting:
            engine.flush()
        start = time.perf_counter()
        ticket = engine.submit(len(self.slots), link.measure(self.slots[0].step.rank))
        engine.finish(ticket)
        self.sent_bytes += ticket.sent_bytes
        self.seconds += time.perf_counter() - start

    def settled(self, step: int) -> None:
        plan, line = self._pending, self._line
        self.drop()
        if plan is None:
            return
        number, *rates = plan.tolist()
        self.number = int(number)
        self.rates = {slot.name: rate for slot, rate in zip(self.slots, rates) if rate}
        self._give()
        if line is not None and self.options.log is not None:
            journal.append(Path(self.options.log), line)

    def drop(self) -> None:
        self._ticket = self._pending = self._line = None
        self._measures = False

    def most_held(self) -> int:
        errors = self.policy.needs_errors and (self.options.errors_of == "all" or self.slots[0].step.rank == 0)
        numels = [slot.parameter.numel for slot in self.slots if slot.parameter.compressed]
        sums = 4 * sum(errors * numel + self.policy.needs_norms * (numel + 1) for numel in numels)
        return sums + 16 * self.policy.needs_losses

    def state_dict(self) -> dict[str, Any]:
        reached = dict(self._reached)
        mine = {"norms": dict(self._norms), "norms_of": _NORMS, "reached": reached, "losses": list(self._losses)}
        return super().state_dict() | mine

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._norms = dict(state["norms"]) if state.get("norms_of") == _NORMS else {}
        self._reached = dict(state["reached"])
        self._losses = list(state.get("losses", ()))

    def load_accumulated(self, accumulated: Mapping[str, Tensor]) -> None:
        known = {slot.name for slot in self.slots}  # earlier versions added up this rank's gradients, ":gradient"
        super().load_accumulated({k: total for k, total in accumulated.items() if owner(k)[0] in known or k == _LOSS})

    def _layers(self, step: int) -> list[Layer]:
        options = self.options
        extra = self.policy.rates
        return layers_of(self.compressor, self.slots, step, reach=options.reach, given=options.rates or (), extra=extra)

    def _accumulate(self, slot: Slot, gradient: Tensor) -> None:
        others_judge = self.options.errors_of == "rank0" and slot.step.rank
        if others_judge or gradient.is_sparse or not slot.parameter.compressed:
            return
        start = time.perf_counter()
        values = flat32(gradient)
        if max_abs(values) < math.inf:
            unscaled = 1.0 / (slot.step.loss_scale or 1.0)
            self._add(slot.name, values, unscaled)
            if (residual := slot.memory.residuals.get(slot.name)) is not None:
                self._add(slot.name, residual.to(values.device), unscaled)
        self.seconds += time.perf_counter() - start

    def _add(self, key: str, values: Tensor, factor: float) -> None:
        total = self.accumulated.get(key)
        if total is None:
            total = self.accumulated[key] = torch.zeros_like(values)
        total.add_(values, alpha=factor)

    def _decide(self, step: int) -> Exchange:
        """The tables of all ranks to rank 0, its plan to all: float64 [1 + parameters], its number and the rates."""
        start = time.perf_counter()
        layers = self._layers(step)
        present = [present_rate(self.compressor, self.slots[layer.index], step) for layer in layers]
        table = self._table(layers, present)
        told = self._told()
        self.accumulated.clear()
        self._reach(layers, present)
        self.seconds += time.perf_counter() - start
        total = yield Allreduce(torch.cat([torch.from_numpy(table).view(-1), told]))
        start = time.perf_counter()
        sums = total[: table.size].numpy().reshape(table.shape)
        self._take_loss(*total[table.size :].tolist())
        norms = np.sqrt(sums[:, -1])
        plan = torch.zeros(1 + len(self.slots), dtype=torch.float64)
        if self.slots[0].step.rank == 0:
            errors = self._errors(layers, sums[:, :-1])
            plan = self._choose(step, Statistics(layers, errors, self._costs(layers), norms, self._norms, self._losses))
        self._norms = {layer.name: float(norm) for layer, norm in zip(layers, norms)}
        self.seconds += time.perf_counter() - start
        plan = yield Broadcast(plan, 0, last=True)
        self._check(plan, layers)
        return plan

    def _told(self) -> Tensor:
        """Of losses on this rank, their sum and number, where the policy looks at losses."""
        if not self.policy.needs_losses:
            return torch.zeros(0, dtype=torch.float64)
        return self.accumulated.get(_LOSS, torch.zeros(2, dtype=torch.float64))

    def _take_loss(self, total: float = 0.0, count: float = 0.0) -> None:
        """Of all ranks."""
        if not self.policy.needs_losses:
            return
        if not count:
            raise ValueError(
                f"{self.policy!r} goes by the loss, and was told of none on any rank since the last decision: call "
                "compression.record_loss(loss) in every step"
            )
        self._losses.append(total / count)

    def _check(self, plan: Tensor, layers: Sequence[Layer]) -> None:
        """Raise WireError for a plan that rank 0 cannot have made."""
        number, *rates = plan.tolist()
        if number != self.number + 1:
            raise WireError(0, "the plan of rates", f"number {self.number + 1}", number)
        choices: dict[int, tuple[float, ...]] = {layer.index: layer.rates for layer in layers}
        for slot, rate in zip(self.slots, rates):
            if rate not in choices.get(slot.parameter.index, (0.0,)):
                raise WireError(0, slot.name, f"a rate of {choices.get(slot.parameter.index, 'none')}", rate)

    def _table(self, layers: Sequence[Layer], present: Sequence[float]) -> np.ndarray:
        """This rank's share, float64 [layers, n + 1]: errors, and squared norms of what was received.

        Errors of all candidates, or where the lasting ones are asked for, of the rates at present alone. Norms of rank
        0 alone: all ranks received the same, but one that joined later has not received it all.
        """
        rates = [(rate,) for rate in present] if self._lasting else [layer.rates for layer in layers]
        errors = error_table(self.compressor, layers, self.accumulated if self.policy.needs_errors else {}, rates)
        squares = [self._received_norm(layer) ** 2 if self.slots[0].step.rank == 0 else 0.0 for layer in layers]
        return np.column_stack([errors, squares])

    def _received_norm(self, layer: Layer) -> float:
        """Of the mean over the steps."""
        if (sums := self.accumulated.get(key(layer.name, AGGREGATE))) is None:
            return 0.0
        return float(torch.linalg.vector_norm(sums[:-1], dtype=torch.float64) / sums[-1])

    @property
    def _lasting(self) -> bool:
        return self.options.errors == "lasting" and self.compressor.stateful

    def _reach(self, layers: Sequence[Layer], present: Sequence[float]) -> None:
        """Take in that the rates at present have been in force since the last decision."""
        for layer, rate in zip(layers, present):
            share = self.compressor.payload_bytes(layer.shape, rate) / (4 * layer.shape.numel())
            self._reached[layer.name] = reached_share(self._reached.get(layer.name), share, self.options.interval)

    def _errors(self, layers: Sequence[Layer], sums: np.ndarray) -> np.ndarray:
        """Of all candidates, from what the ranks' tables add up to."""
        if not self._lasting:
            return sums
        shares = payload_table(self.compressor, layers) / [[4 * layer.shape.numel()] for layer in layers]
        return lasting_errors(sums[:, 0], np.array([self._reached[layer.name] for layer in layers]), shares)

    def _costs(self, layers: Sequence[Layer]) -> np.ndarray:
        sizes = payload_table(self.compressor, layers)
        if self.options.objective == "bytes":
            return sizes
        link = self.options.link
        if link is None and self.link is not None and self.link.samples:
            link = self.link.fit()
        # Resumed in the very step of a decision nothing has been measured yet: then bytes have to do.
        return sizes if link is None else link(sizes, messages=message_table(self.compressor, layers))

    def _choose(self, step: int, statistics: Statistics) -> Tensor:
        decision = self.policy.choose(statistics)
        plan = torch.zeros(1 + len(self.slots), dtype=torch.float64)
        plan[0] = self.number + 1
        for layer, candidate in zip(statistics.layers, decision.choice):
            plan[1 + layer.index] = layer.rates[candidate]
        self._line = journal.line_of(self.number + 1, step + 1, statistics, decision)
        return plan
