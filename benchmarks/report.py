"""What the benchmarks share: rows of results, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` as a JSON list, in place of what `path` held."""
    path = Path(path)
    whole = path.with_name(f".{path.name}.new")
    whole.write_text(json.dumps(list(rows), indent=1) + "\n")
    os.replace(whole, path)


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """What `write_rows` wrote."""
    rows: list[dict[str, Any]] = json.loads(Path(path).read_text())
    return rows
