"""Telemetry as text, as JSON lines, and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from .records import ParameterStep, StepSeconds, Traffic
from .spans import Spans


class Counted(Protocol):
    """What of a Telemetry is shown as text."""

    steps: int
    total: Traffic
    parameters: dict[str, Traffic]
    history: Any
    spans: Spans | None


def table(counted: Counted) -> str:
    """A line for each parameter, bytes a step and the last rate and error; then where the time went, if known."""
    steps = max(counted.steps, 1)
    last = {record.parameter: record for record in counted.history if isinstance(record, ParameterStep)}
    rows: list[tuple[str, ...]] = [("parameter", "bytes a step", "sent", "ratio", "rate", "error")]
    for name, traffic in (*counted.parameters.items(), ("all", counted.total)):
        record = last.get(name)
        rate, error = (None, None) if record is None else (record.rate, record.error)
        shown = f"{traffic.raw_bytes / steps:,.0f}", f"{traffic.sent_bytes / steps:,.0f}"
        rows.append((name, *shown, f"{traffic.compression_ratio:.1f}", _short(rate), _short(error)))
    lines = _aligned(rows)
    if counted.spans is not None:
        seconds = counted.spans.seconds
        parts = [f"{kind} {1e3 * seconds[kind] / steps:.2f}" for kind in seconds if kind != "kernels"]
        lines.append(f"ms a step: {', '.join(parts)}; of these {1e3 * seconds['kernels'] / steps:.2f} in C++ kernels")
    return "\n".join(lines)


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))]).rstrip()
        for row in rows
    ]


def to_jsonl(records: Iterable[ParameterStep | StepSeconds], path: str | Path, *, append: bool) -> None:
    """Numbers that are not finite, which JSON has no words for, become null."""
    lines = [encoded(record) for record in records]
    if append:
        append_lines(path, lines)
        return
    path = Path(path).resolve()
    whole = path.with_name(f".{path.name}.new")
    whole.unlink(missing_ok=True)
    try:
        append_lines(whole, lines)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Append all of `lines` or, where the disk is full, none: a file of JSON lines stays one.

    Raises OSError, which names the file.
    """
    data = "".join(f"{line}\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        start = written = file.seek(0, os.SEEK_END)
        try:
            while written - start < len(data):
                written += file.write(data[written - start :])
        except OSError as error:
            file.truncate(start)
            raise OSError(error.errno, error.strerror, str(path)) from error


def encoded(record: ParameterStep | StepSeconds) -> str:
    """One record as JSON."""
    fields = vars(record)
    try:
        return _encode(fields)
    except ValueError:  # a number that is not finite
        unknown = {
            name: None for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)
        }
        return _encode({**fields, **unknown})


_encode = json.JSONEncoder(allow_nan=False).encode


def to_tensorboard(records: Iterable[ParameterStep | StepSeconds], writer: Any) -> None:
    """Scalars such as sent_bytes/fc.weight and seconds/encode, by step."""
    if isinstance(writer, (str, Path)):
        with _summary_writer(writer) as own:
            return to_tensorboard(records, own)
    for record in records:
        for name, value in asdict(record).items():
            if name not in ("step", "parameter") and value is not None:
                tag = f"{name}/{record.parameter}" if isinstance(record, ParameterStep) else f"seconds/{name}"
                writer.add_scalar(tag, value, record.step)
    return None


def _summary_writer(directory: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "to_tensorboard needs the package tensorboard. Remedy: pip install 'hvd_compress[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory))
