"""Uncompressed inside a node, compressed between nodes: equal on all ranks, and nothing gets lost on the way."""

from __future__ import annotations

import math

import pytest
import torch

from hvd_compress import Compression
from hvd_compress.local import LocalRanks
from hvd_compress.memory import OWNED, owner
from hvd_compress.topologies import Nodes
from hvd_compress.topologies.nodes import Place
from hvd_compress.transports.local import LocalTransport
from hvd_compress.wire import WireError

from .drive import bits
from .in_pieces import (
    SHAPES,
    check_that_a_checkpoint_goes_on,
    check_that_all_get_the_same,
    check_that_order_and_absence_do_not_matter,
    check_that_what_is_not_finite_changes_nothing,
    check_that_what_is_owed_follows_the_loss_scale,
    gradients,
)
from .test_scatter import LARGEST_ERRORS, METHODS, owed_by, ranks_of

NODES = ((2, 2), (3, 2), (2, 4), (4, 1), (1, 3))  # nodes, and ranks on each
BY_NODE = {name: make for name, make in METHODS.items() if name != "dgc"}
method = pytest.mark.parametrize("method", BY_NODE)
nodes = pytest.mark.parametrize(("count", "per_node"), NODES)


def hierarchy(method: str, count: int, per_node: int, **options) -> LocalRanks:
    return ranks_of(method, count * per_node, **{"topology": "hierarchical", "ranks_per_node": per_node, **options})


def whole(size: int, step: int = 0) -> list[dict[str, torch.Tensor]]:
    """Small whole numbers, whose sums are exact in any order."""
    return [{name: (8 * g).round() for name, g in mine.items()} for mine in gradients(size, step)]


@method
@nodes
def test_all_ranks_get_the_same_bits_near_the_mean(method, count, per_node):
    check_that_all_get_the_same(hierarchy(method, count, per_node), LARGEST_ERRORS.get(method))


@pytest.mark.parametrize("average", [True, False])
def test_a_node_is_to_the_codec_as_a_rank(average):
    """bfloat16 has no state and draws no numbers: nodes' sums, gathered, are what comes of it to the bit."""
    known = whole(6)
    by_node = [{name: sum(known[2 * node + r][name] for r in range(2)) for name in SHAPES} for node in range(3)]
    gathered = ranks_of("bf16", 3, topology="gather").exchange(by_node, average=False)[0]
    found = hierarchy("bf16", 3, 2).exchange(known, average=average)[0]
    for name in SHAPES:
        assert bits(found[name]) == bits(gathered[name] / 6 if average else gathered[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_node_alone_compresses_nothing(dtype):
    known = [{name: g.to(dtype) for name, g in mine.items()} for mine in whole(3)]
    for result in hierarchy("topk", 1, 3).exchange(known, average=False):
        for name in SHAPES:
            assert torch.equal(result[name], sum(mine[name].double() for mine in known).to(dtype))
            assert result[name].dtype == dtype


@nodes
def test_what_was_sent_and_what_is_owed_is_all_there_was(count, per_node):
    ranks = hierarchy("topk", count, per_node)
    sent = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in SHAPES.items()}
    there = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(6):
        known = whole(count * per_node, step)
        total = ranks.exchange(known, average=False)[0]
        for name in SHAPES:
            sent[name] += total[name].view(-1)
            there[name] += sum(mine[name].double().view(-1) for mine in known)
    owed = owed_by(ranks)
    for name in SHAPES:
        assert torch.equal(sent[name] + owed[name], there[name])


def test_a_rank_holds_what_is_unsent_of_its_share_alone():
    ranks = hierarchy("topk", 2, 4)
    for step in range(2):
        ranks.exchange(gradients(8, step))
    numel = sum(math.prod(shape) for shape in SHAPES.values())
    for compression in ranks.compressions:
        state = compression.state_dict()["residuals"][compression.rank]
        assert {owner(name)[1] for name in state} == {OWNED}
        assert sum(residual.numel() for residual in state.values()) <= numel / 4 + len(SHAPES)
        needed = compression.memory_needed().parts["residuals"]
        assert needed == pytest.approx(4 * numel / 4, rel=0.01)


@method
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 99_999])
def test_a_gradient_that_is_not_finite_shows_on_all_ranks_and_changes_nothing(method, value, place):
    check_that_what_is_not_finite_changes_nothing(lambda: hierarchy(method, 2, 2), value, place)


@pytest.mark.parametrize("method", ["bf16", "topk"])
def test_a_sum_that_overflows_inside_a_node_shows_on_all_ranks(method):
    ranks, known = hierarchy(method, 2, 2), gradients(4)
    for mine in known[:2]:
        mine["d"].view(-1)[7] = 3e38
    for result in ranks.exchange(known):
        assert not bool(result["d"].isfinite().any())
        assert bool(result["a"].isfinite().all())


@method
def test_gradients_may_be_handed_in_in_any_order_or_not_at_all(method):
    check_that_order_and_absence_do_not_matter(lambda: hierarchy(method, 2, 2))


def test_what_is_owed_is_in_the_unit_of_the_loss_scale():
    check_that_what_is_owed_follows_the_loss_scale(lambda: hierarchy("topk", 2, 2))


@method
def test_a_checkpoint_goes_on_to_the_bit(method):
    check_that_a_checkpoint_goes_on(lambda: hierarchy(method, 3, 2))


