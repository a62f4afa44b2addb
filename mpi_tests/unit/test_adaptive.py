"""Rates that rank 0 chooses: when they change, from what, what outlives them, and how they are repeated."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import math
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from hvd_compress import Compression, GradientCompression
from hvd_compress.adaptive import Accordion, LGreCo, Options, TimeCost
from hvd_compress.adaptive.lasting import lasting_errors, reached_share
from hvd_compress.adaptive.layers import Layer
from hvd_compress.adaptive.link import Link
from hvd_compress.adaptive.plot import main as plot
from hvd_compress.adaptive.policies import Statistics
from hvd_compress.local import LocalRanks
from hvd_compress.requests import sent_bytes
from hvd_compress.transports.local import LocalTransport
from hvd_compress.wire import WireError

from .drive import bits, random

SHAPES = {"a": (60, 50), "b": (40, 80), "bias": (60,), "c": (64, 64)}
FAMILIES = {
    "qsgd": (Compression.qsgd, {"bits": 4}, 4.0),
    "topk": (Compression.topk, {"density": 0.02}, 0.02),
    "powersgd": (Compression.powersgd, {"approximation_rank": 4}, 4.0),
    "adacomp": (Compression.adacomp, {"bin_size": 100}, 100.0),
}
OPTIONS: dict[str, Any] = {"interval": 4, "window": 2}


def base(family: str = "powersgd", **options: Any) -> GradientCompression:
    make, own, _ = FAMILIES[family]
    return make([(name, torch.zeros(shape)) for name, shape in SHAPES.items()], **(own | options))


def adapted(family: str = "powersgd", **options: Any) -> GradientCompression:
    return Compression.lgreco(base(family), **(OPTIONS | options))


def world(family: str = "powersgd", size: int = 3, **options: Any) -> LocalRanks:
    return LocalRanks([adapted(family, **options) for _ in range(size)])


def gradients(step: int, size: int = 3, scale: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """Those of b are large, and nearly of rank one in c, so that uniform rates are not the best ones."""
    of_ranks = []
    for rank in range(size):
        mine = {name: random(*shape, seed=100 * step + 10 * rank + len(name)) for name, shape in SHAPES.items()}
        mine["b"] *= 30
        mine["c"] = 0.01 * mine["c"] + mine["a"].view(-1)[:64].outer(mine["a"].view(-1)[64:128])
        of_ranks.append({name: scale * gradient for name, gradient in mine.items()})
    return of_ranks


def run(ranks: LocalRanks, steps: range, scale: float = 1.0) -> list[dict[str, bytes]]:
    """What rank 0 gets in each step; all others must get the same."""
    outcomes = []
    for step in steps:
        results = ranks.exchange(gradients(step, len(ranks.compressions), scale))
        of_ranks = [{name: bits(total) for name, total in result.items()} for result in results]
        assert all(result == of_ranks[0] for result in of_ranks)
        outcomes.append(of_ranks[0])
    return outcomes


def rates(ranks: LocalRanks) -> list[float | None]:
    """Of the parameters, in the step that is to come; the same on all ranks."""
    for compression in ranks.compressions:
        compression.settle()
    of_ranks = [[slot.rate for slot in compression.slots] for compression in ranks.compressions]
    assert all(mine == of_ranks[0] for mine in of_ranks)
    return of_ranks[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_until_the_first_plan_nothing_differs_then_rates_do_on_all_ranks(family):
    ranks, uniform = world(family), LocalRanks([base(family) for _ in range(3)])
    assert run(ranks, range(5)) == run(uniform, range(5))  # decided during step 4
    first = rates(ranks)
    assert first[2] is None  # the bias travels as it is
    assert len(set(first)) > 2
    assert run(ranks, range(5, 9)) != run(uniform, range(5, 9))
    assert [c.controller.number for c in ranks.compressions] == [1] * 3
    rates(ranks)
    assert [c.controller.number for c in ranks.compressions] == [2] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_cost_less_than_uniform_at_no_more_error_and_are_logged(family, tmp_path):
    log = tmp_path / "plans.jsonl"
    ranks = world(family, log=log)
    run(ranks, range(10))
    chosen = rates(ranks)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["number"], line["step"]) for line in lines] == [(1, 5), (2, 9)]
    compressor: Any = ranks.compressions[0].compressor
    for line in lines:
        assert line["error"] <= line["budget"]
        assert line["cost"] < line["reference_cost"]
        assert line["cost"] == sum(
            compressor.payload_bytes(torch.Size(SHAPES[layer["name"]]), layer["rate"]) for layer in line["layers"]
        )
    assert {layer["name"]: layer["rate"] for layer in lines[-1]["layers"]} == dict(
        zip([name for name in SHAPES if name != "bias"], [rate for rate in chosen if rate is not None])
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_all_ranks_compensated_gradients(family, tmp_path):
    log = tmp_path / "plans.jsonl"
    ranks = world(family, size=2, window=1, errors="single", log=log)
    run(ranks, range(3))
    compensated: dict[str, list[torch.Tensor]] = {name: [] for name in ("a", "b", "c")}
    for compression, mine in zip(ranks.compressions, gradients(3, 2)):
        compression.settle()
        for name, of_ranks in compensated.items():
            residual = compression.memory.residuals.get(name, torch.zeros(mine[name].numel()))
            of_ranks.append(mine[name] + residual.view(mine[name].shape))
    run(ranks, range(3, 5))
    rates(ranks)
    (line,) = [json.loads(line) for line in log.read_text().splitlines()]
    for layer in line["layers"]:
        expected = [
            ranks.compressions[0].compressor.errors(gradient, layer["rates"])  # type: ignore[attr-defined]
            for gradient in compensated[layer["name"]]
        ]
        np.testing.assert_allclose(layer["errors"], np.sum(expected, axis=0), rtol=1e-5)


@pytest.mark.parametrize("family", ["topk", "powersgd", "adacomp"])
def test_residuals_are_expected_to_grow_where_less_is_sent(family, tmp_path):
    """By default: today's error at today's rate, and others by what they send."""
    logs = {errors: tmp_path / errors for errors in ("single", "lasting")}
    for errors, log in logs.items():
        ranks = world(family, errors=errors, log=log)
        run(ranks, range(5))
        rates(ranks)
    compressor, own = ranks.compressions[0].compressor, FAMILIES[family][2]
    for before, layer in zip(*(json.loads(log.read_text())["layers"] for log in logs.values())):
        today = before["errors"][before["rates"].index(own)]
        dense = 4 * math.prod(SHAPES[layer["name"]])
        shares = [compressor.payload_bytes(torch.Size(SHAPES[layer["name"]]), rate) / dense for rate in layer["rates"]]
        now = shares[layer["rates"].index(own)]
        lasting = layer["errors"][layer["rates"].index(own)]
        assert lasting == pytest.approx(today, rel=0.03)  # found from fewer rates, for PowerSGD a little less exactly
        expected = [lasting * math.sqrt(max(1 / share - 1, 0) / (1 / now - 1)) for share in shares]
        np.testing.assert_allclose(layer["errors"], expected, rtol=1e-6)


def test_lasting_errors_are_those_that_last():
    """Of independent gradients, whose residual at 1 % is foretold from that at 4 %, and the other way round."""
    densities, norms, shares = (0.01, 0.04), [], []
    for density in densities:
        (compression,) = (
            ranks := LocalRanks([Compression.topk([("w", torch.zeros(60, 70))], density=density)])
        ).compressions
        for step in range(400):
            generator = torch.Generator().manual_seed(step)
            ranks.exchange([{"w": torch.randn(60, 70, generator=generator)}])
        compression.settle()
        norms.append(float(compression.memory.residuals["w"].norm()))
        shares.append(compression.compressor.payload_bytes(torch.Size([60, 70]), density) / (4 * 4200))
    foretold = lasting_errors(np.array(norms), np.array(shares), np.array([shares] * 2))
    np.testing.assert_allclose(foretold, [norms] * 2, rtol=0.1)


def test_what_a_layer_has_reached_follows_its_rate_as_residuals_do():
    assert reached_share(None, 0.01, 1000) == 0.01
    assert reached_share(0.04, 0.01, 0) == 0.04
    assert reached_share(0.04, 0.01, 100) == pytest.approx(0.01 + 0.03 / math.e)
    assert reached_share(0.04, 0.01, 100_000) == pytest.approx(0.01)


def test_where_everything_is_sent_nothing_is_known_of_other_rates():
    errors = lasting_errors(np.array([0.0, 2.0]), np.array([1.0, 0.5]), np.array([[0.1, 1.01], [0.5, 1.01]]))
    assert errors.tolist() == [[0, 0], [2, 0]]


def test_rank_0_may_decide_on_its_own_errors(tmp_path):
    log = tmp_path / "plans.jsonl"
    alone, together = tmp_path / "alone", tmp_path / "all"
    for log, errors_of in ((alone, "rank0"), (together, "all")):
        ranks = world(errors_of=errors_of, log=log)
        run(ranks, range(5))
        rates(ranks)
    less, more = (json.loads(log.read_text())["budget"] for log in (alone, together))
    assert 0 < less < more


def through_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saved_at", [2, 4, 5, 7, 9])
def test_resumed_training_decides_as_if_it_had_not_stopped(family, saved_at):
    """In an interval, in a window, in the step of a decision, and right after it."""
    first = world(family)
    run(first, range(saved_at))
    states = [through_file(compression.state_dict()) for compression in first.compressions]
    resumed = world(family)
    for compression, state in zip(resumed.compressions, states):
        compression.load_state_dict(state)
    assert run(resumed, range(saved_at, 11)) == run(first, range(saved_at, 11))
    assert rates(resumed) == rates(first)


def test_going_back_in_the_midst_of_training():
    ranks = world()
    run(ranks, range(4))
    states = [through_file(compression.state_dict()) for compression in ranks.compressions]
    ahead = run(ranks, range(4, 11))
    for compression, state in zip(ranks.compressions, states):
        compression.load_state_dict(state)
    assert run(ranks, range(4, 11)) == ahead


@pytest.mark.parametrize("resize", ["sum", "reset"])
def test_other_ranks_take_over_the_plan(resize):
    first = world()
    run(first, range(8))
    states = [compression.state_dict() for compression in first.compressions]
    for kind in ("residuals", "accumulated"):
        states[0][kind] = {rank: state[kind][rank] for rank, state in enumerate(states)}
    resumed = world(size=2)
    for compression in resumed.compressions:
        compression.load_state_dict(through_file(states[0]), resize=resize)
    run(resumed, range(8, 9))
    assert [slot.rate for slot in resumed.compressions[0].slots] == list(
        first.compressions[0].controller.rates.values()
    )[:2] + [None] + list(first.compressions[0].controller.rates.values())[2:]
    run(resumed, range(9, 11))
    assert rates(resumed)


def test_a_log_can_be_repeated(tmp_path):
    log = tmp_path / "plans.jsonl"
    first = run(world("powersgd", log=log), range(12))
    again = LocalRanks([Compression.lgreco(base(), plan=log) for _ in range(3)])
    assert run(again, range(12)) == first
    assert again.compressions[0].controller.sent_bytes == 0


def test_a_log_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    log, picture = tmp_path / "plans.jsonl", tmp_path / "rates.png"
    run(world("powersgd", log=log), range(10))
    plot([str(log), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    one = log.read_text().splitlines()[0]
    log.write_text(one + "\n")
    plot([str(log), str(tmp_path / "one.svg")])
    text = (tmp_path / "one.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("a", "b", "c"))


def test_what_cannot_be_drawn_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "plans").write_text("no plan\n")
    with pytest.raises(SystemExit):
        plot([str(tmp_path / "plans"), str(tmp_path / "rates.png")])
    assert "line 1 of" in capsys.readouterr().err
    (tmp_path / "plans").write_text('{"step": 1, "layers": [{"name": "a", "rate": 1}]}\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        plot([str(tmp_path / "plans"), str(tmp_path / "rates.png")])
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no plan"),
        ("{}\n", "line 1 of .* is no plan"),
        ('{"step": 1, "layers": [{"name": "z", "rate": 1}]}\n', "another model.* z"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, message):
    (tmp_path / "plans").write_text(text)
    with pytest.raises(ValueError, match=message):
        Compression.lgreco(base(), plan=tmp_path / "plans")


def test_bad_steps_leave_no_trace_in_the_plan():
    ranks, spoilt = world(), world()
    run(ranks, range(3))
    run(spoilt, range(3))
    bad = gradients(3)
    bad[1]["a"][3, 3] = math.nan
    bad[2]["b"].fill_(math.inf)
    spoilt.exchange(bad)
    run(ranks, range(3, 4))
    run(ranks, range(4, 5))
    run(spoilt, range(4, 5))
    assert all(rate is None or math.isfinite(rate) for rate in rates(spoilt))
    assert any(rate is not None for rate in rates(spoilt))


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [(0, 7.0, "number 1, found 7"), (1, 3.5, "'a': expected a rate"), (3, 1.0, "'bias'"), (2, math.nan, "'b'")],
)
def test_a_plan_that_rank_0_cannot_have_made_is_an_error_on_every_rank(place, value, says, monkeypatch):
    real = LocalTransport.broadcast

    def spoilt(self: LocalTransport, name: str, tensor: torch.Tensor, root: int) -> Any:
        return real(self, name, tensor.index_fill(0, torch.tensor([place]), value), root)

    ranks = world()
    run(ranks, range(4))
    monkeypatch.setattr(LocalTransport, "broadcast", spoilt)
    known, plans = gradients(4), ranks.compressions
    tickets = [compression.submit(0, known[rank]["a"]) for rank, compression in enumerate(plans)]
    for rank, compression in enumerate(plans):
        with pytest.raises(WireError, match=f"rank 0 for parameter .*{says}"):
            compression.finish(tickets[rank], known[rank]["a"], average=True)


def test_a_layer_without_gradient_keeps_the_rate_of_the_reference():
    ranks = world()
    for step in range(5):
        known = gradients(step)
        for mine in known:
            mine["a"].zero_()
        ranks.exchange(known)
    assert rates(ranks)[0] == 4  # without errors the cheapest would do


def test_the_loss_scale_makes_no_difference():
    plain, scaled = world("qsgd"), world("qsgd")
    run(plain, range(5))
    for step in range(5):
        for compression in scaled.compressions:
            compression.loss_scale = 2.0**step
        scaled.exchange(gradients(step, scale=2.0**step))
    assert rates(scaled) == rates(plain)


def test_residuals_stay_when_the_rate_changes():
    ranks = world("topk")
    run(ranks, range(5))
    before = {name: bits(residual) for name, residual in ranks.compressions[0].memory.state_dict().items()}
    sums = gradients(5)
    results = ranks.exchange(sums, average=False)[0]
    sent = {
        name: sum(
            mine[name].view(-1) + compression.memory.residuals[name]
            for mine, compression in zip(sums, ranks.compressions)
        )
        for name in before
    }
    for compression in ranks.compressions:
        compression.settle()
    for name, total in sent.items():
        left = sum(compression.memory.residuals[name] for compression in ranks.compressions)
        torch.testing.assert_close(results[name].view(-1) + left, total, rtol=1e-5, atol=1e-4)


def test_time_as_the_objective():
    link = TimeCost(latency_seconds=1e-4, bandwidth_bytes_per_second=1e8)
    by_time = world(objective="time", link=link)
    by_bytes = world()
    run(by_time, range(5))
    run(by_bytes, range(5))
    assert rates(by_time) == rates(by_bytes)  # as many messages everywhere
    # Two messages for the factors against one for the gradient as it is: a latency that large buys no bytes.
    slow = world(objective="time", link=TimeCost(10.0, 1e9), alpha=10.0, rates=(1, 4, 64), reach=100.0)
    run(slow, range(5))
    assert [rate for rate in rates(slow) if rate] == [64, 64, 64]


@pytest.mark.parametrize("gathers", [True, False])
def test_a_link_is_measured_by_transfers_of_several_sizes(gathers, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    link = Link(gathers=gathers)
    exchange = link.measure(1)
    request = next(exchange)
    for transfer in itertools.count():
        clock[0] += 2e-4 + sent_bytes(request) / 1e8 + (0.3 if transfer in (0, 1, 7) else 0)  # late ranks, a stall
        try:
            request = exchange.send(None)
        except StopIteration:
            break
    assert link.fit().latency_seconds == pytest.approx(2e-4, rel=1e-3)
    assert link.fit().bandwidth_bytes_per_second == pytest.approx(1e8, rel=1e-3)


def test_without_a_network_there_is_nothing_to_measure():
    with pytest.raises(ValueError, match="link="):
        world(objective="time")


def statistics(norms: list[float], previous: dict[str, float]) -> Statistics:
    layers = [Layer(name, i, torch.Size([8, 8]), (1.0, 2.0, 4.0), 1) for i, name in enumerate("abcd"[: len(norms)])]
    errors = np.array([[3.0, 2.0, 1.0]] * len(norms))
    return Statistics(layers, errors, np.array([[1.0, 2.0, 4.0]] * len(norms)), np.array(norms), previous)


def test_accordion_spares_layers_whose_gradients_change():
    norms, previous = [10.0, 10.0, 10.0, math.inf], {"a": 20.0, "b": 19.0, "c": 0.0, "d": 1.0}
    policy = Accordion(low=4, high=1)
    assert policy.choose(statistics(norms, previous)).choice == [2, 0, 2, 2]
    assert policy.choose(statistics(norms, {})).choice == [2, 2, 2, 2]
    assert Accordion(low=4, high=1, eta=0.4).choose(statistics([10.0], {"a": 16.0})).choice == [0]


def test_accordion_can_be_the_reference():
    decision = LGreCo(reference=Accordion(low=4, high=2)).choose(statistics([1.0, 1.0], {"a": 1.0, "b": 9.0}))
    assert decision.record["reference"] == [1, 2]
    assert decision.record["budget"] == 3.0
    assert decision.record["cost"] <= 6.0


def test_accordion_begins_with_low_compression_and_watches_norms():
    ranks = LocalRanks([Compression.accordion(base(), 8, 2, **OPTIONS) for _ in range(2)])
    assert rates(ranks) == [8, 8, None, 8]
    run(ranks, range(5))
    assert rates(ranks) == [8, 8, None, 8]  # nothing to compare with
    run(ranks, range(5, 9))
    assert rates(ranks) == [2, 2, None, 2]
    run(ranks, range(9, 13), scale=5.0)
    assert rates(ranks) == [8, 8, None, 8]


def accordion(**options: Any) -> LocalRanks:
    options = {"interval": 4} | options
    return LocalRanks([Compression.accordion(base("qsgd", bits=8), 8, 2, **options) for _ in range(2)])


def norms_of(ranks: LocalRanks) -> dict[str, float]:
    """The norms of the last decision; the same on all ranks."""
    for compression in ranks.compressions:
        compression.settle()
    first, *others = [compression.progress[2]["norms"] for compression in ranks.compressions]
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({}, range(4, 8)),
        ({"window": 2}, range(6, 8)),
        ({"warmup_steps": 3}, range(3, 7)),
        ({"warmup_steps": 7}, range(7)),
    ],
    ids=str,
)
def test_accordions_norm_is_that_of_the_mean_of_what_was_received_in_the_interval(options, counted):
    ranks = accordion(**options)
    received = [ranks.exchange(gradients(step, 2))[0] for step in range(10)]
    for name, norm in norms_of(ranks).items():
        mean = torch.stack([received[step][name].double() for step in counted]).mean(0)
        assert norm == pytest.approx(float(mean.norm()), rel=1e-5)


def test_accordion_looks_at_what_ranks_have_in_common():
    """Gradients that grow and cancel say nothing, whatever their norms on a rank are."""
    ranks = accordion()
    for step in range(9):
        common, own = gradients(0, 1)[0], gradients(step, 1, scale=10.0 if step >= 4 else 0.1)[0]
        ranks.exchange([{name: common[name] + sign * own[name] for name in SHAPES} for sign in (1, -1)])
    assert rates(ranks) == [2, 2, None, 2]


def test_accordions_norms_are_without_the_loss_scale():
    plain, scaled = accordion(), accordion()
    run(plain, range(6))
    for step in range(6):
        for compression in scaled.compressions:
            compression.loss_scale = 2.0**step
        scaled.exchange(gradients(step, 2, scale=2.0**step))
    assert norms_of(scaled) == pytest.approx(norms_of(plain), rel=1e-6)


def test_a_step_that_is_not_finite_is_left_out_of_accordions_mean():
    ranks = accordion()
    received = []
    for step in range(6):
        mine = gradients(step, 2)
        if step == 1:
            mine[1]["a"][0, 0] = math.inf
        received.append(ranks.exchange(mine)[0])
    mean = torch.stack([received[step]["a"].double() for step in (0, 2, 3)]).mean(0)
    assert norms_of(ranks)["a"] == pytest.approx(float(mean.norm()), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("saved_at", [6, 8])
def test_other_ranks_take_over_accordions_sums_as_they_are(size, saved_at):
    first = accordion()
    received = [first.exchange(gradients(step, 2))[0] for step in range(saved_at)]
    states = [compression.state_dict() for compression in first.compressions]
    merged = states[0] | {
        kind: {rank: state[kind][rank] for rank, state in enumerate(states)} for kind in ("residuals", "accumulated")
    }
    resumed = LocalRanks([Compression.accordion(base("qsgd", bits=8), 8, 2, interval=4) for _ in range(size)])
    for compression in resumed.compressions:
        compression.load_state_dict(through_file(merged))
    received += [resumed.exchange(gradients(step, size))[0] for step in range(saved_at, 10)]
    for name, norm in norms_of(resumed).items():
        mean = torch.stack([received[step][name].double() for step in range(4, 8)]).mean(0)
        assert norm == pytest.approx(float(mean.norm()), rel=1e-5)


def test_norms_of_an_earlier_version_are_not_compared():
    """They were of each rank's own gradients, in a window."""
    first, resumed = accordion(), accordion()
    run(first, range(6))
    for compression, state in zip(resumed.compressions, [c.state_dict() for c in first.compressions]):
        del state["adaptive"]["norms_of"]
        rank = compression.rank
        state["accumulated"][rank] = {"a:gradient": torch.ones(3000)}
        compression.load_state_dict(state)
    run(resumed, range(6, 9))
    assert rates(resumed) == [8, 8, None, 8]  # nothing to compare with
    assert not any(":gradient" in name for name in resumed.compressions[0].controller.accumulated)


