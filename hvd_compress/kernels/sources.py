"""What the C++ kernels are compiled of, so that a checkout does not call those of other sources.

setup.py runs this file by itself, without the package and what that needs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(directory: Path) -> str | None:
    """SHA-256 of the names and bytes of the C++ files in `directory`, in hexadecimal; None where there are none."""
    files = sorted(path for path in directory.glob("*.[ch]pp"))
    found = hashlib.sha256()
    for path in files:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest() if files else None
