"""When and from what rank 0 decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .costs import TimeCost


@dataclass(frozen=True)
class Options:
    """When and from what rank 0 decides.

    interval: steps between decisions. warmup_steps: steps before the first one; None for `interval`.
    window: of so many steps before a decision the gradients are added up, with their residuals, to know their errors.
    norm_window: of so many steps before a decision the norm is taken, of what all ranks' gradients have added up to;
        None for all since the decision before, as in Accordion's paper.
    reach: rates may be up to this factor above or below the compressor's own.
    rates: to choose from in place of the compressor's candidates; None for those.
    objective: "bytes", or "time" as a link of measured, or given, latency and bandwidth takes it.
    errors: "lasting": what remains unsent after many steps at a rate, where it stays in a residual; "single": what one
        step leaves out, as in the authors' code. The same for compressors without residuals.
    errors_of: "all" ranks, or "rank0" alone, as in the authors' code.
    link: for objective="time" in place of measuring.
    log: file that rank 0 appends each plan to, with what it was made from.
    """

    interval: int = 1000
    warmup_steps: int | None = None
    window: int = 10
    norm_window: int | None = None
    reach: float = 4.0
    rates: tuple[float, ...] | None = None
    objective: Literal["bytes", "time"] = "bytes"
    errors: Literal["lasting", "single"] = "lasting"
    errors_of: Literal["all", "rank0"] = "all"
    link: TimeCost | None = None
    log: str | Path | None = None

    def __post_init__(self) -> None:
        longest = max(self.window, self.norm_window or 1)
        for name, value, least in (
            ("window", self.window, 1),
            ("window", 1 if self.norm_window is None else self.norm_window, 1),
            ("interval", self.interval, longest),
            ("warmup_steps", self.first, longest),
        ):
            if value != int(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}: {value}")
        if not 1 <= self.reach < math.inf:
            raise ValueError(f"reach must be a factor of at least 1: {self.reach}")
        if self.objective not in ("bytes", "time"):
            raise ValueError(f"objective must be 'bytes' or 'time': {self.objective!r}")
        if self.errors not in ("lasting", "single"):
            raise ValueError(f"errors must be 'lasting' or 'single': {self.errors!r}")
        if self.errors_of not in ("all", "rank0"):
            raise ValueError(f"errors_of must be 'all' or 'rank0': {self.errors_of!r}")

    @property
    def first(self) -> int:
        """Step of the first decision."""
        return self.interval if self.warmup_steps is None else self.warmup_steps

    def steps_to_decision(self, step: int) -> int:
        return self.first - step if step < self.first else (self.first - step) % self.interval
