"""Nodes of two ranks each, or of as many as share this host: real ranks do what simulated ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_compress import Compression, GradientCompression

from .job import Job, NamedParameters
from .training import (
    OPTIONS,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    gradients,
    grads,
    parameters,
    sgd,
)

KINDS: dict[str, Any] = {
    "bf16": Compression.bf16,
    "terngrad": Compression.terngrad,
    "qsgd": Compression.qsgd,
    "topk": lambda named, **options: Compression.topk(named, density=0.1, **options),
}


@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_nodes_exchange_as_simulated_ones(several: Job, kind: str, per_node: int) -> None:
    job, options = several, {**OPTIONS, "topology": "hierarchical", "ranks_per_node": per_node}
    if job.size % per_node:
        pytest.skip("no such nodes")

    def make(named: NamedParameters) -> GradientCompression:
        return KINDS[kind](named, **options)

    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(4):
        optimizer.zero_grad()
        order = list(of) if (job.rank + step) % 2 else list(reversed(of))
        backward(of, gradients(of, job.rank, step), order)
        optimizer.step()
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))
    assert_replicated(job, of)


def test_ranks_on_one_host_are_one_node_which_compresses_nothing(several: Job) -> None:
    job, of = several, parameters()
    compression = Compression.topk(of.items(), density=0.1, topology="hierarchical", **OPTIONS)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    backward(of, gradients(of, job.rank, 0))
    optimizer.step()
    known = [gradients(of, rank, 0) for rank in range(job.size)]
    assert_close(grads(of), {name: torch.stack([mine[name] for mine in known]).mean(0) for name in of})
    assert_replicated(job, of)


def test_nodes_that_do_not_come_out_even_are_an_error_on_every_rank(several: Job) -> None:
    job, of, uneven = several, parameters(), several.size + 1
    compression = Compression.topk(of.items(), topology="hierarchical", ranks_per_node=uneven, **OPTIONS)
    message = f"ranks_per_node={uneven} does not divide the number of ranks, {job.size}"
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        optimizer = job.distribute(sgd(of), of.items(), compression)
        backward(of, gradients(of, job.rank, 0))
        optimizer.step()
