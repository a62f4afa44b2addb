"""hvd-compress bench, started by each launcher as a user would."""

import pytest

from .launch import SCRIPTS, printed_json, run_program

MODEL = """
import torch

def make():
    model = torch.nn.Sequential(torch.nn.Linear(60, 80), torch.nn.ReLU(), torch.nn.Linear(80, 40))
    return model, lambda model: model(torch.randn(8, 60)).square().mean()
"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(MODEL)
    return path


def bench(launcher, absent, *arguments):
    options = ["--seconds", "0.1", *arguments]
    return run_program(launcher, 2, SCRIPTS / "command.py", absent, "bench", *options, timeout_seconds=60)


@pytest.mark.parametrize(
    ("launcher", "absent", "by"),
    [
        ("mpirun", "-", "Horovod"),
        ("mpirun", "horovod", "hvd_compress.mpi"),
        ("torchrun", "horovod,mpi4py", "DistributedDataParallel"),
    ],
)
def test_it_trains_by_each_method_beside_those_of_the_launcher(launcher, absent, by, model):
    methods = "topk:density=0.05,dgc"
    ended = bench(launcher, absent, "--model", f"{model}:make", "--methods", methods, "--json")
    assert ended.code == 0, str(ended)
    assert ended.left_behind == []
    found = printed_json(ended.of_rank(0))
    assert (found["ranks"], found["by"]) == (2, by)
    sent = {row["method"]: row["sent_bytes"] for row in found["rows"]}
    assert list(sent) == ["none", "fp16", "topk:density=0.05", "dgc"]
    assert sent["topk:density=0.05"] < 0.1 * 4 * (60 * 80 + 80 * 40)
    if by == "hvd_compress.mpi":
        assert sent["none"] == 2 * sent["fp16"]
    assert all(row["step_seconds"] >= row["fastest_seconds"] > 0 for row in found["rows"])
    assert not ended.of_rank(1).strip()
