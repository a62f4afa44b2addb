"""Error feedback: what was not sent yet, per parameter, and when it may change. Knows no algorithm and no transport.

Besides residuals some algorithms keep state of these kinds, under "<name of the parameter>/<kind>".
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOMENTUM = "momentum"  # float32 [numel], of this rank, in units of the loss-scaled gradient, as a residual is
FACTOR = "factor"  # float32 [columns, approximation rank], the same on every rank; its scale does not matter
THRESHOLD = "threshold"  # float32 [1], of this rank: a factor without unit
AGGREGATE = "aggregate"  # float32 [numel + 1], the same on every rank: aggregated gradients, and how many were added
CUT = "cut"  # float32 [1], the same on every rank, in units of the gradient: what owners send of a sum is no smaller
OWNED = "owned"  # float32 [elements of a piece], of the rank that owns it, in units of the gradient: unsent of the sum
DELAYED = "delayed"  # [numel], the same on every rank, in units of the loss-scaled gradient: what the next step applies
_KINDS = (MOMENTUM, FACTOR, THRESHOLD, AGGREGATE, CUT, DELAYED)
_REPLICATED = (FACTOR, AGGREGATE, CUT, DELAYED)
_SCALED = ("", MOMENTUM, CUT, OWNED, DELAYED)
_BY_RANK = ("residuals", "accumulated")  # of a state

# What is held between steps, besides MOMENTUM and DELAYED.
RESIDUALS, FACTORS, THRESHOLDS = "residuals", "factors", "thresholds"
SPARE = "spare"  # what the last step has made of all these, until it is known to be sound; or memory for the next
FRAMES = "frames"  # room for what is sent
POSITIONS = "positions"  # int64, of the weights that a mask keeps
SUMS = "sums"  # of gradients, of an adaptive method
_HELD = {
    "": RESIDUALS,
    MOMENTUM: MOMENTUM,
    FACTOR: FACTORS,
    THRESHOLD: THRESHOLDS,
    CUT: THRESHOLDS,
    DELAYED: DELAYED,
    OWNED: RESIDUALS,
}


@dataclass(frozen=True)
class Held:
    """Memory that a rank holds between steps, in bytes, by what.

    >>> print(Held({RESIDUALS: 400, FRAMES: 20}, model_bytes=400))
    1.05 copies of the model: residuals 1.00, frames 0.05
    """

    parts: dict[str, int]
    model_bytes: int  # of its parameters as float32

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def copies(self) -> float:
        """In copies of the model."""
        return self.total_bytes / max(self.model_bytes, 1)

    def __str__(self) -> str:
        unit = max(self.model_bytes, 1)
        parts = ", ".join(f"{what} {size / unit:.2f}" for what, size in self.parts.items())
        return f"{self.copies:.2f} copies of the model" + (f": {parts}" if parts else "")


def added(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Without what is nothing."""
    total: dict[str, int] = {}
    for part in parts:
        for what, size in part.items():
            total[what] = total.get(what, 0) + size
    return {what: size for what, size in total.items() if size}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """What these keep in memory: several may be views of one storage, or of a part of it."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def key(name: str, kind: str) -> str:
    return f"{name}/{kind}"


def owned_key(name: str, start: int) -> str:
    """Of what is unsent of the sum of a piece that starts at this element."""
    return f"{name}/{OWNED}.{start}"


def owner(of: str) -> tuple[str, str]:
    """The parameter that a key belongs to, and the kind of its state; "" for a residual."""
    name, _, kind = of.rpartition("/")
    if name and kind.partition(".")[0] == OWNED and kind.partition(".")[2].isdigit():
        return name, OWNED
    return (name, kind) if name and kind in _KINDS else (of, "")


def start_of(of: str) -> int:
    """The first element of the piece that an `owned_key` names."""
    return int(of.rpartition(".")[2])


class ErrorFeedback:
    """Residuals by parameter name, float32 [numel], in units of the loss-scaled gradient of this rank.

    A new residual is only *proposed* by an exchange. It takes effect at `commit`, when the whole step is known to be
    finite on every rank; `discard` leaves every residual as it was.
    """

    def __init__(self) -> None:
        self.residuals: dict[str, Tensor] = {}
        self._proposed: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}  # memory of residuals that were replaced
        self._reused: set[str] = set()  # names that ask for it

    def residual(self, name: str, device: torch.device) -> Tensor | None:
        """What was not sent of this parameter so far; None for nothing. To be read only."""
        residual = self.residuals.get(name)
        return residual if residual is None or residual.device == device else residual.to(device)

    def room(self, name: str, gradient: Tensor) -> Tensor:
        """Memory for the next residual of this parameter, float32 [numel], uninitialized."""
        self._reused.add(name)
        spare = self._spare.pop(name, None)
        if spare is not None and spare.numel() == gradient.numel() and spare.device == gradient.device:
            return spare
        return torch.empty(gradient.numel(), dtype=torch.float32, device=gradient.device)

    def compensate(self, name: str, gradient: Tensor) -> Tensor:
        """Return gradient + residual, a new tensor; `gradient` is float32 [numel]."""
        residual = self.residuals.get(name)
        return gradient.clone() if residual is None else gradient + residual.to(gradient.device)

    def propose(self, name: str, residual: Tensor) -> None:
        self._proposed[name] = residual

    def proposed(self, name: str) -> Tensor:
        """What was proposed of this name since the last step ended. May be written to."""
        return self._proposed[name]

    def commit(self) -> None:
        for name, residual in self._proposed.items():
            if name in self._reused and name in self.residuals:
                self._spare[name] = self.residuals[name]
            self.residuals[name] = residual
        self._proposed.clear()

    def discard(self) -> None:
        self._spare.update((name, room) for name, room in self._proposed.items() if name in self._reused)
        self._proposed.clear()

    def rescale(self, factor: float, names: Container[str] | None = None) -> None:
        """Multiply all that is in units of the gradient, of all parameters or these: as when the loss scale changes."""
        if factor == 1:
            return
        for of, residual in self.residuals.items():
            name, kind = owner(of)
            if kind in _SCALED and (names is None or name in names):
                residual.mul_(factor)

    def fold(self, kept: Container[tuple[str, int, int]], numels: Mapping[str, int]) -> None:
        """Move what this rank owes of sums into its residuals, but for the pieces that it still owns; it is sent then.

        kept: (parameter, first element, elements) of these pieces. numels: elements of the parameters.
        """
        for of in [of for of in self.residuals if owner(of)[1] == OWNED]:
            (name, _), start, owed = owner(of), start_of(of), self.residuals[of]
            if (name, start, owed.numel()) in kept or name not in numels:
                continue
            residual = self.residuals.setdefault(name, torch.zeros(numels[name], device=owed.device))
            residual[start : start + owed.numel()] += owed
            del self.residuals[of]

    def held(self) -> dict[str, int]:
        """Bytes, by what."""
        kinds: dict[str, list[Tensor]] = {SPARE: [*self._proposed.values(), *self._spare.values()]}
        for name, residual in self.residuals.items():
            kinds.setdefault(_HELD[owner(name)[1]], []).append(residual)
        return {what: storage_bytes(tensors) for what, tensors in kinds.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: residual.detach().cpu().clone() for name, residual in self.residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._proposed.clear()
        # What is applied later is a gradient, of whatever type.
        types = {name: None if owner(name)[1] == DELAYED else torch.float32 for name in state}
        self.residuals = {name: residual.detach().to(types[name], copy=True) for name, residual in state.items()}


def share(
    residuals: Mapping[int, Mapping[str, Tensor]], saved_size: int, rank: int, size: int, resize: str
) -> dict[str, Tensor]:
    """What rank `rank` of `size` takes over of `residuals`, by rank, that `saved_size` ranks had.

    With as many ranks as before, its own. Else, for resize="sum", an equal share of the sum of all, but for what is the
    same on every rank, which it takes as it is, what ranks owe of the sums that they own, of which each goes to one of
    them, and thresholds, which start anew; for "reset", none.
    Raises ValueError when residuals are needed that are not there.
    """
    if size == saved_size and rank in residuals:
        return dict(residuals[rank])
    if resize == "reset":
        return {}
    if missing := sorted(set(range(saved_size)) - residuals.keys()):
        raise ValueError(
            f"the state lacks the residuals of ranks {missing} of {saved_size}, needed at rank {rank} of {size}; it "
            f"has those of {sorted(residuals)}. Load what these ranks saved as well, all in one list, or what "
            "gather_state_dict() has returned to its root, or load with resize='reset'"
        )
    ranks = sorted(residuals)
    names = sorted({name for mine in residuals.values() for name in mine if owner(name)[1] not in (THRESHOLD, OWNED)})
    of_ranks = {name: [residuals[r][name] for r in ranks if name in residuals[r]] for name in names}
    shared = {
        name: parts[0] if owner(name)[1] in _REPLICATED else functools.reduce(torch.add, parts) / size
        for name, parts in of_ranks.items()
    }
    # What an owner owes goes to one rank, whole.
    mine = [residuals[r] for r in ranks if r % size == rank]
    return shared | {name: owed for one in mine for name, owed in one.items() if owner(name)[1] == OWNED}


def merged(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One state with all ranks' residuals, of those that the ranks saved each by itself, in any order; not a copy.

    Raises ValueError unless all are of one moment of one training, no rank twice.
    """
    whole: dict[str, Any] = {}
    for state in states:
        if not whole:
            whole = {key: dict(value) if key in _BY_RANK else value for key, value in state.items()}
            continue
        for key in sorted(whole.keys() | state.keys(), key=lambda key: (key in _BY_RANK, key)):
            mine, theirs = whole.get(key), state.get(key)
            if key in _BY_RANK and mine is not None and theirs is not None:
                if twice := sorted(mine.keys() & theirs.keys()):
                    raise ValueError(f"two of the states have {key} of ranks {twice}: load one of each rank")
                mine.update(theirs)
            elif mine != theirs:
                raise ValueError(
                    f"the states are of different moments: {key} is {mine} of ranks {sorted(whole['residuals'])} and "
                    f"{theirs} of ranks {sorted(state['residuals'])}. Load those that were saved after the same step"
                )
    if not whole:
        raise ValueError("no states to load: the list is empty")
    return whole
