"""Elastic Horovod: keeps residuals through commit, restore and reset.

from hvd_compress import elastic

elastic.register()
state = hvd.elastic.TorchState(model, optimizer, compression=compression, epoch=0)
"""

from __future__ import annotations

from typing import Any

from .gradient_compression import GradientCompression


def register() -> None:
    """Teach `horovod.torch.elastic.TorchState` what a compression is; call it once, before the state is made."""
    from horovod.torch.elastic import state
    from horovod.torch.functions import broadcast_object

    class CompressionStateHandler(state.StateHandler):
        """Every rank keeps its own residuals; ranks that are gone take theirs with them, new ones start with none."""

        def __init__(self, compression: GradientCompression) -> None:
            super().__init__(compression)
            self._saved = _residuals(compression)

        def save(self) -> None:
            self._saved = _residuals(self.value)

        def restore(self) -> None:
            self.value.detach()
            self.value.memory.load_state_dict(self._saved)

        def sync(self) -> None:
            self.value.rejoin(broadcast_object(self.value.progress, root_rank=0))
            self.save()

    registry = state.get_handler_registry()
    if not any(handled is GradientCompression for handled, _ in registry):
        state.set_handler_registry([*registry, (GradientCompression, CompressionStateHandler)])


def _residuals(compression: GradientCompression) -> dict[str, Any]:
    compression.settle()
    return compression.memory.state_dict()
