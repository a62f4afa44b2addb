"""Appends records to a file of JSON lines while training runs."""

from __future__ import annotations

import weakref
from pathlib import Path

from ..log import log
from . import export
from .records import ParameterStep, StepSeconds

_AT_ONCE = 4096  # records


class LogFile:
    """Writes what is added: thousands of records at once, and the rest at the end of the process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._records: list[ParameterStep | StepSeconds] = []
        self._end = weakref.finalize(self, _write, self.path, self._records)  # also at exit
        self._good = True

    def add(self, record: ParameterStep | StepSeconds) -> None:
        if self._good:
            self._records.append(record)
            if len(self._records) >= _AT_ONCE:
                self._good = _write(self.path, self._records)


def _write(path: Path, records: list[ParameterStep | StepSeconds]) -> bool:
    """Whether it could be written: training does not end for it."""
    try:
        if records:
            export.to_jsonl(records, path, append=True)
        return True
    except OSError as error:
        log.warning("telemetry is not written any longer: %s", error)
        return False
    finally:
        records.clear()
