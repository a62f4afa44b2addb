"""hvd-compress doctor: every bad environment has a sentence with its remedy, and a good one has none."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from hvd_compress.commands import main
from hvd_compress.commands.facts import Facts
from hvd_compress.commands.links import measure, pairs_of
from hvd_compress.commands.problems import problems_of
from hvd_compress.launcher import launcher_of
from hvd_compress.transports.base import Pending, Transport

GOOD: Facts = {
    "hvd_compress": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "system": "Linux",
    "variables": {},
    "host": "one",
    "launcher": "mpirun",
    "cpus": [0, 1, 2, 3],
    "threads": 1,
    "gpus": [],
    "kernels": {"in_use": "avx2", "built": True, "asked": None, "compiler": "/usr/bin/c++"},
    "horovod": {"version": "0.28.1", "mpi": True, "gloo": True, "nccl": False},
    "mpi": {"mpi4py": "4.1.2", "library": "Open MPI", "threads": "multiple"},
    "torch.distributed": {"gloo": True, "nccl": False, "mpi": False},
    "exchange": {"parameters": 1, "seconds": {"topk": 0.1}},
}


def facts(**changes: Any) -> Facts:
    """GOOD, but for these; a__b is the b of a."""
    found = copy.deepcopy(GOOD)
    for name, value in changes.items():
        of, _, part = name.replace("torch_distributed", "torch.distributed").partition("__")
        if part:
            found[of][part] = value
        else:
            found[of] = value
    return found


@pytest.mark.parametrize(
    "good", [{}, {"horovod": None}, {"mpi": None}, {"mpi__threads": None}, {"horovod": None, "mpi": None}], ids=str
)
def test_nothing_is_wrong_with_a_good_environment(good):
    assert problems_of([facts(**good)] * 4) == []


BAD = [
    (
        {"kernels__in_use": "torch", "kernels__built": False, "kernels__compiler": None},
        "Remedy: install a C.*compiler, and",
    ),
    ({"kernels__in_use": "torch", "kernels__built": False}, "Remedy: install hvd_compress again"),
    ({"kernels__in_use": "torch", "kernels__asked": "torch"}, "HVD_COMPRESS_KERNELS=torch.*Remedy: unset it"),
    ({"kernels": {"error": "OSError: bad ELF"}}, r"cannot be loaded \(OSError: bad ELF\).*install hvd_compress again"),
    ({"horovod": {"error": "ImportError: x"}}, "horovod is there and does not work.*Remedy: build it against"),
    ({"horovod__mpi": False, "horovod__gloo": False}, "neither MPI nor Gloo.*HOROVOD_WITH_GLOO=1"),
    ({"variables": {"HVD_COMPRESS_OFF": "1"}}, "HVD_COMPRESS_OFF is set.*Remedy: unset it"),
    ({"kernels": {"error": "ValueError: HVD_COMPRESS_KERNELS must be plain"}}, "Remedy: correct the variable"),
    ({"gpus": ["A100"]}, "without NCCL.*HOROVOD_GPU_OPERATIONS=NCCL"),
    ({"mpi": {"error": "RuntimeError: cannot load MPI library"}}, "mpi is there.*Remedy: install an MPI library"),
    ({"mpi__threads": "serialized"}, "thread level serialized.*not during backward.*Remedy: an MPI with"),
    ({"torch_distributed": {"error": "x"}, "mpi": None, "horovod": None}, "Remedy: another build of torch"),
    ({"torch_distributed": None, "mpi": None, "horovod": None}, "no way to other ranks.*Remedy: install"),
    ({"exchange": {"error": "RuntimeError: x"}}, "exchange is there and does not work.*report it"),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD, ids=[str(bad) for bad, _ in BAD])
def test_every_bad_environment_has_a_sentence_with_the_remedy(bad, sentence):
    texts = problems_of([facts(**bad)] * 2)
    assert len([text for text in texts if re.search(sentence, text)]) == 1, texts
    of_one = problems_of([facts(), facts(**bad)])
    assert of_one[0].startswith("rank 1: ")


def test_what_differs_between_ranks_is_named_with_them():
    (text,) = problems_of([facts(), facts(torch="2.1.0"), facts()])
    told = "torch differs between ranks: 2.13.0 on ranks 0, 2, 2.1.0 on rank 1"
    assert text == f"{told}. Remedy: install the same version everywhere"


def test_more_ranks_or_threads_than_cores_are_named_with_the_host():
    (text,) = problems_of([facts(cpus=[0, 1])] * 3)
    assert text.startswith("3 ranks share 2 cores on one")
    (text,) = problems_of([facts(threads=4)] * 2)
    assert text == "2 ranks of 4 threads each share 4 cores on one. Remedy: OMP_NUM_THREADS=2"
    assert problems_of([facts(threads=4)]) == []
    assert problems_of([facts(cpus=[0]), facts(cpus=[0], host="other")]) == []


def test_ranks_that_are_bound_to_cores_of_their_own_share_none():
    assert problems_of([facts(cpus=[0]), facts(cpus=[1])]) == []
    (text,) = problems_of([facts(cpus=[1]), facts(cpus=[1])])
    assert text.startswith("2 ranks share 1 cores on one")


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"PMI_SIZE": "2"}, "mpirun"),
        ({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "x", "HOROVOD_RANK": "0"}, "horovodrun"),
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "torchrun"),
    ],
)
def test_launchers_are_told_by_what_they_set(environment, launcher):
    assert launcher_of(environment) == launcher


def test_kernels_that_there_are_none_of_are_one_problem():
    command = [sys.executable, "-W", "ignore", "-m", "hvd_compress", "doctor", "--json"]
    environment = {**os.environ, "HVD_COMPRESS_KERNELS": "fast"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert "HVD_COMPRESS_KERNELS must be torch, plain or avx2: 'fast'" in problem
    assert problem.endswith("Remedy: correct the variable")


def test_a_switch_that_says_neither_ends_whatever_imports_the_package_with_what_it_may_say():
    environment = {**os.environ, "HVD_COMPRESS_OFF": "maybe"}
    done = subprocess.run(
        [sys.executable, "-m", "hvd_compress", "doctor"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "HVD_COMPRESS_OFF must be one of 1, true" in done.stderr.splitlines()[-1]


def test_a_rank_that_reaches_nobody_says_nothing_unless_it_is_the_first():
    command = [sys.executable, "-W", "ignore", "-m", "hvd_compress", "doctor"]
    alone = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"}  # and no address of the others
    for rank, told in (("0", True), ("1", False)):
        done = subprocess.run(command, env={**os.environ, **alone, "RANK": rank}, capture_output=True, text=True)
        assert done.returncode == 1
        assert ("ranks started by torchrun cannot reach each other" in done.stdout) == told
        assert bool(done.stdout) == told


def test_all_pairs_of_few_ranks_are_measured_and_a_ring_of_many():
    assert pairs_of(3) == [(0, 1), (0, 2), (1, 2)]
    assert len(pairs_of(8)) == 28
    assert pairs_of(9) == [(rank, (rank + 1) % 9) for rank in range(9)]


class Timed(Transport):
    """A rank that alone answers for all, with the bytes that it was given to send to each."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.sent: list[list[int]] = []

    def allreduce(self, name, tensor, op):
        return Answered(tensor)

    def alltoall(self, name, parts):
        self.sent.append([sum(part.numel() for part in to) for to in parts])
        return Answered(None)

    allgather = broadcast = None  # type: ignore[assignment]


