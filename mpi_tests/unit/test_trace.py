"""Traces: what they tell, and how those of several sources become one."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hvd_compress import Compression
from hvd_compress.commands import main
from hvd_compress.environment import TRACE
from hvd_compress.local import LocalRanks

STEPS = 3


def train(make, ranks=2):
    named = [("w", torch.zeros(50, 60)), ("b", torch.zeros(60))]
    together = LocalRanks([make(named) for _ in range(ranks)])
    for _ in range(STEPS):
        together.exchange([{name: torch.randn(tensor.shape) for name, tensor in named} for _ in range(ranks)])


def read(path):
    """The events, whose last bracket is missing."""
    return json.loads(path.read_text().rstrip().rstrip(",") + "]")


@pytest.fixture
def traces(tmp_path, monkeypatch):
    monkeypatch.setenv(TRACE, str(tmp_path / "trace{rank}.json"))
    before = time.time()
    train(Compression.terngrad)
    gc.collect()
    return [tmp_path / f"trace{rank}.json" for rank in range(2)], before, time.time()


def test_each_rank_tells_of_spans_by_bucket_collectives_and_steps(traces):
    paths, before, after = traces
    for rank, path in enumerate(paths):
        events = read(path)
        assert {event["pid"] for event in events} == {rank}
        assert events[0]["args"] == {"name": f"hvd_compress, rank {rank}"}
        timed = [event for event in events if event["ph"] != "M"]
        assert all(1e6 * before <= event["ts"] <= 1e6 * after for event in timed)
        spans = [event for event in timed if event["ph"] == "X"]
        assert {span["name"] for span in spans} == {"encode", "decode", "python"}  # simulated ranks do not wait
        assert all(span["args"]["bucket"] for span in spans if span["name"] in ("encode", "decode"))
        begun, ended = ([event for event in timed if event["ph"] == phase] for phase in "be")
        assert begun
        assert {event["id2"]["local"] for event in begun} == {event["id2"]["local"] for event in ended}
        assert all(event["args"]["sent_bytes"] > 0 for event in begun)
        # The last step has not ended.
        assert [event["name"] for event in timed if event["ph"] == "i"] == [f"step {s} ends" for s in range(STEPS - 1)]


def test_spans_of_a_thread_lie_in_one_another_or_apart(traces):
    (path, _), _, _ = traces
    spans = sorted((e["ts"], -e["dur"]) for e in read(path) if e["ph"] == "X")
    ends: list[float] = []
    for start, negative in spans:
        while ends and ends[-1] <= start:
            ends.pop()
        end = start - negative
        assert not ends or end <= ends[-1] + 1  # microseconds, of which a double of today has four to the unit
        ends.append(end)


def test_without_a_place_for_its_rank_rank_0_alone_traces(tmp_path, monkeypatch):
    monkeypatch.setenv(TRACE, str(tmp_path / "trace.json"))
    train(Compression.topk)
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert {event["pid"] for event in read(tmp_path / "trace.json")} == {0}


def test_nothing_is_traced_unless_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(Compression.topk)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_goes_on_in_the_file_and_a_reset_goes_on_tracing(tmp_path):
    path = tmp_path / "trace.json"
    for _ in range(2):
        compression = Compression.topk([("w", torch.zeros(50, 60))])
        compression.telemetry.trace_to(path, rank=3)
        compression.telemetry.reset()
        LocalRanks([compression]).exchange([{"w": torch.randn(50, 60)}])
        del compression
        gc.collect()
    events = read(path)
    assert [event["name"] for event in events].count("process_name") == 2
    assert {event["pid"] for event in events} == {3}


def horovods(path, start):
    """A timeline as Horovod's writer leaves it: a process for each tensor, times since its start."""
    named = {"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": start}}
    path.write_text(f'[\n{json.dumps(named)},\n{{"ph": "B", "name": "ALLREDUCE", "ts": 250, "pid": 1}},\n')


def test_traces_of_several_sources_are_put_on_one_clock(traces, tmp_path, capsys):
    paths, before, _ = traces
    horovods(tmp_path / "timeline.json", int(1e6 * before) - 1000)
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("of_the_profiler"):
        profiling = time.time()
        torch.ones(3).sum()
    profiled.export_chrome_trace(str(tmp_path / "profile.json"))
    files = [*paths, tmp_path / "timeline.json", tmp_path / "profile.json"]
    out = tmp_path / "all.json"
    assert main(["trace", str(out), *map(str, files)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"trace: {out}"
    assert all(str(path) in shown for path in files)
    found = json.loads(out.read_text())
    events = found["traceEvents"]
    start = found["baseTimeNanoseconds"] / 1e9
    assert abs(start - before) < 0.1  # the first is Horovod's, or ours
    (horovod,) = (event for event in events if event["name"] == "ALLREDUCE")
    assert start + horovod["ts"] / 1e6 == pytest.approx(before - 750e-6, abs=1e-5)
    (of_profiler,) = (event for event in events if event["name"] == "of_the_profiler" and event["ph"] == "X")
    assert start + of_profiler["ts"] / 1e6 == pytest.approx(profiling, abs=0.05)
    processes = [
        {event["pid"] for event in events if event.get("cat") == "hvd_compress" and has(event, r)} for r in (0, 1)
    ]
    assert len(processes[0] | processes[1] | {horovod["pid"], of_profiler["pid"]}) == 4


def has(event, rank):
    return event["ph"] == "M" and event["args"].get("name") == f"hvd_compress, rank {rank}"


@pytest.mark.parametrize("text", ["no trace", "{}", '{"traceEvents": 3}', "[1, 2]"])
def test_what_is_no_trace_is_an_error_that_names_the_file(tmp_path, text, capsys):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["trace", str(tmp_path / "all.json"), str(path)])
    assert ended.value.code == 2
    assert f"{path} is no trace" in capsys.readouterr().err
    assert not (tmp_path / "all.json").exists()
