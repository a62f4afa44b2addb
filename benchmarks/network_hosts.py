"""Hosts on one machine: network namespaces that are joined by links of a given rate, and mpirun across them.

Everything is made inside namespaces of its own, under names that no other run has, and is gone when they are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PREFIX = "hvdcbench"
INTERFACE = "net0"  # of every host
_NETWORK = "198.18.0"  # RFC 2544: for benchmarks of networks
_PORT = 5555
_LATENCY_MS = 50  # that a packet may wait in a queue
_LEAST_BURST = 256 << 10  # bytes
_BURST_SECONDS = 2e-3  # what a fast link may send at once: its timer does not fire more often for sure

_UNITS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}


def megabits(rate: str) -> float:
    """Of a rate such as 1gbit or 100mbit. Raises ValueError for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not found or not float(found[1]):
        raise ValueError(f"a rate is a number and kbit, mbit or gbit, such as 100mbit: {rate!r}")
    return float(found[1]) * _UNITS[found[2]]


def missing() -> str | None:
    """Why hosts cannot be made here, and the remedy; None if they can."""
    if os.geteuid() != 0:
        return "emulated hosts need root, for network namespaces. Remedy: run as root, or LOOPBACK=1 (no network)"
    if lacking := [program for program in ("ip", "tc", "unshare", "mount") if shutil.which(program) is None]:
        return f"emulated hosts need {', '.join(lacking)}. Remedy: install iproute2 and util-linux, or LOOPBACK=1"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return f"this machine makes no network namespaces: {done.stderr.strip()}. Remedy: LOOPBACK=1 (no network)"
    run("ip", "netns", "del", probe)
    return None


