"""Where ranks see different things of a parameter: they agree, or all of them say what does not go together."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_compress import Compression, MismatchError

from .job import Job
from .training import (
    COMPRESSIONS,
    OPTIONS,
    Gradients,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    backward,
    copy,
    gradients,
    grads,
    parameters,
    residuals,
    sgd,
)

pytestmark = pytest.mark.usefixtures("plain_mpi")

KINDS = ["none", "topk", "terngrad", "powersgd", "scalecom"]


def exact(named) -> object:
    return Compression.topk(named, density=1.0, min_numel=1, bucket_bytes=1)


# Unused parameters


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_rank_uses_keeps_no_gradient_and_does_not_decay(job: Job, kind: str) -> None:
    """b is used in steps 2 and 3 only, by the last rank only."""
    of = parameters()
    compression = COMPRESSIONS[kind](of.items())
    optimizer = job.distribute(torch.optim.AdamW(of.values(), lr=0.1, weight_decay=0.5), of.items(), compression)
    for step in range(6):
        used = step in (2, 3)
        mine = gradients(of, job.rank, step)
        names = [name for name in of if name != "b" or (used and job.rank == job.size - 1)]
        before, owed = copy(of), copy(residuals(compression))
        optimizer.zero_grad()
        backward(of, {name: mine[name] for name in names})
        optimizer.step()
        assert (of["b"].grad is not None) == used
        assert torch.equal(of["b"], before["b"]) != used
        assert not torch.equal(of["a"], before["a"])
        if not used and "b" in owed:
            assert torch.equal(residuals(compression)["b"], owed["b"])
    assert_replicated(job, of)


def test_steps_without_any_gradient_do_nothing(job: Job) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS["topk"], of)
    for step in range(4):
        before = copy(of)
        optimizer.zero_grad()
        if step % 2:
            backward(of, gradients(of, job.rank, step))
        optimizer.step()
        if step % 2:
            assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))
        else:
            assert_equal(copy(of), before)


@pytest.mark.parametrize("kind", ["none", "topk"])
def test_gradients_that_are_set_by_hand_are_exchanged(job: Job, kind: str) -> None:
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS[kind](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS[kind], of)
    for step in range(3):
        for name, gradient in gradients(of, job.rank, step).items():
            of[name].grad = gradient
        optimizer.step()
        expected = simulation.exchange([gradients(of, rank, step) for rank in range(job.size)])
        (assert_close if kind == "none" else assert_equal)(grads(of), expected)


# Sparse gradients


class Words(nn.Module):
    """An embedding that is looked up, or multiplied with as a whole, or not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 8, sparse=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, words: Tensor, how: str) -> Tensor:
        if how == "dense":
            return self.linear(self.embedding.weight.mean(0) + words.sum() * 0)
        return self.linear(self.embedding(words) if how == "sparse" else torch.ones(3, 8))


# What rank 0 and the others do in each step.
USES = {
    "unused at first": [("unused", "sparse"), ("sparse", "sparse"), ("unused", "sparse"), ("sparse", "unused")],
    "used by nobody at first": [("unused", "unused"), ("unused", "sparse"), ("sparse", "sparse")],
    "dense on some": [("sparse", "dense"), ("sparse", "sparse"), ("dense", "sparse"), ("unused", "sparse")],
    "dense later": [("sparse", "sparse"), ("dense", "sparse"), ("sparse", "sparse"), ("unused", "unused")],
    "sparse later": [("dense", "dense"), ("dense", "sparse"), ("sparse", "sparse"), ("unused", "dense")],
}


