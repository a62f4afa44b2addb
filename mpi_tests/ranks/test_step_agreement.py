"""What decides a step is agreed by all ranks: where they differ, or Horovod would go wrong, each has one error."""

from __future__ import annotations

import pytest
import torch

from hvd_compress import Compression, MismatchError
from hvd_compress.compressors import MaskError
from hvd_compress.step_check import GradientChangedError
from hvd_compress.training import Masks

from .job import Job
from .training import COMPRESSIONS, OPTIONS, assert_replicated, backward, gradients, parameters, residuals, sgd

KINDS = ["terngrad", "topk", "powersgd"]


def nothing_outstanding(job: Job) -> None:
    if job.is_horovod:
        from hvd_compress.transports.horovod import outstanding

        job.barrier()
        assert outstanding() == []


def trained(job: Job, kind: str, steps: int, **options):
    """Parameters, compression and optimizer after so many steps."""
    of = parameters()
    compression = COMPRESSIONS[kind](list(of.items()))
    optimizer = job.distribute(sgd(of, momentum=0.0), of.items(), compression, **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
    optimizer.zero_grad()
    return of, compression, optimizer


@pytest.mark.parametrize("kind", [*KINDS, "none", "fp16"])
@pytest.mark.parametrize("steps", [0, 2])
def test_clipping_before_gradients_are_synchronized_is_an_error_that_names_the_remedy(
    horovod: Job, kind: str, steps: int
) -> None:
    of, _, optimizer = trained(horovod, kind, steps)
    backward(of, gradients(of, horovod.rank, steps))
    torch.nn.utils.clip_grad_norm_(of.values(), 0.01)
    with pytest.raises(GradientChangedError, match=r"changed after backward.*optimizer.synchronize\(\)"):
        optimizer.step()
    nothing_outstanding(horovod)


@pytest.mark.parametrize("kind", ["topk", "none"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_gradient_that_is_added_to_when_it_is_under_way_is_an_error_that_names_both_remedies(
    horovod: Job, kind: str, passes: int
) -> None:
    of, _, optimizer = trained(horovod, kind, 0, backward_passes_per_step=passes)
    for _ in range(passes):
        backward(of, gradients(of, horovod.rank, 0))
    with pytest.raises(RuntimeError, match=rf"backward_passes_per_step={passes} times.*use_reentrant=False"):
        backward(of, gradients(of, horovod.rank, 1))
    with pytest.raises(GradientChangedError):
        optimizer.synchronize()
    nothing_outstanding(horovod)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_changed_on_one_rank_is_an_error_on_every_rank(horovod: Job, kind: str) -> None:
    of, _, optimizer = trained(horovod, kind, 1)
    backward(of, gradients(of, horovod.rank, 1))
    if horovod.rank == 1:
        of["b"].grad.mul_(0.5)
    with pytest.raises(MismatchError, match="the gradient of 'b' is .*changed after backward.* on rank 1"):
        optimizer.synchronize()
    nothing_outstanding(horovod)


@pytest.mark.parametrize("optimizer_options", [{}, {"fused": True}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_grad_scaler_that_steps_by_gradients_not_yet_synchronized_is_refused(
    horovod: Job, kind: str, optimizer_options: dict[str, bool]
) -> None:
    of = parameters()
    compression = COMPRESSIONS[kind](list(of.items()))
    inner = torch.optim.Adam(of.values(), lr=0.1, **optimizer_options)
    optimizer = horovod.distribute(inner, of.items(), compression)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    known = gradients(of, horovod.rank, 0)
    scaler.scale(sum((of[name] * known[name]).sum() for name in of)).backward()
    with pytest.raises(GradientChangedError, match=r"GradScaler.step.*optimizer.synchronize\(\)"):
        scaler.step(optimizer)
    nothing_outstanding(horovod)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_after_gradients_are_synchronized_is_as_ever(several: Job, kind: str) -> None:
    of, _, optimizer = trained(several, kind, 1)
    for step in range(1, 4):
        optimizer.zero_grad()
        backward(of, gradients(of, several.rank, step))
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(of.values(), 0.01)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_replicated(several, of)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_frozen_on_one_rank_while_training_is_named_on_every_rank(horovod: Job, kind: str) -> None:
    of, _, optimizer = trained(horovod, kind, 2)
    if horovod.rank == 0:
        of["b"].requires_grad_(False)
    known = gradients(of, horovod.rank, 2)
    backward(of, {name: known[name] for name in of if of[name].requires_grad})
    with pytest.raises(MismatchError, match="parameter 'b' is .*frozen on rank 0"):
        optimizer.step()
    nothing_outstanding(horovod)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_a_layer_frozen_on_one_rank_from_the_start_is_named_on_every_rank(horovod: Job, kind: str) -> None:
    of = parameters()
    of["c"].requires_grad_(horovod.rank != 1)
    optimizer = horovod.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()))
    known = gradients(of, horovod.rank, 0)
    with pytest.raises(MismatchError, match=r"frozen is \[\] on rank 0 and \['c'\] on rank 1"):
        backward(of, {name: known[name] for name in of if of[name].requires_grad})
    nothing_outstanding(horovod)
    del optimizer


@pytest.mark.parametrize("kind", ["topk", "qsgd", "powersgd", "adacomp"])
def test_a_schedule_that_differs_later_is_named_on_every_rank(several: Job, kind: str) -> None:
    job, of = several, parameters()
    odd = job.rank == job.size - 1
    name, (usual, other) = {
        "topk": ("density", (0.1, 0.2)),
        "qsgd": ("bits", (4, 3)),
        "powersgd": ("approximation_rank", (1, 2)),
        "adacomp": ("bin_size", (50, 60)),
    }[kind]

    def schedule(step: int) -> float:
        return other if odd and step == 5 else usual

    compression = getattr(Compression, kind)(of.items(), **{name: schedule}, **OPTIONS)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    with pytest.raises(MismatchError, match=rf"in step 5: {name} is .* on rank {job.size - 1}"):  # noqa: PT012
        for step in range(7):
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, step))
            optimizer.step()
    assert step == 5
    nothing_outstanding(job)


@pytest.mark.parametrize("early", [0, 1])
def test_a_mask_that_one_rank_updates_a_step_early_is_named_on_every_rank(several: Job, early: int) -> None:
    job, of, masks = several, parameters(), Masks()
    optimizer = job.distribute(sgd(of), of.items(), Compression.masked(masks, of.items(), **OPTIONS))
    with pytest.raises(MaskError, match="mask of 'c'"):  # noqa: PT012
        for step in range(5):
            if step == (2 if job.rank == early else 3):
                masks.update({"c": torch.arange(400).view(40, 10) % 4 == 0})
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, step))
            optimizer.step()
    assert step == 2
    nothing_outstanding(job)


