"""Files of JSON lines hold whole lines, also where the disk is full."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hvd_compress.telemetry.export import append_lines, to_jsonl
from hvd_compress.telemetry.records import ParameterStep

LIMIT_BYTES = 1000
RECORDS = [ParameterStep(step, "layer.weight", 4000, 40, 0.01, None) for step in range(30)]


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may be longer. Not a fixture: pytest itself may be writing to a file between the parts of a test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_does_not_fit_leaves_those_before_it(tmp_path):
    path = tmp_path / "lines"
    with full_disk():
        append_lines(path, ["a" * 400, "b" * 400])
        with pytest.raises(OSError, match="File too large.*lines"):
            append_lines(path, ["c" * 100, "d" * 400])
        assert path.read_text() == "a" * 400 + "\n" + "b" * 400 + "\n"
        append_lines(path, ["e" * 100])
    assert path.read_text().endswith("b\n" + "e" * 100 + "\n")


def test_records_that_do_not_fit_leave_the_file_that_was_there(tmp_path):
    path = tmp_path / "log.jsonl"
    to_jsonl(RECORDS[:3], path, append=False)
    before = path.read_text()
    with full_disk(), pytest.raises(OSError, match="File too large"):
        to_jsonl(RECORDS, path, append=False)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
