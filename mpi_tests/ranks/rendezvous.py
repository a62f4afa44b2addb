"""Where the ranks of a job meet outside of what is tested: a socket of the host that they share."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from pathlib import Path

_POLL_SECONDS = 0.01
_BYTES = 1 << 16  # of a message


class Rendezvous:
    """Rank 0 hears the word of every other rank, and tells them all. All ranks hold the same meetings, in one order."""

    def __init__(self, path: Path, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._peers: list[socket.socket] = []  # of rank 0 all others, by rank; of these rank 0
        if rank == 0:
            with _socket() as listening:
                listening.bind(str(path))
                listening.listen(size)
                arrived = [listening.accept()[0] for _ in range(size - 1)]
            of_rank = {int(peer.recv(_BYTES)): peer for peer in arrived}
            self._peers = [of_rank[rank] for rank in sorted(of_rank)]
        else:
            self._peers = [_socket()]
            while self._peers[0].connect_ex(str(path)):
                time.sleep(_POLL_SECONDS)
            _send(self._peers[0], str(rank))

    def meet(self, word: str, timeout_seconds: float | None = None) -> list[str] | None:
        """Wait for all ranks; returns what each of them says, or None if one does not come in time or is gone."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        if self._rank:
            _send(self._peers[0], word)
            told = _receive(self._peers[0], deadline)
            return told if told is None else json.loads(told)
        said = [word]
        for peer in self._peers:
            if (heard := _receive(peer, deadline)) is None:
                return None
            said.append(heard)
        for peer in self._peers:
            _send(peer, json.dumps(said))
        return said


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # which keeps messages apart


def _send(peer: socket.socket, message: str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who is gone will be missed when it is heard
        peer.send(message.encode())


def _receive(peer: socket.socket, deadline: float | None) -> str | None:
    peer.settimeout(None if deadline is None else max(deadline - time.monotonic(), _POLL_SECONDS))
    with contextlib.suppress(TimeoutError, socket.timeout, ConnectionResetError):
        return peer.recv(_BYTES).decode() or None
    return None
