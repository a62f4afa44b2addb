"""Predictions of a step: work as it is, links as the formulas say."""

import dataclasses
import math

import pytest
import torch

from hvd_compress import Compression
from hvd_compress.commands.methods import method
from hvd_compress.prediction import Cluster, Collective, Compute, Row, Work, compared, measured, predicted, recommended
from hvd_compress.prediction import work as work_module

NAMED = [(f"weight{number}", torch.zeros(100, 80)) for number in range(4)]
NUMEL = 4 * 8000
SLOW = Cluster(4, 1e6, latency_seconds=0.0, cycle_seconds=0.0)


def collective(kind="allgather", size=1000.0, number=0):
    return Collective(kind, "all", number, size, size)


def work(*rounds, parameters=1000, bucket_bytes=4000, encode=0.0, decode=0.0):
    return Work(parameters, 1, bucket_bytes, encode, decode, rounds, 0)


def test_bytes_of_a_gather_are_the_frames_of_all_others():
    found = measured(lambda named: Compression.topk(named, density=0.1, topology="gather"), NAMED, 4)
    payload = Compression.topk(NAMED, density=0.1)
    payload.unregister()
    sent = sum(payload.compressor.sent(slot).gathered for slot in payload.slots)
    assert found.received_bytes == pytest.approx(3 * sent, rel=0.02)  # which are packed in frames of a few bytes more
    assert [[each.kind for each in collectives] for collectives in found.rounds] == [["allgather"]]


@pytest.mark.parametrize(("name", "width"), [("none", 4), ("fp16", 2)])
def test_bytes_of_a_sum_are_those_of_a_ring(name, width):
    found = measured(method(name), NAMED, 4)
    assert found.received_bytes == 2 * 3 / 4 * width * NUMEL
    assert found.held_bytes == 0


@pytest.mark.parametrize("name", ["qsgd", "powersgd", "terngrad"])
def test_of_a_model_that_is_too_large_some_tensors_stand_for_all(name, monkeypatch):
    whole = measured(method(name), NAMED, 2)
    monkeypatch.setattr(work_module, "MOST_ELEMENTS", 2 * 8000)
    part = measured(method(name), NAMED, 2)
    assert part.received_bytes == pytest.approx(whole.received_bytes, rel=0.02)
    assert (part.parameters, part.tensors, part.held_bytes) == (NUMEL, 4, whole.held_bytes)


def test_of_a_hierarchy_only_what_comes_from_other_nodes_is_on_the_link():
    options = {"topology": "hierarchical", "ranks_per_node": 2}
    found = measured(lambda named: Compression.qsgd(named, **options), NAMED, 4, 2)
    inside, *_, last = [sum(each.outside_bytes for each in collectives) for collectives in found.rounds]
    assert inside == last == 0
    assert 0 < found.outside_bytes < 0.1 * found.received_bytes  # inside, gradients are float32


def test_a_sum_goes_around_a_ring_and_all_else_to_every_rank_of_a_node():
    cluster = Cluster(8, 1e6, latency_seconds=1e-3, ranks_per_node=4, cycle_seconds=2e-3)
    assert cluster.seconds(collective("allreduce", 1000)) == pytest.approx(1e-3 + 2 * 3 * 1e-3 + 1e-3)
    assert cluster.seconds(collective("allgather", 1000)) == pytest.approx(1e-3 + 3 * 1e-3 + 4e-3)
    assert cluster.seconds(collective("alltoall", 1000), share=0.5) == pytest.approx(1e-3 + 3 * 1e-3 + 2e-3)


def test_sums_may_be_slower_than_the_link_and_stay_so_on_another():
    cluster = dataclasses.replace(SLOW, sum_bandwidth=5e5)
    assert cluster.seconds(collective("allreduce", 1000)) == pytest.approx(2e-3)
    assert cluster.seconds(collective("alltoall", 1000)) == pytest.approx(1e-3)
    assert cluster.at(4e6).seconds(collective("allreduce", 1000)) == pytest.approx(0.5e-3)


