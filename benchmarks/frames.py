"""Damaged frames, a million of them: none is taken for a good one, none ends the process or reads beyond its end.

Half of them keep their checksum, and must raise WireError unless they are as they were. In the other half the checksum
is made right again, as of a sender that computes wrongly: WireError, or a result. Frames and sums end where memory that
may not be touched begins. FRAMES=1000000, METHODS, SEED=0, OUT=rows.json.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the frames are made as those of the tests

import torch
from rich.console import Console
from rich.table import Table

from hvd_compress import WireError, wire
from hvd_compress.compressors import Parameter, Slot, Step
from hvd_compress.requests import Allgather
from mpi_tests.unit import drive
from report import write_rows

METHODS = {**drive.FRAMED, "dgc": drive.MIXED["dgc"]}
SHAPE = (9, 37)
_LENGTH = struct.Struct("<Q")
_LENGTH_AT = 24
_BATCH = 1000
_MEMORY_BYTES = 1 << 29  # more than now: who believes a damaged length fails


class Fence:
    """Memory that ends where the process may not read or write."""

    def __init__(self, most_bytes: int) -> None:
        pages = -(-most_bytes // mmap.PAGESIZE) + 1
        self._memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
        self._end = (pages - 1) * mmap.PAGESIZE
        self._view = torch.frombuffer(self._memory, dtype=torch.uint8, count=self._end)
        if ctypes.CDLL(None, use_errno=True).mprotect(
            ctypes.c_void_p(self._view.data_ptr() + self._end), mmap.PAGESIZE, 0
        ):
            raise OSError(ctypes.get_errno(), "mprotect")

    def last(self, length: int) -> torch.Tensor:
        return self._view[self._end - length :]

    def put(self, data: bytes) -> torch.Tensor:
        place = self.last(len(data))
        ctypes.memmove(place.data_ptr(), data, len(data))
        return place


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, 40)]


def lengthen(data: bytearray, rng: random.Random) -> None:
    place = rng.randint(0, len(data))
    data[place:place] = rng.randbytes(rng.randint(1, 40))


def swap(data: bytearray, rng: random.Random) -> None:
    middle = rng.randrange(len(data))
    data[:] = data[middle:] + data[:middle]


def lie(data: bytearray, rng: random.Random) -> None:
    """About the length."""
    if len(data) >= _LENGTH_AT + 8:
        _LENGTH.pack_into(data, _LENGTH_AT, rng.choice([0, 1, len(data), rng.getrandbits(20), rng.getrandbits(64)]))


def overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + 8] = rng.randbytes(8)[: len(data) - start]


DAMAGES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, cut, lengthen, swap, lie, overwrite)


def sealed(data: bytes, frame: bytes, rng: random.Random) -> bytes:
    """A payload that is damaged, or a header, with a length and a checksum that are right."""
    padding = -_LENGTH.unpack_from(frame, _LENGTH_AT)[0] % 4
    header, payload = bytearray(data[:32].ljust(32, b"\0")), data[36 : len(data) - padding]
    if rng.random() < 0.7:  # what is no frame at all is refused before its payload is looked at
        header[:_LENGTH_AT] = frame[:_LENGTH_AT]
    _LENGTH.pack_into(header, _LENGTH_AT, len(payload))
    checksum = struct.pack("<I", zlib.crc32(header + payload))
    return bytes(header) + checksum + payload + bytes(-len(payload) % 4)


def is_refused(buffer: torch.Tensor) -> bool:
    """By what sees a frame first."""
    try:
        wire.unpack(wire.split(buffer, 1, 1)[0], 1)
    except WireError:
        return True
    return False


def decode(
    compressor: Any, gradient: torch.Tensor, mine: torch.Tensor, theirs: torch.Tensor, out: torch.Tensor
) -> bool:
    """The way of a frame in the exchange; whether it is refused."""
    slot = Slot(Parameter("weight", 0, gradient.shape), Step(size=2), out=out)
    exchange = compressor.exchange(slot, gradient)
    request = next(exchange)
    try:
        while True:
            answer = [mine.clone(), theirs] if isinstance(request, Allgather) else request.tensor.clone()
            request = exchange.send(answer)
    except StopIteration:
        return False
    except WireError:
        return True


def try_frames(name: str, count: int, seed: int, results: Any) -> None:
    """Put (frames, refused, read, wrongly accepted) into `results`, batch by batch."""
    torch.set_num_threads(1)
    rng, compressor = random.Random(f"{seed} {name}"), METHODS[name]
    gradients = [drive.random(*SHAPE, seed=rank) for rank in range(2)]
    mine, theirs = drive.run(compressor, gradients).frames
    frame = drive.bits(theirs)
    arrived, sums = Fence(len(frame) + 4096), Fence(4 * gradients[0].numel())
    limit()
    out = sums.last(4 * gradients[0].numel()).view(torch.float32)
    if decode(compressor, gradients[0], mine, arrived.put(frame), out):
        raise AssertionError(f"{name}: a frame without damage is refused")
    refused = read = wrong = 0
    for number in range(1, count + 1):
        data = bytearray(frame)
        for _ in range(rng.randint(1, 2)):
            if data:
                rng.choice(DAMAGES)(data, rng)
        if number % 2:
            accepted = not is_refused(arrived.put(bytes(data)))
            refused += not accepted
            wrong += accepted and bytes(data) != frame
        else:
            whole = sealed(bytes(data), frame, rng)
            no = decode(compressor, gradients[0], mine, arrived.put(whole), out)
            refused += no
            read += not no
        if number % _BATCH == 0 or number == count:
            results.put((number, refused, read, wrong))


def limit() -> None:
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def row_of(name: str, count: int, seed: int, progress: Callable[[int], None]) -> dict[str, Any]:
    """What became of `count` frames of a method, in a process of its own."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=try_frames, args=(name, count, seed, results))
    process.start()
    found = (0, 0, 0, 0)
    while found[0] < count and (process.is_alive() or not results.empty()):
        try:
            found = results.get(timeout=1.0)
        except Exception:  # none yet, or none any more
            continue
        progress(found[0])
    process.join()
    tried, refused, read, wrong = found
    crashed = f"exit code {process.exitcode} after {tried} frames" if process.exitcode else ""
    return {"method": name, "frames": tried, "refused": refused, "read": read, "wrong": wrong, "crashed": crashed}


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 120)
    count, seed = int(os.environ.get("FRAMES") or 1_000_000), int(os.environ.get("SEED") or 0)
    names = [name for name in os.environ.get("METHODS", "").split(",") if name] or list(METHODS)
    if unknown := sorted({*names} - {*METHODS}):
        sys.exit(f"METHODS: {', '.join(unknown)} is none of {', '.join(METHODS)}")
    rows, started = [], time.monotonic()
    for number, name in enumerate(names):
        share = count * (number + 1) // len(names) - count * number // len(names)

        def progress(tried: int, name: str = name, share: int = share) -> None:
            if console.is_terminal:
                console.print(f"{name}: {tried:,} of {share:,}", end="\r")

        rows.append(row_of(name, share, seed, progress))
    table = Table("method", *("frames", "refused", "read", "wrong", "crashed"), title="damaged frames")
    for row in rows:
        table.add_row(
            row["method"], *[f"{row[key]:,}" for key in ("frames", "refused", "read", "wrong")], row["crashed"]
        )
    console.print(table)
    tried, wrong = (sum(row[key] for row in rows) for key in ("frames", "wrong"))
    crashed = sum(bool(row["crashed"]) for row in rows)
    console.print(
        f"{tried:,} frames in {time.monotonic() - started:.0f} s, {wrong} wrongly accepted, {crashed} crashes"
    )
    if os.environ.get("OUT"):
        write_rows(os.environ["OUT"], rows)
    return 1 if wrong or crashed or tried < count else 0


if __name__ == "__main__":
    sys.exit(main())
