"""The hot loops: pure functions on flat tensors, in C++ where `of` finds it, as torch operations on any device."""

from .choice import in_use, of, prune_dense, use
from .codec import NOT_FINITE, PayloadError
from .gaps import decode_gaps, encode_gaps
from .quantise import quantised_bytes
from .random import random_bits, stream_key
from .sparse import pack_sparse, sparse_bytes, unpack_sparse
from .ternary import pack_ternary, ternarize, ternary_bytes, unpack_ternary
from .topk import topk_indices

__all__ = [
    "NOT_FINITE",
    "PayloadError",
    "decode_gaps",
    "encode_gaps",
    "in_use",
    "of",
    "pack_sparse",
    "pack_ternary",
    "prune_dense",
    "quantised_bytes",
    "random_bits",
    "sparse_bytes",
    "stream_key",
    "ternarize",
    "ternary_bytes",
    "topk_indices",
    "unpack_sparse",
    "unpack_ternary",
    "use",
]
