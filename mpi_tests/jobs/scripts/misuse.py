"""Uses of Horovod that compression cannot serve, or not in that way; the argument says which."""

import torch
from backend import ARGUMENTS, RANK, hvd, own_batches, sgd, small_model, start, step

from hvd_compress import Compression


def join():
    """Rank 1 has fewer batches."""
    optimizer = sgd(model, Compression.topk(model.named_parameters()))
    for _ in range(2 if RANK == 1 else 4):
        step(model, optimizer, batches)
    hvd.join()


def different_kinds():
    """Of these two, only one takes part in the comparison of options."""
    compression = Compression.topk(model.named_parameters()) if RANK == 1 else Compression.fp16
    step(model, sgd(model, compression), batches)


torch.manual_seed(0)
model = small_model()
batches = own_batches()
start()
uses = {"join": join, "different-kinds": different_kinds}
uses[ARGUMENTS[0]]()
