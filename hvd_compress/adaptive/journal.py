"""Plans as JSON lines: what was decided, from what, and from which step it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..telemetry.export import append_lines
from .layers import Layer
from .policies import Decision, Statistics


def line_of(number: int, step: int, statistics: Statistics, decision: Decision) -> dict[str, Any]:
    """One plan: its number, the first step that it holds for, and per layer the rates, their errors and costs."""
    layers = [
        _layer(layer, statistics.errors[row], statistics.costs[row], statistics.norms[row], decision.choice[row])
        for row, layer in enumerate(statistics.layers)
    ]
    return {"number": number, "step": step} | decision.record | {"layers": layers}


def _layer(layer: Layer, errors: Any, costs: Any, norm: float, choice: int) -> dict[str, Any]:
    count = len(layer.rates)
    return {
        "name": layer.name,
        "rate": layer.rates[choice],
        "rates": list(layer.rates),
        "errors": errors[:count].tolist(),
        "costs": costs[:count].tolist(),
        "norm": float(norm),
    }


def append(path: Path, line: dict[str, Any]) -> None:
    append_lines(path, [json.dumps(_finite(line), allow_nan=False)])


def _finite(value: Any) -> Any:
    """`value` with None, which JSON has, in place of what is not finite, which it has not."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path, names: Sequence[str] | None = None) -> dict[int, dict[str, float]]:
    """The plans of a log, {first step: {parameter: rate}}; of several for one step, the last one.

    Raises ValueError for a file that is no such log, or that tells of other parameters than `names`, where given.
    """
    plans: dict[int, dict[str, float]] = {}
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
            plans[int(line["step"])] = {layer["name"]: float(layer["rate"]) for layer in line["layers"]}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"line {number} of {path} is no plan: {error!r}") from error
    if not plans:
        raise ValueError(f"{path} holds no plan")
    if names is None:
        return plans
    if strange := sorted({name for rates in plans.values() for name in rates} - set(names)):
        raise ValueError(f"{path} is of another model: it has rates for {', '.join(strange)}, which are not parameters")
    return plans
