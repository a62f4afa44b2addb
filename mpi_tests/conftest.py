"""What all tests need: one thread a process, or the ranks of a job would fight for the cores; no compiler of torch's."""

import torch

from . import no_compiler

no_compiler.install()


def pytest_configure() -> None:
    torch.set_num_threads(1)