@pytest.mark.parametrize("kind", ["exact", "none"])
@pytest.mark.parametrize("uses", USES)
def test_all_ranks_agree_on_the_layout_of_a_gradient(job: Job, uses: str, kind: str) -> None:
    def loss_of(model: nn.Module, rank: int, step: int, how: str) -> Tensor:
        words = torch.randint(0, 40, (3,), generator=torch.Generator().manual_seed(10 * step + rank))
        return model(words, how).pow(2).mean()

    def dense_of(model: nn.Module) -> dict[str, Tensor]:
        return {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}

    model, alone = Words(), Words()
    named = list(model.named_parameters())
    make = exact if kind == "exact" else COMPRESSIONS["none"]
    optimizer = job.distribute(torch.optim.SGD(model.parameters(), lr=0.5), named, make(named))
    reference = torch.optim.SGD(alone.parameters(), lr=0.5)
    for step, (first, others) in enumerate(USES[uses]):
        optimizer.zero_grad()
        loss_of(model, job.rank, step, first if job.rank == 0 else others).backward()
        optimizer.step()
        reference.zero_grad()
        losses = [loss_of(alone, rank, step, first if rank == 0 else others) for rank in range(job.size)]
        (sum(losses) / job.size).backward()
        reference.step()
        assert_close(dense_of(model), dense_of(alone))
        gradient = model.embedding.weight.grad
        assert len(set(job.allgather(None if gradient is None else str(gradient.layout)))) == 1
    assert_close(copy(dict(named)), copy(dict(alone.named_parameters())))
    assert_replicated(job, dict(named))


# Errors


@pytest.mark.parametrize("step_of_change", [0, 2])
@pytest.mark.parametrize("how", ["frozen", "absent"])
def test_a_parameter_that_only_some_ranks_train_is_one_error_on_all(
    several: Job, how: str, step_of_change: int
) -> None:
    job = several
    of = parameters()
    last = job.rank == job.size - 1
    optimizer = job.distribute(sgd({"a": of["a"]}), of.items(), exact(of.items()))
    optimizer.add_param_group({"params": [of["b"]]})
    for step in range(3):
        if step == step_of_change:
            if how == "frozen":
                of["b"].requires_grad_(not last)
            elif not last:
                optimizer.add_param_group({"params": [of["c"]]})
        optimizer.zero_grad()
        names = [name for name in ("a", "b") if of[name].requires_grad]
        backward(of, {name: gradients(of, job.rank, step)[name] for name in names})
        if step < step_of_change:
            optimizer.step()
            continue
        others = "rank 0" if job.size == 2 else "ranks 0, 1, 2"
        told = {
            "frozen": rf"'b' is trained on {others}, frozen on rank {job.size - 1}\.",
            "absent": rf"'c' is trained on {others}, not in the optimizer on rank {job.size - 1}\.",
        }
        before = copy(of)
        with pytest.raises(MismatchError, match=told[how]):
            optimizer.step()
        assert_equal(copy(of), before)
        break
    of["b"].requires_grad_(True)
    if how == "absent" and last:
        optimizer.add_param_group({"params": [of["c"]]})
    before = copy(of)
    optimizer.zero_grad()
    backward(of, gradients(of, job.rank, 7))
    optimizer.step()
    trained = ["a", "b"] if how == "frozen" else list(of)
    mean = {name: sum(gradients(of, rank, 7)[name] for rank in range(job.size)) / job.size for name in trained}
    assert_close({name: of[name] for name in trained}, {name: before[name] - 0.1 * mean[name] for name in trained})


# Hooks that fire several times


