"""Figures of matplotlib, which is asked for only where somebody wants to see something."""

from __future__ import annotations

from typing import Any


def figure(**options: Any) -> Any:
    """A new matplotlib.figure.Figure, which needs no display. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return Figure(layout="constrained", **options)
