"""Training with every compressor: replicas stay equal to the bit, on every backend and as the simulation has it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hvd_compress import Compression

from .job import Job
from .training import (
    IN_FRAMES,
    IN_SUMS,
    MakeCompression,
    Simulation,
    assert_close,
    assert_equal,
    assert_replicated,
    copy,
    takes_part,
)

STEPS = [15, pytest.param(200, marks=pytest.mark.long)]
LEARNING_STEPS = 60  # by one back end, which shows that all learn: others give the same bits, or almost
MAKE: dict[str, MakeCompression] = {
    "none": Compression.none,
    "fp16": Compression.fp16,
    "bf16": lambda named: Compression.bf16(named, min_numel=1),
    "terngrad": lambda named: Compression.terngrad(named, min_numel=1),
    "adacomp": lambda named: Compression.adacomp(named, min_numel=1),
    "qsgd": lambda named: Compression.qsgd(named, topology="scatter", min_numel=1),
    "scattered": lambda named: Compression.topk(named, density=0.1, topology="scatter", min_numel=1),
    "topk": lambda named: Compression.topk(named, density=0.1, min_numel=1),
    "narrow": lambda named: Compression.topk(named, density=0.1, value_bits=4, topology="scatter", min_numel=1),
    "stochastic_pruning": lambda named: Compression.stochastic_pruning(named, min_numel=1),
    "onebit": lambda named: Compression.onebit(named, topology="scatter", min_numel=1),
    "powersgd": lambda named: Compression.powersgd(named, approximation_rank=1, min_numel=1),
    "scalecom": lambda named: Compression.scalecom(named, density=0.1, min_numel=1),
    "scalecom_4_bits": lambda named: Compression.scalecom(named, density=0.1, value_bits=4, min_numel=1),
    "dgc": lambda named: Compression.dgc(named, density=0.2, momentum=0.5, min_numel=1),
}


def model() -> nn.Module:
    """No 1-D parameter: those are added up by the backend, in an order of its own."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, bias=False), nn.Linear(64, 12, bias=False), nn.Linear(12, 3, bias=False)
    return nn.Sequential(layers[0], nn.Tanh(), nn.Flatten(), *layers[1:])


def loss(of: nn.Module, rank: int, step: int) -> Tensor:
    """Of a batch that no other rank or step has."""
    batch = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1000 * rank + step))
    pixels = batch[:, 0]
    return nn.functional.mse_loss(of(batch), torch.stack([pixels.mean((1, 2)), pixels[:, 0, 0], pixels[:, 5, 5]], 1))


def sgd(of: nn.Module, kind: str = "none", size: int = 1) -> torch.optim.Optimizer:
    """DGC has the momentum itself, where it takes part."""
    compression = MAKE[kind](of.named_parameters())
    compression.unregister()  # it is only looked at, on some ranks
    has_it = bool(compression.compressor.replaces) and takes_part(size, compression)
    return torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.0 if has_it else 0.5)


def train_simulated(
    one: nn.Module, kind: str, simulation: Simulation, steps: int, alive: Callable[[], None]
) -> dict[str, Tensor]:
    """The parameters of one model that stands for all replicas, after as many steps."""
    by_name = dict(one.named_parameters())
    optimizer = sgd(one, kind, simulation.size)
    for step in range(steps):
        of_ranks = []
        for rank in range(simulation.size):
            optimizer.zero_grad()
            loss(one, rank, step).backward()
            of_ranks.append({name: p.grad for name, p in by_name.items()})
        for name, combined in simulation.exchange(of_ranks).items():
            by_name[name].grad = combined
        optimizer.step()
        alive()
    return copy(by_name)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", MAKE)
def test_replicas_learn_stay_equal_and_match_the_simulation(
    job: Job, alive: Callable[[], None], kind: str, steps: int
) -> None:
    learns = steps >= LEARNING_STEPS or job.backend == "mpi4py"
    steps = max(steps, LEARNING_STEPS) if learns else steps
    mine = model()
    by_name = dict(mine.named_parameters())
    optimizer = job.distribute(sgd(mine, kind, job.size), by_name.items(), MAKE[kind](by_name.items()))
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(mine, job.rank, step)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        alive()
    assert_replicated(job, by_name)
    if learns:
        assert sum(losses[-10:]) < (0.5 if kind == "dgc" else 0.3) * sum(losses[:10])
    one = model()
    simulation = Simulation(job.size, MAKE[kind], dict(one.named_parameters()))
    if job.rank == 0:  # the same on all ranks, and slow on many of them at once
        simulated = train_simulated(one, kind, simulation, steps, alive)
        if kind in (*IN_FRAMES, "narrow", "onebit") or job.size == 1:
            assert_equal(by_name, simulated)
        else:
            # Rounding grows over the steps, most where each starts from the last one's power iteration.
            assert_close(by_name, simulated, 1e-2 if kind in ("fp16", *IN_SUMS) else 1e-4)


@pytest.mark.parametrize("kind", ["none", "fp16", "bf16"])
def test_an_unbound_compression_trains_as_a_bound_one(job: Job, kind: str) -> None:
    """As it is, in the place of a member of horovod.torch.Compression."""
    trained = []
    for bind in (False, True):
        mine = model()
        compression = getattr(Compression, kind)
        if bind:
            compression = compression(mine.named_parameters())
        optimizer = job.distribute(sgd(mine), mine.named_parameters(), compression)
        for step in range(3):
            optimizer.zero_grad()
            loss(mine, job.rank, step).backward()
            optimizer.step()
        trained.append(copy(dict(mine.named_parameters())))
        assert_replicated(job, trained[-1])
    assert_close(*trained, 1e-2 if kind == "fp16" else 1e-5)  # float16 sums depend on their order
