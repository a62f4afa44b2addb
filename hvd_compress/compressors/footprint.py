"""What an exchange costs a rank: bytes that it gives to collectives."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank gives to the collectives of one exchange, by what these do with them."""

    gathered: int = 0  # to every other rank
    reduced: int = 0  # to a sum of as many bytes
    broadcast: int = 0  # to all, by one rank in turn

    def received(self, size: int) -> float:
        """Bytes that come in at each of `size` ranks, where sums go by a ring: in two rounds of (size - 1) / size."""
        if size == 1:
            return 0.0
        return self.gathered * (size - 1) + 2 * self.reduced * (size - 1) / size + self.broadcast
