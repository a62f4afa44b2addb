"""Compressed activations: ActNN (Chen et al., ICML 2021, arXiv 2104.14129), by saved-tensor hooks.

ActNN quantises the inputs of convolutions, linear layers and normalisations, without bias; gradients, which are linear
in these, then have the expectation that they had. That holds for every function whose gradient is linear in what it
saves, so that this goes by functions, as GACT does (Liu et al., ICML 2022, arXiv 2206.11357), not by modules.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from .. import kernels
from ..calls import callers
from ..connection import connect
from .forward import Pass, Saved
from .kept import unpack
from .precision import Bits, Precision

_COMPILED = (
    "CompressedActivations cannot see what a model saves that torch.compile compiles. Remedy: compile neither this "
    "model, nor a part of it, nor what calls it; or remove() this first"
)


class CompressedActivations:
    """Keeps what `model` saves for backward in few bits, until `remove()` or the end of its `with` block.

    Memory falls, hence batches may grow. Gradients get noise: unbiased where RULES says linear, small where it says
    nonlinear, none from what it says to be needed for its sign or its shape. Parameters, also in the precision of
    autocast, buffers, float64, tensors of fewer than `min_numel` elements, what functions save that RULES lacks, and
    what is not finite stay as they are. Masks and whole numbers are kept without loss in the bits that they need.

    model: its forward pass is watched, from its call to its return. A loss that is computed outside stays exact.
    bits: 1 to 8 an element, where gradients are linear in what is saved. Of each 256 elements the smallest and the
        largest are kept besides, float32. Or a function, which is asked at each forward pass.
    nonlinear_bits: where they are not, as in the inputs of GELU and of attention. Or a function as well.
    layers: other numbers of bits, for both, by the name of a module or a pattern in the style of fnmatch; 0 keeps what
        the module saves as it is. The first that fits counts.
    seed: of the rounding. Where ranks train together each needs its own, such as hvd.rank(), or their errors agree and
        do not average out.

    Works with autocast, gradient accumulation, DistributedDataParallel around `model`, and `torch.utils.checkpoint`,
    which keeps what it keeps by itself. Raises ValueError for options that cannot work and for a model of which
    torch.compile compiles a part, which chooses by itself what it saves; RuntimeError in the forward pass where it
    compiles what calls the model.
    """

    def __init__(
        self,
        model: nn.Module,
        bits: Bits = 2,
        *,
        nonlinear_bits: Bits = 4,
        layers: Mapping[str, int] | None = None,
        min_numel: int = 1024,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.seed = seed
        self.precision = Precision(model, bits, nonlinear_bits, layers or {}, min_numel)
        if any(map(_is_compiled, model.modules())):
            raise ValueError(_COMPILED)
        self._passes = 0
        self._pass: Pass | None = None  # the last one, or the one under way
        self._depth = 0  # of calls of the model in itself
        self._where = [""]  # the modules whose forward is under way, outermost first
        self._running = ExitStack()
        self._handles = self._watch()

    def __enter__(self) -> CompressedActivations:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Keep tensors as they are, from the next forward pass on."""
        for handle in self._handles:
            handle.remove()

    @property
    def saved(self) -> Saved:
        """What the last forward pass has kept."""
        return self._pass.saved() if self._pass else Saved(0, 0)

    def saved_by_layer(self) -> dict[str, Saved]:
        """The same by the name of the module; "" for `model` itself. What several keep counts with the first."""
        return self._pass.by_layer() if self._pass else {}

    def state_dict(self) -> dict[str, Any]:
        """To resume to the same bits."""
        return {"passes": self._passes, "bits": self.precision.bits, "chosen": dict(self.precision.chosen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._passes, self.precision.chosen = state["passes"], dict(state["chosen"])
        self.precision.bits = state.get("bits", self.precision.bits)

    # Bits for each layer

    def choose_bits(self, loss: Callable[[], Tensor], over: Any = None, *, alone: bool = False) -> dict[str, int]:
        """Give each layer the bits that take the least in all and make no more noise in the gradients than now.

        For what is linear, until `bits` changes. The noise of a layer is measured, with all others exact, as GACT does;
        then the dynamic programme of L-GreCo chooses. It takes as many passes as there are layers, and two, which touch
        neither `grad` nor what watches it; buffers and torch's random numbers are as before when it ends. Layers that
        `layers` names keep what that says.

        Collective, unless alone: every rank measures, and rank 0 chooses for all by the mean.

        loss: makes a forward pass of the model, not of a DistributedDataParallel around it, each time the same, such as
            of the next batch.
        over: what connects the ranks, as of LocalSteps; None for what the script has started.

        Returns the choice. Raises RuntimeError where nothing linear is kept.
        """
        noise, elements = self._measured(loss)
        if alone:
            chosen = self.precision.least(noise, elements)
        else:
            transport = connect(over)
            tables = transport.gather_objects("hvd_compress.activations", noise).wait()
            mean = {layer: sum(table.get(layer, 0.0) for table in tables) / len(tables) for layer in noise}
            mine = self.precision.least(mean, elements) if transport.rank == 0 else None
            chosen = transport.broadcast_object(mine, 0)
            transport.leave()
        self.precision.chosen = chosen
        return dict(chosen)

    def _measured(self, loss: Callable[[], Tensor]) -> tuple[dict[str, float], dict[str, list[int]]]:
        """By layer: the mean square error that it makes in the gradients, and the elements of what it keeps."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]

        def gradients(only: Collection[str] | None) -> list[Tensor]:
            self.precision.only = only
            with torch.random.fork_rng():
                found = torch.autograd.grad(loss(), parameters, allow_unused=True)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            return [gradient for gradient in found if gradient is not None]

        try:
            gradients(None)
            elements = self._pass.elements if self._pass else {}
            exact = gradients(())
            noise = {layer: _square_error(gradients((layer,)), exact) for layer in elements}
        finally:
            self.precision.only = None
        if not noise:
            raise RuntimeError("the forward pass has kept nothing in which gradients are linear: nothing to choose for")
        return noise, elements

    # The forward pass

    def _watch(self) -> list[RemovableHandle]:
        handles = []
        for name, module in self.model.named_modules():
            if module is not self.model:
                handles.append(module.register_forward_pre_hook(self._entering(name)))
                handles.append(module.register_forward_hook(self._leaving, always_call=True))
        handles.append(self.model.register_forward_pre_hook(self._begin, prepend=True))
        handles.append(self.model.register_forward_hook(self._end, always_call=True))
        return handles

    def _begin(self, *_: object) -> None:
        if any(type(caller).__module__.startswith("torch._dynamo") for caller in callers()):
            raise RuntimeError(_COMPILED)
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled():
            return
        self.precision.begin()
        self._passes += 1
        del self._where[1:]
        key = functools.partial(kernels.stream_key, self.seed, self._passes)
        self._pass = Pass(self.model, self.precision, self._where, key)
        self._running.enter_context(saved_tensors_hooks(self._pass.pack, unpack))
        self._running.enter_context(self._pass)

    def _end(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._running.close()
            if self._pass is not None:
                self._pass.over()

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self._where.append(name)

    def _leaving(self, *_: object) -> None:
        if len(self._where) > 1:
            self._where.pop()


def _square_error(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    return sum(float((a - b).to(torch.float64).square().sum()) for a, b in zip(these, those))


def _is_compiled(module: nn.Module) -> bool:
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or type(module).__name__ == "OptimizedModule"  # torch._dynamo takes seconds to import
