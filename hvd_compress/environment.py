"""What an operator may set without touching the script, in the environment of every rank."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .log import log

VARIABLES = "HVD_COMPRESS_"  # what all of them begin with
OFF, METHOD, LOG, TELEMETRY, TRACE = (f"{VARIABLES}{name}" for name in ("OFF", "METHOD", "LOG", "TELEMETRY", "TRACE"))

_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
_LEVELS = ("debug", "info", "warning", "error")


def is_off(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether nothing is to be compressed. Raises ValueError for a value that says neither."""
    value = environment.get(OFF, "").lower()
    if value not in (*_YES, *_NO):
        raise ValueError(f"{OFF} must be one of {', '.join(filter(None, (*_YES, *_NO)))}: {value!r}")
    return value in _YES


def method(environment: Mapping[str, str] = os.environ) -> str:
    """What is to take the place of every compression that knows its parameters; empty where none is, or it is off."""
    return "" if is_off(environment) else environment.get(METHOD, "")


def file_for(variable: str, rank: int, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where one more compression of this process is to write its TELEMETRY or TRACE; None for nowhere.

    Rank 0 alone writes, or each rank to its own file where the name has {rank}. The second compression's file has .1
    before its suffix, and so on.
    """
    text = environment.get(variable, "")
    if not text or (rank and "{rank}" not in text):
        return None
    path = Path(text.replace("{rank}", str(rank))).absolute()
    number = _written[path]
    _written[path] += 1
    return path.with_suffix(f".{number}{path.suffix}") if number else path


_written: Counter[Path] = Counter()  # by how many compressions


def set_log_level() -> None:
    """As the environment asks, if it does. What is no level is said, and changes nothing: no job is to end for it."""
    level = os.environ.get(LOG, "").lower()
    if not level:
        return
    if level not in _LEVELS:
        log.warning("%s must be one of %s: %r is not, and changes nothing", LOG, ", ".join(_LEVELS), level)
        return
    log.setLevel(level.upper())
    if not logging.getLogger().hasHandlers() and log.level < logging.WARNING:
        handler = logging.StreamHandler()  # what Python has for programs without logging shows warnings alone
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        log.addHandler(handler)
