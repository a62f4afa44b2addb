"""Sums for tensors of another device: added up by the CPU's kernels in its memory, and copied once.

There may be no such device here: the device `meta` stands in for its absence, and the CPU's own memory for its values.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_compress import kernels
from hvd_compress.compressors import BF16Compressor
from hvd_compress.compressors.frames import add_up
from hvd_compress.kernels import choice
from hvd_compress.wire import DENSE

from .drive import FRAMED, bits, random, run, slot_of

NUMEL = 5000
SUMS = ("ternary_sum", "quantise_sum", "bfloat_sum", "sparse_sum", "narrow_sum", "gaps_sum", "prune_sum")


class Copies(TorchDispatchMode):
    """Remembers what every copy between tensors was from and to."""

    def __init__(self):
        super().__init__()
        self.made, self._held = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.made.append((args[1].device.type, args[0].device.type, args[0].data_ptr()))
            self._held.append(args[0])  # so that no other tensor comes to lie there
        return function(*args, **(kwargs or {}))


@pytest.fixture
def summed(monkeypatch):
    """The tensors that the kernels of the CPU, C++ where they are built, have put a sum into."""
    module, outs = kernels.of(torch.empty(1)), []

    def spied(kernel):
        def spy(*arguments):
            outs.append(arguments[-1])
            return kernel(*arguments)

        return spy

    for name in SUMS:
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    return outs


@pytest.mark.parametrize("name", FRAMED)
def test_what_is_staged_has_the_same_bits_and_is_copied_once(name, summed, monkeypatch):
    gradients = [random(NUMEL, seed=rank) for rank in range(3)]
    expected = run(FRAMED[name], gradients).totals
    summed.clear()
    monkeypatch.setattr(choice, "host_memory", lambda numel, device: torch.empty(numel))
    with Copies() as copies:
        totals = run(FRAMED[name], gradients).totals
    for total, wanted in zip(totals, expected):
        assert bits(total) == bits(wanted)
        assert [to for *_, to in copies.made].count(total.data_ptr()) == 1
    if name != "topk_1.0":  # larger than the tensor, which is sent in its place
        assert len(summed) == 3
        assert not {out.data_ptr() for out in summed} & {total.data_ptr() for total in totals}


def exchanged(flags: int) -> tuple[torch.Tensor, float, Copies]:
    """What comes of one rank's gradient on the device `meta`, its bound, and the copies that were made."""
    values = torch.ones(NUMEL)
    payload = (values if flags else values.bfloat16()).view(torch.uint8)
    slot = slot_of([NUMEL])
    gradient = torch.empty(NUMEL, device="meta")

    with Copies() as copies:
        total = add_up(BF16Compressor(), slot, gradient, [payload], [flags])
    return total.values, total.bound, copies


@pytest.mark.parametrize("flags", [0, DENSE])
def test_the_sum_for_another_device_is_made_on_the_cpu(flags, summed):
    total, bound, copies = exchanged(flags)
    assert (total.device.type, total.numel(), bound) == ("meta", NUMEL, 1.0)
    assert [pair for *pair, _ in copies.made if "meta" in pair] == [["cpu", "meta"]]
    assert [out.device.type for out in summed] == ["cpu"] * (not flags)


def test_a_sum_for_the_cpu_is_made_in_its_place(summed):
    out = torch.empty(NUMEL)
    payload = torch.ones(NUMEL).bfloat16().view(torch.uint8)
    kernels.on_host(lambda host: kernels.of(host).bfloat_sum([payload], 1.0, host), out)
    assert len(summed) == 1
    assert summed[0] is out
    assert bool((out == 1).all())
