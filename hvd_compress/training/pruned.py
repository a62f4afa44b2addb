"""What pruned training has in common: weights, and gradients, that masks keep at zero while training runs."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle, unserializable_hook

from .masks import Masks


class PrunedTraining:
    """Keeps what `masks` prune of `model` at zero; who derives from this sets the masks.

    weights: the parameters that may be pruned, by name.
    optimizer: of the model, before or after it is wrapped: weights are masked after the step() of any optimizer that
        trains some of them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: Mapping[str, nn.Parameter]) -> None:
        self._model, self._optimizers = model, weakref.WeakSet([optimizer])  # that step, and what they wrap
        self._weights = dict(weights)
        self._masks = Masks()
        self._stepped = True
        self._gradient_hooks: list[RemovableHandle] = []
        self._step_hook = register_optimizer_step_post_hook(_after_step_of(weakref.ref(self)))
        weakref.finalize(self, self._step_hook.remove)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of the model, under the names of the masks."""
        return list(self._model.named_parameters())

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """By parameter name, True where a weight is kept; empty in dense phases."""
        return self._masks.masks

    @property
    def version(self) -> int:
        """Grows by one whenever the masks change."""
        return self._masks.version

    def digest(self) -> str:
        """See `Masks.digest`."""
        return self._masks.digest()

    def apply_masks(self) -> None:
        """Set pruned weights to zero; done after every step of the optimizer, needed after other changes of weights."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self._weights[name].mul_(mask)  # unlike filling, shows what is not finite

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of zeros in each prunable tensor, by parameter name."""
        return {name: 1 - int(torch.count_nonzero(w)) / w.numel() for name, w in self._weights.items()}

    def realised_sparsity(self) -> float:
        """Fraction of zeros among all prunable weights."""
        nonzero = sum(int(torch.count_nonzero(weight)) for weight in self._weights.values())
        return 1 - nonzero / sum(weight.numel() for weight in self._weights.values())

    def _load_masks(self, state: Mapping[str, Any]) -> None:
        """Of `Masks.state_dict`. Raises ValueError when they do not fit the model."""
        masks = state["masks"]
        for name, mask in masks.items():
            if name not in self._weights or mask.shape != self._weights[name].shape:
                raise ValueError(
                    f"the state masks {name!r} of shape {tuple(mask.shape)}, which this model does not have"
                )
        placed = {name: mask.to(self._weights[name].device) for name, mask in masks.items()}
        self._masks.load_state_dict({**state, "masks": placed})
        self._stepped = True
        self._mask_gradients()

    def _prune(self, masks: Mapping[str, Tensor]) -> None:
        """Replace all masks; a weight without one is dense."""
        self._masks.update(masks)
        self._mask_gradients()
        self.apply_masks()

    def remove(self) -> None:
        """Let go of model and optimizer; the weights stay as they are."""
        self._step_hook.remove()
        for hook in self._gradient_hooks:
            hook.remove()

    def _mask_gradients(self) -> None:
        """Before they reach `.grad`, hence before they are exchanged, clipped, or gathered in momenta and residuals."""
        for hook in self._gradient_hooks:
            hook.remove()
        self._gradient_hooks = [
            self._weights[name].register_hook(_gradient_mask(mask))
            for name, mask in self.masks.items()
            if self._weights[name].requires_grad
        ]

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if optimizer not in self._optimizers:
            mine = {id(weight) for weight in self._weights.values()}
            if not any(id(weight) in mine for group in optimizer.param_groups for weight in group["params"]):
                return  # of another model
            self._optimizers.add(optimizer)
        self._stepped = True
        self.apply_masks()

    def _enters(self, unit: int, kind: str, number: int, present: int) -> bool:
        """Whether `unit` is the first of the phase (or turn: `kind`) with this number, after the present one.

        Raises ValueError when one was skipped, RuntimeError when pruned weights have come back to life.
        """
        if number not in (present, present + 1):
            raise ValueError(
                f"{unit} is in {kind} {number}, but the present one is {present}: call begin() for every epoch (or "
                "step) in order, and load_state_dict() first when training resumes"
            )
        self._check_pruned()
        return number != present

    def _check_pruned(self) -> None:
        """Catch weights that something else than an optimizer of torch moves: nothing masks them then."""
        if not self._stepped and any(bool(self._weights[name][~mask].any()) for name, mask in self.masks.items()):
            raise RuntimeError(
                "pruned weights are not zero, and no optimizer of them made a step: call apply_masks() after other "
                "changes of weights, such as averaging, a broadcast, or the step of an optimizer that is no "
                "torch.optim.Optimizer"
            )
        self._stepped = False


def _after_step_of(training: weakref.ref[PrunedTraining]) -> Callable[..., None]:
    """A hook for the steps of all optimizers that keeps nothing alive."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if (found := training()) is not None:
            found._after_step(optimizer)

    return hook


def prunable(model: nn.Module, exclude: Sequence[str], *, ends: bool) -> dict[str, nn.Parameter]:
    """By name; without the first and the last unless `ends`."""
    named = dict(model.named_parameters())
    for pattern in exclude:
        if not fnmatch.filter(named, pattern):
            raise ValueError(f"exclude={pattern!r} matches no parameter; their names are {', '.join(named)}")
    names = [name for name, p in named.items() if p.dim() > 1 and p.requires_grad and p.is_floating_point()]
    names = names if ends else names[1:-1]
    names = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)]
    if not names:
        raise ValueError("no weights to prune: parameters need two dimensions, requires_grad, and a name not excluded")
    return {name: named[name] for name in names}


def _gradient_mask(mask: Tensor) -> Callable[[Tensor], Tensor]:
    @unserializable_hook
    def hook(gradient: Tensor) -> Tensor:
        return gradient if gradient.is_sparse else gradient * mask  # NaN and infinity stay visible, as NaN

    return hook