class Shared(nn.Module):
    """A checkpointed layer that is used twice: its hook fires twice where checkpoints are reentrant."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head, self.reentrant = nn.Linear(9, 9), nn.Linear(9, 4), reentrant

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(checkpoint(self.inner, x, use_reentrant=self.reentrant))
        return self.head(checkpoint(self.inner, once, use_reentrant=self.reentrant))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_may_be_used_twice(job: Job, reentrant: bool, passes: int) -> None:
    def x(rank: int, step: int) -> Tensor:
        return torch.randn(3, 9, generator=torch.Generator().manual_seed(10 * step + rank)).requires_grad_()

    model, alone = Shared(reentrant), Shared(False)
    named = list(model.named_parameters())
    optimizer = job.distribute(sgd(dict(named)), named, exact(named), backward_passes_per_step=passes)
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        reference.zero_grad()
        for part in range(passes):
            model(x(job.rank, 10 * step + part)).pow(2).mean().backward()
            for rank in range(job.size):
                (alone(x(rank, 10 * step + part)).pow(2).mean() / job.size).backward()
        optimizer.step()
        reference.step()
    assert_close(copy(dict(named)), copy(dict(alone.named_parameters())))
    assert_replicated(job, dict(named))


@pytest.mark.parametrize("ranks_that_do", ["all", "last"])
def test_a_hook_that_fires_twice_only_later_is_refused_with_the_remedy(several: Job, ranks_that_do: str) -> None:
    job = several
    model = Shared(False)
    named = list(model.named_parameters())
    optimizer = job.distribute(sgd(dict(named)), named, exact(named))

    def loss() -> Tensor:
        return model(torch.ones(3, 9).requires_grad_()).pow(2).mean()

    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.reentrant = ranks_that_do == "all" or job.rank == job.size - 1
    if model.reentrant:
        with pytest.raises(RuntimeError, match="'inner.*use_reentrant=False"):
            loss().backward()
    else:
        loss().backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.synchronize\(\)"):
        optimizer.step()


# Gradients that are thrown away

HOW = ["zero_grad", "zero_grad, zeros", "model.zero_grad", "synchronize, zero_grad"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["none", "topk", "adacomp", "powersgd", "scalecom", "dgc", "terngrad"])
def test_gradients_that_are_thrown_away_have_no_effect(job: Job, kind: str, how: str) -> None:
    """Twice each, in the first step, when nothing travels yet, and later."""
    of, undisturbed = parameters(), parameters()
    module = nn.ParameterDict(of)
    compression = COMPRESSIONS[kind](of.items())
    optimizer = job.distribute(sgd(of), of.items(), compression)
    reference = job.distribute(sgd(undisturbed), undisturbed.items(), COMPRESSIONS[kind](undisturbed.items()))

    def throw(known: Gradients) -> None:
        optimizer.zero_grad()
        backward(of, known)
        if how.startswith("synchronize"):
            optimizer.synchronize()
        if how == "model.zero_grad":
            module.zero_grad()
        else:
            optimizer.zero_grad(set_to_none="zeros" not in how)

    for step in range(4):
        before = copy(residuals(compression))
        if step in (0, 2):
            throw(gradients(of, job.rank, 77 + step))
            throw({name: g for name, g in gradients(of, job.rank, 88 + step).items() if name != "b"})
        assert_equal(residuals(compression), before)
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        optimizer.zero_grad()
        reference.zero_grad()
        backward(undisturbed, gradients(of, job.rank, step))
        reference.step()
    if kind in ("terngrad", "scalecom"):  # random numbers, and whose turn it is, depend on the number of the step
        assert_replicated(job, of)
    else:
        assert_close(copy(of), copy(undisturbed))


@pytest.mark.parametrize("rank_without", [0, 1])
def test_thrown_away_on_some_ranks_where_others_had_nothing(several: Job, rank_without: int) -> None:
    job = several
    of = parameters()
    optimizer = job.distribute(sgd(of), of.items(), COMPRESSIONS["topk"](of.items()))
    simulation = Simulation(job.size, COMPRESSIONS["topk"], of)
    for step in range(3):
        if step == 1:
            if job.rank != rank_without:
                backward(of, {"a": gradients(of, job.rank, 66)["a"]})
            optimizer.zero_grad()
            backward(of, gradients(of, job.rank, 67))
            with pytest.raises(RuntimeError, match=rf"there were none on rank {rank_without},.*synchronize\(\)"):
                optimizer.step()
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step))
        optimizer.step()
        assert_equal(grads(of), simulation.exchange([gradients(of, rank, step) for rank in range(job.size)]))


def test_two_optimizers_of_an_adversarial_pair(job: Job) -> None:
    """The generator's backward pass gives the judge gradients as well, which are thrown away."""

    def train(distributed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        generator, judge = nn.Linear(4, 12), nn.Linear(12, 2)
        named = {"generator": list(generator.named_parameters()), "judge": list(judge.named_parameters())}
        optimizers = {key: torch.optim.SGD([p for _, p in pairs], lr=0.1) for key, pairs in named.items()}
        if distributed:
            optimizers = {
                key: job.distribute(optimizer, named[key], exact(named[key])) for key, optimizer in optimizers.items()
            }
        ranks = [job.rank] if distributed else range(job.size)
        for step in range(4):
            inputs = [torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + r)) for r in ranks]
            optimizers["judge"].zero_grad()
            sum(judge(generator(x).detach()).pow(2).mean() for x in inputs).div(len(ranks)).backward()
            optimizers["judge"].step()
            optimizers["generator"].zero_grad()
            sum(judge(generator(x)).mean() for x in inputs).div(len(ranks)).backward()
            optimizers["generator"].step()
        return copy({f"{key}.{name}": p for key, pairs in named.items() for name, p in pairs})

    trained = train(True)
    assert_close(trained, train(False))
    assert_replicated(job, trained)


