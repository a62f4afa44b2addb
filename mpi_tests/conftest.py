"""What all tests need: one thread a process, or the ranks of a job would fight for the cores."""

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
