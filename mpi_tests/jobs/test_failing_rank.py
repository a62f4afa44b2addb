"""When one rank fails, the job ends, with a non-zero exit code, and says why."""

import pytest

from .launch import LAUNCHERS, MPI4PY, run

SECONDS = 10.0  # from the start of training until all processes are gone, on an idle machine


def fail(launcher, ranks, how):
    ended = run(launcher, ranks, "fail.py", how)
    assert ended.code, str(ended)
    assert ended.left_behind == []
    assert ended.seconds_of_training() < SECONDS, str(ended)
    return ended


# The two ways in which an error of Python ends a rank; each launcher meets one of them, MPI's both.
@pytest.mark.parametrize(("launcher", "ranks"), [("horovod-gloo", 2), ("mpirun", 2)])
def test_an_invalid_option_on_one_rank_ends_the_job(launcher, ranks):
    assert "ValueError: density must be in (0, 1]: 2" in fail(launcher, ranks, "option").of_rank(1)


@pytest.mark.parametrize(("launcher", "ranks"), [("horovod-mpi", 2), ("mpi4py", 2), ("mpirun", 2)])
def test_an_exception_on_one_rank_ends_the_job_and_is_shown(launcher, ranks):
    ended = fail(launcher, ranks, "exception")
    assert "RuntimeError: something is wrong with the data" in ended.of_rank(1)
    assert "fail.py" in ended.of_rank(1)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sys_exit_on_one_rank_ends_the_job(launcher):
    ended = fail(launcher, 2, "exit")
    if launcher == "mpi4py":
        assert ended.code == 3


@pytest.mark.parametrize(
    ("launcher", "poster"), [("horovod-mpi", "transport"), ("horovod-mpi", "optimizer"), ("horovod-gloo", "optimizer")]
)
def test_a_rank_that_leaves_while_others_post_ends_the_job(launcher, poster):
    ended = run(launcher, 2, "leave_while_posting.py", poster)
    assert ended.code, str(ended)
    assert "Horovod has been shut down" in ended.of_rank(0)


@pytest.mark.parametrize(("launcher", "ranks"), [("horovod-mpi", 2), ("horovod-gloo", 2), ("mpi4py", 2), ("mpirun", 3)])
def test_a_rank_with_fewer_batches_ends_the_job(launcher, ranks):
    ended = fail(launcher, ranks, "return")
    if launcher in MPI4PY:
        assert "same number of" in ended.output
        assert "rank 1" in ended.output
        if launcher == "mpirun":  # it stays out of MPI_Finalize, where it would meet a defect of Open MPI's launcher
            assert "all that runs at exit has run" not in ended.output, str(ended)
    else:
        assert "after one of the ranks finished execution" in ended.output


@pytest.mark.parametrize(
    ("launcher", "ranks", "when"),
    [
        ("horovod-mpi", 2, "kill-in-backward"),
        ("horovod-mpi", 3, "kill-while-others-wait"),
        ("horovod-gloo", 3, "kill-in-backward"),
        ("horovod-gloo", 2, "kill-while-others-wait"),
        ("mpirun", 2, "kill-in-backward"),
        ("mpirun", 3, "kill-while-others-wait"),
    ],
)
def test_a_killed_rank_ends_the_job(launcher, ranks, when):
    ended = fail(launcher, ranks, when)
    assert "137" in ended.output if launcher == "horovod-gloo" else ended.code == 137, str(ended)
