"""Jobs of one benchmark that take turns: while one measures, all processes of the others are stopped.

Horovod's background threads look for work all the time, and ranks of an emulated network share their cores: what is
measured without Horovod must not have it in the same process, nor beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_POLL_SECONDS = 2e-3


class Turns:
    """A rank's side."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank
        self._number = 0

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--turns", type=Path, required=True, help="directory by which jobs take turns")

    def wait(self) -> None:
        """Give the turn away, when all ranks of the job call this, and wait for the next one."""
        self._number += 1
        (self._directory / f"{self._rank}.{self._number}").write_text(str(os.getpid()))
        while not (self._directory / f"go.{self._number}").exists():
            time.sleep(_POLL_SECONDS)


class Job:
    """The benchmark's side of a job of `ranks` processes, which must call Turns.wait equally often."""

    def __init__(self, directory: Path, ranks: int, ended: Callable[[], bool]) -> None:
        self._directory, self._ranks, self._ended = directory, ranks, ended
        self._number = 0
        self._pids: list[int] = []

    def turn(self) -> bool:
        """Let it run until all its ranks wait, or it ends; returns whether it is to have another turn."""
        if self._number:
            self._signal(signal.SIGCONT)
            (self._directory / f"go.{self._number}").touch()
        self._number += 1
        waiting = [self._directory / f"{rank}.{self._number}" for rank in range(self._ranks)]
        while not all(path.exists() and path.read_text() for path in waiting):
            if self._ended():
                return False
            time.sleep(_POLL_SECONDS)
        self._pids = [int(path.read_text()) for path in waiting]
        self._signal(signal.SIGSTOP)
        return True

    def release(self) -> None:
        """What is stopped could not be ended."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def take(jobs: Sequence[Job]) -> None:
    """Turn by turn until all have ended."""
    going = list(jobs)
    while going:
        going = [job for job in going if job.turn()]
