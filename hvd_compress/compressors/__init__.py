"""One algorithm a file; `base` holds their contract."""

from .adacomp import AdaCompCompressor
from .alone import relative_error
from .base import Compressor, SummedCompressor
from .bf16 import BF16Compressor
from .codec import AUTO, GATHER, HIERARCHICAL, SCATTER, TOPOLOGIES, Codec, ScatterCodec
from .dgc import DGCCompressor
from .fp16 import FP16Compressor
from .masked import MaskedCompressor, MaskError, MaskSource
from .none import NoneCompressor
from .one_of import OneOfCompressor
from .onebit import OneBitCompressor
from .powersgd import PowerSGDCompressor
from .qsgd import QSGDCompressor
from .scalecom import ScaleComCompressor
from .slot import Parameter, Slot, Step
from .sparse import SparseGatherer
from .stochastic_pruning import StochasticPruningCompressor
from .terngrad import TernGradCompressor
from .topk import TopKCompressor
from .traffic import traffic, warn_if_more_than_dense

__all__ = [
    "AUTO",
    "GATHER",
    "HIERARCHICAL",
    "SCATTER",
    "TOPOLOGIES",
    "AdaCompCompressor",
    "BF16Compressor",
    "Codec",
    "Compressor",
    "DGCCompressor",
    "FP16Compressor",
    "MaskError",
    "MaskSource",
    "MaskedCompressor",
    "NoneCompressor",
    "OneBitCompressor",
    "OneOfCompressor",
    "Parameter",
    "PowerSGDCompressor",
    "QSGDCompressor",
    "ScaleComCompressor",
    "ScatterCodec",
    "Slot",
    "SparseGatherer",
    "Step",
    "StochasticPruningCompressor",
    "SummedCompressor",
    "TernGradCompressor",
    "TopKCompressor",
    "relative_error",
    "traffic",
    "warn_if_more_than_dense",
]
