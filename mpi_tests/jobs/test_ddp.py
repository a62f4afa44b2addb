"""Jobs of torchrun with our hook: how they end when a rank fails, and how they go on after a restart."""

import re
import sys

import pytest

from .launch import SCRIPTS, run_program, start

SECONDS = 10.0  # from the start of training until all processes are gone, on an idle machine


def run_each_alone(ranks, how):
    """With nobody who ends the others once one has failed: they have to find out by themselves."""
    command = [sys.executable, SCRIPTS / "each_alone.py", str(ranks), SCRIPTS / "ddp_train.py", how]
    ended = start(command).end(60)
    assert ended.code, str(ended)
    assert ended.left_behind == []
    assert ended.seconds_of_training() < SECONDS, str(ended)
    return ended


@pytest.mark.parametrize(
    ("how", "ranks"),
    [("exception", 2), ("exit", 2), ("return", 3), ("kill-in-backward", 3), ("kill-while-others-wait", 2)],
)
def test_a_rank_that_fails_or_ends_is_an_error_on_every_other(how, ranks):
    ended = run_each_alone(ranks, how)
    for rank in set(range(ranks)) - {1}:
        told = ended.of_rank(rank)
        assert told.count(f"RuntimeError: rank {rank} of {ranks} cannot exchange gradients any more: another rank") == 1
    if how == "exception":
        assert "RuntimeError: something is wrong with the data" in ended.of_rank(1)


def test_ranks_that_differ_have_the_same_error_within_ten_seconds():
    ended = run_each_alone(3, "mismatch")
    for rank in range(3):
        said = ended.of_rank(rank)
        assert said.count("MismatchError: the ranks disagree: density is 0.01 on rank 0 and 0.02 on rank 1") == 1, said


def test_a_restart_by_torchrun_goes_on_with_the_residuals(tmp_path):
    """To the bit as if no worker had been killed."""
    said = []
    # By default torchrun keeps its store at a restart, where workers then find addresses of those that are gone.
    fresh = {"PET_MAX_RESTARTS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    for how in ("undisturbed", "resume"):
        directory = tmp_path / how
        directory.mkdir()
        program = SCRIPTS / "ddp_train.py"
        ended = run_program("torchrun", 2, program, how, str(directory), timeout_seconds=60, **fresh)
        assert ended.code == 0, str(ended)
        assert ended.left_behind == []
        said.append([re.findall(r"after 7: .*", ended.of_rank(rank)) for rank in range(2)])
        assert len(re.findall("training starts", ended.output)) == (4 if how == "resume" else 2)
    assert said[0] == said[1]
    assert all(len(lines) == 1 for lines in said[0])
    assert said[0][0] != said[0][1], "residuals differ by rank"


def test_the_script_that_tries_a_device_runs_on_the_cpu():
    ended = run_program("torchrun", 2, SCRIPTS / "ddp_device.py", "cpu", timeout_seconds=60)
    assert ended.code == 0, str(ended)
    assert re.findall(r"^(.+): loss 0", ended.of_rank(0), re.MULTILINE)[:3] == ["ddp alone", "none", "topk of all"]


@pytest.mark.parametrize("framework", ["lightning", "accelerate"])
def test_frameworks_that_wrap_ddp_train_with_the_hook(framework):
    """With accumulation and clipping by the framework; where all is sent, as DDP alone."""
    ended = run_program("torchrun", 2, SCRIPTS / f"ddp_{framework}.py", timeout_seconds=120)
    assert ended.code == 0, str(ended)
    said = dict(re.findall(r"^(.+): (\S+) from DDP alone, .* times fewer bytes", ended.of_rank(0), re.MULTILINE))
    assert float(said["topk of all"]) < 1e-6 < float(said["topk"])
