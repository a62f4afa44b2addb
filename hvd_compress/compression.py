"""`Compression`: the namespace that a user picks a compressor from, as horovod.torch.Compression."""

from __future__ import annotations

from typing import Any

from .binding import NamedParameters
from .compressors import (
    AdaCompCompressor,
    BF16Compressor,
    Compressor,
    FP16Compressor,
    NoneCompressor,
    QSGDCompressor,
    TernGradCompressor,
    TopKCompressor,
)
from .gradient_compression import GradientCompression


def _bound(compressor: Compressor, named_parameters: NamedParameters, options: dict[str, Any]) -> GradientCompression:
    # No parameters (None) is not the same as no parameters yet.
    return GradientCompression(compressor, () if named_parameters is None else named_parameters, **options)


class _Unbound:
    """An attribute that is a new unbound compression each time it is read, since it binds to what it is passed to."""

    def __get__(self, instance: object, owner: type) -> GradientCompression:
        return GradientCompression(BF16Compressor())


class Compression:
    """How gradients travel. `none`, `fp16` and `bf16` are passed as they are, or called with the named parameters; the
    others are called with them.

    Options of all: see GradientCompression.
    """

    none = GradientCompression(NoneCompressor())
    """Gradients as they are."""

    fp16 = GradientCompression(FP16Compressor())
    """Cast to float16 and added in it, as Horovod's."""

    bf16 = _Unbound()
    """Cast to bfloat16, added in float32; on the CPU too, where Horovod itself has no bfloat16."""

    @staticmethod
    def terngrad(
        named_parameters: NamedParameters,
        *,
        clip_sigma: float | None = 2.5,
        share_scaler: bool = True,
        **options: Any,
    ) -> GradientCompression:
        """TernGrad: {-1, 0, 1} times a scaler, 2 bits an element, unbiased (Wen et al., NeurIPS 2017).

        clip_sigma: clip to so many standard deviations first; None for no clipping.
        share_scaler: one scaler for all ranks, at the price of one more small round.
        """
        compressor = TernGradCompressor(clip_sigma=clip_sigma, share_scaler=share_scaler)
        return _bound(compressor, named_parameters, options)

    @staticmethod
    def adacomp(
        named_parameters: NamedParameters, *, bin_size: int | None = None, **options: Any
    ) -> GradientCompression:
        """AdaComp: the active elements of each bin, with error feedback (Chen et al., AAAI 2018). See docs/adacomp.md.

        bin_size: None for 50 in convolutions and 500 elsewhere.
        """
        return _bound(AdaCompCompressor(bin_size=bin_size), named_parameters, options)

    @staticmethod
    def topk(named_parameters: NamedParameters, *, density: float = 0.01, **options: Any) -> GradientCompression:
        """Top-k: exactly the ceil(density * numel) largest entries of each tensor, with error feedback.

        density: in (0, 1].
        """
        return _bound(TopKCompressor(density=density), named_parameters, options)

    @staticmethod
    def qsgd(
        named_parameters: NamedParameters,
        *,
        bits: int = 4,
        bucket_size: int = 512,
        norm: str = "max",
        **options: Any,
    ) -> GradientCompression:
        """QSGD: stochastically rounded to `bits` bits, 1 to 8, unbiased, no state (Alistarh et al., NeurIPS 2017).

        bucket_size: elements that share a norm, a multiple of 8.
        norm: "max", or "l2" as in the paper.
        """
        return _bound(QSGDCompressor(bits=bits, bucket_size=bucket_size, norm=norm), named_parameters, options)
