"""One rank: prints the digests of training with two compressions and of plain training."""

import torch
from backend import SIZE, digest, own_batches, sgd, small_model, step

from hvd_compress import Compression

assert SIZE == 1


def train(make_optimizer):
    model = small_model()
    optimizer = make_optimizer(model)
    batches = own_batches()
    for _ in range(5):
        step(model, optimizer, batches)
    return digest(model)


plain = train(lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
for make in Compression.terngrad, Compression.topk:
    compressed = train(lambda model, make=make: sgd(model, make(model.named_parameters())))
    print("same" if compressed == plain else "different", flush=True)
