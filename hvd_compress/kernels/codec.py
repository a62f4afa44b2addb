"""What the two implementations of the hot loops share."""

from __future__ import annotations

NOT_FINITE = -1  # in place of a payload's length: some value is not finite
TOO_LARGE = -2  # in place of a payload's length: it does not fit where it should go


class PayloadError(ValueError):
    """A payload that does not decode; `rank` is the place of its sender among the payloads."""

    def __init__(self, rank: int, problem: str) -> None:
        super().__init__(problem)
        self.rank = rank