def test_parameters_added_to_the_optimizer_after_wrapping_are_an_error(horovod: Job) -> None:
    of, _, optimizer = trained(horovod, "topk", 1)
    new = torch.nn.Parameter(torch.ones(3, 5))
    optimizer.add_param_group({"params": [new]})
    backward(of, gradients(of, horovod.rank, 1))
    with pytest.raises(ValueError, match=r"\(3, 5\).*Wrap the optimizer anew"):
        optimizer.step()
    nothing_outstanding(horovod)


@pytest.mark.parametrize("how", ["swapped", "bound before", "unfrozen"])
def test_parameters_that_horovod_does_not_reduce_are_an_error(horovod: Job, how: str) -> None:
    of = parameters()
    first = [of["a"], of["b"]] if how == "bound before" else list(of.values())
    of["c"].requires_grad_(how != "unfrozen")
    inner = torch.optim.SGD(first, lr=0.1)
    optimizer = horovod.distribute(inner, of.items(), COMPRESSIONS["topk"](of.items()))
    if how == "swapped":
        (group,) = optimizer.param_groups
        group["params"][2] = torch.nn.Parameter(of["c"].detach().clone())
    elif how == "bound before":
        optimizer.add_param_group({"params": [of["c"]]})
    else:
        of["c"].requires_grad_(True)
    known = gradients(of, horovod.rank, 0)
    backward(of, {name: known[name] for name in ("a", "b")})
    with pytest.raises(ValueError, match=r"\(40, 10\)|'c' is trained, but was added .* or unfrozen"):
        optimizer.step()
    nothing_outstanding(horovod)


def test_momentum_in_both_dgc_and_the_optimizer_is_an_error_at_the_first_step(horovod: Job) -> None:
    of = parameters()
    optimizer = horovod.distribute(sgd(of, momentum=0.9), of.items(), COMPRESSIONS["dgc"](of.items()))
    backward(of, gradients(of, horovod.rank, 0))
    with pytest.raises(ValueError, match="momentum twice"):
        optimizer.step()
    nothing_outstanding(horovod)


@pytest.mark.parametrize("kind", ["topk", "adacomp", "powersgd", "dgc"])
@pytest.mark.parametrize("how", ["no step", "discard"])
def test_gradients_that_are_thrown_away_leave_no_trace_in_the_residuals(several: Job, kind: str, how: str) -> None:
    job = several
    of, compression, optimizer = trained(job, kind, 2)
    if how == "discard":
        compression._sees_steps = False  # as where an optimizer tells nothing
    before = {name: residual.clone() for name, residual in residuals(compression).items()}
    backward(of, gradients(of, job.rank, 7))
    optimizer.synchronize()
    if how == "discard":
        compression.discard()
    optimizer.zero_grad()
    backward(of, gradients(of, job.rank, 8))  # a step begins, and ends that one
    after = compression.memory.residuals
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    optimizer.step()
    assert_replicated(job, of)
    assert any(not torch.equal(before[name], later) for name, later in residuals(compression).items())


@pytest.mark.parametrize("kind", ["topk", "terngrad", "powersgd", "bf16"])
def test_a_gradient_in_channels_last_stays_so(several: Job, kind: str) -> None:
    of = parameters({"conv": (8, 4, 3, 3), "c": (40, 10)})
    of["conv"].data = of["conv"].data.to(memory_format=torch.channels_last)
    optimizer = several.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()))
    known = gradients(of, several.rank, 0)
    known["conv"] = known["conv"].to(memory_format=torch.channels_last)
    backward(of, known)
    assert of["conv"].grad.is_contiguous(memory_format=torch.channels_last)
    optimizer.synchronize()
    assert of["conv"].grad.is_contiguous(memory_format=torch.channels_last)
    with optimizer.skip_synchronize():
        optimizer.step()
    assert_replicated(several, of)
