"""Gradient compression for data-parallel PyTorch training on unmodified Horovod, on plain MPI and in torch's DDP."""

from .compression import Compression
from .environment import set_log_level
from .fingerprint import MismatchError
from .gradient_compression import GradientCompression
from .version import __version__
from .wire import WireError

set_log_level()

__all__ = ["Compression", "GradientCompression", "MismatchError", "WireError", "__version__"]
