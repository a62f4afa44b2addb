"""What cannot work is refused on every rank, with the cause and the remedy; nothing hangs."""

import pytest
import torch
from torch import nn

from hvd_compress import Compression, MismatchError

from .job import Job
from .training import COMPRESSIONS, OPTIONS, assert_replicated, backward, digest, gradients, parameters, sgd

REFUSED = [
    ("terngrad", {"clip_sigma": 0}),
    ("adacomp", {"bin_size": 0}),
    ("topk", {"density": 0}),
    ("topk", {"density": 1.5}),
    ("topk", {"min_numel": -1}),
    ("topk", {"bucket_bytes": 0}),
    ("topk", {"exclude": "no.such.*"}),
]


@pytest.mark.parametrize(("kind", "options"), REFUSED)
def test_wrong_options_are_value_errors(job: Job, kind: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(Compression, kind)(parameters().items(), **options)


def test_adasum_is_refused(horovod: Job) -> None:
    job = horovod
    of = parameters()
    if job.backend == "horovod-gloo":
        pytest.skip("Horovod itself has no Adasum on Gloo")
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()), op="adasum")
    with pytest.raises(NotImplementedError, match=r"op=hvd.Adasum.*use op=hvd.Average or op=hvd.Sum"):
        backward(of, gradients(of, job.rank, 0))
    del optimizer


def test_a_process_set_that_only_compression_or_optimizer_has_is_refused(horovod: Job) -> None:
    job = horovod
    if job.size < 4:
        pytest.skip("needs two sets of more than one rank")
    mine = job.split([[0, 1], [2, 3]]).of_optimizer["process_set"]
    for of_compression, of_optimizer in ((mine, None), (None, mine)):
        of = parameters()
        options = {"process_set": of_optimizer} if of_optimizer else {}
        compression = Compression.topk(of.items(), process_set=of_compression, **OPTIONS)
        with pytest.raises((RuntimeError, ValueError), match="process_set="):  # noqa: PT012
            optimizer = job.distribute(sgd(of), of.items(), compression, **options)
            for step in range(2):
                optimizer.zero_grad()
                backward(of, gradients(of, job.rank, step))
                optimizer.step()
        job.barrier()
    of = parameters()
    compression = Compression.topk(of.items(), process_set=mine, **OPTIONS)
    optimizer = job.distribute(sgd(of), of.items(), compression, process_set=mine)
    for step in range(2):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
    first, second, third, fourth = job.allgather(digest(of))
    assert first == second != third == fourth


def test_sparse_as_dense_is_refused(horovod: Job) -> None:
    job = horovod
    embedding = nn.Embedding(50, 30, sparse=True)
    named = [("weight", embedding.weight)]
    optimizer = job.distribute(
        torch.optim.SGD(embedding.parameters(), lr=0.1), named, COMPRESSIONS["topk"](named), sparse_as_dense=True
    )
    with pytest.raises(ValueError, match="sparse_as_dense=False"):
        embedding(torch.tensor([1, 2])).sum().backward()
    del optimizer


@pytest.mark.usefixtures("optimizers")
def test_an_unbound_parameter_is_refused(job: Job) -> None:
    of = parameters()
    compression = COMPRESSIONS["topk"]([("a", of["a"]), ("b", of["b"])])
    if job.is_horovod:
        if job.size == 1:
            pytest.skip("Horovod asks no compression at one rank")
        optimizer = job.distribute(sgd(of), of.items(), compression)
        with pytest.raises(ValueError, match=r"\(40, 10\).*named_parameters\(\)"):
            backward(of, {"c": gradients(of, job.rank, 0)["c"]})
        del optimizer
    else:
        with pytest.raises(ValueError, match=r"\(40, 10\).*named_parameters\(\)"):
            job.distribute(sgd(of), of.items(), compression)


@pytest.mark.parametrize("kind", ["none", "fp16"])
def test_join_works_with_what_horovod_adds_up(horovod: Job, kind: str) -> None:
    job = horovod
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), getattr(Compression, kind))
    for step in range(2 + job.rank):
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
    job.hvd.join()
    job.hvd.broadcast_parameters(of, root_rank=job.size - 1)
    assert_replicated(job, of)


def made_differently(job: Job, how: str):
    """A compression that on the last rank is not like on the others."""
    of = parameters()
    odd = job.rank == job.size - 1
    if how == "density":
        return of, Compression.topk(of.items(), density=0.2 if odd else 0.1, **OPTIONS)
    if how == "compressor":
        return of, COMPRESSIONS["terngrad" if odd else "topk"](of.items())
    if how == "shape":
        of = parameters({"a": (30, 21 if odd else 20), "b": (8, 4)})
    if how == "name":
        of = {"z" if odd and name == "a" else name: p for name, p in of.items()}
    return of, COMPRESSIONS["topk"](of.items())


@pytest.mark.parametrize(
    ("how", "told"),
    [("density", "density is 0.1"), ("compressor", "compressor is"), ("shape", r"30, 21"), ("name", "'z'")],
)
def test_ranks_that_differ_are_told_so_and_can_go_on(several: Job, how: str, told: str) -> None:
    job = several
    if (job.backend, how) == ("torch", "shape"):
        pytest.skip("DistributedDataParallel itself refuses such models")
    of, compression = made_differently(job, how)

    def run(of, compression) -> None:
        optimizer = job.distribute(sgd(of), of.items(), compression)
        backward(of, gradients(of, job.rank, 0))
        optimizer.step()

    with pytest.raises(MismatchError, match=told):
        run(of, compression)
    of = parameters()
    run(of, COMPRESSIONS["topk"](of.items()))
    assert_replicated(job, of)
