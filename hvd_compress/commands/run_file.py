"""Reads the telemetry of a run: JSON lines, a record of a parameter or of a step each."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPANS = ("encode", "exchange", "decode", "python")


@dataclass
class Run:
    """By step: bytes of all parameters, seconds by kind. By parameter: bytes of all steps, rates and errors by step."""

    raw: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    seconds: dict[int, Mapping[str, float]] = field(default_factory=dict)
    sent_by: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    rates: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    errors: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, record: Mapping[str, Any]) -> None:
        """Raises KeyError or TypeError for what is no record."""
        step = record["step"]
        if "parameter" not in record:
            self.seconds[step] = {kind: float(record[kind]) for kind in SPANS}
            return
        name = record["parameter"]
        self.raw[step] += record["raw_bytes"]
        self.sent[step] += record["sent_bytes"]
        self.sent_by[name] += record["sent_bytes"]
        for found, value in ((self.rates, record["rate"]), (self.errors, record["error"])):
            if value is not None:
                found[name][step] = value


def read(path: Path) -> Run:
    """Raises ValueError for a file that is no telemetry, or has none; OSError for one that cannot be read."""
    run = Run()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                run.add(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is no record of telemetry: {error!r}") from error
    if not run.raw:
        raise ValueError(f"{path} has no record of a parameter: telemetry.watch(records=...) keeps them")
    return run
