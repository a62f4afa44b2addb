"""One bit an element: against worked numbers, against AdamW, and where rare rows have no second moment."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from hvd_compress import Compression, step_check
from hvd_compress.compressors import OneBitCompressor
from hvd_compress.local import LocalRanks
from hvd_compress.optim import OneBitAdam

from .drive import bits, bound, random, run
from .in_pieces import SHAPES, check_that_it_travels, check_that_what_is_owed_follows_the_loss_scale, gradients

WORKED = [0.4, -0.1, 0.05, 0.3, -0.25, 0.02, -0.6, 0.1, 0.0, 0.15]
KEPT = [0.203, 0.097, -0.147, 0.103, -0.053, -0.177, -0.403, -0.097, -0.197, -0.047]  # mean magnitude 0.197


def repeated(values, times=100):
    return torch.tensor(values).repeat(times)


def test_signs_times_the_mean_magnitude_give_the_worked_numbers():
    """Ten numbers, a hundred times."""
    outcome = run(OneBitCompressor(bucket_size=1024), [repeated(WORKED)])
    assert torch.allclose(outcome.totals[0], 0.197 * torch.where(repeated(WORKED) >= 0, 1.0, -1.0), atol=1e-7)
    outcome.memories[0].commit()
    assert torch.allclose(outcome.memories[0].residuals["weight"], repeated(KEPT), atol=1e-7)


def test_what_is_sent_is_one_bit_an_element_and_a_mean_a_bucket():
    (frame,) = run(OneBitCompressor(), [random(100, 1000)]).parsed()
    assert frame.payload.numel() == 4 * math.ceil(100_000 / 256) + 32 * math.ceil(100_000 / 256)


def test_two_steps_send_all_but_what_is_kept():
    compressor, residual, given = OneBitCompressor(), None, torch.zeros(3000)
    steps = [random(3000, seed=seed) for seed in range(50)]
    for step, gradient in enumerate(steps):
        outcome = run(compressor, [gradient], step=step, residuals=[residual])
        outcome.memories[0].commit()
        residual = outcome.memories[0].residuals["weight"]
        given += outcome.totals[0]
    assert torch.allclose(given + residual, torch.stack(steps).sum(0), atol=1e-3)
    assert residual.norm() < 10 * steps[0].norm()


def test_with_momentum_comes_out_the_first_moment():
    """But for what is kept: the sum over steps of what came out, and it, is that of the moments."""
    size, beta = 3, 0.9
    compressions = [bound(OneBitCompressor(momentum=beta, warmup_steps=2), {"w": (64, 64)}) for _ in range(size)]
    ranks = LocalRanks(compressions)
    moments = [torch.zeros(64, 64) for _ in range(size)]
    given, due = torch.zeros(64, 64), torch.zeros(64, 64)
    for step in range(30):
        of_ranks = [random(64, 64, seed=10 * step + rank) for rank in range(size)]
        moments = [beta * m + (1 - beta) * g for m, g in zip(moments, of_ranks)]
        result = ranks.exchange([{"w": g} for g in of_ranks])[0]["w"]
        parameter = compressions[0].parameters[0]
        assert compressions[0].gives_momentum(parameter) == (step >= 2)
        if step < 2:
            assert torch.allclose(result, sum(of_ranks) / size, atol=1e-6)
        else:
            given, due = given + result, due + sum(moments) / size
    for compression in compressions:
        compression.settle()
    kept = sum(c.memory.residuals["w"].view(64, 64) for c in compressions) * (1 - beta) / size
    assert torch.allclose(given + kept, due, atol=1e-4)
    assert 0 < kept.norm() < due.norm()


def test_the_second_moment_is_updated_ever_more_rarely():
    """0/1 Adam's T_v by its recursion: t_(j+1) = t_j + 2**floor(j / k), here after a warm-up of 3 steps."""
    for k in (1, 2, 3, 16):
        steps, t = set(range(3)), 3
        for j in range(200):
            if t > 3000:
                break
            steps.add(t)
            t += 2 ** (j // k)
        compressor = OneBitCompressor(momentum=0.9, warmup_steps=3, variance_update_scaler=k)
        assert {step for step in range(3000) if compressor.as_it_is(step)} == {step for step in steps if step < 3000}
    compressor = OneBitCompressor(momentum=0.9, variance_update_scaler=2)
    assert [step for step in range(25) if compressor.as_it_is(step)] == [0, 1, 2, 4, 6, 10, 14, 22]


TOPOLOGIES = {
    "gather": {"topology": "gather"},
    "scatter": {"topology": "scatter"},
    "hierarchical": {"topology": "hierarchical", "ranks_per_node": 2},
    "momentum": {"topology": "scatter", "momentum": 0.9, "warmup_steps": 1},
}
topologies = pytest.mark.parametrize("topology", TOPOLOGIES)


def ranks_of(topology: str, size: int) -> LocalRanks:
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    options = {"min_numel": 1, "bucket_bytes": 100_000} | TOPOLOGIES[topology]
    return LocalRanks([Compression.onebit(named, **options) for _ in range(size)])


@topologies
def test_it_travels_by_every_topology(topology):
    check_that_it_travels(lambda size: ranks_of(topology, size))


@topologies
def test_what_is_owed_follows_the_loss_scale(topology):
    check_that_what_is_owed_follows_the_loss_scale(lambda: ranks_of(topology, 4))


def test_owners_keep_what_the_signs_of_sums_lose():
    """Over many steps nothing is lost: what came out, what ranks keep and what owners keep is what went in."""
    ranks = ranks_of("scatter", 4)
    given, due = torch.zeros(SHAPES["b"]), torch.zeros(SHAPES["b"])
    for step in range(10):
        known = gradients(4, step)
        given += ranks.exchange(known, average=False)[0]["b"]
        due += sum(mine["b"] for mine in known)
    for compression in ranks.compressions:
        compression.settle()
        for key, kept in compression.memory.residuals.items():
            if key == "b":
                given += kept.view(SHAPES["b"])
            elif key.startswith("b/owned."):
                start = int(key.rpartition(".")[2])
                given.view(-1)[start : start + kept.numel()] += kept
    assert torch.allclose(given, due, atol=1e-2)


def test_momentum_is_refused_where_nodes_add_up_and_under_masks():
    named = [("w", torch.zeros(100, 100))]
    with pytest.raises(ValueError, match="momentum that it has itself is that of a rank"):
        Compression.onebit(named, momentum=0.9, topology="hierarchical", ranks_per_node=2)
    with pytest.raises(ValueError, match="without momentum of its own"):
        Compression.masked(lambda: None, named, dense=Compression.onebit(named, momentum=0.9))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"bucket_size": 300}, "bucket_size"),
        ({"variance_update_scaler": -1}, "variance_update_scaler"),
        ({"variance_update_scaler": 1.5}, "variance_update_scaler"),
    ],
)
def test_options_that_cannot_work_are_errors(options, named):
    with pytest.raises(ValueError, match=named):
        Compression.onebit([("w", torch.zeros(100, 100))], **options)


