"""Starts ranks for torch.distributed and waits until each has ended by itself: each_alone.py RANKS SCRIPT ARGUMENT...

torchrun ends the others as soon as it sees that one has failed, and it may look at any time.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable

ranks, *command = sys.argv[1:]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": ranks}


def show(rank: int, lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"[{rank}]<stdout>: {line}")  # as torchrun's lines begin
        sys.stdout.flush()


processes = [
    subprocess.Popen(
        [sys.executable, "-u", *command],
        env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for rank in range(int(ranks))
]
readers = [threading.Thread(target=show, args=(rank, process.stdout)) for rank, process in enumerate(processes)]
for reader in readers:
    reader.start()
for reader in readers:
    reader.join()
sys.exit(any(process.wait() for process in processes))
