"""What the accuracy benchmark trains: tasks, and every method with the hyper-parameters that it requires."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_compress import Compression, GradientCompression
from hvd_compress.activations import CompressedActivations
from hvd_compress.local_steps import Averaging, LocalSteps, Nesterov, Outer, SparseLoCo
from hvd_compress.optim import OneBitAdam
from hvd_compress.schedules import Steps
from hvd_compress.training import ACDC, GaP, NovoGrad, Schedule, predicted_weights, prune_activation_gradients

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))  # after benchmarks, which has a report, too
import digits
import stdlib_text


@dataclass(frozen=True)
class Task:
    """A model and its data; the hyper-parameters are the same for all methods. Score: `better` is +1 or -1."""

    load: Callable[[], Any]
    model: Callable[[], nn.Module]
    score: Callable[[nn.Module, Any], float]
    metric: str
    better: int
    epochs: int
    global_batch: int  # whatever the number of ranks, so that all take as many steps; but at least 1 a rank
    lr: float
    clip: float | None  # limit of the norm of the combined gradient
    places: dict[str, str]  # where activation gradients are pruned
    dgc_clip: float | None  # in place of `clip`: local, of each tensor, before the momentum
    optimizer: str = "sgd"  # with momentum, or "adamw", in one cycle; "adam" and "novograd" at a constant rate

    def epochs_of(self, ranks: int) -> int:
        """As EPOCHS says; half as many for many simulated ranks, which take as long as that number of real ones."""
        epochs = int(os.environ.get("EPOCHS") or self.epochs)
        return epochs if ranks <= 8 else max(epochs // 2, 1)


TASKS = {
    "digits": Task(
        digits.load,
        digits.make_model,
        digits.accuracy,
        "test accuracy, %",
        better=1,
        epochs=20,
        global_batch=64,
        lr=0.05,
        clip=None,
        places={"2": "input", "6": "input", "8": "input"},
        dgc_clip=None,
    ),
    "char_lm": Task(
        lambda: stdlib_text.load(300_000, 50_000),
        stdlib_text.CharLM,
        stdlib_text.nats_per_character,
        "validation, nats/char",
        better=-1,
        epochs=2,
        global_batch=16,
        lr=2.0,
        clip=0.5,
        places={"output": "input"},  # the gradient that enters the LSTM
        dgc_clip=0.2,  # 0.5 / sqrt(7): of seven tensors, to 0.5 together
    ),
    "gru_adam": Task(
        lambda: stdlib_text.load(300_000, 50_000),
        stdlib_text.CharGRU,
        stdlib_text.nats_per_character,
        "validation, nats/char",
        better=-1,
        epochs=4,
        global_batch=64,
        lr=2e-3,
        clip=None,
        places={"output": "input"},
        dgc_clip=None,
        optimizer="adam",
    ),
}
TASKS["gpt_adamw"] = replace(
    TASKS["gru_adam"],
    load=lambda: stdlib_text.load_reference(300_000, 50_000),
    model=stdlib_text.CharGPT,
    lr=3e-3,
    clip=1.0,
    optimizer="adamw",
)
TASKS["gru_novograd"] = replace(TASKS["gru_adam"], lr=0.02, optimizer="novograd")


@dataclass
class Setting:
    """One training: what a method needs to know of it, and what it adds to it."""

    task: Task
    seed: int
    steps: int
    pruned: ACDC | GaP | None = None
    named: list[tuple[str, nn.Parameter]] = field(default_factory=list)

    @property
    def interval(self) -> int:
        """Steps between the decisions of adaptive methods."""
        return max(self.steps // 6, 12)


Make = Callable[[Setting], GradientCompression]

_ADAPTIVE_WINDOW = 10
_BETAS = (0.9, 0.999)
_WEIGHT_DECAY = 0.01  # of AdamW
_WITH_ONEBIT_ADAM = ("onebit_adam", "zero_one_adam")
_OF_ADAM = (*_WITH_ONEBIT_ADAM, "dgc_adam")
_OF_SGD = ("dgc", "acdc", "gap")  # tried with the momentum of SGD alone, or having it themselves
# Percent of the steps. The published schedules are of 100 epochs and more; their phases, of a twentieth and less of so
# short a training, leave the sparse model no time to recover.
_PHASES = Schedule((20, 20, 30, 30))


def _dgc(setting: Setting) -> GradientCompression:
    # Warm-up at each of 1/4, 1/16, 1/64, 1/256 for a twentieth of the training: an epoch of the digits.
    warmup, clip = setting.steps // 20, setting.task.dgc_clip
    return Compression.dgc(setting.named, density=0.001, momentum=0.9, warmup=warmup, clip=clip)


def _dgc_adam(setting: Setting) -> GradientCompression:
    """Everything for a tenth of the training, and 1 % from there on."""
    density = Steps((0, 1.0), (setting.steps // 10, 0.01))
    return Compression.dgc(setting.named, density=density, momentum=_BETAS[0])


def _lgreco(setting: Setting) -> GradientCompression:
    base = Compression.topk(setting.named, density=0.01)
    return Compression.lgreco(base, interval=setting.interval, window=_ADAPTIVE_WINDOW)


def _accordion(setting: Setting) -> GradientCompression:
    base = Compression.powersgd(setting.named, approximation_rank=4)
    return Compression.accordion(base, 4, 1, interval=setting.interval, window=_ADAPTIVE_WINDOW)


def _fractrain(setting: Setting) -> GradientCompression:
    """Decides twenty times, as if these were the epochs."""
    base = Compression.qsgd(setting.named, bits=3, seed=setting.seed)
    return Compression.fractrain(base, (3, 4, 6, 8), interval=max(setting.steps // 20, 2))


METHODS: dict[str, Make] = {
    "none": lambda s: Compression.none(s.named),
    "fp16": lambda s: Compression.fp16(s.named),
    "bf16": lambda s: Compression.bf16(s.named),
    "terngrad": lambda s: Compression.terngrad(s.named, seed=s.seed),
    "qsgd": lambda s: Compression.qsgd(s.named, bits=4, seed=s.seed),
    "qsgd_8_bits": lambda s: Compression.qsgd(s.named, bits=8, seed=s.seed),
    "qsgd_gather": lambda s: Compression.qsgd(s.named, bits=4, seed=s.seed, topology="gather"),
    "bf16_gather": lambda s: Compression.bf16(s.named, topology="gather"),
    "topk_gather": lambda s: Compression.topk(s.named, density=0.01, topology="gather"),
    "qsgd_bucket_128": lambda s: Compression.qsgd(s.named, bits=4, bucket_size=128, seed=s.seed),
    "adacomp": lambda s: Compression.adacomp(s.named),
    "topk": lambda s: Compression.topk(s.named, density=0.01),
    "topk_8_bits": lambda s: Compression.topk(s.named, density=0.01, value_bits=8),
    "topk_4_bits": lambda s: Compression.topk(s.named, density=0.01, value_bits=4),
    "onebit": lambda s: Compression.onebit(s.named),
    "onebit_adam": lambda s: Compression.onebit(s.named, momentum=_BETAS[0], warmup_steps=s.steps // 10),
    "zero_one_adam": lambda s: Compression.onebit(
        s.named, momentum=_BETAS[0], warmup_steps=s.steps // 50, variance_update_scaler=max(s.steps // 100, 1)
    ),
    "powersgd": lambda s: Compression.powersgd(s.named, approximation_rank=4, seed=s.seed),
    "scalecom": lambda s: Compression.scalecom(s.named, density=0.01),
    "scalecom_8_bits": lambda s: Compression.scalecom(s.named, density=0.01, value_bits=8),
    "scalecom_4_bits": lambda s: Compression.scalecom(s.named, density=0.01, value_bits=4),
    "dgc": _dgc,
    "dgc_adam": _dgc_adam,
    "stochastic_pruning": lambda s: Compression.stochastic_pruning(s.named, rate=0.9, seed=s.seed),
    "lgreco": _lgreco,
    "accordion": _accordion,
    "acdc": lambda s: Compression.masked(lambda: s.pruned, s.named),
    "gap": lambda s: Compression.masked(lambda: s.pruned, s.named),
    "fractrain": _fractrain,
    "fractrain_activations": _fractrain,
    "none_delayed": lambda s: Compression.none(s.named, delay=1),
    "qsgd_delayed": lambda s: Compression.qsgd(s.named, bits=4, seed=s.seed, delay=1),
    "topk_delayed": lambda s: Compression.topk(s.named, density=0.01, delay=1),
    "activation_pruning": lambda s: Compression.none(s.named),
    "sparseloco": lambda s: Compression.topk(s.named, density=1 / 64, value_bits=4),
}
for _late in ("none_delayed", "qsgd_delayed", "topk_delayed"):
    METHODS[f"{_late}_predicted"] = METHODS[_late]
METHODS["local_sgd"] = METHODS["diloco"] = METHODS["activations_2_bits"] = METHODS["none"]
METHODS["local_sgd_4_bits"] = METHODS["diloco_4_bits"] = METHODS["qsgd"]
# Each rank makes so many steps of its own; what is exchanged is where they have led.
_EVERY = 30
_OUTER: dict[str, Outer] = {
    "local_sgd": Averaging(),
    "local_sgd_4_bits": Averaging(),
    "diloco": Nesterov(),
    "diloco_4_bits": Nesterov(),
    "sparseloco": SparseLoCo(),
}


def applies(method: str, task: Task, *, simulated: bool) -> bool:
    """Simulated ranks share one model, so that there are no local steps."""
    if method in _OUTER:
        return not simulated
    if method in _OF_SGD:
        return task.optimizer == "sgd"
    return method not in _OF_ADAM or task.optimizer.startswith("adam")


def optimizer_of(method: str, setting: Setting, compression: GradientCompression) -> torch.optim.Optimizer:
    """The task's; DGC has its momentum, and its clipping, in the compressor."""
    parameters, lr = [p for _, p in setting.named], setting.task.lr
    decay = _WEIGHT_DECAY if setting.task.optimizer == "adamw" else 0.0
    if method in _WITH_ONEBIT_ADAM:
        return OneBitAdam(parameters, lr, _BETAS, weight_decay=decay, compression=compression)
    if setting.task.optimizer.startswith("adam"):
        betas = (0.0, _BETAS[1]) if method == "dgc_adam" else _BETAS  # the first moment is the compressor's then
        return torch.optim.AdamW(parameters, lr, betas, weight_decay=decay)  # without decay, it is Adam
    if setting.task.optimizer == "novograd":
        return NovoGrad(parameters, lr)
    return torch.optim.SGD(parameters, lr, momentum=0.0 if method == "dgc" else 0.9)


