"""A library that was compiled of other sources than the checkout has is not called: its functions may have changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hvd_compress
from hvd_compress.kernels import native

PACKAGE = Path(hvd_compress.__file__).parent
PROGRAM = """
import torch
from hvd_compress import Compression
from hvd_compress.local import LocalRanks

ranks = LocalRanks([Compression.qsgd([("w", torch.zeros(100_000))]) for _ in range(2)])
print(ranks.exchange([{"w": torch.ones(100_000)}] * 2)[0]["w"].shape)
"""

pytestmark = pytest.mark.skipif(not native.built(), reason="there are no kernels")


def start(place: Path, *program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(place), **variables}
    return subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, cwd=place)


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose kernels are compiled of what lies there."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def pulled(checkout):
    """The same with newer sources, which nobody has compiled."""
    with (checkout / PACKAGE.name / "kernels" / "native" / "quantise.hpp").open("a") as file:
        file.write("// newer\n")
    return checkout


def test_of_the_same_sources_it_is_called(checkout):
    done = start(checkout, "-c", "from hvd_compress import kernels; print(kernels.in_use(), kernels.__file__)")
    assert done.returncode == 0, done.stderr
    level, module = done.stdout.split()
    assert level in native.LEVELS
    assert Path(module).is_relative_to(checkout)


def test_of_others_the_first_use_says_how_to_compile_them(pulled):
    done = start(pulled, "-c", PROGRAM)
    assert done.returncode == 1, done.stdout
    assert "RuntimeError: the C++ kernels were compiled of other sources" in done.stderr
    assert "Remedy: install hvd_compress again (make setup, or pip install --editable .)" in done.stderr


def test_torch_operations_need_no_library(pulled):
    done = start(pulled, "-c", PROGRAM, HVD_COMPRESS_KERNELS="torch")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([100000])\n"


def test_the_doctor_tells_it_once_with_one_remedy(pulled):
    done = start(pulled, "-W", "ignore", "-m", "hvd_compress", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    problems = json.loads(done.stdout)["problems"]
    (problem,) = (problem for problem in problems if "kernels cannot be loaded" in problem)
    assert problem.count("Remedy") == 1
    assert "make setup" in problem
