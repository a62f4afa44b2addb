"""Ranks that were started differently end with one error that names the difference."""

import pytest

from hvd_compress import __version__

from .launch import HOROVOD, run

DIFFERENCES = {
    "density": "density is 0.01 on rank 0 and 0.02 on rank 1",
    "bin_size": "bin_size is 50 on rank 0 and 100 on rank 1",
    "seed": "seed is 7 on rank 0 and 8 on rank 1",
    "min_numel": "min_numel is 2 on rank 0 and 1 on rank 1",
    "exclude": "exclude is () on rank 0 and ('first*',) on rank 1",
    "bucket_bytes": "bucket_bytes is 1 on rank 0 and 2 on rank 1",
    "compressor": "compressor is topk on rank 0 and terngrad on rank 1",
    "version": f"version is {__version__} on rank 0 and 99.0 on rank 1",
    "parameter order": "parameter 0 is 'first.bias' (64,) torch.float32 on rank 0 and 'second.weight' (32, 64)",
    "parameter name": "parameter 0 is 'first.weight' (64, 32) torch.float32 on rank 0 and 'erste.weight' (64, 32)",
    "shape": "parameter 0 is 'first.weight' (64, 32) torch.float32 on rank 0 and 'first.weight' (65, 32)",
    "parameter count": "parameter 4 is missing on rank 0 and 'third.weight' (32, 32) torch.float32 on rank 1",
    "dtype": "parameter 0 is 'first.weight' (64, 32) torch.float32 on rank 0 and 'first.weight' (64, 32) torch.float64",
}
OF_HOROVOD = {"one more compression": "rank 0 made [topk], rank 1 made [adacomp, topk]"}


@pytest.mark.parametrize(("launcher", "ranks"), [("horovod-mpi", 2), ("horovod-gloo", 3), ("mpi4py", 2)])
def test_every_rank_names_what_differs(launcher, ranks):
    ended = run(launcher, ranks, "mismatch.py")
    assert ended.code == 0, str(ended)
    for rank in range(ranks):
        said = dict(line.split(": ", 1) for line in ended.of_rank(rank).splitlines() if ": " in line)
        for case, difference in (DIFFERENCES | (OF_HOROVOD if launcher in HOROVOD else {})).items():
            assert f"the ranks disagree: {difference}" in said[case], case


@pytest.mark.parametrize(("launcher", "ranks"), [("horovod-mpi", 3), ("horovod-gloo", 2), ("mpi4py", 2), ("mpirun", 3)])
def test_a_difference_ends_the_job_within_ten_seconds(launcher, ranks):
    ended = run(launcher, ranks, "mismatch.py", "density")
    assert ended.code, str(ended)
    assert ended.left_behind == []
    assert ended.seconds_of_training() < 10, str(ended)
    errors = [ended.of_rank(rank).count("MismatchError: the ranks disagree: density is") for rank in range(ranks)]
    assert errors == [1] * ranks, str(ended)