def local_steps_of(
    method: str, optimizer: torch.optim.Optimizer, compression: GradientCompression
) -> LocalSteps | None:
    every = int(os.environ.get("EVERY") or _EVERY)
    return LocalSteps(optimizer, compression, every=every, outer=_OUTER[method]) if method in _OUTER else None


def weights_of(method: str, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Where forward and backward have their weights."""
    return predicted_weights(optimizer) if method.endswith("_predicted") else nullcontext()


def clip_of(method: str, task: Task) -> float | None:
    return None if method in ("dgc", "dgc_adam") else task.clip


@contextmanager
def technique(
    method: str,
    setting: Setting,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compression: GradientCompression,
    rank: int,
) -> Iterator[None]:
    """What a method changes in training beside the exchange; `optimizer` is the one whose step() is called."""
    pruning: Any = None
    if method == "acdc":
        setting.pruned = ACDC(model, optimizer, schedule=_PHASES.scaled(setting.steps / 100), sparsity=0.9)
    if method == "gap":  # each of two partitions twice, for a seventh of the steps; the rest is all sparse
        setting.pruned = GaP(model, optimizer, units=setting.steps // 7, rounds=2, partitions=2, sparsity=0.9)
    seed = 1000 * setting.seed + rank
    if method == "activations_2_bits":
        pruning = CompressedActivations(model, 2, seed=seed)
    if method == "fractrain_activations":
        pruning = CompressedActivations(model, lambda: max(compression.rates.values()), seed=seed)
    if method == "activation_pruning":
        pruning = prune_activation_gradients(model, 0.9, modules=setting.task.places, seed=seed)
    try:
        yield
    finally:
        if pruning:
            pruning.remove()
        if setting.pruned:
            setting.pruned.remove()


def scores(setting: Setting, model: nn.Module, test: Any) -> dict[str, float]:
    """The metric, and with AC/DC that of its dense twin."""
    found = {"metric": setting.task.score(model.eval(), test)}
    if isinstance(setting.pruned, ACDC):
        model.load_state_dict(setting.pruned.dense_state_dict())
        found["dense_twin_metric"] = setting.task.score(model, test)
    return found
