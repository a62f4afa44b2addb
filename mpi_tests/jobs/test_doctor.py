"""hvd-compress doctor, started by each launcher as a user would, and where things are absent."""

import os
import sys

import pytest

from .launch import SCRIPTS, printed_json, run_program, start


@pytest.mark.parametrize(
    ("launcher", "told", "absent"),
    [
        ("mpirun", "mpirun", ()),
        ("horovod-gloo", "horovodrun", ("mpi4py",)),
        ("torchrun", "torchrun", ("horovod", "mpi4py")),
    ],
)
def test_ranks_find_each_other_and_measure_their_link(launcher, told, absent):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks on one core are a problem, and it says so")
    doctor = [",".join(absent) or "-", "doctor", "--json"]
    ended = run_program(launcher, 2, SCRIPTS / "command.py", *doctor, timeout_seconds=60)
    assert ended.code == 0, str(ended)
    assert ended.left_behind == []
    facts = printed_json(ended.of_rank(0))
    assert facts["problems"] == []
    assert [rank["launcher"] for rank in facts["ranks"]] == [told] * 2
    assert [rank["horovod"] is None for rank in facts["ranks"]] == ["horovod" in absent] * 2
    assert [rank["mpi"] is None for rank in facts["ranks"]] == ["mpi4py" in absent] * 2
    (link,) = facts["links"]
    assert link["ranks"] == [0, 1]
    assert link["bits_per_second"] > 1e6
    assert facts["sums_bits_per_second"] > 1e6
    assert not ended.of_rank(1).strip()


def test_one_process_without_other_packages_and_kernels_is_told_what_to_do():
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / "command.py"), "horovod,mpi4py", "doctor", "--json"]
    ended = start(command, HVD_COMPRESS_KERNELS="torch").end(60)
    assert ended.code == 1, str(ended)
    (problem,) = printed_json(ended.output)["problems"]
    assert "HVD_COMPRESS_KERNELS=torch" in problem
    assert "unset it" in problem
