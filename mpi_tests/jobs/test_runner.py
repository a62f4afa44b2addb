"""The suite's own runner ends when a test hangs or fails on one rank, and shows where every rank was."""

import re
import shutil
import sys

import pytest

from .launch import ROOT, no_control_codes, start

ONE_FAILS = """
def test_one_rank_fails(job):
    assert job.rank != 1, "this rank has found something"
    job.barrier()
"""
DEADLOCK = """
def test_rank_0_skips_a_collective(job):
    if job.rank != 0:
        job.barrier()
    import time; time.sleep(job.rank == 0 and 1000)
"""
PASSES = """
def test_nothing(job):
    job.barrier()
"""


LEFT_OVER = """
def test_rank_0_posts_alone(job):
    if job.rank == 0:
        import torch
        job.hvd.allreduce_async(torch.ones(7), name="alone")
"""


def run_suite(directory, test, backend, *options, **environment):
    """Run the runner on a copy of its files, and of no test but `test`."""
    copied = directory / "mpi_tests"
    shutil.copytree(ROOT / "mpi_tests", copied, ignore=shutil.ignore_patterns("test_*", "unit", "jobs", "__pycache__"))
    (copied / "ranks" / "test_deliberately.py").write_text(test)
    command = [sys.executable, "-m", "mpi_tests", "--only", "ranks", "--sizes", "2", "--backends", backend, *options]
    return start(command, directory=directory, **environment).end(120)


@pytest.mark.parametrize("backend", ["horovod-mpi", "mpi4py"])
def test_a_failure_on_one_rank_ends_the_suite_with_the_stacks_of_the_others(tmp_path, backend):
    ended = run_suite(tmp_path, ONE_FAILS, backend)
    assert ended.code, str(ended)
    assert ended.left_behind == []
    assert ended.clock.seconds < 60
    assert "rank 1| AssertionError: this rank has found something" in re.sub(r"\| E +", "| ", ended.output), str(ended)
    summary = ended.output[ended.output.index("not ok: ") :]
    assert re.search(r"    rank 1 of 2, .*test_deliberately.py::test_one_rank_fails failed in call", summary), summary
    of_one_part = re.sub(r"^ranks: [^|\n]*\| ", "", ended.output, flags=re.MULTILINE)  # as where parts run alone
    assert re.search(r"^ *File .*test_deliberately.py.* line 4 in test_one_rank_fails", of_one_part, re.MULTILINE)


def test_a_deadlock_ends_the_suite_with_the_stacks_of_all_ranks(tmp_path):
    ended = run_suite(tmp_path, DEADLOCK, "horovod-gloo", HVD_COMPRESS_TEST_SECONDS="6")
    assert ended.code, str(ended)
    assert ended.left_behind == []
    assert ended.clock.seconds < 60
    for rank in ("", r"rank 1\| "):
        stack = rf"^{rank} *File .*test_deliberately.py.* line \d in test_rank_0_skips_a_collective"
        assert re.search(stack, ended.output, re.MULTILINE), str(ended)


def test_what_a_test_leaves_posted_on_one_rank_is_a_failure(tmp_path):
    ended = run_suite(tmp_path, LEFT_OVER, "horovod-gloo")
    assert ended.code, str(ended)
    assert "leaves operations that rank 0 has posted and others have not" in ended.output, str(ended)
    assert "(7,)" in ended.output


def test_a_suite_that_passes_ends_with_success_however_often_and_its_output_has_no_control_codes(tmp_path):
    ended = run_suite(tmp_path, PASSES, "mpi4py", "--part", "serialized", "--repeat", "2")
    assert ended.code == 0, str(ended)
    assert "2 of 2 runs passed" in ended.output
    assert no_control_codes(ended.output)
