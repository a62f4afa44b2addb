"""One thread: the tensors are small, and the machine may be shared. A file of tests that hangs shows where."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from hvd_compress import kernels
from hvd_compress.kernels import native

torch.set_num_threads(1)

_FILE_SECONDS = 600  # a file of tests, of which the longest takes one; a timer for each test would cost more than most
_stderr: int


def pytest_configure() -> None:
    global _stderr
    _stderr = os.dup(2)  # tests run with another


@pytest.fixture(scope="module", autouse=True)
def stacks_of_a_hang() -> Iterator[None]:
    """End a file of tests that takes too long, with the stacks of all threads."""
    faulthandler.dump_traceback_later(_FILE_SECONDS, exit=True, file=_stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=[*native.LEVELS, "torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The kernels of each level that this processor has, in use for the test."""
    before = kernels.in_use()
    if kernels.use(request.param) != request.param:
        kernels.use(before)
        pytest.skip(f"no kernels of level {request.param}")
    yield kernels.of(torch.empty(1))
    kernels.use(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep one share of the tests: HVD_COMPRESS_TEST_SHARE=1/2 the first of two."""
    number, count = map(int, os.environ.get("HVD_COMPRESS_TEST_SHARE", "1/1").split("/"))
    items[:] = items[number - 1 :: count]