# Other kinds of models


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", ["none", "topk", "terngrad", "powersgd", "dgc", "fp16"])
def test_complex_parameters_are_combined_in_both_parts(job: Job, kind: str, dtype: torch.dtype) -> None:
    def train(distributed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        of = {"w": nn.Parameter(torch.randn(20, 30, dtype=dtype)), "b": nn.Parameter(torch.randn(30, dtype=dtype))}
        optimizer = torch.optim.Adam(of.values(), lr=0.1, betas=(0.0, 0.9))
        if distributed:
            optimizer = job.distribute(optimizer, of.items(), COMPRESSIONS[kind](of.items()))
        ranks = [job.rank] if distributed else range(job.size)
        for step in range(3):
            optimizer.zero_grad()
            inputs = [
                torch.randn(3, 20, dtype=dtype, generator=torch.Generator().manual_seed(9 * step + r)) for r in ranks
            ]
            sum((x @ of["w"] + of["b"]).abs().pow(2).mean() for x in inputs).div(len(ranks)).backward()
            optimizer.step()
        return {name: torch.view_as_real(p.detach()).clone() for name, p in of.items()}

    trained = train(True)
    assert_replicated(job, trained)
    if kind != "dgc" or job.size == 1:  # which has momentum
        assert_close(trained, train(False), 1e-2 if kind == "fp16" else 1e-4)


@pytest.mark.parametrize("kind", ["none", "topk"])
def test_compiled_models_train(job: Job, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    named = list(model.named_parameters())
    optimizer = job.distribute(sgd(dict(named)), named, COMPRESSIONS[kind](named))
    compiled = torch.compile(model, backend="eager")
    simulation = Simulation(job.size, COMPRESSIONS[kind], dict(named))
    for step in range(2):
        locals_ = []
        for rank in range(job.size):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            locals_.append(dict(zip(dict(named), torch.autograd.grad(model(x).pow(2).mean(), model.parameters()))))
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + job.rank))
        compiled(x).pow(2).mean().backward()
        optimizer.step()
        assert_close(grads(dict(named)), simulation.exchange(locals_))
    assert_replicated(job, dict(named))


def test_gradients_travel_from_the_second_step_on_in_the_order_of_the_hooks(several: Job) -> None:
    """Nothing is handed in before all ranks have agreed on it; afterwards all is, during backward."""
    job = several
    of = parameters({f"p{i}": (4, 5) for i in range(6)})
    compression = Compression.topk(of.items(), **OPTIONS)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    handed_in: list[int] = []
    submit = compression.submit

    def spy(index: int, *arguments: object, **options: object) -> object:
        handed_in.append(index)
        return submit(index, *arguments, **options)

    compression.submit = spy
    order = ["p3", "p0", "p5", "p1", "p4", "p2"]
    for step in range(3):
        handed_in.clear()
        optimizer.zero_grad()
        backward(of, gradients(of, job.rank, step), order)
        assert handed_in == ([] if step == 0 else [3, 0, 5, 1, 4, 2])
        optimizer.step()
        assert handed_in == [3, 0, 5, 1, 4, 2]
