"""What this process finds on its machine. Each fact is looked for by itself: what is absent or broken says why."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import kernels
from ..compression import Compression
from ..environment import VARIABLES
from ..kernels import native
from ..local import LocalRanks
from ..version import __version__

Facts = dict[str, Any]  # JSON-serializable

_PARAMETERS = 1 << 20
_SECONDS = 0.5
_COMPILERS = ("c++", "g++", "clang++")


def facts_of_this_process(launcher: str | None) -> Facts:
    """`launcher`: "mpirun", "horovodrun" or "torchrun", None for none."""
    return {
        "hvd_compress": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.import_module("numpy").__version__,
        "system": platform.platform(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "host": socket.gethostname(),
        "launcher": launcher,
        "cpus": sorted(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpus": _tried(_gpus),
        "kernels": _tried(_kernels),
        "horovod": _tried(_horovod),
        "mpi": _tried(lambda: _mpi(start=launcher != "horovodrun" and launcher != "torchrun")),
        "torch.distributed": _tried(_torch_distributed),
        "exchange": _tried(_exchange),
    }


def _tried(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:  # whatever is wrong with a package, the others are still looked at
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def _kernels() -> Facts:
    return {
        "in_use": kernels.in_use(),
        "built": native.built(),
        "asked": os.environ.get(native.VARIABLE),
        "compiler": next(filter(None, map(shutil.which, _COMPILERS)), None),
    }


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def _horovod() -> Facts | None:
    try:
        horovod = importlib.import_module("horovod")
    except ModuleNotFoundError:
        return None
    hvd = importlib.import_module("horovod.torch")
    return {
        "version": horovod.__version__,
        "mpi": bool(hvd.mpi_built()),
        "gloo": bool(hvd.gloo_built()),
        "nccl": bool(hvd.nccl_built()),
    }


def _mpi(*, start: bool) -> Facts | None:
    """start: MPI tells its library and threads only once it runs, which a rank of another launcher leaves alone."""
    try:
        mpi4py = importlib.import_module("mpi4py")
    except ModuleNotFoundError:
        return None
    found: Facts = {"mpi4py": mpi4py.__version__, "library": None, "threads": None}
    if start:
        mpi = importlib.import_module("mpi4py.MPI")
        levels = {getattr(mpi, f"THREAD_{name.upper()}"): name for name in _LEVELS}
        found |= {"library": mpi.Get_library_version().split(",")[0], "threads": levels[mpi.Query_thread()]}
    elif mpirun := shutil.which("mpirun"):
        told = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=20).stdout
        found["library"] = told.splitlines()[0] if told else None
    return found


_LEVELS = ("single", "funneled", "serialized", "multiple")


def _torch_distributed() -> Facts | None:
    import torch.distributed as dist

    if not dist.is_available():
        return None
    return {name: bool(getattr(dist, f"is_{name}_available")()) for name in ("gloo", "nccl", "mpi")}


def _exchange() -> Facts:
    """Steps of two simulated ranks, of a million parameters each, whose results are compared: seconds a step."""
    weight = torch.zeros(1024, _PARAMETERS // 1024)
    gradients = [{"weight": torch.randn(weight.shape, generator=torch.Generator().manual_seed(r))} for r in range(2)]
    seconds: dict[str, float] = {}
    for name in ("topk", "qsgd"):
        make = getattr(Compression, name)
        ranks = LocalRanks([make([("weight", weight)]) for _ in gradients])
        ranks.exchange(gradients)  # memory is made in the first step
        count, start = 0, time.perf_counter()
        while count < 3 or time.perf_counter() - start < _SECONDS:
            results = ranks.exchange(gradients)
            count += 1
        seconds[name] = (time.perf_counter() - start) / count / len(gradients)
        if not torch.equal(results[0]["weight"], results[1]["weight"]):
            raise RuntimeError(f"two ranks got different sums by {name}")
    return {"parameters": _PARAMETERS, "seconds": seconds}
