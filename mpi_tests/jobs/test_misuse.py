"""What Horovod offers and compression cannot serve is refused by an error that names the cause and the remedy."""

import pytest

from .launch import HOROVOD, SCRIPTS, command_of, run, start


def refused(launcher, ranks, use):
    ended = run(launcher, ranks, "misuse.py", use)
    assert ended.code, str(ended)
    assert ended.left_behind == []
    assert ended.seconds_of_training() < 10, str(ended)
    return ended.output


@pytest.mark.parametrize("launcher", HOROVOD)
def test_joining_while_others_step_names_join_and_the_remedy(launcher):
    output = refused(launcher, 2, "join")
    assert "a rank called hvd.join()" in output
    assert "Give every rank the same number of batches" in output


def test_ranks_that_wait_for_one_with_another_kind_of_compression_say_so():
    job = start(command_of("horovod-gloo", 2, SCRIPTS / "misuse.py", "horovod", "different-kinds"))
    try:
        job.await_output("has waited 10 s for the other ranks.*do all ranks pass the same compression=")
    finally:
        job.end(0)
