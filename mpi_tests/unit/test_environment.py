"""What an operator sets in the environment: compression off, and how much is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hvd_compress import Compression
from hvd_compress.environment import LOG, METHOD, OFF, TELEMETRY, file_for, is_off
from hvd_compress.gradient_compression import _say_if_it_stays
from hvd_compress.local import LocalRanks
from hvd_compress.training import Masks

from .drive import random

TRAINED = """
import torch
from hvd_compress import Compression
from hvd_compress.local import LocalRanks

for _ in range(2):
    ranks = LocalRanks([Compression.topk([("w", torch.zeros(50, 60))]) for _ in range(2)])
    for _ in range(3):
        ranks.exchange([{"w": torch.randn(50, 60)} for _ in range(2)])
"""


def test_telemetry_is_written_by_the_time_the_process_has_ended(tmp_path):
    environment = os.environ | {TELEMETRY: str(tmp_path / "rank{rank}.jsonl")}
    subprocess.run([sys.executable, "-c", TRAINED], env=environment, check=True, cwd=tmp_path)
    files = ["rank0.1.jsonl", "rank0.jsonl", "rank1.1.jsonl", "rank1.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    for file in files:
        steps = [json.loads(line)["step"] for line in (tmp_path / file).read_text().splitlines()]
        assert steps == [0, 0, 1, 1, 2]  # the last one has not ended: seconds are those of whole steps


def test_without_a_place_for_its_rank_telemetry_is_that_of_rank_0(tmp_path):
    where = {TELEMETRY: str(tmp_path / "run.jsonl")}
    assert file_for(TELEMETRY, 1, where) is None
    assert [file_for(TELEMETRY, 0, where) for _ in range(2)] == [tmp_path / "run.jsonl", tmp_path / "run.1.jsonl"]
    assert file_for(TELEMETRY, 0, {}) is None


@pytest.mark.parametrize(
    ("value", "off"), [("1", True), ("true", True), ("On", True), ("", False), ("0", False), ("no", False)]
)
def test_it_is_off_where_the_variable_says_so(value, off):
    assert is_off({OFF: value}) == off


def test_it_is_on_without_the_variable():
    assert not is_off({})


def test_a_value_that_says_neither_is_an_error_that_names_those_that_do(monkeypatch):
    monkeypatch.setenv(OFF, "maybe")
    with pytest.raises(
        ValueError, match="HVD_COMPRESS_OFF must be one of 1, true, yes, on, 0, false, no, off: 'maybe'"
    ):
        Compression.topk([("w", torch.zeros(50, 50))])


METHODS = {
    "topk": lambda named: Compression.topk(named, density=0.01, topology="scatter"),
    "hierarchical": lambda named: Compression.qsgd(named, topology="hierarchical", ranks_per_node=2),
    "adacomp": lambda named: Compression.adacomp(named),
    "powersgd": lambda named: Compression.powersgd(named),
    "bf16": lambda named: Compression.bf16(named),
    "fp16": lambda named: Compression.fp16(named),
    "lgreco": lambda named: Compression.lgreco(Compression.topk(named), interval=2, window=2),
    "accordion": lambda named: Compression.accordion(Compression.topk(named), 0.1, 0.01),
}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_travel_as_they_are_where_it_is_off(monkeypatch, method):
    monkeypatch.setenv(OFF, "1")
    named = [("w", torch.zeros(50, 60)), ("b", torch.zeros(60))]
    ranks = LocalRanks([METHODS[method](named) for _ in range(2)])
    for step in range(3):
        known = [{"w": random(50, 60, seed=10 * step + r), "b": random(60, seed=r)} for r in range(2)]
        for result in ranks.exchange(known):
            assert all(torch.equal(result[name], (known[0][name] + known[1][name]) / 2) for name in result)
    assert ranks.compressions[0].memory_held().total_bytes == 0


def test_the_momentum_of_dgc_stays_where_it_is_off(monkeypatch):
    monkeypatch.setenv(OFF, "1")
    ranks = LocalRanks([Compression.dgc([("w", torch.zeros(50, 60))], momentum=0.5) for _ in range(2)])
    known = [{"w": random(50, 60, seed=r).round()} for r in range(2)]
    total = known[0]["w"] + known[1]["w"]
    for factor in (1.0, 1.5, 1.75):
        (result, _) = ranks.exchange(known, average=False)
        assert torch.equal(result["w"], factor * total)


def test_masks_stay_where_it_is_off(monkeypatch):
    monkeypatch.setenv(OFF, "1")
    masks, named = Masks(), [("w", torch.zeros(50, 60))]
    kept = random(50, 60) > 0
    masks.update({"w": kept})
    ranks = LocalRanks([Compression.masked(masks, named, dense=Compression.topk(named)) for _ in range(2)])
    known = [{"w": random(50, 60, seed=r)} for r in range(2)]
    (result, _) = ranks.exchange(known)
    assert torch.equal(result["w"], (known[0]["w"] + known[1]["w"]) / 2 * kept)
    masks.update({})
    (result, _) = ranks.exchange(known)
    assert torch.equal(result["w"], (known[0]["w"] + known[1]["w"]) / 2)


def test_that_it_is_off_is_said_once():
    script = """