def run(*command: str) -> str:
    """The output of a command; raises RuntimeError, with what it said, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Hosts:
    """`count` hosts, h0, h1, ..., as a context: two are joined by a cable, more by a switch."""

    def __init__(self, count: int, ranks_per_host: int = 1) -> None:
        if not 2 <= count <= 200:
            raise ValueError(f"2 to 200 hosts can be joined: {count}")
        self.count = count
        self.ranks_per_host = ranks_per_host
        self.names = [f"h{number}" for number in range(count)]
        self.addresses = [f"{_NETWORK}.{number + 1}" for number in range(count)]
        self.interface = INTERFACE
        self._mark = f"{PREFIX}-{os.getpid()}"
        self._ends: list[tuple[str, str]] = []  # namespace and interface of every end of a link
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def namespace(self, host: str) -> str:
        return f"{self._mark}-{host}"

    def __enter__(self) -> Hosts:
        _remove_abandoned()
        try:
            self._files = tempfile.TemporaryDirectory(prefix=PREFIX)
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove all that was made; the links go with the namespaces."""
        for namespace in _namespaces(f"{self._mark}-"):
            _remove(namespace)
        if self._files:
            self._files.cleanup()

    def _make(self) -> None:
        for host in self.names + (["switch"] if self.count > 2 else []):
            run("ip", "netns", "add", self.namespace(host))
            run("ip", "-n", self.namespace(host), "link", "set", "lo", "up")
        if self.count == 2:
            self._cable("h0", "h1", INTERFACE)
        else:
            switch = self.namespace("switch")
            run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", switch, "link", "set", "bridge", "up")
            for number, host in enumerate(self.names):
                self._cable(host, "switch", f"port{number}")
                run("ip", "-n", switch, "link", "set", f"port{number}", "master", "bridge")
        for host, address in zip(self.names, self.addresses):
            run("ip", "-n", self.namespace(host), "addr", "add", f"{address}/24", "dev", INTERFACE)
        assert self._files is not None
        known = [f"{address} {host}" for host, address in zip(self.names, self.addresses)]
        (Path(self._files.name) / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
        self._write_agent(Path(self._files.name) / "agent")

    def _cable(self, host: str, other: str, others_interface: str) -> None:
        ends = [(self.namespace(host), INTERFACE), (self.namespace(other), others_interface)]
        (first, mine), (second, its) = ends
        run("ip", "link", "add", mine, "netns", first, "type", "veth", "peer", "name", its, "netns", second)
        for namespace, interface in ends:
            run("ip", "-n", namespace, "link", "set", interface, "up")
        self._ends += ends

    def _write_agent(self, path: Path) -> None:
        """What mpirun takes for ssh: `agent HOST COMMAND...` runs the command on that host."""
        path.write_text(
            textwrap.dedent(
                f"""\
                #!/bin/sh
                host=$1
                shift
                exec ip netns exec {self._mark}-$host unshare --uts --mount sh -c '
                    mount --bind "$0" /etc/hosts && hostname "$1" && exec sh -c "$2"
                ' {path.parent}/hosts "$host" "$*"
                """
            )
        )
        path.chmod(0o700)

    def limit(self, rate: str) -> None:
        """Let no end of a link send faster than `rate`, such as 1gbit."""
        burst = max(_LEAST_BURST, int(megabits(rate) * 1e6 / 8 * _BURST_SECONDS))
        for namespace, interface in self._ends:
            tbf = ("tbf", "rate", rate, "burst", f"{burst}b", "latency", f"{_LATENCY_MS}ms")
            run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", interface, "root", *tbf)

    def throughput(self, seconds: float = 1.0) -> float:
        """Megabits a second that one TCP connection really carries from h1 to h0."""
        with subprocess.Popen(
            self.command("h0", sys.executable, "-c", _RECEIVE, str(_PORT)), stdout=subprocess.PIPE, text=True
        ) as receiver:
            assert receiver.stdout is not None
            receiver.stdout.readline()  # it listens
            run(*self.command("h1", sys.executable, "-c", _SEND, self.addresses[0], str(_PORT), str(seconds)))
            return float(receiver.stdout.read())

    def command(self, host: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def mpirun(self, program: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        """The command that runs `program` with its ranks on every host and, besides PATH, these variables."""
        assert self._files is not None
        network, agent = f"{_NETWORK}.0/24", f"{self._files.name}/agent"
        options = ["--host", ",".join(f"{host}:{self.ranks_per_host}" for host in self.names), "--bind-to", "none"]
        options += ["--prtemca", "plm_ssh_agent", agent, "--prtemca", "prte_if_include", network]
        if _open_mpi_major() < 5:
            options[-6:] = ["--mca", "plm_rsh_agent", agent, "--mca", "oob_tcp_if_include", network]
        options += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", network]
        exported = [part for name in ("PATH", *environment) for part in ("-x", name)]
        line = " ".join(_quoted(["mpirun", *options, *exported, *program]))
        return [agent, "h0", line]


def _quoted(words: Sequence[str]) -> list[str]:
    import shlex

    return [shlex.quote(word) for word in words]


def _open_mpi_major() -> int:
    found = re.search(r"(\d+)\.", run("mpirun", "--version"))
    return int(found[1]) if found else 5


def _namespaces(prefix: str) -> Iterator[str]:
    for line in run("ip", "netns", "list").splitlines():
        if line.startswith(prefix):
            yield line.split()[0]


def _remove(namespace: str) -> None:
    """With the processes that are left in it."""
    for pid in run("ip", "netns", "pids", namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    run("ip", "netns", "del", namespace)


def _remove_abandoned() -> None:
    """What runs have left that were killed."""
    for namespace in _namespaces(f"{PREFIX}-"):
        pid = namespace.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            _remove(namespace)


_RECEIVE = """
import socket, sys, time
with socket.create_server(("", int(sys.argv[1]))) as server:
    print("listening", flush=True)
    connection, _ = server.accept()
    buffer, total, start = bytearray(1 << 20), 0, time.perf_counter()
    while count := connection.recv_into(buffer):
        total += count
    print(total * 8e-6 / (time.perf_counter() - start))
"""

_SEND = """
import socket, sys, time
data, end = bytes(1 << 20), time.perf_counter() + float(sys.argv[3])
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    while time.perf_counter() < end:
        connection.sendall(data)
"""