# The optimizer


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 20))


def loss_of(net, rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = torch.randn(16, 40, generator=generator)
    return nn.functional.mse_loss(net(inputs), inputs[:, :20].sin())


def train(net, optimizer, ranks, steps):
    """One model that stands for all replicas; returns the losses."""
    losses = []
    for step in steps:
        of_ranks = []
        for rank in range(2):
            optimizer.zero_grad()
            value = loss_of(net, rank, step)
            value.backward()
            of_ranks.append({name: p.grad.clone() for name, p in net.named_parameters()})
        combined = ranks.exchange(of_ranks)[0] if ranks else None
        for name, p in net.named_parameters():
            p.grad = combined[name] if combined else (of_ranks[0][name] + of_ranks[1][name]) / 2
        optimizer.step()
        losses.append(float(value.detach()))
    return losses


def compressed(net, warmup_steps, **options):
    named = list(net.named_parameters())
    make = [Compression.onebit(named, momentum=0.9, warmup_steps=warmup_steps, **options) for _ in range(2)]
    return make[0], LocalRanks(make)


def test_in_the_warm_up_it_is_adamw():
    one, other = model(), model()
    compression, ranks = compressed(one, 20)
    mine = OneBitAdam(one.parameters(), lr=1e-2, weight_decay=0.1, compression=compression)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1)
    assert train(one, mine, ranks, range(20)) == pytest.approx(train(other, theirs, None, range(20)), rel=1e-5)
    for p, q in zip(one.parameters(), other.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_without_a_compression_it_is_adamw():
    one, other = model(), model()
    train(one, OneBitAdam(one.parameters(), lr=1e-2), None, range(20))
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.0), None, range(20))
    for p, q in zip(one.parameters(), other.parameters()):
        assert torch.allclose(p, q, atol=1e-5)