import torch
from hvd_compress import Compression
for _ in range(3):
    print(Compression.topk(torch.nn.Linear(50, 60).named_parameters()).compressor)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, OFF: "1"}, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("HVD_COMPRESS_OFF is set: compression is switched off") == 1
    assert done.stdout.splitlines() == ["NoneCompressor()"] * 3


def test_a_switched_off_compression_keeps_what_a_checkpoint_owes(monkeypatch):
    model = nn.Linear(60, 50)
    on = LocalRanks([Compression.topk(model.named_parameters()) for _ in range(2)])
    on.exchange([{"weight": random(50, 60, seed=r)} for r in range(2)])
    states = [compression.state_dict() for compression in on.compressions]
    monkeypatch.setenv(OFF, "1")
    off = LocalRanks([Compression.topk(model.named_parameters()) for _ in range(2)])
    for rank, (compression, state) in enumerate(zip(off.compressions, states)):
        compression.load_state_dict(state)
        after = compression.state_dict()["residuals"][rank]
        assert torch.equal(after["weight"], state["residuals"][rank]["weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda named: Compression.topk(named, density=0.5, topology="scatter"),
        lambda named: Compression.none(named),
        lambda named: Compression.bf16(named),
        lambda named: Compression.lgreco(Compression.topk(named), interval=2, window=2),
    ],
)
def test_another_method_takes_the_place_of_what_the_script_asks_for(monkeypatch, make):
    named = [("w", torch.zeros(50, 60)), ("b", torch.zeros(60))]
    known = [{"w": random(50, 60, seed=r), "b": random(60, seed=r)} for r in range(2)]
    expected = LocalRanks([Compression.powersgd(named, approximation_rank=2, seed=3) for _ in range(2)])
    monkeypatch.setenv(METHOD, "powersgd:approximation_rank=2:seed=3")
    ranks = LocalRanks([make(named) for _ in range(2)])
    assert ranks.compressions[0].controller is None
    assert repr(ranks.compressions[0]) == repr(expected.compressions[0])
    for results in zip(ranks.exchange(known), expected.exchange(known)):
        assert all(torch.equal(results[0][name], results[1][name]) for name in ("w", "b"))


def test_the_scripts_own_options_stay_and_the_operators_come_before(monkeypatch):
    monkeypatch.setenv(METHOD, "topk:density=0.1:min_numel=7")
    compression = Compression.qsgd([("w", torch.zeros(50, 60))], exclude="w*", min_numel=100, bucket_bytes=77)
    options = compression.options
    assert (options.exclude, options.min_numel, options.bucket_bytes) == (("w*",), 7, 77)
    assert compression.compressor.density == 0.1


def test_masks_stay_where_another_method_is_asked_for(monkeypatch):
    monkeypatch.setenv(METHOD, "qsgd:bits=8")
    named = [("w", torch.zeros(50, 60))]
    compression = Compression.masked(Masks(), named, dense=Compression.topk(named))
    assert compression.compressor.dense == Compression.qsgd(named, bits=8).compressor


def test_what_has_the_optimizers_momentum_is_not_replaced(monkeypatch):
    named = [("w", torch.zeros(50, 60))]
    monkeypatch.setenv(METHOD, "topk")
    with pytest.raises(ValueError, match="HVD_COMPRESS_METHOD=topk cannot take the place of DGC.*unset the variable"):
        Compression.dgc(named)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ("topq", "no such method: topq .choose from none, .*topk"),
        ("topk:density", "'density' is no OPTION=VALUE"),
        ("topk:bits=3", "unexpected keyword argument 'bits'"),
        ("topk:density=2", "density must be in"),
    ],
)
def test_a_method_that_is_none_is_an_error_that_names_the_variable(monkeypatch, asked, says):
    monkeypatch.setenv(METHOD, asked)
    with pytest.raises(ValueError, match=f"HVD_COMPRESS_METHOD: .*{says}"):
        Compression.qsgd([("w", torch.zeros(50, 60))])


def test_off_comes_before_a_method(monkeypatch):
    monkeypatch.setenv(METHOD, "topk")
    monkeypatch.setenv(OFF, "1")
    assert repr(Compression.qsgd([("w", torch.zeros(50, 60))]).compressor) == "NoneCompressor()"


def test_what_does_not_know_its_parameters_stays_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv(METHOD, "topk")
    _say_if_it_stays.cache_clear()
    try:
        compression = Compression.fp16
        for _ in range(3):
            summand, _ = compression.compress(torch.ones(2000))
        assert summand.dtype == torch.float16
        (told,) = caplog.messages
        assert "HVD_COMPRESS_METHOD=topk changes nothing for Compression.fp16" in told
        assert "pass Compression.fp16(model.named_parameters())" in told
    finally:
        _say_if_it_stays.cache_clear()


@pytest.mark.parametrize(("level", "shown"), [("info", "1"), ("warning", ""), ("", "")])
def test_messages_are_shown_from_the_level_that_is_asked_for(level, shown):
    script = "from hvd_compress.log import log; import hvd_compress; log.info('told')"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, LOG: level}, capture_output=True, text=True, check=True
    )
    assert ("hvd_compress: told" in done.stderr) == bool(shown)


def test_what_is_no_level_is_told_with_those_that_are():
    done = subprocess.run(
        [sys.executable, "-c", "import hvd_compress"], env={**os.environ, LOG: "loud"}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "HVD_COMPRESS_LOG must be one of debug, info, warning, error: 'loud' is not" in done.stderr
