"""Optimizers that take what a compression makes of gradients for what it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .compressors import Compressor, OneBitCompressor
from .gradient_compression import GradientCompression
from .training.by_parameter import ByParameter

_COMPRESSION = "compression"  # in a group: Horovod makes the optimizer anew of its groups


class OneBitAdam(ByParameter):
    """1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888): AdamW whose first moment travels by one bit an element.

    While `compression` warms up, and for parameters that it does not compress, this is torch.optim.AdamW. After that a
    compressed parameter's `grad` is the mean of the ranks' first moments, and its second moment stays what the warm-up
    has made of it; or, with a `variance_update_scaler`, goes on in the steps in which gradients travel as they are, as
    that of 0/1 Adam (Lu et al., ICLR 2023, arXiv 2202.06009). No step of theirs is larger than lr: an element far
    smaller than others of its bucket would else be moved by signs that stand for these. What had no gradient so far,
    such as the embedding of a rare word, has no second moment to divide by, and stays as it is.

    params: as of any optimizer.
    lr, betas, eps, weight_decay: as of torch.optim.AdamW.
    compression: `Compression.onebit(..., momentum=betas[0], warmup_steps=...)`, the one that the gradients travel by;
        None where they travel as they are.

    Differs from the paper in that limit, and in where the momentum runs: there each rank adds its gradient to what came
    out of the last step, here to its own momentum, so that what rounding loses is in its residual alone. Weights decay
    as in AdamW.
    Raises ValueError for options that cannot work.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        compression: GradientCompression | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **{_COMPRESSION: compression})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if problem := _mismatch(self.param_groups[-1]):
            self.param_groups.pop()
            raise ValueError(problem)

    def takes_momentum_from(self, compressor: Compressor) -> bool:
        """Whether what this compressor gives is taken for what it is, in all groups."""
        given = [group[_COMPRESSION] for group in self.param_groups]
        return all(one is not None and one.compressor == compressor for one in given)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        compression = group[_COMPRESSION]
        momentum = compression is not None and compression.gives_momentum(parameter)
        first, second = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg_sq_step"] = torch.tensor(0.0)  # of the last step that changed exp_avg_sq
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        if momentum:
            state["exp_avg"].copy_(gradient)
        else:
            state["exp_avg"].lerp_(gradient, 1 - first)
            state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            state["exp_avg_sq_step"] += 1
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = (state["exp_avg_sq"] / (1 - second ** max(state["exp_avg_sq_step"].item(), 1.0))).sqrt_()
        has_signs = bool(state["exp_avg_sq_step"] < state["step"])  # in the first moment
        if has_signs:
            root.masked_fill_(root == 0, math.inf)
        ratio = (state["exp_avg"] / (1 - first ** state["step"].item())).div_(root.add_(group["eps"]))
        if has_signs:
            ratio.clamp_(-1, 1)
        parameter.add_(ratio, alpha=-float(group["lr"]))

    # A compression is saved by itself.

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        groups = [
            {key: value for key, value in group.items() if key != _COMPRESSION} for group in state["param_groups"]
        ]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        given = [group[_COMPRESSION] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, compression in zip(self.param_groups, given):
            group[_COMPRESSION] = compression


def _mismatch(group: dict[str, Any]) -> str | None:
    """What is wrong with the compression of a group, and the remedy; None if nothing is."""
    compression: GradientCompression | None = group[_COMPRESSION]
    if compression is None:
        return None
    if not isinstance(compression, GradientCompression) or not compression.bound:
        return f"compression must be what Compression.onebit(model.named_parameters(), ...) gives: {compression!r}"
    compressor = compression.compressor
    if compressor.replaces:
        return f"OneBitAdam takes no momentum of {compression!r}: give it Compression.onebit(..., momentum=betas[0])"
    if isinstance(compressor, OneBitCompressor) and compressor.momentum:
        first = group["betas"][0]
        if compressor.momentum != first:
            return f"betas[0] is {first}, and the compression's momentum is {compressor.momentum}: give both the same"
        if not (compressor.warmup_steps or compressor.variance_update_scaler):
            return "without warmup_steps= there is no second moment to divide by: give the compression at least 1"
    known = compression.binding.index_of
    if any(id(parameter) not in known for parameter in group["params"]):
        return "the compression does not know all parameters of the optimizer: make it of model.named_parameters()"
    return None
