"""One wheel, with the kernels in it, installs and runs where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .launch import ROOT

SOURCES = ("hvd_compress", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
PROGRAM = """
import torch
import hvd_compress
from hvd_compress import Compression, kernels
from hvd_compress.local import LocalRanks

ranks = LocalRanks([Compression.terngrad([("w", torch.zeros(100, 100))]) for _ in range(2)])
first, second = ranks.exchange([{"w": torch.ones(100, 100)}] * 2)
assert torch.equal(first["w"], second["w"]) and first["w"].abs().max() > 0
print(kernels.in_use(), hvd_compress.__file__)
"""


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run([*map(str, command)], env=os.environ | environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    (tree / "hvd_compress" / "kernels" / "_native.so").unlink(missing_ok=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, tree]
    run(*wheel, CXXFLAGS="-O0")  # how fast they are does not matter here, and they compile in a third of the time
    (built,) = dist.iterdir()
    return built


def test_it_serves_every_version_of_python_and_old_systems(wheel: Path) -> None:
    """As `make wheel` makes it: with the tag that an index asks for."""
    repaired = wheel.parent / "repaired"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, wheel, PATH=path)
    (built,) = repaired.iterdir()
    python, abi, platform = built.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert f"manylinux_2_17_{os.uname().machine}" in platform.split(".")
    run(sys.executable, "-m", "twine", "check", "--strict", built)


def test_it_runs_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    where = tmp_path / "venv"
    venv.create(where, symlinks=True, with_pip=False)
    python = where / "bin" / "python"
    # torch and numpy come from the environment of the suite, the package itself must not.
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    nothing = {"PATH": str(where / "bin"), "PYTHONPATH": "", "CXX": "/nonexistent", "CC": "/nonexistent"}
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, **nothing)
    kernels, package = run(python, "-c", PROGRAM, **nothing).split()
    assert kernels in ("plain", "avx2")
    assert Path(package).is_relative_to(where)
