"""Who started this process, by what launchers leave in the environment."""

from __future__ import annotations

from collections.abc import Mapping


def launcher_of(environment: Mapping[str, str]) -> str | None:
    """Who started this process as one of several ranks; None for nobody."""
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environment:
        return "horovodrun"
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    if any(name in environment for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return "mpirun"
    return None


def rank_of(environment: Mapping[str, str]) -> int:
    """As the launcher tells it, before ranks have reached each other; 0 for one process."""
    names = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "RANK")
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), 0)
