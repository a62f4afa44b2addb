"""The benchmarks of jobs run, tell what they promise, and leave nothing of their networks behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .launch import ROOT, no_control_codes, start

BENCHMARKS = ROOT / "benchmarks"
SECONDS = 120.0

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="needs Horovod")


def emulation_is_missing() -> bool:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "unshare", "mount"))):
        return True
    probe = f"hvdcprobe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", probe], check=True)
    return not made


needs_hosts = pytest.mark.skipif(emulation_is_missing(), reason="needs root and network namespaces")


def rows_of(script: str, out: Path, **environment: str) -> tuple[list[dict], str]:
    """The rows of a benchmark that is run to its end, and what it printed."""
    command = [sys.executable, "-W", "ignore", BENCHMARKS / script]
    ended = start(command, OUT=str(out), **environment).end(SECONDS)
    assert ended.code == 0, str(ended)
    assert ended.left_behind == []
    assert no_control_codes(ended.output)
    return json.loads(out.read_text()), ended.output


def namespaces(process_id: int | None = None) -> list[str]:
    """Of network benchmarks, or of that one which has this process id."""
    prefix = "hvdcbench-" if process_id is None else f"hvdcbench-{process_id}-"
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(prefix)]


SMALL = {"HOSTS": "2", "PARAMETERS": "10M", "SECONDS_EACH": "0.1"}
FIELDS = {
    *("hosts", "rate_mbit", "parameters", "method", "step_seconds", "exposed_seconds", "bytes_per_rank_per_step"),
    *("network", "numel", "rounds", "steps_per_round"),
}


@pytest.mark.long
@needs_horovod
def test_the_network_benchmark_runs_on_loopback_and_says_so(tmp_path):
    methods = ["bound", "ddp-powersgd1", "topk:density=0.001", "hook-topk:density=0.001"]
    rows, output = rows_of("network.py", tmp_path / "rows.json", LOOPBACK="1", METHODS=",".join(methods), **SMALL)
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert row.keys() >= FIELDS
        assert (row["network"], row["hosts"], row["rate_mbit"], row["numel"]) == ("loopback", 2, None, 10_020_010)
        assert row["exposed_seconds"] == row["step_seconds"] - rows[0]["step_seconds"]
    assert rows[2]["encode_seconds"] > 0
    assert "loopback: no network in between" in output
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@needs_horovod
@needs_hosts
def test_the_network_benchmark_runs_on_emulated_hosts(tmp_path):
    methods = "bound,horovod-fp16,topk"
    rows, _ = rows_of("network.py", tmp_path / "rows.json", RATES="1gbit", METHODS=methods, **SMALL)
    bound, half, topk = rows
    assert [(row["network"], row["rate_mbit"]) for row in rows] == [("emulated", 1000)] * 3
    # Over two hosts a ring sends the tensor once: 20 MB of float16. Of top-k 1 %, six bytes an entry: 0.6 MB.
    assert half["bytes_per_rank_per_step"] == pytest.approx(20.04e6, rel=0.05)
    assert topk["bytes_per_rank_per_step"] == pytest.approx(0.64e6, rel=0.15)
    assert bound["bytes_per_rank_per_step"] < 0.1e6


@needs_hosts
def test_a_network_benchmark_that_is_ended_removes_its_hosts(tmp_path):
    command = [sys.executable, "-u", BENCHMARKS / "network.py"]
    job = start(command, RATES="1gbit", METHODS="bound,topk", **SMALL)
    job.await_output("one TCP connection carries", SECONDS)
    (pid,) = {name.split("-")[1] for name in namespaces() if is_of(job, int(name.split("-")[1]))}
    assert len(namespaces(int(pid))) == 2
    os.kill(int(pid), signal.SIGTERM)
    ended = job.end(30)
    assert ended.code == 128 + signal.SIGTERM, str(ended)
    assert ended.left_behind == []
    assert namespaces(int(pid)) == []


def is_of(job, process_id: int) -> bool:
    """Whether that process belongs to `job`; other benchmarks may be running."""
    return process_id in job._alive()


@needs_hosts
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_reach_each_other_at_the_rate_that_was_set_and_vanish_with_an_error(count, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from network_hosts import Hosts

    def fail() -> None:
        with Hosts(count) as hosts:
            assert len(namespaces(os.getpid())) == count + (count > 2)  # and a switch
            hosts.limit("20mbit")
            assert 10 < hosts.throughput(0.5) <= 40  # of which the buckets of the links let some pass at once
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert namespaces(os.getpid()) == []


@pytest.mark.parametrize("rate", ["1", "gbit", "1 gbit", "0gbit", "-1gbit", "1tbit"])
def test_a_rate_that_is_none_is_an_error(rate, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from network_hosts import megabits

    with pytest.raises(ValueError, match="such as 100mbit"):
        megabits(rate)
    assert [megabits(known) for known in ("100mbit", "1gbit", "2.5gbit", "64kbit")] == [100, 1000, 2500, 0.064]


@pytest.mark.parametrize(
    ("variable", "value"), [("METHODS", "bound,topq"), ("RATES", "fast"), ("PARAMETERS", "11M"), ("HOSTS", "two")]
)
def test_what_the_network_benchmark_does_not_know_is_an_error(variable, value, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("LOOPBACK", "1")
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["network.py"])
    import network

    with pytest.raises(SystemExit) as ended:
        network.main()
    assert ended.value.code == 2
    assert value.split(",")[-1] in capsys.readouterr().err


@pytest.mark.long
@needs_horovod
def test_the_overhead_benchmark_tells_where_time_and_memory_go(tmp_path):
    rows, output = rows_of("overhead.py", tmp_path / "rows.json", METHODS="topk", STEPS="3")
    simulated = [row for row in rows if row["where"] == "simulated"]
    under_horovod = [row for row in rows if row["where"] == "horovod"]
    assert [(row["ranks"], row["tensors"], row["numel"]) for row in simulated] == [
        (1, 160, 1_600_000),
        (2, 160, 1_600_000),
    ]
    assert [(row["method"], row["numel"]) for row in under_horovod] == [
        (method, numel) for method in ("horovod-none", "topk") for numel in (1_600_000, 10_020_010)
    ]
    for row in simulated + [row for row in under_horovod if row["method"] == "topk"]:
        parts = [row[f"{kind}_seconds"] for kind in ("encode", "decode", "python", "exchange")]
        assert all(seconds >= 0 for seconds in parts)
        assert row["python_microseconds_per_tensor"] > 0
    # A residual and the memory of the next one, of 40 MB each; not many steps' gradients.
    assert under_horovod[3]["peak_bytes_over_none"] < 150e6
    assert "us of Python a tensor" in output


def test_damaged_frames_are_refused_or_read(tmp_path):
    rows, output = rows_of("frames.py", tmp_path / "rows.json", METHODS="topk_0.3,terngrad", FRAMES="2000")
    assert [(row["method"], row["frames"], row["wrong"], row["crashed"]) for row in rows] == [
        ("topk_0.3", 1000, 0, ""),
        ("terngrad", 1000, 0, ""),
    ]
    assert all(row["refused"] > 500 and row["read"] > 50 for row in rows)
    assert "0 wrongly accepted, 0 crashes" in output


@pytest.mark.long
def test_faults_are_counted(tmp_path):
    faults = {"FAULTS": "nan_on_one_rank,wrong_shapes,corrupt_frame_received", "BACKENDS": "mpi4py", "TIMES": "1"}
    rows, output = rows_of("faults.py", tmp_path / "rows.json", **faults)
    assert [(row["fault"], row["good"], row["outcome"]) for row in rows] == [
        ("nan_on_one_rank", 1, "exact recovery"),
        ("wrong_shapes", 1, "error"),
        ("corrupt_frame_received", 1, "error"),
    ]
    assert "3 of 3 ended well, 0 did not" in output


@pytest.mark.long
def test_the_soak_compares_replicas_and_reads_memory(tmp_path):
    rows, output = rows_of("soak.py", tmp_path / "rows.json", METHODS="topk", STEPS="100", CHECKS="4")
    assert [(row["step"], row["equal"]) for row in rows] == [(25, True), (50, True), (75, True), (100, True)]
    assert all(row["resident_bytes"] > 0 for row in rows)
    assert "100 steps" in output
