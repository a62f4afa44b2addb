"""hvd-compress trace: put traces of ranks, of Horovod's timeline and of torch.profiler into one file, on one clock."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

Event = dict[str, Any]
_TIMELINE_START = "start_time_since_epoch_in_micros"  # an argument of an event of Horovod's


@dataclass
class _Source:
    """A file, its events, and the microseconds since 1970 at which its clock is 0."""

    path: Path
    events: list[Event]
    start: float


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "trace", help="put the traces of ranks, of Horovod and of torch.profiler into one file", description=__doc__
    )
    parser.add_argument("out", type=Path, metavar="OUT.json", help="for Perfetto or chrome://tracing")
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="of HVD_COMPRESS_TRACE or telemetry.trace_to(), of HOROVOD_TIMELINE, or of torch.profiler",
    )
    parser.set_defaults(run=lambda options: _run(parser, options))


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    try:
        sources = [_read(path) for path in options.files]
        events = _put_together(sources)
        options.out.write_text(json.dumps(events), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for source in sources:
        print(f"{source.path}: {len(source.events):,} events")
    print(f"trace: {options.out.resolve()}")
    return 0


def _read(path: Path) -> _Source:
    """Raises ValueError for what is no trace."""
    text = path.read_text(encoding="utf-8").strip()
    try:
        try:
            found = json.loads(text)
        except ValueError:  # an array that is still, or was, written: its last comma and bracket may be missing
            found = json.loads(text.rstrip(",") + "]")
        events = found if isinstance(found, list) else found["traceEvents"]
        events = [event for event in events if event]  # Horovod ends with an empty one
        known = [event["args"][_TIMELINE_START] for event in events if _TIMELINE_START in event.get("args", ())]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{path} is no trace: neither an array of events nor an object that has traceEvents") from None
    base = found.get("baseTimeNanoseconds", 0) / 1e3 if isinstance(found, dict) else 0.0
    return _Source(path, events, float(known[0]) if known else base)


def _put_together(sources: Sequence[_Source]) -> dict[str, Any]:
    """Processes keep apart, whatever their numbers; the first event of all is at 0."""
    numbers = count()
    start = min((source.start + event["ts"] for source in sources for event in _timed(source)), default=0.0)
    events = []
    for source in sources:
        processes: dict[Any, int] = {}
        for event in source.events:
            process = event.get("pid")
            if process not in processes:
                processes[process] = next(numbers)
            moved = {**event, "pid": processes[process]}
            if "ts" in event:
                moved["ts"] = event["ts"] + source.start - start if event.get("ph") != "M" else 0
            events.append(moved)
    return {"traceEvents": events, "baseTimeNanoseconds": int(1e3 * start)}


def _timed(source: _Source) -> Iterator[Event]:
    return (event for event in source.events if event.get("ph") != "M" and "ts" in event)
