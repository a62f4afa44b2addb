"""Techniques that change training itself; torch only, on one process or on many."""

from .acdc import ACDC
from .activation_pruning import ActivationPruning, Realised, find_places, prune_activation_gradients
from .gap import GaP
from .masks import Masks
from .novograd import NovoGrad
from .predicted_weights import predicted_weights
from .schedule import Phase, Schedule

__all__ = [
    "ACDC",
    "ActivationPruning",
    "GaP",
    "Masks",
    "NovoGrad",
    "Phase",
    "Realised",
    "Schedule",
    "find_places",
    "predicted_weights",
    "prune_activation_gradients",
]
