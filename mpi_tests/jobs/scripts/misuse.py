"""Uses of Horovod that compression cannot serve, or not in that way; the argument says which."""

import torch
from backend import ARGUMENTS, RANK, digest, hvd, own_batches, sgd, small_model, start, step

from hvd_compress import Compression


def join(make):
    """Rank 1 has fewer batches."""
    optimizer = sgd(model, make(model.named_parameters()))
    for _ in range(2 if RANK == 1 else 4):
        step(model, optimizer, batches)
    hvd.join()
    print("joined", flush=True)


def adasum():
    step(model, sgd(model, Compression.topk(model.named_parameters()), op=hvd.Adasum), batches)


def different_kinds():
    """Of these two, only one takes part in the comparison of options."""
    compression = Compression.topk(model.named_parameters()) if RANK == 1 else Compression.fp16
    step(model, sgd(model, compression), batches)


def process_sets():
    """Process sets {0, 1} and {2, 3}, given to only one of the two; then to both."""
    sets = [hvd.add_process_set([0, 1]), hvd.add_process_set([2, 3])]
    mine = sets[RANK // 2]
    for of_compression, of_optimizer in ((mine, None), (None, mine), (mine, mine)):
        model = small_model()
        options = {"process_set": of_optimizer} if of_optimizer else {}
        try:
            optimizer = sgd(model, Compression.topk(model.named_parameters(), process_set=of_compression), **options)
            for _ in range(2):
                step(model, optimizer, batches)
        except (RuntimeError, ValueError) as error:
            print(f"refused: {error}", flush=True)
        else:
            print(f"trained: {digest(model)}", flush=True)
        hvd.barrier()


torch.manual_seed(0)
model = small_model()
batches = own_batches()
start()
uses = {
    "join": lambda: join(Compression.topk),
    "join-uncompressed": lambda: join(Compression.none),
    "adasum": adasum,
    "different-kinds": different_kinds,
    "process-sets": process_sets,
}
uses[ARGUMENTS[0]]()
