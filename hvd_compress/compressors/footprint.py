"""What an exchange costs a rank: bytes that it gives to collectives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank gives to the collectives of one exchange, by what these do with them."""

    gathered: int = 0  # to every other rank
    reduced: int = 0  # to a sum of as many bytes
    broadcast: int = 0  # to all, by one rank in turn
    scattered: int = 0  # to their owners, and from these to all, in two rounds

    def received(self, size: int) -> float:
        """Bytes that come in at each of `size` ranks, where sums go by a ring: in two rounds of (size - 1) / size."""
        if size == 1:
            return 0.0
        in_parts = 2 * self.reduced + self.scattered
        return self.gathered * (size - 1) + in_parts * (size - 1) / size + self.broadcast
