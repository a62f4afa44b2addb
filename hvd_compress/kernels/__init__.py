"""The hot loops: pure functions on flat tensors. Today they are torch operations, on any device."""

from .gaps import decode_gaps, encode_gaps
from .random import random_bits, stream_key
from .sparse import pack_sparse, sparse_bytes, unpack_sparse
from .ternary import pack_ternary, ternarize, ternary_bytes, unpack_ternary
from .topk import topk_indices

__all__ = [
    "decode_gaps",
    "encode_gaps",
    "pack_sparse",
    "pack_ternary",
    "random_bits",
    "sparse_bytes",
    "stream_key",
    "ternarize",
    "ternary_bytes",
    "topk_indices",
    "unpack_sparse",
    "unpack_ternary",
]
