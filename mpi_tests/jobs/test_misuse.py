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


def test_joining_works_with_the_compression_that_the_error_proposes():
    ended = run("horovod-gloo", 2, "misuse.py", "join-uncompressed")
    assert ended.code == 0, str(ended)
    assert ended.output.count("joined") == 2


def test_adasum_is_refused():
    output = refused("horovod-mpi", 2, "adasum")
    assert "op=hvd.Adasum" in output
    assert "use op=hvd.Average or op=hvd.Sum" in output


@pytest.mark.parametrize("launcher", HOROVOD)
def test_a_process_set_that_only_compression_or_optimizer_has_is_refused(launcher):
    ended = run(launcher, 4, "misuse.py", "process-sets", HOROVOD_DYNAMIC_PROCESS_SETS="1")
    assert ended.code == 0, str(ended)
    of_ranks = [
        [line for line in ended.of_rank(r).splitlines() if line.startswith(("refused", "trained"))] for r in range(4)
    ]
    for only_compression, only_optimizer, both in of_ranks:
        assert only_compression.startswith("refused"), str(ended)
        assert "process_set=" in only_compression
        assert only_optimizer.startswith("refused"), str(ended)
        assert "process_set=" in only_optimizer
        assert both.startswith("trained"), str(ended)
    digests = [both for _, _, both in of_ranks]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_ranks_that_wait_for_one_with_another_kind_of_compression_say_so():
    job = start(command_of("horovod-gloo", 2, SCRIPTS / "misuse.py", "horovod", "different-kinds"))
    try:
        job.await_output("has waited 10 s for the other ranks.*do all ranks pass the same compression=")
    finally:
        job.end(0)
