"""One rank of a job in which something goes wrong: faults_worker.py BACKEND FAULT TIMES DIRECTORY

Writes how each time ended to DIRECTORY/RANK.jsonl; a fault that ends the job says when it begins instead.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hvd_compress import Compression
from hvd_compress.local import LocalRanks
from hvd_compress.training import Masks
from hvd_compress.transports.base import Pending
from mpi_tests.ranks.job import Job, join
from mpi_tests.ranks.training import OPTIONS, assert_close, backward, digest, gradients, grads, parameters, sgd

STEPS, AT = 8, 3  # of a training, and the one in which the fault happens
STOP_SECONDS = float(os.environ.get("STOP_SECONDS") or 20)
BUSY_SECONDS = 1e-3
_SCALE = 1024.0
Parameters = dict[str, torch.Tensor]

began = 0.0


def begin() -> None:
    """Say that the fault happens now."""
    global began
    began = time.time()
    print(f"training starts at {began:.3f}", flush=True)


def topk(of: Parameters, density: Any = 0.1) -> Any:
    return Compression.topk(of.items(), density=density, **OPTIONS)


def train(
    job: Job,
    make: Callable[[Parameters], Any] = topk,
    *,
    of: Parameters | None = None,
    before: Callable[[int, Parameters, Parameters], None] = lambda *_: None,
    omit: Iterable[int] = (),
) -> str:
    """Train, skip steps whose gradients are not finite, and return the hash of the parameters.

    before: called with the step, the parameters and the gradients to come, which it may change.
    """
    of = of or parameters()
    optimizer = job.distribute(sgd(of), of.items(), make(of))
    for step in range(STEPS):
        if step not in omit:
            known = gradients(of, job.rank, step)
            before(step, of, known)
            optimizer.zero_grad()
            backward(of, {name: known[name] for name in known if of[name].requires_grad})
            optimizer.synchronize()
            if all(bool(gradient.isfinite().all()) for gradient in grads(of).values()):
                with optimizer.skip_synchronize():
                    optimizer.step()
    return digest(of)


def odd(job: Job) -> bool:
    """Whether this is the rank on which the fault happens."""
    return job.rank == 1


def killed(job: Job) -> bool:
    def kill(step: int, *_: Any) -> None:
        if step == AT:
            begin()
            if odd(job):
                os.kill(os.getpid(), signal.SIGKILL)

    return bool(train(job, before=kill))


def ended(job: Job) -> bool:
    """The others are in Python, between two operations that they post."""

    def keep_busy(_: object) -> None:
        until = time.perf_counter() + BUSY_SECONDS
        while time.perf_counter() < until:
            pass

    def end(step: int, of: Parameters, _: Parameters) -> None:
        if step == AT:
            begin()
            if odd(job):
                raise RuntimeError("something is wrong with the data")
            for parameter in of.values():
                parameter.register_hook(keep_busy)

    several = {f"{name}{number}": p for number in range(40) for name, p in parameters().items()}
    return bool(train(job, of=several, before=end))


def stopped(job: Job) -> bool:
    plain = train(job)

    def stop(step: int, *_: Any) -> None:
        if step == AT:
            begin()
            if odd(job):
                subprocess.Popen(["sh", "-c", f"sleep {STOP_SECONDS}; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)

    return train(job, before=stop) == plain


def wrong_options(job: Job) -> bool:
    begin()
    return bool(train(job, lambda of: topk(of, 0.2 if odd(job) else 0.1)))


def wrong_shapes(job: Job) -> bool:
    begin()
    return bool(train(job, of=parameters({"a": (30, 21 if odd(job) else 20), "b": (8, 4)})))


def nan_on_one_rank(job: Job) -> bool:
    plain = train(job, omit={AT})

    def spoil(step: int, _: Parameters, known: Parameters) -> None:
        if step == AT:
            begin()
            if odd(job):
                known["b"].view(-1)[3] = float("nan")

    return train(job, before=spoil) == plain


def train_scaled(job: Job, *, inf: bool) -> tuple[str, float]:
    """Under a GradScaler, with an infinite gradient in one step, or without that step."""
    of = parameters()
    compression = topk(of)
    optimizer = job.distribute(sgd(of), of.items(), compression)
    scaler = torch.amp.GradScaler("cpu", init_scale=_SCALE, growth_interval=1000)
    for step in range(STEPS):
        if step == AT and not inf:
            scaler.update(scaler.get_scale() / 2)
            continue
        known = gradients(of, job.rank, step)
        if step == AT:
            begin()
            if odd(job):
                known["b"].view(-1)[3] = float("inf")
        compression.loss_scale = scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(sum((of[name] * known[name]).sum() for name in of)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    return digest(of), scaler.get_scale()


def inf_step(job: Job) -> bool:
    plain = train_scaled(job, inf=False)
    found = train_scaled(job, inf=True)
    return found == plain and found[1] == _SCALE / 2


class Spoiled(Pending):
    """An answer in which a bit of rank 0's first frame is flipped."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def ready(self) -> bool:
        return self._pending.ready()

    def await_ready(self, meanwhile: Callable[[], None] | None = None) -> None:
        self._pending.await_ready(meanwhile)

    def wait(self) -> Any:
        first, *others = self._pending.wait()
        return [flipped(first), *others]