def test_without_overlap_a_step_is_the_sum_of_its_parts():
    of = work((collective(),), (collective("allreduce", 500.0, 1),), encode=0.003, decode=0.004)
    step = predicted(of, SLOW, Compute(0.05, 0.02), python_seconds=0.001)
    exposed = 0.003 + 0.001 + 0.001 + 0.0005 + 0.004
    assert step.seconds == pytest.approx(0.05 + 0.02 + exposed)
    assert step.exposed_seconds == pytest.approx(exposed)
    assert step.link_seconds == pytest.approx(0.0015)


def test_all_but_the_last_bucket_hides_behind_backward():
    of = work((collective(size=4000.0),), parameters=4000)  # four buckets of a millisecond each
    hidden = predicted(of, SLOW, Compute(0.1), python_seconds=0.0)
    assert hidden.seconds == pytest.approx(0.1 + 0.001)
    slower = predicted(of, dataclasses.replace(SLOW, bandwidth=1e4), Compute(0.1), python_seconds=0.0)
    assert slower.seconds == pytest.approx(0.025 + 4 * 0.1)  # the link is busy from the first bucket on


def test_rounds_of_buckets_share_the_link():
    of = work((collective(size=2000.0),), (collective(size=2000.0, number=1),), parameters=2000)
    step = predicted(of, SLOW, Compute(0.0), python_seconds=0.0)
    assert step.link_seconds == pytest.approx(0.004)
    assert step.seconds == pytest.approx(0.004)  # while one bucket waits for its next round, the other has the link


@pytest.mark.parametrize(
    ("ranks", "per_node", "options"), [(1, 1, {}), (4, 4, {}), (6, 4, {}), (4, 1, {"latency_seconds": -1.0})]
)
def test_clusters_without_a_link_are_refused(ranks, per_node, options):
    with pytest.raises(ValueError, match="two nodes|not negative"):
        Cluster(ranks, 1e6, ranks_per_node=per_node, **options)


@pytest.fixture(scope="module")
def rows():
    makers = {name: method(name) for name in ("none", "fp16", "topk", "qsgd", "powersgd", "adacomp")}
    return compared(makers, NAMED, SLOW, Compute(0.01))


def test_every_topology_of_a_method_has_a_row(rows):
    assert {(row.method, row.topology) for row in rows} == {
        *(("none", "sum"), ("fp16", "sum"), ("powersgd", "sum")),
        *(("topk", "gather"), ("topk", "scatter"), ("qsgd", "gather"), ("qsgd", "scatter"), ("adacomp", "gather")),
    }


def test_below_the_link_that_is_told_a_method_pays_and_above_it_does_not(rows):
    for row in rows:
        if row.plain:
            assert row.pays_below is None
            continue
        assert row.pays_below is not None

        def gain(rate, row=row):
            plain = min(other.seconds_at(rate, SLOW, Compute(0.01)) for other in rows if other.plain)
            return plain / row.seconds_at(rate, SLOW, Compute(0.01))

        assert gain(row.pays_below) > 1.02
        if row.pays_below < math.inf:
            assert gain(1.2 * row.pays_below) < gain(row.pays_below)


def test_what_is_no_faster_than_horovods_own_is_not_recommended(rows):
    assert recommended(rows, adam=False).method not in ("none", "fp16")
    fast = dataclasses.replace(SLOW, bandwidth=1e15)
    same = [dataclasses.replace(row, step=predicted(row.work, fast, Compute(1.0))) for row in rows]
    assert recommended(same, adam=False).plain


def test_with_adam_nothing_is_recommended_that_slows_it_down(rows):
    def alone(name) -> list[Row]:
        return [row for row in rows if row.plain or row.method == name]

    assert recommended(alone("topk"), adam=False).method == "topk"
    assert recommended(alone("topk"), adam=True).plain
    assert recommended(alone("qsgd"), adam=True).method == "qsgd"