def test_after_it_the_second_moment_of_what_is_compressed_stays_and_it_still_learns():
    net = model()
    compression, ranks = compressed(net, 10)
    optimizer = OneBitAdam(net.parameters(), lr=3e-3, compression=compression)
    train(net, optimizer, ranks, range(10))
    before = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in net.named_parameters()}
    losses = train(net, optimizer, ranks, range(10, 200))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    for name, p in net.named_parameters():
        assert torch.equal(before[name], optimizer.state[p]["exp_avg_sq"]) == name.endswith("weight")
        assert optimizer.state[p]["step"] == 200
        assert optimizer.state[p]["exp_avg_sq_step"] == (10 if name.endswith("weight") else 200)


def test_a_step_gives_the_worked_numbers():
    """lr * m / (1 - 0.9**3) / sqrt(v / (1 - 0.999**2)), with v of the two steps of the warm-up."""
    weight = nn.Parameter(torch.zeros(32, 32))
    named = [("w", weight)]
    compressions = [Compression.onebit(named, momentum=0.9, warmup_steps=2, min_numel=1) for _ in range(2)]
    ranks = LocalRanks(compressions)
    optimizer = OneBitAdam([weight], lr=0.1, compression=compressions[0])
    for gradient in (2.0, 1.0, 1.0):
        known = {"w": torch.full((32, 32), gradient)}
        weight.grad = ranks.exchange([known, known])[0]["w"]
        optimizer.step()
    first = 0.1 * (0.81 * 2 + 0.9 * 1 + 1)
    second = 0.001 * (0.999 * 4 + 1) / (1 - 0.999**2)
    steps = [0.1, 0.1 * 0.1 * (0.9 * 2 + 1) / (1 - 0.81) / math.sqrt(second)]
    steps.append(0.1 * first / (1 - 0.729) / math.sqrt(second))
    assert torch.allclose(weight, torch.full((32, 32), -sum(steps)), rtol=1e-4)


def test_a_second_moment_that_goes_on_gives_the_worked_numbers():
    """As above; the steps 0, 1, 2 and 4 are those in which it sees the gradient, the first moment all."""
    weight = nn.Parameter(torch.zeros(32, 32))
    make = [Compression.onebit([("w", weight)], momentum=0.9, variance_update_scaler=2, min_numel=1) for _ in range(2)]
    ranks = LocalRanks(make)
    optimizer = OneBitAdam([weight], lr=0.1, compression=make[0])
    first, second, count, where = 0.0, 0.0, 0, 0.0
    for step, gradient in enumerate((2.0, 1.0, -1.0, 0.5, 1.5, -2.0)):
        known = {"w": torch.full((32, 32), gradient)}
        weight.grad = ranks.exchange([known, known])[0]["w"]
        assert make[0].gives_momentum(weight) == (step in (3, 5))
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        if step not in (3, 5):
            second, count = 0.999 * second + 0.001 * gradient**2, count + 1
        ratio = first / (1 - 0.9 ** (step + 1)) / (math.sqrt(second / (1 - 0.999**count)) + 1e-8)
        where -= 0.1 * (ratio if step < 3 else max(-1.0, min(1.0, ratio)))
        assert torch.allclose(weight, torch.full((32, 32), where), rtol=1e-4)
    assert optimizer.state[weight]["exp_avg_sq_step"] == 4


def test_no_step_is_larger_than_the_rate():
    """Of elements far smaller than others of their bucket, signs say as much as of these."""
    weight = nn.Parameter(torch.zeros(32, 32))
    compressions = [Compression.onebit([("w", weight)], momentum=0.9, warmup_steps=2, min_numel=1) for _ in range(2)]
    ranks = LocalRanks(compressions)
    optimizer = OneBitAdam([weight], lr=0.1, compression=compressions[0])
    for _ in range(20):
        known = {"w": random(32, 32, seed=3) * torch.where(torch.arange(1024).view(32, 32) % 2 == 0, 1.0, 1e-9)}
        weight.grad = ranks.exchange([known, known])[0]["w"]
        before = weight.detach().clone()
        optimizer.step()
        assert float((weight.detach() - before).abs().max()) < 0.1 * 1.0001


