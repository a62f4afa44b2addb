"""The hot loops: pure functions on flat tensors, in C++ where `of` finds it, as torch operations on any device."""

from .affine import affine_bytes
from .choice import find_frames, in_use, largest_positions, of, on_host, orthonormalise, prune_dense, use
from .codec import NOT_FINITE, TOO_LARGE, PayloadError
from .counts import MOST_RANKS, count_bytes
from .gaps import decode_gaps, encode_gaps, token_width
from .narrow import narrow_bytes
from .positions import position_bytes
from .prune import decode_pruned, encode_pruned, pruned_entries
from .quantise import QUANTISED_BLOCK, quantised_bytes
from .random import key_at, random_bits, stream_key
from .sparse import pack_sparse, sparse_bytes, unpack_sparse
from .ternary import pack_ternary, ternarize, ternary_bytes, unpack_ternary
from .topk import topk_indices

__all__ = [
    "MOST_RANKS",
    "NOT_FINITE",
    "QUANTISED_BLOCK",
    "TOO_LARGE",
    "PayloadError",
    "affine_bytes",
    "count_bytes",
    "decode_gaps",
    "decode_pruned",
    "encode_gaps",
    "encode_pruned",
    "find_frames",
    "in_use",
    "key_at",
    "largest_positions",
    "of",
    "narrow_bytes",
    "on_host",
    "orthonormalise",
    "pack_sparse",
    "pack_ternary",
    "position_bytes",
    "prune_dense",
    "pruned_entries",
    "quantised_bytes",
    "random_bits",
    "sparse_bytes",
    "stream_key",
    "ternarize",
    "ternary_bytes",
    "token_width",
    "topk_indices",
    "unpack_sparse",
    "unpack_ternary",
    "use",
]
