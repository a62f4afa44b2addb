"""What happens when, in Chrome's trace event format: for Perfetto, chrome://tracing and TensorBoard.

The format: "Trace Event Format", the Catapult project. A file is a JSON array whose last bracket may be missing, so
that a job which is killed leaves one that can be read.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from .log_file import LogFile

_CATEGORY = "hvd_compress"


class Trace:
    """Appends events to a file. Their times are microseconds since 1970, by which files of several sources fit.

    rank: whose events these are; viewers show it as a process.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.rank = rank
        self._file = LogFile(path, _line)
        self._epoch = time.time() - time.perf_counter()
        self._numbers = count()
        if not (self._file.path.exists() and self._file.path.stat().st_size):
            self._file.add(None)
        self._add("process_name", "M", 0.0, args={"name": f"hvd_compress, rank {rank}"})
        self._add("process_sort_index", "M", 0.0, args={"sort_index": rank})

    def span(self, kind: str, of: str, since: float, until: float) -> None:
        """What this thread did, of which bucket, between two times of perf_counter()."""
        args = {"bucket": of} if of else {}
        self._add(kind, "X", since, dur=1e6 * (until - since), tid=threading.get_native_id(), args=args)

    def collective(self, name: str, kind: str, sent_bytes: int, since: float, until: float) -> None:
        """A collective, from when it was posted until its answer was taken; others may be under way meanwhile."""
        number = {"local": str(next(self._numbers))}
        self._add(kind, "b", since, id2=number, args={"name": name, "sent_bytes": sent_bytes})
        self._add(kind, "e", until, id2=number)

    def step(self, step: int, now: float) -> None:
        """The end of a step."""
        self._add(f"step {step} ends", "i", now, s="p")

    def _add(self, name: str, phase: str, seconds: float, **fields: Any) -> None:
        microseconds = 1e6 * (self._epoch + seconds)
        self._file.add({"name": name, "cat": _CATEGORY, "ph": phase, "ts": microseconds, "pid": self.rank, **fields})


def _line(event: Mapping[str, Any] | None) -> str:
    return "[" if event is None else f"{json.dumps(event)},"
