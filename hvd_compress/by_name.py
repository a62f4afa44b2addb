"""Compressors by the names of their methods, as people write them: NAME or NAME:OPTION=VALUE:..."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection
from typing import Any

from . import compressors
from .compressors import Compressor, MaskedCompressor, OneOfCompressor, SparseGatherer

_OF_OTHERS = (MaskedCompressor, OneOfCompressor, SparseGatherer)  # of masks, of others, for what is sparse already


def name_of(compressor: type[Compressor]) -> str:
    """As which `Compression` has it.

    >>> name_of(compressors.StochasticPruningCompressor), name_of(compressors.TopKCompressor)
    ('stochastic_pruning', 'topk')
    """
    return compressor.label or compressor.__name__.removesuffix("Compressor").lower()


def _methods() -> dict[str, type[Compressor]]:
    exported = [cls for cls in vars(compressors).values() if inspect.isclass(cls) and issubclass(cls, Compressor)]
    chosen = [cls for cls in exported if not inspect.isabstract(cls) and cls not in _OF_OTHERS]
    return {name_of(cls): cls for cls in sorted(chosen, key=lambda cls: cls.algorithm)}


_BY_NAME = _methods()


def split(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options. Raises ValueError for an option that is none.

    >>> split("topk:density=0.001:topology='gather'")
    ('topk', {'density': 0.001, 'topology': 'gather'})
    """
    name, *options = text.split(":")
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        try:
            values[key] = ast.literal_eval(value if equals else "?")
        except (SyntaxError, ValueError):
            raise ValueError(f"{text}: {option!r} is no OPTION=VALUE, such as density=0.001") from None
    return name, values


def compressor_of(text: str, common: Collection[str] = ()) -> tuple[Compressor, dict[str, Any]]:
    """The compressor that `text` names, and those of its options that are among `common`.

    Raises ValueError for what is none.
    """
    name, options = split(text)
    if name not in _BY_NAME:
        raise ValueError(f"no such method: {text} (choose from {', '.join(_BY_NAME)})")
    further = {key: options.pop(key) for key in tuple(options) if key in common}
    try:
        return _BY_NAME[name](**options), further
    except TypeError as error:  # of an option that it does not have
        raise ValueError(f"{text}: {error}") from error
