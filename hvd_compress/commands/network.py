"""The network of hvd-compress predict: by its options, and by what hvd-compress doctor --json has measured on it."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..prediction import PAYLOAD, Cluster
from . import quantities
from .links import Link

_LATENCY_SECONDS, _CYCLE_SECONDS = 50e-6, 1e-3


def add_to(parser: argparse.ArgumentParser) -> None:
    network = parser.add_argument_group("network", "what is given goes before what doctor has found")
    network.add_argument(
        "--doctor",
        type=Path,
        metavar="FILE",
        help="what hvd-compress doctor --json printed under mpirun on the cluster",
    )
    network.add_argument("--link", type=quantities.bytes_a_second, metavar="1gbit", help="of a node, as it is called")
    network.add_argument("--ranks", type=int, metavar="N")
    network.add_argument("--per-node", type=int, metavar="G", help="ranks that share a link; default 1")
    network.add_argument(
        "--latency", type=quantities.seconds, metavar="50us", help="of a message between two nodes; default 50us"
    )
    network.add_argument(
        "--cycle",
        type=quantities.seconds,
        default=_CYCLE_SECONDS,
        metavar="1ms",
        help="HOROVOD_CYCLE_TIME; 0s for plain MPI and torchrun; default 1ms",
    )


def cluster_of(options: argparse.Namespace) -> Cluster:
    """Raises ValueError for a network that is not told, or cannot be."""
    found: dict[str, Any] = {} if options.doctor is None else _measured(options.doctor)
    if options.link is not None:
        found |= {"bandwidth": PAYLOAD * options.link, "sum_bandwidth": None}
    for name, value in (
        ("ranks", options.ranks),
        ("ranks_per_node", options.per_node),
        ("latency_seconds", options.latency),
    ):
        if value is not None:
            found[name] = value
    if "bandwidth" not in found or "ranks" not in found:
        raise ValueError("give --link and --ranks, or --doctor with what hvd-compress doctor --json printed")
    return Cluster(cycle_seconds=options.cycle, **{"latency_seconds": _LATENCY_SECONDS} | found)


def _measured(path: Path) -> dict[str, Any]:
    """The nodes, and the speed of the links between them."""
    try:
        found = json.loads(path.read_text())
        hosts = [facts["host"] for facts in found["ranks"]]
        links = [link for link in found["links"] if len({hosts[rank] for rank in link["ranks"]}) > 1]
        sums = found["sums_bits_per_second"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is not what hvd-compress doctor --json prints: {error}") from error
    if not links:
        raise ValueError(f"{path} has no link between two nodes: start doctor by mpirun with ranks on several hosts")
    per_node = {len(list(ranks)) for _, ranks in itertools.groupby(hosts)}
    if len(per_node) > 1:
        raise ValueError(f"{path} has unlike numbers of ranks on its nodes, {sorted(per_node)}: give --per-node")
    return {
        "ranks": len(hosts),
        "ranks_per_node": per_node.pop(),
    } | speed_of(links, sums)


def speed_of(links: Sequence[Link], sums_bits_per_second: float) -> dict[str, float]:
    """Of a Cluster: that of the slowest link, which all others wait for."""
    return {
        "bandwidth": min(link["bits_per_second"] for link in links) / 8,
        "latency_seconds": max(link["latency_seconds"] for link in links),
        "sum_bandwidth": sums_bits_per_second / 8,
    }