def test_accordion_resumes_with_its_norms():
    def make() -> LocalRanks:
        return LocalRanks([Compression.accordion(base(), 8, 2, **OPTIONS) for _ in range(2)])

    first, resumed = make(), make()
    run(first, range(7))
    for compression, state in zip(resumed.compressions, [c.state_dict() for c in first.compressions]):
        compression.load_state_dict(state)
    assert run(resumed, range(7, 10)) == run(first, range(7, 10))
    assert rates(resumed) == [2, 2, None, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": 3, "window": 4}, "interval"),
        ({"warmup_steps": 1}, "warmup_steps"),
        ({"window": 0}, "window"),
        ({"reach": 0.5}, "reach"),
        ({"objective": "speed"}, "objective"),
        ({"errors": "none"}, "errors"),
        ({"errors_of": "rank1"}, "errors_of"),
        ({"alpha": 0}, "alpha"),
        ({"levels": 0}, "levels"),
        ({"rates": (1.5,)}, "approximation_rank"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        adapted(**options)


def test_options_have_names_and_defaults():
    for method in (Compression.lgreco, Compression.accordion):
        options = inspect.signature(method).parameters
        assert options["interval"].default == 1000
        assert options["warmup_steps"].default is None
        assert not any(option.kind is option.VAR_KEYWORD for option in options.values())
    assert Options().first == 1000
    assert inspect.signature(Compression.lgreco).parameters["alpha"].default == 1.0
    assert inspect.signature(Compression.accordion).parameters["eta"].default == 0.5


def test_what_has_no_rates_is_refused():
    named = [("a", torch.zeros(60, 50))]
    with pytest.raises(ValueError, match="no rates to choose from"):
        Compression.lgreco(Compression.terngrad(named))
    with pytest.raises(ValueError, match="base must be"):
        Compression.lgreco(Compression.bf16)
    with pytest.raises(ValueError, match="controller already"):
        Compression.lgreco(adapted())
    with pytest.raises(ValueError, match="low and high"):
        Compression.accordion(base(), 0, 1)


def test_the_schedule_of_decisions():
    options = Options(interval=5, warmup_steps=3, window=2)
    assert [step for step in range(20) if options.steps_to_decision(step) == 0] == [3, 8, 13, 18]
    assert [step for step in range(9) if 0 < options.steps_to_decision(step) <= 2] == [1, 2, 6, 7]


def test_ranks_compare_their_controllers():
    alone, one, other = base(), adapted(), adapted(alpha=1.5)
    descriptions = [compression.description() for compression in (alone, one, other)]
    assert len({json.dumps(description) for description in descriptions}) == 3


def test_nothing_is_kept_outside_of_the_window():
    ranks = world()
    controller = ranks.compressions[0].controller
    held = []
    for step in range(6):
        run(ranks, range(step, step + 1))
        held.append(sorted(controller.accumulated))
    assert held == [[], [], ["a", "b", "c"], ["a", "b", "c"], [], []]
