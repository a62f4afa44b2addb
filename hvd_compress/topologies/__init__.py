"""Who sends what to whom: each way of exchanging frames, written once for all codecs."""

from .base import Part
from .gather import Gather

__all__ = ["Gather", "Part"]