def test_a_row_without_a_gradient_in_the_warm_up_stays_as_it_is():
    net = nn.Embedding(64, 64)
    compression, ranks = compressed(net, 5)
    optimizer = OneBitAdam(net.parameters(), lr=1e-2, compression=compression)
    before = net.weight.detach().clone()
    for _ in range(20):
        gradient = torch.zeros(64, 64)
        gradient[:32] = random(32, 64, seed=1)
        net.weight.grad = ranks.exchange([{"weight": gradient}, {"weight": gradient}])[0]["weight"]
        optimizer.step()
    assert torch.equal(net.weight[32:], before[32:])
    assert not torch.equal(net.weight[:32], before[:32])
    assert (net.weight - before).abs().max() < 1


def test_training_goes_on_from_a_checkpoint_to_the_bit():
    straight = model()
    compression, ranks = compressed(straight, 5)
    optimizer = OneBitAdam(straight.parameters(), lr=1e-2, compression=compression)
    train(straight, optimizer, ranks, range(10))
    saved = pickle.dumps((straight.state_dict(), optimizer.state_dict(), [c.state_dict() for c in ranks.compressions]))
    train(straight, optimizer, ranks, range(10, 15))
    resumed = model()
    parameters, moments, states = pickle.loads(saved)
    assert all("compression" not in group for group in moments["param_groups"])
    resumed.load_state_dict(parameters)
    compression, ranks = compressed(resumed, 5)
    optimizer = OneBitAdam(resumed.parameters(), lr=1e-2, compression=compression)
    optimizer.load_state_dict(moments)
    for one, state in zip(ranks.compressions, states):
        one.load_state_dict(state)
    train(resumed, optimizer, ranks, range(10, 15))
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert bits(p.detach()) == bits(q.detach())


def test_a_compression_that_does_not_fit_is_an_error():
    net = model()
    named = list(net.named_parameters())
    for compression, message in (
        (Compression.onebit(named, momentum=0.8), "betas\\[0\\] is 0.9, and the compression's momentum is 0.8"),
        (Compression.onebit(named, momentum=0.9), "give the compression at least 1"),
        (Compression.dgc(named), "takes no momentum of"),
        (Compression.onebit(named[:2], momentum=0.9, warmup_steps=1), "does not know all parameters"),
        (Compression.fp16, "must be what Compression.onebit"),
    ):
        with pytest.raises(ValueError, match=message):
            OneBitAdam(net.parameters(), compression=compression)


def test_a_group_that_the_compression_does_not_know_is_not_added():
    net = model()
    compression, _ = compressed(net, 5)
    optimizer = OneBitAdam(net.parameters(), compression=compression)
    with pytest.raises(ValueError, match="does not know all parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


def test_a_second_moment_that_goes_on_needs_no_warm_up():
    net = model()
    compression = Compression.onebit(net.named_parameters(), momentum=0.9, variance_update_scaler=4)
    OneBitAdam(net.parameters(), compression=compression)


def test_other_optimizers_are_refused_and_the_right_one_is_not():
    net = model()
    compression, _ = compressed(net, 5)
    compressor = compression.compressor
    problem = compressor.conflict(torch.optim.AdamW(net.parameters()))
    assert problem is not None
    assert "AdamW takes it for gradients" in problem
    assert "OneBitAdam" in problem
    assert compressor.conflict(OneBitAdam(net.parameters(), compression=compression)) is None
    assert compressor.conflict(OneBitAdam(net.parameters())) is not None
    assert OneBitCompressor().conflict(torch.optim.AdamW(net.parameters())) is None


@pytest.mark.parametrize("method", ["topk", "adacomp", "powersgd", "scalecom"])
def test_methods_that_are_slow_with_adam_are_told_with_the_remedy(method, monkeypatch):
    said = []
    monkeypatch.setattr(step_check, "warn_once", said.append)
    net = model()
    compressor = getattr(Compression, method)(net.named_parameters()).compressor
    for optimizer, rank in ((torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), 0), (adam(net), 1)):
        step_check.advise(optimizer, compressor, rank)
        assert said == []
    step_check.advise(adam(net), compressor, 0)
    assert len(said) == 1
    assert "AdamW" in said[0]
    assert "Remedy: Compression.onebit with hvd_compress.optim.OneBitAdam" in said[0]
    for other in (Compression.qsgd(net.named_parameters()), Compression.topk(net.named_parameters(), density=1.0)):
        step_check.advise(adam(net), other.compressor, 0)
    assert len(said) == 1


def adam(net):
    return torch.optim.AdamW(net.parameters())
