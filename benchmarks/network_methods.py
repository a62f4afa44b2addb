"""What is trained in the network benchmark, and how its gradients travel: the methods that are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hvd_compress import Compression, GradientCompression
from hvd_compress.commands import methods
from hvd_compress.local_steps import LocalSteps

_VOCABULARY, _WIDTH, _LAYERS, _LENGTH = 6000, 512, 6, 64

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    """10.0 M parameters and little compute: ten layers of 1000 x 1000, and a head of ten classes."""
    layers: list[nn.Module] = []
    for _ in range(10):
        layers += [nn.Linear(1000, 1000), nn.ReLU()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.Linear(1000, 10))


class Transformer(nn.Module):
    """25.1 M parameters: a causal language model of six layers, 512 wide, that knows 6000 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.positions = nn.Parameter(torch.randn(_LENGTH, _WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(_WIDTH, 8, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, _VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, [batch, tokens, length], of what follows each of `tokens`, [batch, length]."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.layers(self.embedding(tokens) + self.positions, mask=mask, is_causal=True)
        return self.head(hidden).transpose(1, 2)


def mlp_batch(generator: torch.Generator) -> Batch:
    inputs = torch.randn(32, 1000, generator=generator)
    return inputs, inputs[:, :10].argmax(1)


def transformer_batch(generator: torch.Generator) -> Batch:
    tokens = torch.randint(_VOCABULARY, (4, _LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Batch]]] = {
    "10M": (mlp, mlp_batch),
    "25M": (Transformer, transformer_batch),
}

ALONE = "bound", "ddp-bound"  # without any communication, the latter inside DistributedDataParallel
PEERS = (
    *ALONE,
    *("horovod-none", "horovod-fp16"),
    *("ddp-none", "ddp-fp16", "ddp-powersgd1", "ddp-powersgd4"),
)
_LGRECO = ("lgreco-bytes", "lgreco-time")
_AUTO = {"auto": "safe", "auto-aggressive": "aggressive"}
_TRIAL_STEPS = 6  # of each candidate, twice
EVERY = 30  # local steps between two exchanges


class Trained:
    """A model, and an optimizer that combines gradients by one method."""

    def __init__(self, method: str, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        self.method = method
        self.plain = make()
        family, _, variant = method.partition("-")
        momentum = 0.0 if (variant if family == "hook" else method).startswith("dgc") else 0.9  # which it has itself
        self.model, self.optimizer = self.plain, torch.optim.SGD(self.plain.parameters(), lr=1e-3, momentum=momentum)
        self.compression: GradientCompression | None = None
        self.local: LocalSteps | None = None
        if family == "ddp":
            self.model = _distributed(self.plain, variant)
        elif family == "hook":
            self.compression = ours(variant)(self.plain.named_parameters())
            self.model = _hooked(self.plain, self.compression)
        elif family == "local":
            import horovod.torch as hvd

            self.compression = ours(variant)(self.plain.named_parameters())
            self.local = LocalSteps(self.optimizer, self.compression, every=EVERY, over=hvd.global_process_set)
        elif method != "bound":
            # Horovod remembers tensors by name: those of several optimizers in one process must not share any.
            named = [(f"{method}.{name}", parameter) for name, parameter in self.plain.named_parameters()]
            self._use_horovod(named, None if family != "horovod" else variant)

    def _use_horovod(self, named: list[tuple[str, nn.Parameter]], horovods: str | None) -> None:
        import horovod.torch as hvd

        compression = self.compression = ours(self.method)(named) if horovods is None else None
        if horovods is not None:
            compression = getattr(hvd.Compression, horovods)
        self.optimizer = hvd.DistributedOptimizer(self.optimizer, named, compression=compression)

    @property
    def preparation(self) -> int:
        """Steps before anything is timed: what is tried must not have other methods in between."""
        candidates = getattr(self.compression and self.compression.compressor, "candidates", ())
        return 2 * _TRIAL_STEPS * len(candidates) + 2 if self.method in _AUTO else 0

    @property
    def period(self) -> int:
        """Steps after which the replicas are equal."""
        return EVERY if self.local else 1

    def step(self, batch: Batch) -> float:
        inputs, wanted = batch
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(inputs), wanted)
        loss.backward()
        self.optimizer.step()
        if self.local:
            self.local.step()
        return float(loss.detach())


def needs_horovod(method: str) -> bool:
    """Whether Horovod exchanges its gradients, or its parameters."""
    return method != "bound" and not method.startswith(("ddp-", "hook-"))


def ours(method: str) -> Callable[[Any], GradientCompression]:
    """NAME, or NAME:OPTION=VALUE:..., of a method of Compression; or lgreco-bytes and lgreco-time, over PowerSGD.

    Raises ValueError for what is none.
    """
    name = method.partition(":")[0]
    if name in _AUTO:
        return functools.partial(_auto, _AUTO[name])
    if name in _LGRECO:
        return functools.partial(_lgreco, name.removeprefix("lgreco-"))
    if name not in methods.NAMES:
        raise ValueError(
            f"no such method: {method} (choose from {', '.join((*PEERS, *methods.NAMES, *_LGRECO, *_AUTO))})"
        )
    return methods.method(method)


def _auto(accuracy: Any, named: Any) -> GradientCompression:
    """Decides once, before anything is measured."""
    sgd = torch.optim.SGD([parameter for _, parameter in named], lr=1e-3)
    return Compression.auto(named, accuracy=accuracy, optimizer=sgd, steps=_TRIAL_STEPS, interval=1 << 30)


def _lgreco(objective: str, named: Any) -> GradientCompression:
    """Decides once, before anything is measured."""
    base = Compression.powersgd(named, approximation_rank=4)
    return Compression.lgreco(base, objective=objective, interval=1 << 30, warmup_steps=4, window=2)


WARM_UP_STEPS = (
    6  # DDP makes its buckets anew after the first, PowerSGD starts at the third, L-GreCo decides at the fifth
)


def _hooked(model: nn.Module, compression: GradientCompression) -> nn.Module:
    from hvd_compress import ddp

    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.register_comm_hook(compression, ddp.hook)
    return wrapped


def _distributed(model: nn.Module, variant: str) -> nn.Module:
    from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

    if variant.startswith("powersgd"):
        # One bucket: with several, this hook crashes on Gloo.
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=4096)
        state = powersgd.PowerSGDState(
            None, matrix_approximation_rank=int(variant.removeprefix("powersgd")), start_powerSGD_iter=2
        )
        wrapped.register_comm_hook(state, powersgd.powerSGD_hook)
        return wrapped
    wrapped = nn.parallel.DistributedDataParallel(model)
    if variant == "bound":
        wrapped.register_comm_hook(None, debugging_hooks.noop_hook)
    if variant == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return wrapped


def check(methods: list[str]) -> None:
    """Raise ValueError unless all are methods."""
    for method in methods:
        if method not in PEERS:
            ours(method.removeprefix("hook-").removeprefix("local-"))
