"""Tensors that a thread of C++ can let go of without Python's lock."""

from __future__ import annotations

from torch import Tensor


def anchored(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """`tensor` for a library to post, and an anchor to keep until the library has let go of it.

    The last in C++ to let go of a tensor that Python has as well needs Python's lock for it (seen with torch 2.13).
    Horovod's thread does so with the tensors of what it drops at a shutdown, and holds a lock meanwhile that whoever
    posts takes under Python's: the job hangs. An anchor is a view, which holds its base in C++, so that the thread is
    not the last one.
    """
    base = tensor.data if tensor._is_view() else tensor
    return base, base.view_as(base)
