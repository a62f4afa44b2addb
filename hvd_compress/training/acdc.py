"""AC/DC: dense and sparse phases of training in turns (Peste et al., NeurIPS 2021, arXiv 2106.12379)."""

from __future__ import annotations

import copy
import fnmatch
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle, unserializable_hook

from .masks import Masks, global_masks, uniform_masks
from .momentum import restart_momentum
from .schedule import Schedule


class ACDC:
    """Train `model` dense and compressed in turns, to a sparse model and its dense twin.

    As a compressed phase begins, the weights of largest magnitude are chosen; until it ends all others are zero, and so
    are their gradients. As a dense phase begins they return, from zero, and `optimizer` restarts its momentum.

    Call `begin` at the start of every epoch (or step, if the schedule counts those), between optimizer steps and, where
    several ranks train, once they all have the same weights: equal weights give equal masks.

    optimizer: of the model, before or after it is wrapped, as by DistributedOptimizer: weights are masked after the
        step() of any optimizer that trains some of them. Where training resumes, give the wrapped one, whose momentum
        may have to restart before its first step.
    sparsity: fraction of the prunable weights that are pruned, in (0, 1): exactly ceil(n * (1 - sparsity)) stay.
        Trained parameters with at least two dimensions are prunable: no biases, no normalisation.
    scope: "global" ranks the weights of all tensors together; "uniform" prunes each tensor alike, but leaves the first
        and the last dense.
    exclude: names or patterns of parameters that stay dense as well, such as "embedding.*".
    min_share: under "global", every tensor keeps at least this part, in [0, 1], of what it would keep if all were
        pruned alike, and at least one weight; 0 for no such floor, as in the paper.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedule: Schedule,
        sparsity: float = 0.9,
        scope: Literal["global", "uniform"] = "global",
        exclude: Sequence[str] = (),
        min_share: float = 0.1,
    ) -> None:
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity must be in (0, 1): {sparsity}")
        if scope not in ("global", "uniform"):
            raise ValueError(f"scope must be 'global' or 'uniform': {scope!r}")
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share must be in [0, 1]: {min_share}")
        self.schedule, self.sparsity, self.scope, self.min_share = schedule, sparsity, scope, min_share
        self.phase = 0
        self._model, self._optimizers = model, weakref.WeakSet([optimizer])  # that step, and what they wrap
        self._weights = _prunable(model, exclude, ends=scope == "global")
        self._masks = Masks()
        self._dense_twin: dict[str, Any] | None = None
        self._stepped = True
        self._gradient_hooks: list[RemovableHandle] = []
        self._step_hook = register_optimizer_step_post_hook(_after_step_of(weakref.ref(self)))
        weakref.finalize(self, self._step_hook.remove)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those of the model, under the names of the masks."""
        return list(self._model.named_parameters())

    @property
    def compressed(self) -> bool:
        return self.phase % 2 == 1

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

    def begin(self, unit: int) -> None:
        """Say that epoch or step number `unit`, from 0, begins; enters its phase unless that is the present one.

        Raises ValueError when a phase was skipped, RuntimeError when pruned weights have come back to life.
        """
        phase = self.schedule.phase_at(unit)
        if phase not in (self.phase, self.phase + 1):
            raise ValueError(
                f"{unit} is in phase {phase}, but the present one is {self.phase}: call begin() for every epoch (or "
                "step) in order, and load_state_dict() first when training resumes"
            )
        self._check_pruned()
        if phase != self.phase:
            self.phase = phase
            self._compress() if self.compressed else self._decompress()

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

    def dense_state_dict(self) -> dict[str, Any]:
        """The model's `state_dict()` as the last dense phase left it, on the CPU: after training, the dense twin."""
        if self._dense_twin is None:
            raise RuntimeError("no dense phase has ended yet: the model itself is the dense one")
        return dict(self._dense_twin)

    def state_dict(self) -> dict[str, Any]:
        """What is needed, beside the state of model and optimizer, to resume anywhere to the same bits."""
        twin = None if self._dense_twin is None else dict(self._dense_twin)
        return {"phase": self.phase, "masks": self._masks.state_dict(), "dense_twin": twin}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError when the masks do not fit the model, or the phase the schedule."""
        masks = state["masks"]["masks"]
        for name, mask in masks.items():
            if name not in self._weights or mask.shape != self._weights[name].shape:
                raise ValueError(
                    f"the state masks {name!r} of shape {tuple(mask.shape)}, which this model does not have"
                )
        if not 0 <= state["phase"] < len(self.schedule.lengths):
            raise ValueError(f"the state is in phase {state['phase']}, the schedule has {len(self.schedule.lengths)}")
        placed = {name: mask.to(self._weights[name].device) for name, mask in masks.items()}
        self._masks.load_state_dict({**state["masks"], "masks": placed})
        self.phase, self._dense_twin, self._stepped = state["phase"], state["dense_twin"], True
        self._mask_gradients()

    def remove(self) -> None:
        """Let go of model and optimizer; the weights stay as they are."""
        self._step_hook.remove()
        for hook in self._gradient_hooks:
            hook.remove()

    def _compress(self) -> None:
        weights = {name: weight.detach() for name, weight in self._weights.items()}
        if self.scope == "uniform":
            masks = uniform_masks(weights, self.sparsity)
        else:
            masks = global_masks(weights, self.sparsity, min_share=self.min_share)
        self._dense_twin = {name: _copied(value) for name, value in self._model.state_dict().items()}
        self._masks.update(masks)
        self._mask_gradients()
        self.apply_masks()

    def _decompress(self) -> None:
        self._masks.update({})
        self._mask_gradients()
        for optimizer in self._optimizers:
            restart_momentum(optimizer)

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

    def _check_pruned(self) -> None:
        """Catch weights that something else than an optimizer of torch moves: nothing masks them then."""
        if not self._stepped and any(bool(self._weights[name][~mask].any()) for name, mask in self.masks.items()):
            raise RuntimeError(
                "pruned weights are not zero, and no optimizer of them made a step: call apply_masks() after other "
                "changes of weights, such as averaging, a broadcast, or the step of an optimizer that is no "
                "torch.optim.Optimizer"
            )
        self._stepped = False


def _after_step_of(acdc: weakref.ref[ACDC]) -> Callable[..., None]:
    """A hook for the steps of all optimizers that keeps nothing alive."""

    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if (found := acdc()) is not None:
            found._after_step(optimizer)

    return hook


def _prunable(model: nn.Module, exclude: Sequence[str], *, ends: bool) -> dict[str, nn.Parameter]:
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


def _copied(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
