"""What ranks compare before they exchange anything, and how a difference is told."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hvd_compress import Compression, MismatchError, fingerprint
from hvd_compress.transports.local import LocalWorld


def check(descriptions: list[dict[str, Any]]) -> list[str]:
    """What every rank raises; the ranks are threads, as each waits for the others."""
    world = LocalWorld(len(descriptions))
    messages = [""] * len(descriptions)
    lock = threading.Lock()  # simulated ranks are made for one thread
    answer = world.answer

    def locked(*arguments: Any) -> Any:
        with lock:
            return answer(*arguments)

    world.answer = locked  # type: ignore[method-assign]

    def of_rank(rank: int) -> None:
        try:
            fingerprint.check(world.transports[rank], "check", descriptions[rank])
        except MismatchError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=of_rank, args=(rank,), daemon=True) for rank in range(len(descriptions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return messages


def described(method: str = "topk", shapes: dict[str, tuple[int, ...]] | None = None, **options: Any) -> dict[str, Any]:
    shapes = {"a": (40, 50), "b": (30,)} if shapes is None else shapes
    named = [(name, torch.zeros(shape)) for name, shape in shapes.items()]
    compression = getattr(Compression, method)(named, **options)
    compression.unregister()
    return compression.description()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_that_agree_pass(size):
    assert check([{"0": described(), "1": described("terngrad")} for _ in range(size)]) == [""] * size


DIFFERENCES = {
    "version": (described(), described() | {"version": "9.9"}, ["version", "9.9"]),
    "option": (described(), described(density=0.5), ["density", "0.01", "0.5"]),
    "common option": (described(), described(min_numel=7), ["min_numel", "1024", "7"]),
    "seed": (described(), described(seed=3), ["seed is 0", "3"]),
    "exclude": (described(), described(exclude="a"), ["exclude", "('a',)"]),
    "compressor": (described(), described("terngrad"), ["compressor is topk", "terngrad"]),
    "another compressor": (described("bf16"), described("adacomp"), ["compressor is bf16", "adacomp"]),
    "unlike options": (described("adacomp"), described("topk"), ["compressor is adacomp", "topk"]),
    "shape": (described(), described(shapes={"a": (40, 51), "b": (30,)}), ["parameter 0", "'a' (40, 50)", "(40, 51)"]),
    "name": (described(), described(shapes={"a": (40, 50), "c": (30,)}), ["parameter 1", "'b'", "'c'"]),
    "order": (described(), described(shapes={"b": (30,), "a": (40, 50)}), ["parameter 0", "'a'", "'b'"]),
    "fewer": (described(), described(shapes={"a": (40, 50)}), ["parameter 1", "'b'", "missing"]),
    "more": (described(shapes={"a": (40, 50)}), described(), ["parameter 1", "missing on rank 0", "'b'"]),
    "dtype": (
        described(),
        described() | {"parameters": [("a", [40, 50], "torch.float16"), ("b", [30], "torch.float32")]},
        ["parameter 0", "torch.float32", "torch.float16"],
    ),
}


@pytest.mark.parametrize(("first", "other", "parts"), DIFFERENCES.values(), ids=DIFFERENCES)
@pytest.mark.parametrize("culprit", [1, 2])
def test_a_difference_is_named_alike_on_every_rank(first, other, parts, culprit):
    messages = check([{"0": other if rank == culprit else first} for rank in range(3)])
    assert len(set(messages)) == 1
    for part in [*parts, "rank 0", f"rank {culprit}", "same version", "same order"]:
        assert part in messages[0]


@pytest.mark.parametrize("culprit", [0, 1])
def test_another_number_of_compressions_is_named(culprit):
    made = [{"0": described(), "1": described("terngrad")}, {"0": described(), "1": described("terngrad")}]
    del made[culprit]["1"]
    messages = check(made)
    assert messages[0] == messages[1]
    assert "[topk, terngrad]" in messages[0]
    assert "made [topk]" in messages[0]


def test_a_registry_is_compared_once_and_all_at_once():
    registry = fingerprint.Registry()
    registry.unchecked.update({7: described(), 3: described("terngrad")})
    (transport,) = LocalWorld(1).transports
    registry.check(transport)
    assert registry.unchecked == {}
    assert registry.checks == 1
    assert registry.numbers == {3: 0, 7: 1}  # as they were made
    registry.check(transport)
    assert registry.checks == 2


def test_every_set_of_ranks_has_its_own_registry():
    class Set:
        def __init__(self, number: int, ranks: list[int]) -> None:
            self.process_set_id, self.ranks = number, ranks

    assert fingerprint.registry_of(None) is fingerprint.registry_of(Set(0, [0, 1]))
    assert fingerprint.registry_of(Set(1, [0, 7])) is fingerprint.registry_of(Set(1, [0, 7]))
    assert fingerprint.registry_of(Set(1, [0, 7])) is not fingerprint.registry_of(None)
    fingerprint._registries.pop((0, 7))


def test_what_waits_long_says_so_once(caplog, monkeypatch):
    monkeypatch.setattr(fingerprint, "_WARNING_SECONDS", 0.0)

    class Slow:
        asked = 0

        def ready(self) -> bool:
            self.asked += 1
            return self.asked > 20

    fingerprint._wait(Slow(), 3)
    (record,) = caplog.records
    assert record.getMessage().startswith("rank 3 has waited")
