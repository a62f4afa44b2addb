"""What is wrong with what ranks have found, each in a sentence, with the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ..environment import OFF, VARIABLES, is_off
from .facts import Facts

_SAME = ("hvd_compress", "torch", "numpy", "python")
_BACK_ENDS = ("horovod", "mpi", "torch.distributed")


def problems_of(everyone: Sequence[Facts]) -> list[str]:
    """Of all ranks' facts, in rank order. Empty where nothing needs a remedy."""
    found: dict[str, list[int]] = {}
    for rank, facts in enumerate(everyone):
        for text in _of_one(facts):
            found.setdefault(text, []).append(rank)
    texts = [text if len(ranks) == len(everyone) else f"{named_ranks(ranks)}: {text}" for text, ranks in found.items()]
    return [*texts, *_between(everyone)]


def _of_one(facts: Facts) -> Iterator[str]:
    yield from _of_kernels(facts["kernels"])
    if is_off(facts["variables"]):
        yield f"{OFF} is set, and nothing is compressed. Remedy: unset it"
    for name in ("horovod", "mpi", "torch.distributed", "gpus", "exchange"):
        error = _error(facts[name])
        if error and VARIABLES not in error:  # those are told by themselves
            yield f"{name} is there and does not work ({error}). {_REPAIR[name]}"
    there = [name for name in _BACK_ENDS if facts[name] and not _error(facts[name])]
    if not there:
        yield "no way to other ranks is installed. Remedy: install Horovod, mpi4py, or a torch with torch.distributed"
    horovod, mpi = facts["horovod"], facts["mpi"]
    if horovod and not _error(horovod):
        if not (horovod["mpi"] or horovod["gloo"]):
            yield (
                "Horovod was built with neither MPI nor Gloo. Remedy: build it anew with HOROVOD_WITH_MPI=1 or "
                "HOROVOD_WITH_GLOO=1"
            )
        if facts["gpus"] and not _error(facts["gpus"]) and not horovod["nccl"]:
            yield (
                "there are GPUs, and Horovod was built without NCCL. Remedy: build it anew with "
                "HOROVOD_GPU_OPERATIONS=NCCL"
            )
    if mpi and not _error(mpi) and mpi["threads"] not in (None, "multiple"):
        yield (
            f"MPI runs with thread level {mpi['threads']}: hvd_compress.mpi exchanges gradients at step() alone, not "
            "during backward. Remedy: an MPI with MPI_THREAD_MULTIPLE, and neither mpi4py.rc.thread_level nor "
            "MPI4PY_RC_THREAD_LEVEL below it"
        )


def _of_kernels(kernels: Any) -> Iterator[str]:
    if error := _error(kernels):
        remedy = (
            "correct the variable" if error.startswith("ValueError") else "install hvd_compress again on this machine"
        )
        yield f"the kernels cannot be loaded ({error})" + ("" if "Remedy: " in error else f". Remedy: {remedy}")
    elif kernels["in_use"] == "torch" and kernels["asked"] == "torch":
        yield (
            "HVD_COMPRESS_KERNELS=torch chooses torch operations, ten and more times slower than the kernels. Remedy: "
            "unset it"
        )
    elif kernels["in_use"] == "torch":
        compiler = (
            "install hvd_compress again" if kernels["compiler"] else "install a C++17 compiler, and hvd_compress again"
        )
        yield (
            "the C++ kernels are not there, and torch operations, ten and more times slower, take their place. "
            f"Remedy: {compiler}"
        )


def _between(everyone: Sequence[Facts]) -> Iterator[str]:
    for name in _SAME:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            ranks.setdefault(facts[name], []).append(rank)
        if len(ranks) > 1:
            told = ", ".join(f"{version} on {named_ranks(members)}" for version, members in ranks.items())
            yield f"{name} differs between ranks: {told}. Remedy: install the same version everywhere"
    on_host = Counter(facts["host"] for facts in everyone)
    for host, count in on_host.items():
        first = next(facts for facts in everyone if facts["host"] == host)
        cores = cores_of(host, everyone)
        if count > cores:
            yield (
                f"{count} ranks share {cores} cores on {host}: they wait for each other's turn. Remedy: at "
                "most one rank a core"
            )
        elif count * first["threads"] > cores and count > 1:
            yield (
                f"{count} ranks of {first['threads']} threads each share {cores} cores on {host}. Remedy: "
                f"OMP_NUM_THREADS={max(1, cores // count)}"
            )


def cores_of(host: str, everyone: Sequence[Facts]) -> int:
    """That its ranks may run on: launchers bind each to some of them."""
    return len({cpu for facts in everyone if facts["host"] == host for cpu in facts["cpus"]})


def _error(found: Any) -> str | None:
    return found.get("error") if isinstance(found, dict) else None


def named_ranks(ranks: Sequence[int]) -> str:
    """
    >>> named_ranks([0, 2])
    'ranks 0, 2'
    """
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


_REPAIR = {
    "horovod": "Remedy: build it against the torch that is installed, or remove it",
    "mpi": "Remedy: install an MPI library that mpi4py finds, such as the package openmpi, or remove mpi4py",
    "torch.distributed": "Remedy: another build of torch",
    "gpus": "Remedy: see the driver, or hide the GPUs by CUDA_VISIBLE_DEVICES=",
    "exchange": "Remedy: please report it, with this text",
}
