"""What stays unsent in the long run, where it is kept in a residual: the error of a rate that lasts."""

from __future__ import annotations

import numpy as np


def lasting_errors(error: np.ndarray, reached: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Errors float64 [layers, candidates] after many steps, from today's: `error`, [layers].

    shares: what a candidate sends, as a part of the gradient as it is, [layers, candidates]; reached: that of the rates
        that have led to `error`, [layers].

    One step alone says little: top-k leaves out 99.5 % of the entries at a density of 0.5 %, and 99 % at 1 %. But an
    entry that is sent in every n-th step has added up n gradients by then. Where these are independent, each is on its
    way to a common threshold t as a random walk, which takes it t**2 / variance steps: t**2 is in proportion to
    1 / share, and so is the mean square of what is under way. (1 - share) takes it to zero where everything is sent.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # everything is sent, and no error left: that says nothing
        growth = np.maximum(1 / shares - 1, 0) / np.maximum(1 / reached - 1, 0)[:, None]
        return np.where(error[:, None] > 0, error[:, None] * np.sqrt(growth), 0.0)


def reached_share(before: float | None, share: float, steps: int) -> float:
    """The share whose error a layer has that sent `share` for `steps`, and had reached that of `before` until then.

    An entry waits 1 / share steps, about: so long does a layer remember.
    """
    return share if before is None else share + (before - share) * float(np.exp(-share * steps))
