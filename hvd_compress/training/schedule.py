"""When AC/DC trains dense and when compressed (Peste et al., NeurIPS 2021, arXiv 2106.12379). Pure arithmetic."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """Units `start` to `end` - 1, in epochs or in steps, whichever the schedule counts."""

    start: int
    end: int
    compressed: bool


@dataclass(frozen=True)
class Schedule:
    """Phases that take turns: dense, compressed, dense, ..., compressed.

    lengths: of the phases, in epochs or in steps, the first one dense and the last one compressed; each at least 1.
    After its end a schedule stays in its last phase.

    >>> Schedule((2, 3, 1, 4)).phases[1]
    Phase(start=2, end=5, compressed=True)
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) < 2 or len(self.lengths) % 2:
            raise ValueError(f"lengths must alternate dense, compressed, ..., compressed: {len(self.lengths)} phases")
        if not all(isinstance(length, int) and length >= 1 for length in self.lengths):
            raise ValueError(f"every phase must last at least 1, in whole numbers: {self.lengths}")

    @classmethod
    def imagenet(cls) -> Schedule:
        """100 epochs, as the authors trained ResNet50 and MobileNet on ImageNet: half of them dense."""
        return cls((10, *(5,) * 12, 5, 10, 15))

    @classmethod
    def cifar(cls) -> Schedule:
        """200 epochs, as the authors trained on CIFAR-10 and CIFAR-100: 90 of them dense."""
        return cls((10, *(20,) * 8, 30))

    def scaled(self, factor: float) -> Schedule:
        """This schedule in `factor` times as many units: 0.5 for half the epochs, the steps of an epoch for steps.

        Every boundary is rounded to the nearest unit. Raises ValueError where a phase would vanish.
        """
        ends = [math.floor(end * factor + 0.5) for end in itertools.accumulate(self.lengths)]
        lengths = tuple(end - start for start, end in zip([0, *ends], ends))
        if min(lengths) < 1:
            raise ValueError(
                f"scaled by {factor}, the phases {self.lengths} last {lengths}: scale by more, or count steps "
                "instead of epochs"
            )
        return Schedule(lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def phases(self) -> tuple[Phase, ...]:
        ends = list(itertools.accumulate(self.lengths))
        return tuple(Phase(*span, bool(i % 2)) for i, span in enumerate(zip([0, *ends], ends)))

    @property
    def compressed_fraction(self) -> float:
        """Of all units."""
        return sum(self.lengths[1::2]) / self.total

    def phase_at(self, unit: int) -> int:
        """The number of the phase, from 0, that `unit` belongs to; odd numbers are compressed."""
        if unit < 0:
            raise ValueError(f"epochs and steps count from 0: {unit}")
        ends = itertools.accumulate(self.lengths)
        return next((number for number, end in enumerate(ends) if unit < end), len(self.lengths) - 1)
