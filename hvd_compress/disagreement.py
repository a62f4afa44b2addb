"""The errors that all ranks raise where what they saw of their parameters does not go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .facts import Agreement, Fact, Facts, General
from .fingerprint import MismatchError

_NAMED = 3  # parameters in one error
_MEMBERSHIP = {Fact.TRAINED: "trained", Fact.FROZEN: "frozen", Fact.ABSENT: "not in the optimizer"}


def find(agreement: Agreement, mine: Facts, agreed: Facts, names: Sequence[str], fault: str | None) -> Exception | None:
    """What is wrong, if anything is; the same answer on every rank, all of which gather the details."""
    if agreed.general(General.FAULT):
        return _faults(agreement.texts(fault))
    first, *others = (set(agreed.where(kind)) for kind in _MEMBERSHIP)
    if differing := (first & (others[0] | others[1])) | (others[0] & others[1]):
        return _membership(agreement.of_all(mine), sorted(differing), names)
    if changed := agreed.where(Fact.CHANGED):
        return _changed(agreement.of_all(mine), changed, names)
    if agreed.general(General.THREW) and agreed.general(General.KEPT):
        return _thrown(agreement.of_all(mine))
    return None


def _faults(texts: Sequence[str | None]) -> Exception:
    different = dict.fromkeys(text for text in texts if text)
    return ValueError("; ".join(f"{_ranks(text == other for other in texts)}: {text}" for text in different))


def _membership(of_all: Sequence[Facts], differing: Sequence[int], names: Sequence[str]) -> Exception:
    def places(index: int) -> str:
        ranks = {text: _ranks(bool(facts.of(index, kind)) for facts in of_all) for kind, text in _MEMBERSHIP.items()}
        return f"{names[index]!r} is " + ", ".join(f"{text} on {where}" for text, where in ranks.items() if where)

    return MismatchError(
        f"the ranks train other parameters: {_listed(differing, places, '; ')}. Set requires_grad and add parameter "
        "groups on all ranks alike, between the same two steps."
    )


def _changed(of_all: Sequence[Facts], changed: Sequence[int], names: Sequence[str]) -> Exception:
    where = _ranks(bool(facts.where(Fact.CHANGED)) for facts in of_all)
    return RuntimeError(
        f"gradients were changed on {where} after backward() and before they were combined over the ranks, those of "
        f"{_listed(changed, lambda index: repr(names[index]), ', ')}. The change would be lost, or not be the same on "
        "all ranks. Combine them first, by synchronize():\n"
        "    optimizer.synchronize()\n"
        "    ...  # what changes gradients, such as scaler.unscale_(optimizer) or clip_grad_norm_()\n"
        "    with optimizer.skip_synchronize():\n"
        "        optimizer.step()"
    )


def _thrown(of_all: Sequence[Facts]) -> Exception:
    return RuntimeError(
        f"zero_grad() threw away the gradients of a backward pass on {_ranks(f.general(General.THREW) for f in of_all)}"
        f", in which there were none on {_ranks(f.general(General.KEPT) for f in of_all)}, so that those of the next "
        "one are lost there. Call synchronize() before such a zero_grad()."
    )


def _listed(indices: Sequence[int], text: Callable[[int], str], separator: str) -> str:
    more = [f"and {len(indices) - _NAMED} more"] if len(indices) > _NAMED else []
    return separator.join([*map(text, indices[:_NAMED]), *more])


def _ranks(hits: Iterable[bool]) -> str:
    """ "rank 1", "ranks 0, 2", or nothing."""
    ranks = [str(rank) for rank, hit in enumerate(hits) if hit]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" if ranks else ""
