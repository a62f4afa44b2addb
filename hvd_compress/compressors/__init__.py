"""One algorithm a file; `base` holds their contract."""

from .adacomp import AdaCompCompressor
from .base import Compressor, Slot, SummedCompressor
from .bf16 import BF16Compressor
from .fp16 import FP16Compressor
from .none import NoneCompressor
from .qsgd import QSGDCompressor
from .sparse import SparseGatherer
from .terngrad import TernGradCompressor
from .topk import TopKCompressor

__all__ = [
    "AdaCompCompressor",
    "BF16Compressor",
    "Compressor",
    "FP16Compressor",
    "NoneCompressor",
    "QSGDCompressor",
    "Slot",
    "SparseGatherer",
    "SummedCompressor",
    "TernGradCompressor",
    "TopKCompressor",
]