class Answered(Pending):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def ready(self) -> bool:
        return True

    def wait(self) -> Any:
        return self.answer


Timed.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def test_a_link_is_measured_by_messages_of_the_pair_alone():
    transport = Timed()
    (link,) = measure(transport)
    assert link["ranks"] == [0, 1]
    assert link["latency_seconds"] > 0
    assert link["bits_per_second"] > 0
    assert all(to[0] == 0 and to[1] in (8, 1 << 18, 1 << 22, 1 << 25) for to in transport.sent)
    assert transport.sent[-1] == [0, 1 << 25]  # all sizes are tried where they take no time


def test_it_tells_all_as_text_and_as_json(capsys):
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "1 rank, without a launcher" in text
    assert ("nothing needs a remedy" in text) == (code == 0)
    assert main(["doctor", "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert len(found["ranks"]) == 1
    assert found["ranks"][0]["exchange"]["seconds"].keys() == {"topk", "qsgd"}
    assert bool(found["problems"]) == bool(code)


def test_nothing_waits_to_end_the_process_afterwards(capsys):
    main(["doctor"])
    capsys.readouterr()
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()]


def test_importing_the_package_does_not_import_the_command_line():
    script = "import sys, hvd_compress; sys.exit(any('commands' in name for name in sys.modules if 'hvd_c' in name))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
