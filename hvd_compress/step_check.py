"""What Horovod's ranks compare when the gradients of a step are synchronized, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .binding import Binding
from .calls import callers
from .compressors import Compressor
from .log import warn_once

# torch.amp has it from torch 2.3 on.
_GRAD_SCALERS = getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)
_RECIPE = (
    "Clip, unscale or otherwise change gradients after they are synchronized: optimizer.synchronize(), then "
    "scaler.unscale_(optimizer) and clipping, then `with optimizer.skip_synchronize(): optimizer.step()` or "
    "scaler.step(optimizer)"
)


MORE_PASSES = (
    "Where several backward passes accumulate, give the optimizer backward_passes_per_step=; where checkpoint() runs a "
    "layer twice, use_reentrant=False."
)


def came_too_often(name: str, backward_passes: int) -> RuntimeError:
    """For a gradient that is added to when it is under way already."""
    return RuntimeError(
        f"parameter {name!r} got a gradient more than backward_passes_per_step={backward_passes} times before step() "
        f"or synchronize(), when it was under way already. {MORE_PASSES}"
    )


class GradientChangedError(RuntimeError):
    """Gradients were changed between backward(), which hands them over, and synchronize()."""

    @classmethod
    def of(cls, names: Collection[str]) -> GradientChangedError:
        """For these parameters."""
        return cls(
            f"the gradient of {_some(names)} was changed after backward() had handed it over to be exchanged, and the "
            f"change would be lost. {_RECIPE}."
        )

    @classmethod
    def by_scaler(cls) -> GradientChangedError:
        """For a step that a GradScaler makes by gradients that are not synchronized."""
        return cls(
            "GradScaler.step() has looked for Inf in gradients, and unscaled them, that were not synchronized yet: "
            f"each rank has seen its own alone, and what is exchanged is still scaled. {_RECIPE}."
        )


@dataclass
class Taken:
    """The gradients that were taken in this step, by the index of their parameter, with their version at that time.

    A version counts a tensor's in-place changes. What this package writes into a gradient's memory is not counted.
    """

    gradients: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    late: list[int] = field(default_factory=list)  # those that did not come during a backward pass

    def add(self, index: int, gradient: Tensor) -> None:
        self.gradients[index] = gradient, gradient._version
        if torch._C._current_graph_task_id() == -1:
            self.late.append(index)

    def changed(self) -> list[int]:
        return [index for index, (gradient, version) in self.gradients.items() if gradient._version != version]

    def states(self, binding: Binding, problem: str | None, step: int) -> Mapping[str, str]:
        """In words: of every parameter whether it is trained, and what became of its gradient."""
        changed = set(self.changed())
        said = {"the number of the step": str(step)}
        for slot, parameter in zip(binding.slots, binding.parameters):
            said[f"parameter {slot.name!r}"] = "trained" if parameter.requires_grad else "frozen"
        for slot, parameter in zip(binding.slots, binding.parameters):
            sparse = parameter.grad is not None and parameter.grad.is_sparse
            state = "sparse" if sparse else "dense" if slot.parameter.index in self.gradients else "not there"
            said[f"the gradient of {slot.name!r}"] = (
                "changed after backward()" if slot.parameter.index in changed else state
            )
        return {**said, "the optimizer": problem or "all right"}


def called_by_grad_scaler() -> bool:
    """Whether a GradScaler's method is among the calls under way."""
    return any(isinstance(caller, _GRAD_SCALERS) for caller in callers())


def problem_of(optimizer: torch.optim.Optimizer | None, compressor: Compressor, binding: Binding) -> str | None:
    """What is wrong with exchanging the gradients of this optimizer so, with the remedy; None if nothing is."""
    if optimizer is None:
        return None
    known = binding.index_of
    reduced = getattr(optimizer, "_requires_update", None)  # Horovod's: the parameters that it watches
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            if id(parameter) not in known:
                return (
                    f"the optimizer has a parameter of shape {tuple(parameter.shape)} that this compression does not "
                    "know: it was added or replaced after the optimizer was wrapped, and Horovod does not reduce its "
                    "gradient. Wrap the optimizer anew, with a compression of all parameters"
                )
            if reduced is not None and parameter not in reduced:
                return (
                    f"the parameter {binding.slots[known[id(parameter)]].name!r} is trained, but was added to the "
                    "optimizer or unfrozen after it was wrapped: Horovod does not reduce its gradient. Wrap the "
                    "optimizer anew"
                )
    return compressor.conflict(optimizer)


def advise(optimizer: torch.optim.Optimizer, compressor: Compressor, rank: int) -> None:
    """Say on rank 0, once, where a method is known to learn more slowly with such an optimizer, and the remedy."""
    if rank == 0 and compressor.slow_with_adam and is_of_adam(optimizer):
        warn_once(
            f"{compressor} with {type(optimizer).__name__}: optimizers like Adam divide by a second moment that has "
            "seen little but what was sent, and learn more slowly, at least in the first thousands of steps. Remedy: "
            "Compression.onebit with hvd_compress.optim.OneBitAdam, Compression.qsgd, or SGD with momentum"
        )


def is_of_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it divides by a second moment, as Adam and NovoGrad do."""
    return any("betas" in group for group in optimizer.param_groups)


def _some(names: Collection[str]) -> str:
    few = [repr(name) for name in list(names)[:3]]
    return ", ".join(few) + (f" and {len(names) - 3} more parameters" if len(names) > 3 else "")
