"""The options that every method of `Compression` takes besides its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from .compressors import AUTO


@dataclass(frozen=True)
class Options:
    """As GradientCompression documents them; raises ValueError for those that cannot be, whatever the method."""

    min_numel: int = 1024
    exclude: str | Sequence[str] = ()
    seed: int = 0
    process_set: Any = None
    bucket_bytes: int | None = None
    overlap: bool = True
    topology: str = AUTO
    ranks_per_node: int | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        if self.min_numel < 0:
            raise ValueError(f"min_numel must not be negative: {self.min_numel}")
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1: {self.bucket_bytes}")
        if self.delay not in (0, 1):
            raise ValueError(f"delay must be 0 or 1 step: {self.delay}")
        exclude = (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude)
        object.__setattr__(self, "exclude", exclude)

    def by_name(self) -> dict[str, Any]:
        """Values as they are, which dataclasses.asdict would copy."""
        return {option.name: getattr(self, option.name) for option in fields(self)}


NAMES = tuple(option.name for option in fields(Options))
