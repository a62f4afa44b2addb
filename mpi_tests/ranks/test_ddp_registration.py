"""The hook beside what DistributedDataParallel itself keeps: one hook a model, ignored parameters, logs; threads."""

import gc
import os

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from hvd_compress import ddp

from .job import Job
from .replicated import adamw, everything, hooked, loss, mlp, tenth, train
from .training import assert_close, assert_replicated, copy

# DistributedDataParallel refuses a hook whose annotations are strings, hence no `from __future__ import annotations`.
pytestmark = pytest.mark.usefixtures("torch_job")


def test_a_second_registration_is_refused_and_leaves_the_first(job: Job) -> None:
    net = mlp()
    model, compression = hooked(net, tenth)
    with pytest.raises(RuntimeError, match="only be called once"):
        model.register_comm_hook(compression, ddp.hook)
    train(job, model, adamw(net), range(2))
    assert_replicated(job, dict(net.named_parameters()))


def test_parameters_that_ddp_ignores_keep_their_own_gradients(job: Job) -> None:
    trained = []
    for make in (None, everything):
        net = mlp()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["2.weight"])
        model, _ = hooked(net, make)
        train(job, model, adamw(net), range(2))
        trained.append(copy(dict(net.named_parameters())))
    assert_close(*trained, tolerance=1e-6)
    assert_replicated(job, {name: p for name, p in trained[-1].items() if name != "2.weight"})


def test_data_that_ddp_logs_name_the_hook(job: Job) -> None:
    net = mlp()
    model, _ = hooked(net, tenth)
    loss(model, job.rank, 0).backward()
    assert "hook" in model._get_ddp_logging_data()["comm_hook"]


def test_compressions_that_have_ended_leave_no_threads_behind(several: Job) -> None:
    """Those of a process group of Gloo's wake a hundred times a second, however long nobody uses it."""
    threads = []
    for _ in range(5):
        net = mlp()
        model, _ = hooked(net, tenth)
        train(several, model, adamw(net), range(2))
        ddp.attach(tenth(net.named_parameters()))  # beside it
        del net, model, _
        gc.collect()
        several.allgather(None)  # all ranks have let go
        threads.append(len(os.listdir("/proc/self/task")))
    assert threads[2:] == threads[1:-1]


def test_an_error_of_a_hook_around_ours_comes_out_of_backward(job: Job) -> None:
    def around(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        ddp.hook(state, bucket).wait()
        raise ArithmeticError("of the user")

    net = mlp()
    model = DistributedDataParallel(net, bucket_cap_mb=25)
    model.register_comm_hook(tenth(net.named_parameters()), around)
    with pytest.raises((ArithmeticError, RuntimeError), match="of the user"):
        loss(model, job.rank, 0).backward()
    net = mlp()
    model, _ = hooked(net, tenth)
    train(job, model, adamw(net), range(2))
    assert_replicated(job, dict(net.named_parameters()))
