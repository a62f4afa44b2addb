"""Every method of `Compression`, made for parameters of any names: for what must be true of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_compress import Compression, GradientCompression
from hvd_compress.training import Masks

Named = Iterable[tuple[str, Tensor]]
Make = Callable[..., GradientCompression]

PUBLIC = {name for name in vars(Compression) if not name.startswith("_")} - {"recommended", "auto"}  # which take others


def masked(named: Named, *, set_masks: bool = True, **options: Any) -> GradientCompression:
    """Every second weight of all matrices is kept; without `set_masks`, all travels by top-k."""
    pairs = list(named)
    kept = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in pairs if p.dim() > 1}
    masks = Masks(kept if set_masks else None)
    return Compression.masked(masks, pairs, dense=Compression.topk(pairs, density=0.05), **options)


def lgreco(named: Named, *, interval: int = 4, window: int = 2, **options: Any) -> GradientCompression:
    return Compression.lgreco(Compression.topk(named, density=0.05, **options), interval=interval, window=window)


def accordion(named: Named, *, interval: int = 4, **options: Any) -> GradientCompression:
    return Compression.accordion(Compression.powersgd(named, **options), 4, 1, interval=interval)


def fractrain(named: Named, *, interval: int = 4, **options: Any) -> GradientCompression:
    compression = Compression.fractrain(Compression.qsgd(named, **options), interval=interval, window=2)
    return _told(compression)


def _told(compression: GradientCompression) -> GradientCompression:
    """Of a loss before each gradient, in place of the script."""
    submit = compression.submit

    def submit_and_tell(*arguments: Any, **options: Any) -> Any:
        compression.record_loss(1.0)
        return submit(*arguments, **options)

    compression.submit = submit_and_tell  # type: ignore[method-assign]
    return compression


METHODS: dict[str, Make] = {
    "none": lambda named, **options: Compression.none(named, **options),
    "fp16": lambda named, **options: Compression.fp16(named, **options),
    "bf16": lambda named, **options: Compression.bf16(named, **options),
    "terngrad": Compression.terngrad,
    "adacomp": lambda named, **options: Compression.adacomp(named, bin_size=50, **options),
    "topk": lambda named, **options: Compression.topk(named, density=0.05, **options),
    "qsgd": Compression.qsgd,
    "onebit": Compression.onebit,
    "powersgd": lambda named, **options: Compression.powersgd(named, approximation_rank=2, **options),
    "scalecom": lambda named, **options: Compression.scalecom(named, density=0.05, **options),
    "dgc": lambda named, **options: Compression.dgc(named, density=0.05, momentum=0.5, **options),
    "masked": masked,
    "stochastic_pruning": lambda named, **options: Compression.stochastic_pruning(named, rate=0.8, **options),
    "lgreco": lgreco,
    "accordion": accordion,
    "fractrain": fractrain,
}
VARIANTS: dict[str, Make] = METHODS | {
    "terngrad of its own scaler": lambda named, **o: Compression.terngrad(named, share_scaler=False, **o),
    "topk one step late": lambda named, **o: Compression.topk(named, density=0.05, delay=1, **o),
    "qsgd of 8 bits": lambda named, **o: Compression.qsgd(named, bits=8, **o),
    "scalecom by chunks": lambda named, **o: Compression.scalecom(named, chunk=25, **o),
    "scalecom with a filter": lambda named, **o: Compression.scalecom(named, density=0.05, beta=0.5, **o),
    "scalecom of 4 bits": lambda named, **o: Compression.scalecom(named, density=0.05, value_bits=4, **o),
    "dgc of Nesterov": lambda named, **o: Compression.dgc(named, density=0.05, nesterov=True, **o),
    "dgc without momentum": lambda named, **o: Compression.dgc(named, density=0.05, momentum=0.0, **o),
    "onebit with momentum": lambda named, **o: Compression.onebit(named, momentum=0.9, **o),
    "topk of 4 bits": lambda named, **o: Compression.topk(named, density=0.05, value_bits=4, **o),
    "dgc of 8 bits": lambda named, **o: Compression.dgc(named, density=0.05, value_bits=8, **o),
    "topk of everything": lambda named, **o: Compression.topk(named, density=1.0, **o),
    "masked before its masks": lambda named, **o: masked(named, set_masks=False, **o),
}
