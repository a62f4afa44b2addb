"""hvd-compress doctor: what is installed here, whether it works, and how fast ranks reach each other."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..launcher import launcher_of, rank_of
from ..transports.base import Transport
from .facts import Facts, facts_of_this_process
from .links import Link, measure, measure_sums
from .problems import cores_of, named_ranks, problems_of

_LIMIT_SECONDS = 120
_SHOWN_LINKS = 10


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is installed here, and whether it works",
        description=f"{__doc__} Start it by mpirun, horovodrun or torchrun to measure the links, too. "
        "The exit code is 0 if nothing needs a remedy, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="all that was found, for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with _ended_if_it_hangs():
        return _looked_at(options)


def _looked_at(options: argparse.Namespace) -> int:
    launcher = launcher_of(os.environ)
    mine = facts_of_this_process(launcher)
    everyone, links, sums, rank = [mine], [], None, rank_of(os.environ)
    try:
        transport = _connected(launcher, mine)
        if transport is not None:
            rank = transport.rank
            everyone = transport.gather_objects("hvd_compress.doctor.facts", mine).wait()
            if transport.size > 1:
                links, sums = measure(transport), measure_sums(transport, _horovods_sum(mine))
        problems = problems_of(everyone)
    except Exception as error:  # of any launcher's back end
        text = " ".join(str(error).split())
        problems = [*problems_of(everyone), f"ranks started by {launcher} cannot reach each other: {text}"]
    if rank == 0:
        found = {"ranks": everyone, "links": links, "sums_bits_per_second": sums, "problems": problems}
        lines = _lines(everyone, links, sums, problems)
        print(json.dumps(found, indent=1) if options.json else "\n".join(lines), flush=True)
    return 1 if problems else 0


def _connected(launcher: str | None, mine: Facts) -> Transport | None:
    """By what the launcher is for; None where there is but this process. MPI, where it can: Horovod may be on it."""
    if launcher == "torchrun":
        from ..transports.torch_distributed import over_gloo

        return over_gloo()
    if _by_mpi(mine):
        from mpi4py import MPI

        from ..transports.mpi import MPITransport

        return MPITransport(MPI.COMM_WORLD)
    if launcher is not None:
        import horovod.torch as hvd

        from ..transports.horovod import HorovodTransport

        hvd.init()
        return HorovodTransport()
    return None


def _by_mpi(mine: Facts) -> bool:
    return bool(mine["launcher"] == "mpirun" and mine["mpi"] and "error" not in mine["mpi"])


def _horovods_sum(mine: Facts) -> Callable[[Any], Any] | None:
    """What Horovod adds up by, where MPI was asked in its place; None for what was asked."""
    if not mine["horovod"] or not _by_mpi(mine):
        return None
    from mpi4py import MPI

    return lambda tensor: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, tensor.numpy())


@contextlib.contextmanager
def _ended_if_it_hangs() -> Iterator[None]:
    def end() -> None:
        print(f"hvd-compress doctor: some rank has not answered for {_LIMIT_SECONDS} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(_LIMIT_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _lines(
    everyone: Sequence[Facts], links: Sequence[Link], sums: float | None, problems: Sequence[str]
) -> Iterator[str]:
    first = everyone[0]
    yield f"hvd_compress {first['hvd_compress']}, Python {first['python']}, {first['system']}"
    yield f"torch {first['torch']}, numpy {first['numpy']}; {_listed(first['gpus']) or 'no GPUs'}"
    if first["variables"]:
        yield ", ".join(f"{name}={value}" for name, value in first["variables"].items())
    yield f"kernels: {_of(first['kernels'], _kernels)}"
    yield f"Horovod: {_of(first['horovod'], _horovod)}"
    yield f"MPI: {_of(first['mpi'], _mpi)}"
    yield f"torch.distributed: {_of(first['torch.distributed'], _back_ends)}"
    yield f"exchange of {first['exchange'].get('parameters', 0):,} parameters here: {_of(first['exchange'], _exchange)}"
    hosts: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        hosts.setdefault(facts["host"], []).append(rank)
    by = f", started by {first['launcher']}" if first["launcher"] else ", without a launcher"
    yield f"{_counted(len(everyone), 'rank')}{by}"
    for host, ranks in hosts.items():
        of_host = everyone[ranks[0]]
        cores, threads = _counted(cores_of(host, everyone), "core"), _counted(of_host["threads"], "thread")
        yield f"  {host}: {named_ranks(ranks)} on {cores}, of {threads} each"
    yield from _of_links(links)
    if sums is not None:
        yield f"sums of all ranks, by allreduce: {sums / 1e9:.3g} Gbit/s into each, as around a ring"
    yield "" if problems else "nothing needs a remedy"
    yield from (f"PROBLEM: {problem}" for problem in problems)


def _of_links(links: Sequence[Link]) -> Iterator[str]:
    by_speed = sorted(links, key=lambda link: link["bits_per_second"])
    if by_speed:
        middle = statistics.median(link["bits_per_second"] for link in links)
        yield f"links, by the back end's own alltoall, the slowest first; median {middle / 1e9:.3g} Gbit/s each way:"
    for link in by_speed[:_SHOWN_LINKS]:
        one, other = link["ranks"]
        speed = f"{link['bits_per_second'] / 1e9:.3g} Gbit/s"
        yield f"  ranks {one} and {other}: {speed}, {1e6 * link['latency_seconds']:.0f} us for eight bytes"
    if len(links) > _SHOWN_LINKS:
        yield f"  and {len(links) - _SHOWN_LINKS} faster ones"


def _of(found: Any, describe: Any) -> str:
    if not found:
        return "not installed"
    text: str = f"does not work: {found['error']}" if "error" in found else describe(found)
    return text


def _kernels(found: Facts) -> str:
    asked = f", as HVD_COMPRESS_KERNELS={found['asked']} asks" if found["asked"] else ""
    return f"{found['in_use']}{asked}" + ("" if found["built"] else ", none were built")


def _horovod(found: Facts) -> str:
    built = [name for name in ("mpi", "gloo", "nccl") if found[name]]
    return f"{found['version']}, built with {', '.join(built) or 'nothing'}"


def _mpi(found: Facts) -> str:
    threads = f", thread level {found['threads']}" if found["threads"] else ""
    return f"mpi4py {found['mpi4py']}, {found['library'] or 'library not asked'}{threads}"


def _back_ends(found: Facts) -> str:
    return ", ".join(name for name, there in found.items() if there) or "no back end"


def _exchange(found: Facts) -> str:
    return ", ".join(f"{name} {1e3 * seconds:.1f} ms a rank" for name, seconds in found["seconds"].items())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _listed(found: Any) -> str:
    return f"GPUs do not work: {found['error']}" if isinstance(found, dict) else ", ".join(found)
