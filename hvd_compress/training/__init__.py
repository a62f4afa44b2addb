"""Techniques that change training itself; torch only, on one process or on many."""

from .acdc import ACDC
from .activation_pruning import ActivationPruning, Realised, find_places, prune_activation_gradients
from .masks import Masks
from .schedule import Phase, Schedule

__all__ = [
    "ACDC",
    "ActivationPruning",
    "Masks",
    "Phase",
    "Realised",
    "Schedule",
    "find_places",
    "prune_activation_gradients",
]
