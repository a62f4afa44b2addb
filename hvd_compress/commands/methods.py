"""Methods as people write them: NAME or NAME:OPTION=VALUE:... of `Compression`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from ..by_name import split
from ..compression import Compression
from ..environment import METHOD, OFF, is_off
from ..environment import method as asked_for
from ..gradient_compression import GradientCompression
from ..prediction import PLAIN, Maker

# Which need masks, a compression whose rates they choose, an optimizer by which they choose one, or time to try.
_OF_OTHERS = {"masked", "lgreco", "accordion", "fractrain", "recommended", "auto"}
NAMES = tuple(name for name in vars(Compression) if not name.startswith("_") and name not in _OF_OTHERS)


def add_to(parser: argparse.ArgumentParser, default: str) -> None:
    """The option --methods. What is compared is compared with none and fp16."""
    parser.add_argument(
        "--methods",
        type=lambda text: text.split(","),
        default=default.split(","),
        metavar="NAME[:OPTION=VALUE...],...",
        help=f"besides none and fp16; default: {default}",
    )


def makers_of(texts: Iterable[str]) -> dict[str, Maker]:
    """By what they are called: none, fp16, and these.

    Raises ValueError for what is none, and where the environment has another method take the place of all.
    """
    if variable := OFF if is_off() else METHOD if asked_for() else None:
        raise ValueError(f"{variable} is set, which changes every method that is compared. Remedy: unset it")
    return {text: method(text) for text in dict.fromkeys([*PLAIN, *texts])}


def method(text: str) -> Maker:
    """A function that makes it for named parameters, and takes further options.

    Raises ValueError for what is none.

    >>> import torch
    >>> method("topk:density=0.001")([("weight", torch.zeros(100, 100))], topology="gather").options.topology
    'gather'
    """
    name, values = split(text)
    if name not in NAMES:
        raise ValueError(f"no such method: {text} (choose from {', '.join(NAMES)})")

    def make(named: Any, **further: Any) -> GradientCompression:
        try:
            made: GradientCompression = getattr(Compression, name)(named, **(values | further))
        except TypeError as error:  # of an option that it does not have
            raise ValueError(f"{text}: {error}") from error
        return made

    return make
