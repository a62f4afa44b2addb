"""Rank 1 is started differently, in the way that the argument names; says what it led to.

A single way is not caught: the job must end by itself. No argument stands for all of them.
"""

import torch
from backend import ARGUMENTS, RANK, distribute, own_batches, start, step

import hvd_compress.gradient_compression
from hvd_compress import Compression, MismatchError, __version__

odd = RANK == 1


def topk(model, **options):
    return Compression.topk(model.named_parameters(), **options)


def model_of(first="first", width=64, layers=2, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = [32, width] + [32] * (layers - 1)
    names = [first, "second", "third"]
    modules = [(name, torch.nn.Linear(a, b)) for name, a, b in zip(names, sizes, sizes[1:])]
    model = torch.nn.Sequential()
    for name, module in modules:
        model.add_module(name, module)
    return model.to(dtype)


def of_another_version(model):
    hvd_compress.gradient_compression.__version__ = "99.0" if odd else __version__
    return topk(model)


def after_another(model):
    if odd:
        Compression.adacomp(model.named_parameters())
    return topk(model)


COMPRESSIONS = {
    "density": lambda model: topk(model, density=0.02 if odd else 0.01),
    "bin_size": lambda model: Compression.adacomp(model.named_parameters(), bin_size=100 if odd else 50),
    "seed": lambda model: Compression.terngrad(model.named_parameters(), seed=8 if odd else 7),
    "min_numel": lambda model: topk(model, min_numel=1 if odd else 2),
    "exclude": lambda model: topk(model, exclude="first*" if odd else ()),
    "bucket_bytes": lambda model: topk(model, bucket_bytes=2 if odd else 1),
    "compressor": lambda model: Compression.terngrad(model.named_parameters()) if odd else topk(model),
    "version": of_another_version,
    "parameter order": lambda model: Compression.topk(sorted(model.named_parameters(), reverse=odd)),
}
MODELS = {
    "parameter name": lambda: model_of(first="erste" if odd else "first"),
    "shape": lambda: model_of(width=65 if odd else 64),
    "parameter count": lambda: model_of(layers=3 if odd else 2),
    "dtype": lambda: model_of(dtype=torch.float64 if odd else torch.float32),
}


def train(case):
    hvd_compress.gradient_compression.__version__ = __version__
    model = MODELS.get(case, model_of)()
    compression = (after_another if case == "one more compression" else COMPRESSIONS.get(case, topk))(model)
    named = list(model.named_parameters())
    optimizer = distribute(torch.optim.SGD(model.parameters(), lr=0.1), named, compression)
    step(model, optimizer, own_batches())


start()
if len(ARGUMENTS) == 1:
    train(*ARGUMENTS)
else:
    for case in [*COMPRESSIONS, *MODELS, "one more compression"]:  # that one puts all later ones out of step
        try:
            train(case)
        except MismatchError as error:
            print(f"{case}: {error}", flush=True)
        else:
            print(f"{case}: no error", flush=True)
