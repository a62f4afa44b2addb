"""What all tests need: one thread a process, or ranks would fight for the cores; none of torch's compiler."""

from . import no_compiler

no_compiler.install()

import torch  # noqa: E402


def pytest_configure() -> None:
    torch.set_num_threads(1)
