"""Compression.auto: tries, takes what is fastest on the slowest rank, and none where nothing is."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch

from hvd_compress import Compression, GradientCompression
from hvd_compress.adaptive import Trials, trials
from hvd_compress.local import LocalRanks

from .test_adaptive import SHAPES, gradients

NAMES = ("none", "bf16", "qsgd")


class Clock:
    """In place of time.perf_counter(): a step takes what its candidate takes on the rank that is being driven."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(trials.time, "perf_counter", found)
    return found


def auto(**options: object) -> GradientCompression:
    named = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    return Compression.auto(named, **({"interval": 10, "steps": 4, "rounds": 2} | options))


def world(size: int = 2, **options: object) -> LocalRanks:
    return LocalRanks([auto(**options) for _ in range(size)])


def run(ranks: LocalRanks, clock: Clock, steps: range, seconds: tuple[float, ...]) -> list[int]:
    """The candidates of these steps, each of which takes its time."""
    found = []
    for step in steps:
        for compression in ranks.compressions:
            compression.settle()
        indices = {compression.compressor.choice.index for compression in ranks.compressions}
        assert len(indices) == 1, "the ranks differ"
        found.append(indices.pop())
        results = ranks.exchange(gradients(step, len(ranks.compressions)))
        assert all(torch.equal(result["a"], results[0]["a"]) for result in results)
        clock.now += seconds[found[-1]]
    return found


TRIAL = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] * 2


def test_the_fastest_is_taken_after_the_trial_and_tried_again_later(clock, caplog, tmp_path):
    ranks = world(log=tmp_path / "auto.jsonl")
    with caplog.at_level(logging.WARNING):
        assert run(ranks, clock, range(25), (1.0, 0.9, 0.5)) == [*TRIAL, 0]  # decided in step 24
        assert run(ranks, clock, range(25, 34), (1.0, 0.9, 0.5)) == [2] * 9
        assert run(ranks, clock, range(34, 59), (1.0, 0.6, 0.7)) == [*TRIAL, 2]
        assert run(ranks, clock, range(59, 68), (1.0, 0.6, 0.7)) == [1] * 9
    said = [record.getMessage() for record in caplog.records if "auto goes on" in record.getMessage()]
    assert len(said) == 2
    assert "QSGDCompressor(bits=4, bucket_size=128" in said[0]
    assert "from step 25 on, 0.50 of the time; a step took: NoneCompressor() 1000.0 ms" in said[0]
    lines = [json.loads(line) for line in (tmp_path / "auto.jsonl").read_text().splitlines()]
    assert [(line["number"], line["step"]) for line in lines] == [(1, 25), (2, 59)]
    assert list(lines[0]["seconds"].values()) == pytest.approx([1.0, 0.9, 0.5])


@pytest.mark.parametrize(("qsgd", "expected"), [(0.99, 0), (0.97, 2), (1.5, 0)])
def test_none_is_taken_where_nothing_is_faster_by_two_percent(clock, caplog, qsgd, expected):
    ranks = world()
    with caplog.at_level(logging.WARNING):
        run(ranks, clock, range(25), (1.0, 1.2, qsgd))
        assert run(ranks, clock, range(25, 30), (1.0, 1.2, qsgd)) == [expected] * 5
    assert ("nothing is faster" in caplog.text) == (expected == 0)


def test_the_slowest_rank_and_the_median_count(clock):
    """Rank 1 is slow by QSGD, and every candidate has one step that takes ages, such as that of an evaluation."""
    ranks = world()
    for step in range(26):
        for compression in ranks.compressions:
            compression.settle()
        choice = ranks.compressions[0].compressor.choice.index
        if step == 25:
            assert choice == 1
            break
        ranks.exchange(gradients(step, 2))
        clock.now += (1.0, 0.8, 0.9)[choice] + 100 * (step in (2, 6, 10))
        if choice == 2:
            for noted in ranks.compressions[1].controller.watch.seconds.get(2, []):
                assert noted > 0
            ranks.compressions[1].controller.watch.began -= 5.0


def test_what_comes_is_what_the_candidate_gives(clock):
    """In steps of none the exact sum, in those of QSGD its own bits."""
    ranks, qsgd = world(), LocalRanks([Compression.qsgd(_named(), bits=4, bucket_size=128) for _ in range(2)])
    for step in range(12):
        mine = gradients(step, 2)
        result, by_qsgd = ranks.exchange(mine)[0], qsgd.exchange(mine)[0]
        clock.now += 1.0
        if step < 4:
            assert torch.equal(result["a"], (mine[0]["a"] + mine[1]["a"]) / 2)
        elif step >= 8:
            assert torch.equal(result["a"], by_qsgd["a"])


def _named() -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]


def test_a_single_rank_tries_nothing(clock):
    ranks = world(1)
    assert run(ranks, clock, range(30), (1.0, 0.5, 0.5)) == [0] * 30


def test_resumes_with_what_was_chosen_and_tries_again(clock):
    ranks = world()
    run(ranks, clock, range(28), (1.0, 0.9, 0.5))
    states = [compression.state_dict() for compression in ranks.compressions]
    json.dumps(states[0]["adaptive"])
    compressions = [auto() for _ in range(3)]
    for compression in compressions:
        compression.load_state_dict(states)
    resumed = LocalRanks(compressions)  # the network may be another one
    assert run(resumed, clock, range(28, 53), (0.4, 0.9, 0.5)) == [*TRIAL, 2]
    assert run(resumed, clock, range(53, 55), (0.4, 0.9, 0.5)) == [0, 0]


def test_copies_choose_by_themselves(clock):
    ranks = world()
    run(ranks, clock, range(5), (1.0, 1.0, 1.0))
    twin = copy.deepcopy(ranks.compressions[0])
    assert twin.compressor == ranks.compressions[0].compressor
    assert twin.compressor.choice is not ranks.compressions[0].compressor.choice
    assert isinstance(twin.controller, Trials)


@pytest.mark.parametrize(
    ("optimizer", "accuracy", "last"),
    [
        (torch.optim.SGD, "safe", "QSGDCompressor(bits=4, bucket_size=512,"),
        (torch.optim.AdamW, "safe", "QSGDCompressor(bits=4, bucket_size=128,"),
        (None, "safe", "QSGDCompressor(bits=4, bucket_size=128,"),
        (torch.optim.SGD, "aggressive", "TopKCompressor("),
        (torch.optim.AdamW, "aggressive", "OneBitCompressor("),
        (None, "aggressive", "OneBitCompressor("),
    ],
)
def test_candidates(optimizer, accuracy, last):
    given = optimizer([torch.zeros(1, requires_grad=True)], lr=0.1) if optimizer else None
    found = auto(accuracy=accuracy, optimizer=given).compressor.candidates
    assert type(found[0]).__name__ == "NoneCompressor"
    assert repr(found[-1]).startswith(last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2}, "steps must be a whole number of at least 3"),
        ({"rounds": 0}, "rounds must be"),
        ({"interval": 0}, "interval must be"),
        ({"accuracy": "fast"}, "accuracy must be"),
        ({"topology": "scatter"}, "is not possible"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        auto(**options)


def test_trials_are_of_several_methods():
    with pytest.raises(ValueError, match="nothing to try"):
        Compression.topk(_named()).adapt(Trials())
