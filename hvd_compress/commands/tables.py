"""Tables of rich."""

from __future__ import annotations


def check() -> None:
    """Raise ImportError without rich: before anything is measured."""
    try:
        import rich.table  # noqa: F401
    except ImportError as error:
        raise ImportError("tables need rich: pip install rich, or ask for --json") from error
