"""What of an exchange outlives a step, hence belongs in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .adaptive import Controller
from .compressors import Slot
from .log import log
from .memory import CUT, FACTOR, OWNED, THRESHOLD, ErrorFeedback, owner, share, start_of

Progress = tuple[Any, ...]  # steps, loss scale; state of the controller, if there is one


class State:
    """Of one rank: how many steps were made, in what unit gradients are, residuals, and rates that change."""

    def __init__(self) -> None:
        self.steps = 0
        self.loss_scale: float | None = None
        self.memory = ErrorFeedback()
        self.controller: Controller | None = None
        self._waiting: tuple[Mapping[str, Any], str] | None = None  # what was loaded before rank and size are known

    @property
    def accumulated(self) -> dict[str, Tensor]:
        """The controller's sums for its next decision."""
        return self.controller.accumulated if self.controller is not None else {}

    # What is the same on all ranks

    @property
    def progress(self) -> Progress:
        plan = () if self.controller is None else (self.controller.state_dict(),)
        return (self.steps, self.loss_scale, *plan)

    def go_on_from(self, progress: Progress) -> None:
        """Take over that of another rank: residuals stay what they are, in units of its loss scale."""
        self.steps, loss_scale, *plan = progress
        self.change_unit(loss_scale)
        if self.controller is not None and plan:
            self.controller.load_state_dict(plan[0])

    def change_unit(self, loss_scale: float | None) -> None:
        """Gradients are in units of this loss scale from now on; residuals follow, if both are known."""
        if self.loss_scale is not None and loss_scale is not None:
            self.memory.rescale(loss_scale / self.loss_scale)
        self.loss_scale = loss_scale

    # Copies in this process

    def snapshot(self) -> dict[str, Any]:
        """All of it, a copy; whatever the rank will be."""
        return {
            "progress": self.progress,
            "residuals": self.memory.state_dict(),
            "accumulated": {key: total.detach().cpu().clone() for key, total in self.accumulated.items()},
            "loaded": self._waiting,
        }

    def go_back(self, snapshot: Mapping[str, Any]) -> None:
        self._waiting = snapshot["loaded"]
        self.memory.load_state_dict(snapshot["residuals"])
        self.loss_scale = None  # residuals are in units of that of the snapshot
        self.go_on_from(snapshot["progress"])
        if self.controller is not None:
            self.controller.load_accumulated(snapshot["accumulated"])

    # Files

    @property
    def waits(self) -> bool:
        """Whether what was loaded is not taken over yet."""
        return self._waiting is not None

    def of_rank(self, rank: int, size: int) -> dict[str, Any]:
        """What this rank's file has; while a loaded state waits, that one."""
        if self._waiting:
            return dict(self._waiting[0])
        state: dict[str, Any] = {"step": self.steps, "loss_scale": self.loss_scale, "size": size}
        now = self.snapshot()
        state["residuals"] = {rank: now["residuals"]}
        if self.controller is not None:
            state |= {"adaptive": now["progress"][2], "accumulated": {rank: now["accumulated"]}}
        return state

    def load(self, state: Mapping[str, Any], resize: str, ranks: tuple[int, int] | None) -> None:
        """Go on from what files of any ranks had; ranks: this rank and how many there are, if that is known yet."""
        if ranks:
            self._take_over(state, resize, *ranks)
        self._waiting = None if ranks else (state, resize)
        self.steps, self.loss_scale = state["step"], state["loss_scale"]

    def attach(self, rank: int, size: int) -> None:
        """Take over this rank's share of the state that waits, if any does."""
        if self._waiting is None:
            return
        state, resize = self._waiting
        self._take_over(state, resize, rank, size)
        self.memory.rescale((self.loss_scale or 1.0) / (state["loss_scale"] or self.loss_scale or 1.0))
        self._waiting = None

    def _take_over(self, state: Mapping[str, Any], resize: str, rank: int, size: int) -> None:
        self.memory.load_state_dict(share(state["residuals"], state["size"], rank, size, resize))
        if self.controller is not None and "adaptive" in state:
            self.controller.load_state_dict(state["adaptive"])
            self.controller.load_accumulated(share(state["accumulated"], state["size"], rank, size, resize))
        if resize == "reset" and state["size"] != size and rank == 0:
            log.warning("residuals of %d ranks are dropped at %d, as resize='reset' asks", state["size"], size)


def check_residuals(of_ranks: Iterable[Mapping[str, Tensor]], slots: Iterable[Slot]) -> None:
    """Raises ValueError for what fits none of the parameters."""
    numel = {slot.name: slot.parameter.numel for slot in slots}
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
