"""Appends records to a file, a line each, while training runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..log import log
from . import export

_AT_ONCE = 4096  # records


class LogFile:
    """Writes what is added: thousands of records at once, and the rest at the end of the process."""

    def __init__(self, path: str | Path, encode: Callable[[Any], str] = export.encoded) -> None:
        self.path = Path(path).absolute()
        self._encode = encode
        self._records: list[Any] = []
        self._end = weakref.finalize(self, _write, self.path, encode, self._records)  # also at exit
        self._good = True

    def add(self, record: Any) -> None:
        if self._good:
            self._records.append(record)
            if len(self._records) >= _AT_ONCE:
                self._good = _write(self.path, self._encode, self._records)


def _write(path: Path, encode: Callable[[Any], str], records: list[Any]) -> bool:
    """Whether it could be written: training does not end for it."""
    try:
        if records:
            export.append_lines(path, map(encode, records))
        return True
    except OSError as error:
        log.warning("telemetry is not written any longer: %s", error)
        return False
    finally:
        records.clear()
