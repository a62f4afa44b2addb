"""Time training steps on hosts with a slow network: Horovod, torch's DDP and this library's methods, interleaved.

The hosts are network namespaces of this machine, which needs root; LOOPBACK=1 runs the ranks without any network in
between. Every option can be given as an environment variable, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import network_methods
from jobs import rows_in_turns
from network_hosts import Hosts, megabits, missing
from network_report import machine, plot, table_of
from rich.console import Console

from report import write_rows

_WORKER = Path(__file__).with_name("network_worker.py")
_DEFAULT_METHODS = (*network_methods.PEERS, "terngrad", "qsgd", "topk", "adacomp", "powersgd")
_PORT = 29511
_TCP = ("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo")


def emulated(options: argparse.Namespace, console: Console) -> Iterator[list[dict[str, Any]]]:
    """Rows of one job after the other."""
    for count in options.hosts:
        with Hosts(count, options.ranks_per_host) as hosts:
            for rate in options.rates:
                hosts.limit(rate)
                reached = hosts.throughput()
                console.print(f"{count} hosts at {rate}: one TCP connection carries {reached:.0f} Mbit/s")
                if reached < 0.85 * megabits(rate):
                    console.print(f"[red]that is less than 85 % of {rate}: this machine is too slow, or busy[/]")
                links = jobs.told(["-m", "hvd_compress", "doctor", "--json"], hosts.mpirun)
                for parameters in options.parameters:
                    network = ["--interface", hosts.interface, "--sharers", str(hosts.ranks_per_host)]
                    network += ["--master", f"{hosts.addresses[0]}:{_PORT}"]
                    programs = _programs(options, parameters, network)
                    rows = rows_in_turns(programs, hosts.mpirun, count * hosts.ranks_per_host)
                    kind = {"network": "emulated", "hosts": count, "rate_mbit": megabits(rate)}
                    kind |= {"ranks_per_host": hosts.ranks_per_host}
                    kind |= {"reached_mbit": round(reached, 1), "parameters": parameters, "doctor": links}
                    yield _with_bound([kind | row for row in rows])


def loopback(options: argparse.Namespace, console: Console) -> Iterator[list[dict[str, Any]]]:
    """As `emulated`, of ranks that talk through this machine's loopback interface, which nothing slows."""
    console.print("[red]loopback: no network in between, and bytes are of all that use the interface[/]")
    for count in options.hosts:
        for parameters in options.parameters:
            network = ["--interface", "lo", "--sharers", str(count), "--master", f"127.0.0.1:{_PORT}"]
            programs = _programs(options, parameters, network)
            rows = rows_in_turns(programs, jobs.on_this_machine(count, *_TCP), count)
            kind = {"network": "loopback", "hosts": count, "rate_mbit": None, "parameters": parameters}
            yield _with_bound([kind | row for row in rows])


def _programs(options: argparse.Namespace, parameters: str, network: list[str]) -> list[list[str]]:
    """Of the methods under Horovod, and of those without it."""
    by_horovod = [method for method in options.methods if network_methods.needs_horovod(method)]
    others = [method for method in options.methods if method not in by_horovod]
    common = [str(_WORKER), "--parameters", parameters, *network]
    each = options.seconds / len(options.methods)
    return [
        [*common, "--methods", ",".join(methods), "--seconds", str(each * len(methods))]
        for methods in (by_horovod, others)
        if methods
    ]


def _with_bound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the part of a step that is communication, if the step without any was measured."""
    bound = next((row["step_seconds"] for row in rows if row["method"] == "bound"), None)
    return [row | {"exposed_seconds": None if bound is None else row["step_seconds"] - bound} for row in rows]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(name: str, default: str, text: str) -> None:
        value = os.environ.get(name.upper()) or default
        parser.add_argument(f"--{name}", default=value, type=lambda given: given.split(","), help=text)

    several("hosts", "2,4", "numbers of hosts, one rank each")
    several("rates", "10gbit,1gbit,100mbit", "of the links")
    several("parameters", "10M,25M", f"models: {', '.join(network_methods.MODELS)}")
    several(
        "methods",
        ",".join(_DEFAULT_METHODS),
        f"{', '.join(network_methods.PEERS)}; NAME[:OPTION=VALUE...] of Compression, lgreco-bytes, lgreco-time, auto "
        "and auto-aggressive, under Horovod; hook-NAME... for the same by the hook of DistributedDataParallel; "
        f"local-NAME... to exchange after every {network_methods.EVERY} LocalSteps",
    )
    parser.add_argument(
        "--ranks-per-host", type=int, default=int(os.environ.get("RANKS_PER_HOST") or 1), help="of emulated hosts"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float(os.environ.get("SECONDS_EACH") or 40),
        help="for the rounds of a job, after its warm-up",
    )
    parser.add_argument(
        "--loopback", action="store_true", default=bool(os.environ.get("LOOPBACK")), help="no emulated hosts"
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="JSON; the plot goes beside it")
    options = parser.parse_args()
    if options.ranks_per_host < 1:
        parser.error(f"--ranks-per-host must be at least 1: {options.ranks_per_host}")
    try:
        options.hosts = [int(count) for count in options.hosts]
        [megabits(rate) for rate in options.rates]
        network_methods.check(options.methods)
    except ValueError as error:
        parser.error(str(error))
    if unknown := sorted({*options.parameters} - {*network_methods.MODELS}):
        parser.error(f"no such model: {', '.join(unknown)} (choose from {', '.join(network_methods.MODELS)})")
    if not options.loopback and (why := missing()):
        parser.error(why)
    return options


def main() -> None:
    options = parse()
    jobs.prepare()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(machine(max(options.hosts) * options.ranks_per_host))
    rows: list[dict[str, Any]] = []
    for found in (loopback if options.loopback else emulated)(options, console):
        rows += found
        console.print(table_of(found))
        if options.out:  # after each job: a long benchmark that is ended keeps what it has
            write_rows(options.out, rows)
            plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
