"""What forward keeps for backward, in few bits."""

from .compressed import CompressedActivations
from .forward import Saved
from .rules import RULES

__all__ = ["RULES", "CompressedActivations", "Saved"]
