"""One rank has nothing to exchange: it is told so, and trains as if there were no compression."""

import pytest

from .launch import run


@pytest.mark.parametrize("launcher", ["horovod-mpi", "mpi4py"])  # one rank is launched alike by both of a kind
def test_one_rank_is_told_once_that_nothing_is_compressed_and_trains_plainly(launcher):
    ended = run(launcher, 1, "single.py")
    assert ended.code == 0, str(ended)
    assert ended.output.count("nothing is compressed") == 1, str(ended)
    assert ended.of_rank(0).splitlines().count("same") == 2, str(ended)
