"""Draws the rate of each layer over the steps, from a log of plans."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..pictures import figure
from . import journal


def plot_rates(log: str | Path, picture: str | Path) -> None:
    """Write a picture, of the type that its name ends in, of the plans in `log`.

    A layer's line begins with its first plan; before that it had the compressor's own rate. Needs matplotlib: raises
    ImportError without it, and ValueError for a file that is no log of plans.
    """
    plans = journal.read(Path(log))
    drawn = figure(figsize=(9, 5))
    _draw(drawn.subplots(), plans)
    drawn.savefig(Path(picture))


def _draw(axes: Any, plans: dict[int, dict[str, float]]) -> None:
    steps = sorted(plans)
    end = steps[-1] + (steps[-1] - steps[0]) / len(steps)  # so that the last plan can be seen
    for name in sorted({name for rates in plans.values() for name in rates}):
        known = [(step, plans[step][name]) for step in steps if name in plans[step]]
        at, rates = zip(*known, (end, known[-1][1]))
        axes.step(at, rates, where="post", label=name)
    axes.set(xlabel="step", ylabel="rate", yscale="log", title="rates by layer")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m hvd_compress.adaptive.plot", description=__doc__)
    parser.add_argument("log", type=Path, help="what log= named")
    parser.add_argument("picture", type=Path, help="file to write, such as rates.png")
    options = parser.parse_args(arguments)
    try:
        plot_rates(options.log, options.picture)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
