"""A new codec is one file: topologies, telemetry, checkpoints, memory and traffic serve it without another change."""

from __future__ import annotations

import pickle

import pytest
import torch

from hvd_compress import GradientCompression
from hvd_compress.compressors import traffic
from hvd_compress.local import LocalRanks

from .drive import bits
from .in_pieces import SHAPES, check_that_it_travels, gradients
from .toy_codec import SignCompressor

TOPOLOGIES = {
    "auto": {},
    "gather": {"topology": "gather"},
    "scatter": {"topology": "scatter"},
    "hierarchical": {"topology": "hierarchical", "ranks_per_node": 2},
}
topologies = pytest.mark.parametrize("topology", TOPOLOGIES)


def ranks_of(topology: str, size: int) -> LocalRanks:
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    options = {"min_numel": 1, "bucket_bytes": 100_000} | TOPOLOGIES[topology]
    return LocalRanks([GradientCompression(SignCompressor(), named, **options) for _ in range(size)])


@topologies
def test_it_travels_by_every_topology(topology):
    check_that_it_travels(lambda size: ranks_of(topology, size))


def test_one_rank_alone_gets_its_own_signs():
    known = gradients(1)
    (result,) = ranks_of("gather", 1).exchange(known)
    for name, gradient in known[0].items():
        assert torch.allclose(result[name], gradient.abs().mean() * torch.where(gradient >= 0, 1.0, -1.0))


def test_few_ranks_gather_and_many_scatter():
    for size, like in ((4, "gather"), (6, "scatter")):
        found, expected = (ranks_of(topology, size).exchange(gradients(size))[0] for topology in ("auto", like))
        assert all(bits(found[name]) == bits(expected[name]) for name in SHAPES)


@topologies
def test_telemetry_counts_it_and_measures_what_it_loses(topology):
    ranks = ranks_of(topology, 4)
    telemetry = ranks.compressions[0].telemetry
    telemetry.watch(records=100, errors=True)
    ranks.exchange(gradients(4))
    for compression in ranks.compressions:
        compression.settle()
    by_name = {record.parameter: record for record in telemetry.history if hasattr(record, "parameter")}
    assert by_name.keys() == SHAPES.keys()
    assert all(0 < record.error < 1 for record in by_name.values())  # of normal numbers about 0.6
    assert 0 < telemetry.total.sent_bytes < telemetry.total.raw_bytes / 10
    assert "d " in telemetry.table()


def test_its_traffic_and_memory_are_told():
    shapes = [torch.Size(shape) for shape in SHAPES.values()]
    received, dense = traffic(SignCompressor(), shapes, 8, "gather")
    assert 0 < received < dense
    scattered, _ = traffic(SignCompressor(), shapes, 64, "scatter")
    assert scattered < 3 * received / 7
    ranks = ranks_of("gather", 2)
    ranks.exchange(gradients(2))
    assert ranks.compressions[0].memory_held().parts.keys() <= {"frames"}


def test_options_are_printed_compared_and_copied():
    compression = GradientCompression(SignCompressor(scale=0.5), [("w", torch.zeros(40, 50))], min_numel=1)
    assert "scale=0.5" in repr(compression)
    assert compression.description()["scale"] == "0.5"
    assert repr(pickle.loads(pickle.dumps(compression))) == repr(compression)
