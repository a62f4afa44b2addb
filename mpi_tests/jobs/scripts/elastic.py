"""Trains under elastic Horovod until told to stop; says at every step what the test compares over ranks and resets.

Arguments: a directory, where the file `stop` ends the training, and the file `die` names a worker that kills itself;
and a method of compression.
"""

import hashlib
import os
import signal
import time
from pathlib import Path

import torch
from backend import ARGUMENTS, digest, hvd, small_model

from hvd_compress import Compression, elastic

directory, method = Path(ARGUMENTS[0]), ARGUMENTS[1]
MOMENTUM = {"topk": 0.0, "dgc": 0.5}[method]  # of the compression, in place of the optimizer's
model = small_model()
if method == "dgc":
    compression = Compression.dgc(model.named_parameters(), density=0.1, momentum=MOMENTUM)
else:
    compression = Compression.topk(model.named_parameters(), density=0.1)
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.0 if MOMENTUM else 0.9),
    named_parameters=model.named_parameters(),
    compression=compression,
)
elastic.register()
state = hvd.elastic.TorchState(model, optimizer, compression=compression, step=0)
gradients = {}
for name, parameter in model.named_parameters():
    parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradient.clone()}))


def residuals():
    return next(iter(compression.state_dict()["residuals"].values()))


def say(what, *more):
    kept = residuals()
    bits = hashlib.sha256(b"".join(kept[name].numpy().tobytes() for name in sorted(kept))).hexdigest()[:16]
    print(what, os.getpid(), hvd.size(), state.step, digest(model), bits if kept else "none", *more, flush=True)


def everything_is_sent_or_kept(before, after):
    """Gradients and residuals of all ranks together: what came in is what went out, whatever the number of ranks.

    With a momentum of the compression, what comes is the gradient and that part of the momentum.
    """
    names = [name for name in after if name in gradients]
    for name in names:
        nothing = torch.zeros_like(after[name])
        old = before.get(name, nothing) + MOMENTUM * before.get(f"{name}/momentum", nothing)
        came = hvd.allreduce(gradients[name].reshape(-1) + old, op=hvd.Sum, name=f"came.{name}")
        kept = hvd.allreduce(after[name], op=hvd.Sum, name=f"kept.{name}")
        sent = model.get_parameter(name).grad.reshape(-1) * hvd.size()
        if not torch.allclose(came, kept + sent, atol=1e-5):
            return False
    return len(names) > 0


@hvd.elastic.run
def train(state):
    say("begin", os.environ["HOROVOD_HOSTNAME"])
    while not stopped():
        batch = torch.randn(8, 32, generator=torch.Generator().manual_seed(1000 * state.step + hvd.rank()))
        optimizer.zero_grad()
        before = residuals()
        model(batch).pow(2).mean().backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        good = everything_is_sent_or_kept(before, residuals())
        state.step += 1
        say("step", "sound" if good else "unsound")
        time.sleep(0.1)
        die_if_told()
        say("commit")
        state.commit()


def die_if_told():
    """Between two exchanges: where a worker dies in one, Gloo aborts another now and then (pair.cc, "enforce fail")."""
    told = directory / "die"
    if told.exists() and told.read_text() == str(os.getpid()):
        time.sleep(1.0)  # until the others have ended theirs
        os.kill(os.getpid(), signal.SIGKILL)


def stopped():
    """Whether rank 0 sees that it is to stop: all ranks stop at the same step."""
    return hvd.broadcast_object((directory / "stop").exists(), root_rank=0, name="stop")


train(state)
say("end")
