"""Bytes and ratios; records, spans, and what becomes of them."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import weakref

import pytest
import torch

from hvd_compress import Compression, kernels
from hvd_compress.engine import Ticket
from hvd_compress.local import LocalRanks
from hvd_compress.requests import Allgather, Allreduce, Alltoall, Broadcast, sent_bytes
from hvd_compress.telemetry import KINDS, Collective, ParameterStep, Spans, StepSeconds, Telemetry, Traffic
from hvd_compress.telemetry import spans as spans_module


def test_a_ratio_is_raw_over_sent():
    traffic = Traffic()
    assert math.isnan(traffic.compression_ratio)
    traffic.add(400, 25)
    traffic.add(400, 75)
    assert (traffic.raw_bytes, traffic.sent_bytes, traffic.compression_ratio) == (800, 100, 8.0)


def test_tensors_count_by_name_in_all_and_among_the_compressed():
    telemetry = Telemetry()
    telemetry.record("w", 400, 40, compressed=True)
    telemetry.record("b", 40, 40, compressed=False)
    telemetry.record("w", 400, 60, compressed=True)
    assert telemetry.parameters == {"w": Traffic(800, 100), "b": Traffic(40, 40)}
    assert telemetry.compressed == Traffic(800, 100)
    assert telemetry.total == Traffic(840, 140)


def test_a_reset_forgets_all():
    telemetry = Telemetry()
    before = telemetry.total
    telemetry.steps = 3
    telemetry.record("w", 400, 40, compressed=True)
    telemetry.reset()
    assert telemetry == Telemetry()
    assert before.raw_bytes == 400


FRAME, TENSOR = torch.zeros(40, dtype=torch.uint8), torch.zeros(3, 5, dtype=torch.float16)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Allgather(FRAME), 40),
        (Allreduce(TENSOR), 30),
        (Alltoall([FRAME, FRAME[:8]]), 48),
        (Broadcast(TENSOR, 1), 30),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_request_costs_its_frames_or_its_tensor(request_, expected):
    assert sent_bytes(request_) == expected


SHAPES = {"a": (40, 60), "b": (30, 50), "vector": (7,)}


def exchanged(make, steps=3, *, ranks=2, errors=False, records=1000, spoil=None, **options):
    """Ranks that were watched while they exchanged random gradients, and these gradients by step and rank."""
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    compressions = [make(named, min_numel=100, **options) for _ in range(ranks)]
    together = LocalRanks(compressions)
    for compression in compressions:
        compression.telemetry.watch(records=records, errors=errors)
    generator = torch.Generator().manual_seed(0)
    given = []
    for step in range(steps):
        given.append([{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(ranks)])
        if step == spoil:
            given[-1][1]["a"][0, 0] = math.inf
        together.exchange(given[-1])
    for compression in compressions:
        compression.settle()
    return compressions, given


def records_of(compression, kind=ParameterStep):
    return [record for record in compression.telemetry.history if isinstance(record, kind)]


def test_nothing_is_recorded_or_timed_unless_it_is_asked_for():
    named = [("a", torch.zeros(40, 60))]
    compressions = [Compression.topk(named) for _ in range(2)]
    LocalRanks(compressions).exchange([{"a": torch.ones(40, 60)} for _ in range(2)])
    compressions[0].settle()
    assert not compressions[0].telemetry.history
    assert compressions[0].telemetry.spans is None


def test_a_record_for_every_parameter_and_step_and_one_for_the_step():
    (compression, _), _ = exchanged(Compression.topk, density=0.05)
    records = records_of(compression)
    assert [(record.step, record.parameter) for record in records] == [(s, n) for s in range(3) for n in SHAPES]
    assert {(r.parameter, r.rate) for r in records} == {("a", 0.05), ("b", 0.05), ("vector", None)}
    assert sum(record.sent_bytes for record in records) == compression.telemetry.total.sent_bytes
    assert [record.raw_bytes for record in records[:3]] == [9600, 6000, 28]
    assert [record.step for record in records_of(compression, StepSeconds)] == [0, 1, 2]


def test_the_rate_is_that_of_the_step():
    (compression, _), _ = exchanged(Compression.topk, density=lambda step: 0.1 / (step + 1))
    found = [record.rate for record in records_of(compression) if record.parameter == "a"]
    assert found == pytest.approx([0.1, 0.05, 0.1 / 3])


def test_a_controllers_rate_comes_before_the_compressors_own():
    named = [("a", torch.zeros(40, 60))]
    compressions = [Compression.topk(named) for _ in range(2)]
    together = LocalRanks(compressions)
    for compression in compressions:
        compression.slots[0].rate = 0.25
        compression.telemetry.watch(records=10)
    together.exchange([{"a": torch.randn(40, 60)} for _ in range(2)])
    assert records_of(compressions[0])[0].rate == 0.25


def test_the_error_is_the_part_that_stays_in_the_residual():
    compressions, given = exchanged(Compression.topk, errors=True, density=0.05)
    for rank, compression in enumerate(compressions):
        owed = torch.zeros(SHAPES["a"])
        errors = [record.error for record in records_of(compression) if record.parameter == "a"]
        for gradients, error in zip(given, errors):
            whole = (owed + gradients[rank]["a"]).view(-1)
            left = whole.clone()
            left[whole.abs().topk(120).indices] = 0
            assert error == pytest.approx(float(left.norm() / whole.norm()), rel=1e-5)
            owed = left.view(SHAPES["a"])


@pytest.mark.parametrize(
    ("make", "low", "high"),
    [
        (Compression.none, 0, 0),
        (Compression.fp16, 1e-5, 1e-3),
        (Compression.bf16, 1e-4, 4e-3),
        (Compression.qsgd, 0.05, 0.3),
        (Compression.terngrad, 0.3, 3),
        (Compression.powersgd, 0.3, 1),
        (Compression.scalecom, 0.9, 1),
        (Compression.adacomp, 0.3, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_method_tells_its_error(make, low, high):
    named = [("a", torch.zeros(100, 100))]
    compressions = [make(named) for _ in range(2)]
    together = LocalRanks(compressions)
    compressions[0].telemetry.watch(records=10, errors=True)
    together.exchange([{"a": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))} for _ in range(2)])
    assert low <= records_of(compressions[0])[0].error <= high


def test_to_look_at_errors_changes_no_bit_of_the_training():
    def trained(errors):
        named = [("a", torch.zeros(40, 60))]
        together = LocalRanks([Compression.adacomp(named) for _ in range(2)])
        if errors:
            together.compressions[0].telemetry.watch(records=100, errors=True)
        generator = torch.Generator().manual_seed(0)
        return [
            together.exchange([{"a": torch.randn(40, 60, generator=generator)} for _ in "ab"])[0]["a"] for _ in "abcd"
        ]

    assert all(torch.equal(seen, unseen) for seen, unseen in zip(trained(True), trained(False)))


def test_the_error_of_what_is_not_finite_is_not_a_number_and_none_in_json(tmp_path):
    (_, compression), _ = exchanged(Compression.topk, errors=True, spoil=1)
    errors = [record.error for record in records_of(compression) if record.parameter == "a"]
    assert [math.isnan(error) for error in errors] == [False, True, False]
    compression.telemetry.to_jsonl(tmp_path / "log")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["error"] is None for line in lines if line.get("parameter") == "a"] == [False, True, False]


def test_only_the_last_records_are_kept():
    (compression, _), _ = exchanged(Compression.topk, steps=20, records=8)
    assert [r.step for r in compression.telemetry.history] == [18] * 4 + [19] * 4


def test_collectives_are_kept_without_being_asked_for_and_no_more_than_a_thousand():
    (compression, _), _ = exchanged(Compression.topk, steps=2)
    collectives = list(compression.telemetry.collectives)
    assert {collective.kind for collective in collectives} == {"allgather", "allreduce.sum.torch.float32.cpu"}
    assert sum(c.sent_bytes for c in collectives) == compression.telemetry.total.sent_bytes
    assert all(collective.seconds >= 0 for collective in collectives)
    compression.telemetry.collectives.extend([Collective("allgather", 1, 0.1, True)] * 2000)
    assert len(compression.telemetry.collectives) == 1000


def test_a_reset_goes_on_with_what_is_watched():
    (compression, _), _ = exchanged(Compression.topk, errors=True, records=50)
    compression.telemetry.reset()
    telemetry = compression.telemetry
    assert (telemetry.steps, list(telemetry.history), telemetry.errors) == (0, [], True)
    assert telemetry.history.maxlen == 50
    assert set(telemetry.spans.seconds.values()) == {0.0}


@pytest.mark.parametrize(("options", "says"), [({"records": -1}, "negative"), ({"errors": True}, "records=100_000")])
def test_what_cannot_be_watched_is_an_error(options, says):
    with pytest.raises(ValueError, match=says):
        Telemetry().watch(**options)


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(spans_module, "perf_counter", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


def test_a_span_interrupts_the_one_around_it(monkeypatch):
    clock, spans = Clock(monkeypatch), Spans()
    spans.begin()
    clock.pass_(1)
    spans.begin()
    clock.pass_(10)
    spans.end("encode")
    clock.pass_(2)
    spans.begin()
    clock.pass_(100)
    spans.end("exchange")
    spans.end("python")
    clock.pass_(1000)
    assert spans.seconds == {"python": 3, "encode": 10, "exchange": 100, "decode": 0, "kernels": 0}


def test_spans_of_two_compressions_do_not_mix(monkeypatch):
    clock, first, second = Clock(monkeypatch), Spans(), Spans()
    first.begin()
    clock.pass_(1)
    second.begin()
    clock.pass_(10)
    second.end("python")
    first.end("python")
    assert (first.seconds["python"], second.seconds["python"]) == (1, 10)


def test_what_a_thread_does_meanwhile_is_kept_apart(monkeypatch):
    clock, spans = Clock(monkeypatch), Spans()
    spans.begin()
    clock.pass_(5)
    spans.end("decode")
    assert (spans.seconds["decode"], spans.background["decode"]) == (0, 5)


@pytest.mark.skipif(kernels.in_use() == "torch", reason="no C++ kernels")
def test_kernels_are_a_part_of_encode_and_decode():
    (compression, _), _ = exchanged(Compression.topk)
    seconds = compression.telemetry.spans.seconds
    assert all(seconds[kind] > 0 for kind in ("encode", "decode", "python", "kernels"))
    assert seconds["kernels"] < seconds["encode"] + seconds["decode"]
    by_step = records_of(compression, StepSeconds)
    assert sum(record.encode for record in by_step) == pytest.approx(seconds["encode"])


def test_all_spans_together_take_no_longer_than_the_calls_did():
    named = [("a", torch.zeros(40, 60))]
    compression = Compression.topk(named)
    together = LocalRanks([compression])
    compression.telemetry.watch()
    start = time.perf_counter()
    for _ in range(5):
        together.exchange([{"a": torch.ones(40, 60)}])
    passed = time.perf_counter() - start
    assert 0 < sum(compression.telemetry.spans.seconds[kind] for kind in KINDS) <= passed


def test_an_exchange_that_fails_leaves_no_span_open():
    named = [("a", torch.zeros(40, 60))]
    compressions = [Compression.topk(named) for _ in range(2)]
    together = LocalRanks(compressions)
    compressions[0].telemetry.watch()
    with pytest.raises(RuntimeError, match="never posted"):
        together.compressions[0].finish(compressions[0].submit(0, torch.ones(40, 60)), torch.ones(40, 60), average=True)
    assert spans_module._thread.spans == []


@pytest.mark.parametrize("make", [Compression.topk, Compression.terngrad, Compression.powersgd])
def test_a_finished_exchange_holds_no_gradient(make):
    named = [("a", torch.zeros(40, 60))]
    compressions = [make(named) for _ in range(2)]
    together = LocalRanks(compressions)
    gc.collect()
    gc.disable()  # what only the collector frees adds up to many steps' gradients
    try:
        (result, _) = together.exchange([{"a": torch.randn(40, 60)} for _ in range(2)])
        storage = weakref.ref(result["a"])
        together.exchange([{"a": torch.randn(40, 60)} for _ in range(2)])
        del result
        assert storage() is None
        assert [found for found in gc.get_objects() if type(found) is Ticket] == []
    finally:
        gc.enable()


def test_the_table_has_a_line_for_each_parameter_and_for_all():
    (compression, _), _ = exchanged(Compression.topk, errors=True, density=0.05)
    head, *lines, last = compression.telemetry.table().splitlines()
    assert head.split() == ["parameter", "bytes", "a", "step", "sent", "ratio", "rate", "error"]
    assert [line.split()[0] for line in lines] == [*SHAPES, "all"]
    assert lines[0].split()[1:3] == ["9,600", f"{compression.telemetry.parameters['a'].sent_bytes / 3:,.0f}"]
    assert "0.05" in lines[0]
    assert last.startswith("ms a step: encode ")


def test_a_table_of_nothing_is_no_error():
    assert Telemetry().table().splitlines()[-1].split() == ["all", "0", "0", "nan"]


def test_json_lines_can_be_read_back_and_appended_to(tmp_path):
    (compression, _), _ = exchanged(Compression.topk, steps=2)
    telemetry, path = compression.telemetry, tmp_path / "log.jsonl"
    telemetry.to_jsonl(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [ParameterStep(**line) for line in lines if "parameter" in line] == records_of(compression)
    assert [StepSeconds(**line) for line in lines if "encode" in line] == records_of(compression, StepSeconds)
    telemetry.to_jsonl(path, append=True)
    assert len(path.read_text().splitlines()) == 2 * len(lines)
    telemetry.to_jsonl(path)
    assert len(path.read_text().splitlines()) == len(lines)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_gets_all_records_whatever_is_kept_besides(tmp_path):
    telemetry, path = Telemetry(), tmp_path / "run.jsonl"
    telemetry.write_to(path)
    telemetry.watch(records=10)
    for step in range(3000):
        telemetry.record("w", 400, 40, compressed=True, step=step, rate=0.1)
        telemetry.settled(step)
        if step == 2000:
            telemetry.reset()
    assert len(telemetry.history) == 10
    kept = len(written(path))
    assert 0 < kept < 6000  # the rest is written when nobody can add to it any more
    del telemetry
    gc.collect()
    lines = written(path)
    assert [line["step"] for line in lines] == [step for step in range(3000) for _ in range(2)]
    assert lines[0] == {
        "step": 0,
        "parameter": "w",
        "raw_bytes": 400,
        "sent_bytes": 40,
        "rate": 0.1,
        "error": None,
    }


def test_a_file_that_cannot_be_written_is_told_once_and_ends_no_training(tmp_path, caplog):
    telemetry = Telemetry()
    telemetry.write_to(tmp_path / "nowhere" / "run.jsonl")
    for step in range(9000):
        telemetry.record("w", 400, 40, compressed=True, step=step)
    del telemetry
    gc.collect()
    (told,) = caplog.messages
    assert "telemetry is not written any longer" in told
    assert "nowhere" in told


class Writer:
    def __init__(self):
        self.scalars = []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))


def test_tensorboard_gets_scalars_by_step():
    (compression, _), _ = exchanged(Compression.topk, steps=2, density=0.05)
    writer = Writer()
    compression.telemetry.to_tensorboard(writer)
    assert ("rate/a", 0.05, 1) in writer.scalars
    assert ("raw_bytes/vector", 28, 0) in writer.scalars
    assert {tag for tag, _, _ in writer.scalars if tag.startswith("seconds/")} == {
        f"seconds/{kind}" for kind in (*KINDS, "kernels")
    }
    assert not any(tag.startswith(("step", "parameter", "error", "rate/vector")) for tag, _, _ in writer.scalars)


def test_without_tensorboard_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"hvd_compress\[tensorboard\]"):
        Telemetry().to_tensorboard(tmp_path)


def test_tensorboard_reads_what_is_written_for_it(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (compression, _), _ = exchanged(Compression.topk, steps=2, density=0.05)
    compression.telemetry.to_tensorboard(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("rate/a")] == [(0, pytest.approx(0.05)), (1, pytest.approx(0.05))]
