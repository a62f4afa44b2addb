"""Compressed gradients for DistributedDataParallel, over torch.distributed alone: a communication hook.

    model = DistributedDataParallel(net)
    compression = Compression.topk(net.named_parameters(), density=0.01)
    model.register_comm_hook(compression, ddp.hook)

Annotations are not postponed here: DDP looks at those of a hook, and takes no strings for types.
"""

import functools
import io
import weakref
from typing import Optional

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import fingerprint
from .bucket_exchange import BucketExchange
from .gradient_compression import GradientCompression, say_single_rank
from .ordered_engine import OrderedEngine
from .transports.torch_distributed import TorchTransport

_BUCKET_BYTES = 25 << 20  # as DDP's own, which hand in their gradients when they are full
_exchanges: weakref.WeakKeyDictionary[GradientCompression, BucketExchange] = weakref.WeakKeyDictionary()


def hook(compression: GradientCompression, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients over the ranks; give it to `DistributedDataParallel.register_comm_hook`.

    compression: the hook's state, of this model alone, bound to its parameters: `net.named_parameters()`, or
        `model.named_parameters()`. Attached to all ranks at the first call, unless `attach` was called before.

    Gradients are whole when `backward()` returns. It raises, on every rank, MismatchError where the ranks made the
    compression differently, ValueError for a parameter that it is not bound to, RuntimeError after a rank has failed.
    """
    exchange = _exchanges.get(compression) if isinstance(compression, GradientCompression) else None
    if exchange is None or not exchange.is_current():
        exchange = attach(compression)
    return exchange.take(bucket)


def attach(compression: GradientCompression, process_group: Optional[dist.ProcessGroup] = None) -> BucketExchange:
    """Exchange over `process_group`, the one that DistributedDataParallel was given; None for all ranks.

    Collective over its ranks, and to be called before the first backward pass where it is not all ranks. Raises
    MismatchError on every rank where they made the compression differently.
    """
    if not isinstance(compression, GradientCompression):
        raise ValueError(f"the state of this hook must come from hvd_compress.Compression: {compression!r}")
    compression.binding  # noqa: B018  # raises where there is none, before any rank waits
    transport = TorchTransport(process_group)
    if transport.size == 1 and not compression.compressor.replaces:
        say_single_rank(compression.compressor)
    compression.unregister()
    fingerprint.check(transport, "hvd_compress.check", {"0": compression.description()})
    engine = functools.partial(OrderedEngine, threaded=transport.size > 1)
    compression.attach(transport, engine, bucket_bytes=_BUCKET_BYTES)
    _watch_optimizers()
    exchange = _exchanges[compression] = BucketExchange(compression, transport)
    return exchange


class Checkpoint:
    """A compression's state for `torch.distributed.checkpoint`, as one of the objects in what it saves or loads.

    Every rank writes its own residuals, and reads them again: `dcp.save({"compression": Checkpoint(compression)})`.

    saved_by: to load what another number of ranks has saved: every rank reads that of all, and takes its share.
    """

    def __init__(self, compression: GradientCompression, *, saved_by: Optional[int] = None) -> None:
        if saved_by is not None and saved_by < 1:
            raise ValueError(f"saved_by must be a number of ranks: {saved_by}")
        self._compression = compression
        self._saved_by = saved_by

    def state_dict(self) -> dict[str, bytes]:
        """Called before saving, and before loading, for the names of what there is to load."""
        if self._saved_by is not None:
            return {f"rank{rank}": b"" for rank in range(self._saved_by)}
        buffer = io.BytesIO()
        torch.save(self._compression.state_dict(), buffer)
        return {f"rank{dist.get_rank()}": buffer.getvalue()}

    def load_state_dict(self, state_dict: dict[str, bytes]) -> None:
        """Called after loading."""
        states = [torch.load(io.BytesIO(state), weights_only=True) for state in state_dict.values()]
        self._compression.load_state_dict(states if self._saved_by is not None else states[0])


@functools.cache
def _watch_optimizers() -> None:
    """Optimizers do not tell whose gradients they apply, and a hook is not told of them: look at all."""

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for exchange in list(_exchanges.values()):
            exchange.steps.before(optimizer)

    def after(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for exchange in list(_exchanges.values()):
            exchange.steps.after(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
