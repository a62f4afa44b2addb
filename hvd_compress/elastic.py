"""Elastic Horovod: keeps what a compression knows through commit, restore and reset.

from hvd_compress import elastic

elastic.register()
state = hvd.elastic.TorchState(model, optimizer, compression=compression, epoch=0)

With LocalSteps, it takes the place of its compression: TorchState(model, optimizer, local=local, epoch=0).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .gradient_compression import GradientCompression
from .local_steps import LocalSteps
from .log import log


class Keeper:
    """What a worker has committed of a compression: residuals, step, loss scale, plan of rates, sums for the next one.

    Every worker keeps its own residuals; workers that are gone take theirs with them, new ones start with none.
    """

    def __init__(self, compression: GradientCompression) -> None:
        self.save(compression)

    def save(self, compression: GradientCompression) -> None:
        self._saved = compression.snapshot()

    def restore(self, compression: GradientCompression) -> None:
        compression.detach()
        compression.go_back(self._saved)

    def sync(self, compression: GradientCompression, broadcast: Callable[[Any], Any], size: int) -> None:
        """Go on together with all workers there are now; `broadcast` gives what rank 0 has."""
        compression.rejoin(broadcast(compression.progress))
        self.save(compression)
        replaces = compression.compressor.replaces
        if size == 1 and replaces and os.environ.get("HOROVOD_ELASTIC") != "1":
            log.warning(
                "one worker is left, and Horovod may hand it no gradients to compress: training would go on without "
                "the %s that %r applies. Start the job by horovodrun with --min-np and --host-discovery-script, whose "
                "workers keep it, or with --min-np 2.",
                replaces,
                compression,
            )


class LocalStepsKeeper:
    """What a worker has committed of LocalSteps and of its compression. New workers take over what rank 0 shares."""

    def __init__(self, local: LocalSteps) -> None:
        self.save(local)

    def save(self, local: LocalSteps) -> None:
        self._saved = local.state_dict(), local.compression.snapshot()

    def restore(self, local: LocalSteps) -> None:
        state, snapshot = self._saved
        local.leave()
        local.load_state_dict(state)
        local.compression.go_back(snapshot)

    def sync(self, local: LocalSteps, broadcast: Callable[[Any], Any], size: int) -> None:
        """Go on together with all workers there are now; `broadcast` gives what rank 0 has."""
        local.leave()
        state, local.compression.progress = broadcast((local.state_dict(), local.compression.progress))
        local.load_state_dict(state)
        self.save(local)


def register() -> None:
    """Teach `horovod.torch.elastic.TorchState` what a compression is, and what LocalSteps are; call it once, before the
    state is made."""
    import horovod.torch as hvd
    from horovod.torch.elastic import state
    from horovod.torch.functions import broadcast_object

    def handler(keeper: type[Keeper] | type[LocalStepsKeeper]) -> Any:
        class KeptStateHandler(state.StateHandler):
            def __init__(self, value: Any) -> None:
                super().__init__(value)
                self._keeper = keeper(value)

            def save(self) -> None:
                self._keeper.save(self.value)

            def restore(self) -> None:
                self._keeper.restore(self.value)

            def sync(self) -> None:
                self._keeper.sync(self.value, lambda value: broadcast_object(value, root_rank=0), hvd.size())

        return KeptStateHandler

    registry = state.get_handler_registry()
    known = [handled for handled, _ in registry]
    keepers = {GradientCompression: Keeper, LocalSteps: LocalStepsKeeper}
    new = [(kept, handler(keeper)) for kept, keeper in keepers.items() if kept not in known]
    state.set_handler_registry([*registry, *new])
