"""Rank 1 fails in the way that the argument names; the others go on."""

import atexit
import os
import signal
import sys
import time

atexit.register(print, "all that runs at exit has run", flush=True)  # registered first, it runs last

from backend import ARGUMENTS, RANK, own_batches, sgd, small_model, start, step  # noqa: E402

from hvd_compress import Compression  # noqa: E402

(how,) = ARGUMENTS
model = small_model()
start()
if how == "option" and RANK == 1:
    Compression.topk(model.named_parameters(), density=2)
optimizer = sgd(model, Compression.topk(model.named_parameters()))
batches = own_batches()


def kill_in_backward(gradient):
    os.kill(os.getpid(), signal.SIGKILL)


for number in range(1000):
    if RANK == 1 and number == 3:
        if how == "exception":
            raise RuntimeError("something is wrong with the data")
        if how == "exit":
            sys.exit(3)
        if how == "kill-in-backward":
            model[0].weight.register_hook(kill_in_backward)
        if how == "kill-while-others-wait":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "return":
            break
    step(model, optimizer, batches)
