"""Numbers as people write them: 25M parameters, 85ms, 1gbit; types for argparse, which shows their errors."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping


def _quantity(what: str, example: str, units: Mapping[str, float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-zA-Z/]*)\s*", text)
        unit = units.get(found[2].lower()) if found else None
        try:
            number = float(found[1]) if found else math.nan
        except ValueError:
            number = math.nan
        if unit is None or not math.isfinite(number):
            names = ", ".join(filter(None, units))
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}: such as {example}, in {names}")
        return number * unit

    return parse


_count = _quantity("number", "25M", {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9})
seconds = _quantity("time", "85ms", {"s": 1.0, "ms": 1e-3, "us": 1e-6})
_BITS = {"gbit": 1e9 / 8, "mbit": 1e6 / 8, "kbit": 1e3 / 8}
bytes_a_second = _quantity("rate", "1gbit", _BITS | {f"{name}/s": rate for name, rate in _BITS.items()})


def count(text: str) -> int:
    """25M, 250K or 7000."""
    return round(_count(text))