def flipped(frame: torch.Tensor) -> torch.Tensor:
    """With another bit in its payload."""
    frame = frame.clone()
    frame[40] ^= 4
    return frame


def with_spoiled_gathers(job: Job, spoil: Callable[[Any, Any, str, Any], Pending]) -> bool:
    """Train with a transport whose gathers of one step are `spoil`, on the odd rank."""
    transport = type(job.transport())
    gather = transport.allgather

    def begin_to_spoil(step: int, *_: Any) -> None:
        if step == AT:
            begin()
            if odd(job):
                transport.allgather = lambda self, name, parts: spoil(gather, self, name, parts)

    try:
        return bool(train(job, before=begin_to_spoil))
    finally:
        transport.allgather = gather


def corrupt_frame_sent(job: Job) -> bool:
    return with_spoiled_gathers(
        job, lambda gather, self, name, parts: gather(self, name, [flipped(parts[0]), *parts[1:]])
    )


def corrupt_frame_received(job: Job) -> bool:
    return with_spoiled_gathers(job, lambda gather, self, name, parts: Spoiled(gather(self, name, parts)))


def masks_that_differ(job: Job) -> bool:
    of = parameters()
    masks = Masks({"a": torch.arange(600).view(30, 20) % 2 == 0})

    def update(step: int, *_: Any) -> None:
        if step == AT:
            begin()
        if step == (AT if odd(job) else AT + 1):
            masks.update({"a": torch.arange(600).view(30, 20) % 3 == 0})

    return bool(train(job, lambda of: Compression.masked(masks, of.items()), of=of, before=update))


def schedule_that_differs(job: Job) -> bool:
    begin()
    return bool(train(job, lambda of: topk(of, lambda step: 0.2 if odd(job) and step == 5 else 0.1)))


def frozen_at_the_start(job: Job) -> bool:
    of = parameters()
    of["c"].requires_grad_(not odd(job))
    begin()
    return bool(train(job, of=of))


def frozen_later(job: Job) -> bool:
    def freeze(step: int, of: Parameters, _: Parameters) -> None:
        if step == AT:
            begin()
            of["c"].requires_grad_(not odd(job))

    return bool(train(job, before=freeze))


def another_size(job: Job) -> bool:
    """From a checkpoint of three ranks: the sum of their residuals is shared out, and nothing is lost."""
    of = parameters()
    ranks = LocalRanks([topk(of) for _ in range(3)])
    for step in range(3):
        ranks.exchange([gradients(of, rank, step) for rank in range(3)])
    states = [compression.state_dict() for compression in ranks.compressions]
    residuals = {rank: state["residuals"][rank] for rank, state in enumerate(states)}
    begin()
    compression = topk(of, 1.0)  # all goes at once, so that residuals show in the next sum
    compression.load_state_dict(states[0] | {"residuals": residuals})
    optimizer = job.distribute(sgd(of), of.items(), compression, op="sum")
    backward(of, gradients(of, job.rank, 0))
    optimizer.step()
    expected = {
        name: sum(gradients(of, rank, 0)[name] for rank in range(job.size))
        + sum(mine[name].view(p.shape) for mine in residuals.values())
        for name, p in of.items()
    }
    assert_close(grads(of), expected)
    return len(set(job.allgather(digest(grads(of))))) == 1


def disk_full(job: Job, write: Callable[[Path], None]) -> bool:
    """Write until the disk is full, here the limit of a file's length; then every line of the file must be whole."""
    path = Path(sys.argv[4]) / f"lines.{job.rank}.{time.monotonic_ns()}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin()
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        for _ in range(100):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        [json.loads(line) for line in path.read_text().splitlines()]
    return False


def disk_full_at_telemetry(job: Job) -> bool:
    of = parameters()
    compression = topk(of)
    compression.telemetry.watch(records=200)
    train(job, lambda _: compression, of=of)
    return disk_full(job, lambda path: compression.telemetry.to_jsonl(path, append=True))


def disk_full_at_plan_log(job: Job) -> bool:
    from hvd_compress.adaptive import journal

    return disk_full(job, lambda path: journal.append(path, {"step": 1, "layers": [{"name": "a" * 50, "rate": 0.1}]}))


FAULTS = {
    function.__name__: function
    for function in (
        *(killed, ended, stopped, wrong_options, wrong_shapes, nan_on_one_rank, inf_step, corrupt_frame_sent),
        *(corrupt_frame_received, masks_that_differ, schedule_that_differs, frozen_at_the_start, frozen_later),
        *(another_size, disk_full_at_telemetry, disk_full_at_plan_log),
    )
}


def main() -> None:
    backend, fault, times, directory = sys.argv[1:]
    torch.set_num_threads(1)
    job = join(backend)
    train(job)  # what is imported at the first step does not count
    with Path(directory, f"{job.rank}.jsonl").open("w", buffering=1) as file:
        for _ in range(int(times)):
            row: dict[str, Any] = {"exact": False, "error": None}
            try:
                row["exact"] = FAULTS[fault](job)
            except Exception as error:  # all that a program would see of the fault
                if fault in ("killed", "ended", "corrupt_frame_received"):
                    raise
                row["error"] = f"{type(error).__name__}: {error}"
            file.write(json.dumps(row | {"seconds": time.time() - began}) + "\n")


if __name__ == "__main__":
    main()
