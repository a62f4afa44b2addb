"""`Compression`: the namespace that a user picks a compressor from, as horovod.torch.Compression."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from . import environment
from .adaptive import Accordion, FracTrain, LGreCo, Options, Planner, Policy, Replay, TimeCost, Timetable, Trials
from .binding import NamedParameters
from .compressors import (
    AdaCompCompressor,
    BF16Compressor,
    Compressor,
    DGCCompressor,
    FP16Compressor,
    MaskedCompressor,
    MaskSource,
    NoneCompressor,
    OneBitCompressor,
    OneOfCompressor,
    PowerSGDCompressor,
    QSGDCompressor,
    ScaleComCompressor,
    StochasticPruningCompressor,
    TernGradCompressor,
    TopKCompressor,
)
from .gradient_compression import GradientCompression, bound_compression
from .launcher import rank_of
from .log import warn_once
from .recommendation import Accuracy, candidates, recommend
from .schedules import ExponentialWarmup, Rate


def _bound(compressor: Compressor, named_parameters: NamedParameters, options: dict[str, Any]) -> GradientCompression:
    # No parameters (None) is not the same as no parameters yet.
    return bound_compression(compressor, () if named_parameters is None else named_parameters, options)


def _adapted(
    base: GradientCompression, policy: Policy, plan: str | Path | None, options: Options
) -> GradientCompression:
    if not isinstance(base, GradientCompression) or not base.bound:
        raise ValueError(f"base must be a compression with its parameters, as Compression.topk(...) gives: {base!r}")
    if environment.is_off() or environment.method():  # its rates are those of another method
        return base
    return base.adapt(Planner(policy, options) if plan is None else Replay(plan, policy))


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
    def recommended(
        named_parameters: NamedParameters,
        optimizer: torch.optim.Optimizer,
        *,
        accuracy: Accuracy = "safe",
        **options: Any,
    ) -> GradientCompression:
        """The method to begin with, for this optimizer; says on rank 0 which, and why. See docs/accuracy.md.

        optimizer: whose gradients they are, as it is before it is distributed.
        accuracy: "safe", where no loss was seen; "aggressive", for fewest bytes at a loss that most trainings can bear.
        """
        chosen = recommend(optimizer, accuracy)
        compression = _bound(chosen.compressor, named_parameters, options)
        if compression.compressor == chosen.compressor and rank_of(os.environ) == 0:
            warn_once(f"Compression.recommended takes {compression!r}: {chosen.why}")
        return compression

    @staticmethod
    def auto(
        named_parameters: NamedParameters,
        *,
        accuracy: Accuracy = "safe",
        optimizer: torch.optim.Optimizer | None = None,
        interval: int = 2000,
        steps: int = 8,
        rounds: int = 2,
        log: str | Path | None = None,
        **options: Any,
    ) -> GradientCompression:
        """What is fastest on these ranks and this network, none included: tried while training goes on, and again after
        `interval` steps. Says on rank 0 what it takes, and by which figures. See docs/predict.md.

        accuracy: "safe": none, bf16 and QSGD of 4 bits are tried, which have lost nothing so far, for an `optimizer`
            of SGD's kind with fewer norms. "aggressive": one bit besides, or for SGD top-k of 1 %.
        steps, rounds: each candidate is tried for so many steps, so many times in turn; the median step counts, on the
            slowest rank. One that is not faster than none by 2 % is not taken.
        log: file that rank 0 appends each decision to, with what it was made from.
        """
        trials = Trials(Timetable(interval, steps, rounds), log=log)
        compression = _bound(OneOfCompressor(candidates(optimizer, accuracy)), named_parameters, options)
        return compression if environment.is_off() or environment.method() else compression.adapt(trials)

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
        named_parameters: NamedParameters, *, bin_size: Rate | None = None, **options: Any
    ) -> GradientCompression:
        """AdaComp: the active elements of each bin, with error feedback (Chen et al., AAAI 2018); it is patented, see
        docs/methods/adacomp.md.

        bin_size: 1 to 16384, or a schedule of it; None for 50 in convolutions and 500 elsewhere.
        """
        return _bound(AdaCompCompressor(bin_size=bin_size), named_parameters, options)

    @staticmethod
    def topk(
        named_parameters: NamedParameters, *, density: Rate = 0.01, value_bits: int = 32, **options: Any
    ) -> GradientCompression:
        """Top-k: exactly the ceil(density * numel) largest entries of each tensor, with error feedback.

        density: in (0, 1], or a schedule of it, such as schedules.ExponentialWarmup.
        value_bits: of an entry's value, 32, 8 or 4. With its position that makes 48 bits, or these 8 or 4 and about
            log2(1 / density) + 2.5; what rounding loses is sent later, by error feedback.
        """
        return _bound(TopKCompressor(density=density, value_bits=value_bits), named_parameters, options)

    @staticmethod
    def qsgd(
        named_parameters: NamedParameters,
        *,
        bits: Rate = 4,
        bucket_size: int = 512,
        norm: str = "max",
        **options: Any,
    ) -> GradientCompression:
        """QSGD: stochastically rounded to `bits` bits, unbiased, no state (Alistarh et al., NeurIPS 2017).

        bits: 1 to 8, or a schedule of it, such as schedules.Steps.evenly((3, 4, 6, 8), steps).
        bucket_size: elements that share a norm, a multiple of 8.
        norm: "max", or "l2" as in the paper.
        """
        return _bound(QSGDCompressor(bits=bits, bucket_size=bucket_size, norm=norm), named_parameters, options)

    @staticmethod
    def onebit(
        named_parameters: NamedParameters,
        *,
        momentum: float = 0.0,
        warmup_steps: int = 0,
        variance_update_scaler: int = 0,
        bucket_size: int = 256,
        **options: Any,
    ) -> GradientCompression:
        """One bit an element, its sign, with error feedback (EF-signSGD, Karimireddy et al., ICML 2019); and the first
        moment of 1-bit Adam, for optim.OneBitAdam (Tang et al., ICML 2021), with 0/1 Adam's rule for the second one
        (Lu et al., ICLR 2023).

        momentum: betas[0] of optim.OneBitAdam, which takes what comes out for its first moment; 0 for gradients, for
            any optimizer.
        warmup_steps: so many gradients travel as they are first; for OneBitAdam 10 to 20 % of the training.
        variance_update_scaler: after the warm-up gradients still travel as they are in some steps, so many in turn,
            then as many in every second step, in every fourth, and so on; OneBitAdam goes on with its second moment
            in these. 0 for none.
        bucket_size: elements that share a mean magnitude, a multiple of 256.
        """
        compressor = OneBitCompressor(momentum, warmup_steps, variance_update_scaler, bucket_size)
        return _bound(compressor, named_parameters, options)

    @staticmethod
    def powersgd(
        named_parameters: NamedParameters, *, approximation_rank: Rate = 4, **options: Any
    ) -> GradientCompression:
        """PowerSGD: low-rank factors, with error feedback and warm start (Vogels et al., NeurIPS 2019).

        approximation_rank: at least 1, or a schedule of it. What it would not halve travels as it is.
        """
        return _bound(PowerSGDCompressor(approximation_rank=approximation_rank), named_parameters, options)

    @staticmethod
    def scalecom(
        named_parameters: NamedParameters,
        *,
        density: Rate = 0.001,
        beta: float = 1.0,
        chunk: int | None = None,
        value_bits: int = 32,
        **options: Any,
    ) -> GradientCompression:
        """ScaleCom: the ranks in turn pick the entries that all send, so that traffic does not grow with their number
        (Chen et al., NeurIPS 2020).

        density: fraction of the entries, in (0, 1], or a schedule of it.
        beta: of the low-pass filter of the residual, in (0, 1]; 1 for none. Below 1 gradients are lost in part.
        chunk: pick the largest of each chunk of so many elements instead, without a sort.
        value_bits: of an entry's value, 32, 8 or 4. With fewer, values are rounded at random (QSGD), and each rank
            adds up a part of them.
        """
        compressor = ScaleComCompressor(density=density, beta=beta, chunk=chunk, value_bits=value_bits)
        return _bound(compressor, named_parameters, options)

    @staticmethod
    def dgc(
        named_parameters: NamedParameters,
        *,
        density: Rate = 0.001,
        momentum: float = 0.9,
        nesterov: bool = False,
        clip: float | None = None,
        weight_decay: float = 0.0,
        value_bits: int = 32,
        warmup: int = 0,
        **options: Any,
    ) -> GradientCompression:
        """Deep Gradient Compression: top-k of what momentum has accumulated (Lin et al., ICLR 2018).

        It applies the momentum *in place of* the optimizer, which must have none; otherwise an error says so on every
        rank, under Horovod at the first gradient.

        density: fraction of the entries, in (0, 1], or a schedule of it.
        momentum, nesterov, weight_decay: as of torch.optim.SGD.
        clip: limit of the norm of each tensor's gradient, before it accumulates; None for none.
        value_bits: of an entry's value, 32, 8 or 4, as of topk.
        warmup: steps, in the paper an epoch, at each of the densities 1/4, 1/16, ... that lead to `density`.
        """
        if warmup:
            if callable(density):
                raise ValueError("warmup= leads to a density that is a number: give one, or the whole schedule")
            density = ExponentialWarmup(interval=warmup, final=density)
        compressor = DGCCompressor(
            density=density,
            momentum=momentum,
            nesterov=nesterov,
            clip=clip,
            weight_decay=weight_decay,
            value_bits=value_bits,
        )
        return _bound(compressor, named_parameters, options)

    @staticmethod
    def masked(
        masks: MaskSource | Callable[[], MaskSource],
        named_parameters: NamedParameters | None = None,
        *,
        dense: GradientCompression | None = None,
        **options: Any,
    ) -> GradientCompression:
        """Only the gradients of kept weights, as they are, while weights are pruned.

        masks: training.ACDC or training.Masks, with the names of `named_parameters`; or a function that returns it, for
            one that is made later: `lambda: acdc`.
        named_parameters: those of the model of an ACDC need not be given.
        dense: how all else travels, and everything while no mask is set: any other compression, but not dgc; its own
            options, such as min_numel, are not used. None for as it is.
        """
        compressor: Compressor = NoneCompressor()
        if dense is not None:
            dense.unregister()
            compressor = dense.compressor
        if named_parameters is None:
            if not (of_model := getattr(masks, "named_parameters", None)):
                raise ValueError(f"{masks!r} does not know its model: give model.named_parameters() after it")
            named_parameters = of_model()
        return _bound(MaskedCompressor(masks=masks, dense=compressor), named_parameters, options)

    @staticmethod
    def stochastic_pruning(
        named_parameters: NamedParameters, *, rate: Rate = 0.9, **options: Any
    ) -> GradientCompression:
        """Small elements become 0 or plus or minus a threshold at random, unbiased (after Ye et al., ECCV 2020).

        rate: fraction of the elements below the threshold, in (0, 1), or a schedule of it.
        """
        return _bound(StochasticPruningCompressor(rate=rate), named_parameters, options)

    @staticmethod
    def lgreco(
        base: GradientCompression,
        *,
        interval: int = 1000,
        warmup_steps: int | None = None,
        window: int = 10,
        alpha: float = 1.0,
        levels: int = 10_000,
        objective: Literal["bytes", "time"] = "bytes",
        reference: Accordion | None = None,
        rates: Sequence[float] | None = None,
        reach: float = 4.0,
        errors: Literal["lasting", "single"] = "lasting",
        errors_of: Literal["all", "rank0"] = "all",
        link: TimeCost | None = None,
        log: str | Path | None = None,
        plan: str | Path | None = None,
    ) -> GradientCompression:
        """L-GreCo: a rate for each layer, such that all together send least at no more error than `base` makes
        (Markov et al., MLSys 2024). Returns `base`, which adapts from now on. See docs/adaptive.md.

        base: Compression.qsgd, topk, powersgd or adacomp; its own rates are the reference.
        interval, warmup_steps: steps between decisions, and before the first; None for `interval`.
        window: of so many steps before a decision the gradients are added up, with their residuals.
        alpha: total error allowed, as a multiple of that of the reference.
        levels: into how many parts that error is cut.
        objective: "bytes", or "time" as the job's network takes it, by latency and bandwidth.
        reference: an adaptive.Accordion whose choice is the reference, instead of the rates of `base`.
        rates, reach: what to choose from: these instead of the compressor's candidates, up to this factor from its own.
        errors: "lasting": what remains unsent after many steps; "single": of one step, as in the authors' code.
        errors_of: "all" ranks, or "rank0" alone, as in the authors' code.
        link: for objective="time" in place of measuring.
        log: file that rank 0 appends each plan to, with what it was made from.
        plan: such a log, whose plans are repeated in place of deciding.

        Raises ValueError for options that cannot work, and for a base that has no rates.
        """
        policy = LGreCo(alpha=alpha, levels=levels, reference=reference)
        options = Options(
            interval=interval,
            warmup_steps=warmup_steps,
            window=window,
            reach=reach,
            rates=None if rates is None else tuple(rates),
            objective=objective,
            errors=errors,
            errors_of=errors_of,
            link=link,
            log=log,
        )
        return _adapted(base, policy, plan, options)

    @staticmethod
    def accordion(
        base: GradientCompression,
        low: float,
        high: float,
        *,
        eta: float = 0.5,
        interval: int = 1000,
        warmup_steps: int | None = None,
        window: int | None = None,
        log: str | Path | None = None,
        plan: str | Path | None = None,
    ) -> GradientCompression:
        """Accordion: low compression for layers whose gradients are changing, high for the others (Agarwal et al.,
        MLSys 2021). Returns `base`, which adapts from now on.

        low, high: rates of low and of high compression, such as densities 0.1 and 0.01.
        eta: relative change of the norm of a layer's accumulated gradient, from one decision to the next, that makes it
            critical. Accumulated is what the ranks receive.
        window: over so many steps before a decision; None for all since the decision before, as in the paper.
        interval, warmup_steps, log, plan: as of `lgreco`.
        """
        options = Options(interval=interval, warmup_steps=warmup_steps, window=1, norm_window=window, log=log)
        return _adapted(base, Accordion(low=low, high=high, eta=eta), plan, options)

    @staticmethod
    def fractrain(
        base: GradientCompression,
        rates: Sequence[float] = (3, 4, 6, 8),
        *,
        interval: int = 1000,
        threshold: float = 0.05,
        decay: float = 0.3,
        window: int = 5,
        log: str | Path | None = None,
        plan: str | Path | None = None,
    ) -> GradientCompression:
        """FracTrain's progressive precision: few bits at first, more when the loss stalls (Fu et al., NeurIPS 2020).
        Returns `base`, which adapts from now on; call its `record_loss(loss)` in every step.

        rates: of all layers, in turn: bits of `qsgd`, or densities, ranks or bin sizes.
        interval: steps over which losses are averaged, on all ranks, before each decision; an epoch in the paper.
        threshold, decay, window: the loss has stalled when those of `window` intervals differ by at most `threshold`,
            which is multiplied by `decay` each time.
        log, plan: as of `lgreco`.
        """
        policy = FracTrain(tuple(map(float, rates)), threshold, decay, window)
        return _adapted(base, policy, plan, Options(interval=interval, window=1, log=log))
