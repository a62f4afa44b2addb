"""Masked exchange inside a job: what goes on the wire, and masks that differ."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_compress import Compression, agreement
from hvd_compress.compressors import MaskError
from hvd_compress.training import ACDC, Masks, Schedule

from .job import Job
from .test_acdc import OPTIMIZERS, make_model, train_step
from .training import (
    OPTIONS,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    gradients,
    grads,
    parameters,
    sgd,
)

DENSE = {
    "none": lambda named: None,
    "bf16": lambda named: Compression.bf16,
    "topk": lambda named: Compression.topk(named, density=0.1),
}


def masks_for(of: dict[str, Tensor], seed: int, keep: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < keep for name, p in of.items() if name != "b"}


@pytest.mark.parametrize("dense", DENSE)
def test_phases_give_what_the_simulation_gives(job: Job, dense: str) -> None:
    of, masks = parameters(), Masks()

    def make(named: Any) -> Any:
        named = list(named)
        return Compression.masked(masks, named, dense=DENSE[dense](named), **OPTIONS)

    optimizer = job.distribute(sgd(of), of.items(), make(of.items()))
    simulation = Simulation(job.size, make, of)
    for step in range(9):
        if step in (2, 4, 7):
            masks.update({} if step == 4 else masks_for(of, step))
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        expected = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
        (assert_equal if job.size <= 2 else assert_close)(grads(of), expected)
        if job.size > 1:
            assert not any(of[name].grad[~mask].any() for name, mask in masks.masks.items())
    assert_replicated(job, of)


def test_horovod_itself_adds_up_kept_values_and_nothing_else(
    horovod: Job, several: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where Horovod's optimizer and our transport hand tensors to Horovod."""
    import horovod.torch as hvd
    from horovod.torch import optimizer as of_horovod

    of, masks = parameters({"a": (60, 50), "c": (40, 100)}), Masks()
    named, counted = list(of.items()), []

    def counting(function: Any) -> Any:
        def count(tensor: Tensor, *args: Any, **options: Any) -> Any:
            counted.append(tensor.numel() * tensor.element_size())
            return function(tensor, *args, **options)

        return count

    monkeypatch.setattr(of_horovod, "allreduce_async_", counting(of_horovod.allreduce_async_))
    for name in ("allreduce_async_", "allgather_async", "broadcast_async_"):
        monkeypatch.setattr(hvd, name, counting(getattr(hvd, name)))
    compression = Compression.masked(masks, named, **OPTIONS)
    optimizer = several.distribute(sgd(of), named, compression)
    masks.update(masks_for(of, 0, keep=0.1))
    sent = []
    for step in range(100):
        counted.clear()
        optimizer.zero_grad()
        backward(of, gradients(of, several.rank, step))
        optimizer.step()
        for _ in range(2):  # by which the ranks agree on the masks, and on what they have handed in
            counted.remove(agreement.BYTES)
        sent.append((len(counted), sum(counted)))
    kept = sum(int(mask.sum()) for mask in masks.masks.values())
    assert set(sent[1:]) == {(2, 4 * kept)}
    share = kept / 7000
    assert sum(total for _, total in sent) == pytest.approx(share * 100 * 4 * 7000, rel=0.01)
    assert 0.08 < share < 0.12


@pytest.mark.parametrize(
    ("optimizer_name", "dense", "first"),  # any two of them in all ways
    [
        ("sgd", "none", "acdc"),
        ("sgd", "bf16", "compression"),
        ("sgd", "topk", "acdc"),
        ("adam", "none", "compression"),
        ("adam", "bf16", "acdc"),
        ("adam", "topk", "compression"),
    ],
)
def test_acdc_prunes_alike_and_sends_what_is_left(job: Job, optimizer_name: str, dense: str, first: str) -> None:
    model = make_model()
    named = list(model.named_parameters())
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    options = {"schedule": Schedule((1, 1, 1, 1)), "sparsity": 0.9}
    if first == "acdc":
        acdc = ACDC(model, optimizer, **options)
        compression = Compression.masked(acdc, dense=DENSE[dense](named), **OPTIONS)
        optimizer = job.distribute(optimizer, named, compression)
    else:
        compression = Compression.masked(lambda: acdc, named, dense=DENSE[dense](named), **OPTIONS)
        optimizer = job.distribute(optimizer, named, compression)
        acdc = ACDC(model, optimizer, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    generator = torch.Generator().manual_seed(job.rank)
    for phase in range(4):
        acdc.begin(phase)
        for step in range(4):
            compression.telemetry.reset()
            train_step(model, optimizer, scaler, generator)
            if acdc.compressed and step and job.size > 1:
                kept = sum(int(mask.sum()) for mask in acdc.masks.values())
                others = sum(p.numel() for name, p in named if name not in acdc.masks)
                assert compression.telemetry.total.sent_bytes == 4 * (kept + others)
        assert_replicated(job, model.state_dict())
        assert len(set(job.allgather(acdc.digest()))) == 1


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("how", ["moved", "one more"])
def test_a_tampered_mask_is_named_on_every_rank(several: Job, how: str, when: int) -> None:
    job = several
    of, masks = parameters(), Masks()
    optimizer = job.distribute(sgd(of), of.items(), Compression.masked(masks, of.items(), **OPTIONS))
    with pytest.raises(MaskError, match=f"mask of 'c' on rank {job.size - 1} "):  # noqa: PT012
        for step in range(when + 1):
            if step == when:
                mine = masks_for(of, 0)
                if job.rank == job.size - 1:
                    flat = mine["c"].view(-1)
                    pruned = torch.nonzero(~flat).view(-1)[0]
                    if how == "moved":
                        flat[torch.nonzero(flat).view(-1)[0]] = False
                    flat[pruned] = True
                masks.update(mine)
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, step))
            optimizer.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_not_finite_shows_on_every_rank(several: Job, bad: float, kept: bool) -> None:
    job = several
    of, masks = parameters(), Masks()
    optimizer = job.distribute(sgd(of), of.items(), Compression.masked(masks, of.items(), **OPTIONS))
    masks.update(masks_for(of, 0))
    for step in range(3):
        known = gradients(of, job.rank, step)
        if job.rank == 0 and step < 2:
            known["a"].view(-1)[torch.nonzero(masks.masks["a"].view(-1) == kept).view(-1)[5]] = bad
        optimizer.zero_grad()
        backward(of, known)
        optimizer.synchronize()
        assert bool(torch.isfinite(of["a"].grad).all()) == (step == 2)
        assert bool(torch.isfinite(of["c"].grad).all())
