"""Where the ranks of a job meet outside of what is tested: files in a directory of the host that they share."""

from __future__ import annotations

import time
from pathlib import Path

_POLL_SECONDS = 0.001


class Rendezvous:
    """Meetings are numbered: all ranks hold the same ones, in the same order."""

    def __init__(self, directory: Path, rank: int, size: int) -> None:
        self.directory, self.rank, self.size = directory, rank, size
        self._number = 0

    def meet(self, word: str, timeout_seconds: float | None = None) -> list[str] | None:
        """Wait for all ranks; returns what each of them says, or None if one does not come in time."""
        deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
        self._number += 1
        self._path(self._number - 2, self.rank).unlink(missing_ok=True)  # all have left that meeting
        part = self.directory / f"part.{self.rank}"
        part.write_text(word)
        part.rename(self._path(self._number, self.rank))  # at once, so that nobody reads half of it
        said = []
        for rank in range(self.size):
            path = self._path(self._number, rank)
            while not path.exists():
                if deadline is not None and time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_SECONDS)
            said.append(path.read_text())
        return said

    def _path(self, number: int, rank: int) -> Path:
        return self.directory / f"{number}.{rank}"
