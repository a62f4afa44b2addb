"""Who sends what to whom: each way of exchanging frames, written once for all codecs."""

from .base import Part
from .cyclic import Cyclic
from .gather import Gather
from .hierarchical import Hierarchical
from .nodes import Nodes
from .regions import Piece, Span, regions, spans_of
from .scatter import Scatter

__all__ = ["Cyclic", "Gather", "Hierarchical", "Nodes", "Part", "Piece", "Scatter", "Span", "regions", "spans_of"]