@pytest.mark.parametrize(
    "options", [{}, {"ranks_per_node": 3}, {"topology": "gather", "ranks_per_node": None}], ids=str
)
@pytest.mark.parametrize("size", [4, 6])
def test_what_is_owed_survives_other_nodes_and_topologies(options, size):
    """Nothing is lost, and nothing is counted twice, wherever pieces go."""
    per_node = options.get("ranks_per_node", 2)
    if per_node and size % per_node:
        pytest.skip("no such nodes")
    ranks = hierarchy("topk", 2, 2)
    for step in range(3):
        ranks.exchange(whole(4, step))
    before, states = owed_by(ranks), [compression.state_dict() for compression in ranks.compressions]
    resumed = ranks_of("topk", size, **{"topology": "hierarchical", "ranks_per_node": 2, **options})
    for compression in resumed.compressions:
        transport = compression.attached
        compression.load_state_dict(states)
        compression.attach(transport)
    after = owed_by(resumed)
    for name in SHAPES:
        assert torch.allclose(after[name], before[name], rtol=1e-6, atol=1e-4)
    if options.get("topology") == "gather":
        assert not any(owner(n)[1] == OWNED for c in resumed.compressions for n in c.memory.residuals)


@pytest.mark.parametrize("per_node", [4, 8])
@pytest.mark.parametrize("count", [2, 3])
def test_into_a_node_comes_what_one_rank_would_send_from_each_other_node(count, per_node, monkeypatch):
    """(M - 1) p, where everyone sending to everyone brings G * G * (M - 1) p."""
    into = {"gather": 0, "hierarchical": 0}
    topology = ""
    usual = LocalTransport.alltoall, LocalTransport.allgather

    def crossing(rank: int, other: int) -> bool:
        return rank // per_node != other // per_node and other // per_node == 0

    def alltoall(transport, name, parts):
        for rank, to in enumerate(parts):
            into[topology] += crossing(transport.rank, rank) * sum(part.numel() for part in to)
        return usual[0](transport, name, parts)

    def allgather(transport, name, parts):
        into[topology] += sum(crossing(transport.rank, rank) for rank in range(per_node)) * sum(
            p.numel() for p in parts
        )
        return usual[1](transport, name, parts)

    monkeypatch.setattr(LocalTransport, "alltoall", alltoall)
    monkeypatch.setattr(LocalTransport, "allgather", allgather)
    known = gradients(count * per_node)
    for topology in into:
        per = {"ranks_per_node": per_node} if topology == "hierarchical" else {"ranks_per_node": None}
        ranks = ranks_of("qsgd", count * per_node, topology=topology, **per)
        ranks.exchange(known)
    payload = sum(ranks.compressions[0].compressor.sent(slot).gathered for slot in ranks.compressions[0].slots)
    assert into["gather"] == pytest.approx(per_node**2 * (count - 1) * payload, rel=0.01)
    assert into["hierarchical"] == pytest.approx((count - 1) * payload, rel=0.02)
    assert ranks.compressions[0].telemetry.total.sent_bytes == pytest.approx(payload / per_node, rel=0.02)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
@pytest.mark.parametrize("way", [0, 1, 2])
@method
def test_damage_is_found(method, damage, way, monkeypatch):
    """On the way to an owner, to another node, or back inside a node."""
    usual, rounds = LocalTransport.alltoall, {}

    def spoil(message: torch.Tensor) -> torch.Tensor:
        if not message.numel():
            return message
        message = message.clone()
        if damage == "flip":
            message[message.numel() // 2] ^= 4
        return message[:-4] if damage == "cut" else torch.cat([message, message[:4]]) if damage == "longer" else message

    def spoilt(transport, key, parts):
        number = rounds[transport.rank] = rounds.get(transport.rank, -1) + 1
        return usual(transport, key, [[spoil(p) for p in to] for to in parts] if number == way else parts)

    monkeypatch.setattr(LocalTransport, "alltoall", spoilt)
    with pytest.raises(WireError, match=r"rank \d"):
        hierarchy(method, 2, 2, bucket_bytes=10**9).exchange(gradients(4))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda named, **o: Compression.adacomp(named, **o), "depends on the whole"),
        (lambda named, **o: Compression.powersgd(named, **o), "sums"),
        (lambda named, **o: Compression.terngrad(named, share_scaler=False, **o), "share_scaler=True"),
        (lambda named, **o: Compression.dgc(named, **o), "momentum.*of a rank, not of a node"),
    ],
)
def test_what_cannot_be_exchanged_so_says_why(make, why):
    with pytest.raises(ValueError, match=why):
        make([("w", torch.zeros(50, 50))], topology="hierarchical")


@pytest.mark.parametrize("options", [{"ranks_per_node": 2}, {"topology": "hierarchical", "ranks_per_node": 0}])
def test_ranks_per_node_is_for_this_topology_alone(options):
    with pytest.raises(ValueError, match="ranks_per_node must be at least 1, and is for topology='hierarchical'"):
        Compression.topk([("w", torch.zeros(50, 50))], **options)


def test_nodes_are_told_by_the_hosts_of_their_ranks():
    nodes = Nodes.on(["b", "a", "b", "a", "c", "c"])
    assert nodes.members == ((0, 2), (1, 3), (4, 5))
    assert nodes.place(3) == Place(node=1, place=1, mates=(1, 3), counterparts=(2, 3, 5))
    assert Nodes.of_so_many(4, 2).members == ((0, 1), (2, 3))


def test_nodes_with_unlike_numbers_of_ranks_are_refused():
    with pytest.raises(ValueError, match=r"as many ranks on each node, and there are 2 on a, 1 on b: start as many"):
        Nodes.on(["a", "a", "b"])
    with pytest.raises(ValueError, match="ranks_per_node=2 does not divide the number of ranks, 3"):
        Nodes.of_so_many(3, 2)
