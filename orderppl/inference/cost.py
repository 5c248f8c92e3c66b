"""What an update costs, in memory and operations, found by running it on shapes alone: no number is computed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro import validation_enabled
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from orderppl.inference.batches import BatchStream, as_batch
from orderppl.unmasking import Batch

GIB, TERA, BATCHES = 2**30, 1e12, 4
PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum)  # lowered by autocast


@dataclass(frozen=True)
class UpdateCost:
    """Memory of an update, in bytes, and its operations.

    Attributes:
        weights: parameters, trained or not, and buffers.
        optimizer: state that the optimiser keeps.
        peak: most that is held at a time on top of `weights`: activations, gradients, state of the optimiser.
        flops: floating-point operations of matrix products and attention, backward included.
    """

    weights: int
    optimizer: int
    peak: int
    flops: float


def update_cost(
    loss: nn.Module,
    batch: Batch,
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
    *,
    accumulate: int = 1,
    bfloat16: bool = False,
) -> UpdateCost:
    """Find what an update costs, as `train` makes it.

    The update runs on the meta device, with attention in one kernel as on a GPU. Not counted are the working space of
    kernels, what an allocator wastes, and the float32 copy of an autocast weight.

    Args:
        loss: as for `train`; it is left as it is.
        batch: the whole batch.
        optimizer: makes the optimiser.
        accumulate: pieces of the batch.
        bfloat16: whether the forward pass runs under autocast.

    Raises:
        RuntimeError: the loss needs to look at a number.
    """
    shapes = on_shapes(loss)
    _ = batch.prefix  # found while there are numbers
    piece = batch.rows(slice(-(-len(batch) // accumulate))).to("meta")
    opt = optimizer([parameter for parameter in shapes.parameters() if parameter.requires_grad])
    flops = count_flops(lambda: shapes(piece).backward()) * len(batch) / len(piece)
    opt.zero_grad(set_to_none=True)
    with validation_enabled(False), _AsOnAccelerator(bfloat16), _Held() as held:
        for _ in range(2):  # the first one makes the optimiser's state
            for _ in range(min(accumulate, 2)):  # gradients of earlier pieces are held
                shapes(piece).backward()
            opt.step()
            opt.zero_grad(set_to_none=True)
    state = [value for own in opt.state.values() for value in own.values() if isinstance(value, Tensor)]
    stored = {id(tensor): tensor for tensor in (*shapes.parameters(), *shapes.buffers())}
    return UpdateCost(_bytes(stored.values()), _bytes(state), held.peak, flops)


def find_costs(loss: nn.Module, data: Any, settings: Any, tflops: float, processes: int = 1) -> dict[str, float]:
    """What each process needs for the updates of a training; nothing is computed but shapes.

    Args:
        loss: as for `train`; its trainable parameters are those that require a gradient.
        data: training rows.
        settings: `TrainSettings`.
        tflops: 10^12 floating-point operations a second of one process.
        processes: that share a batch.

    Returns:
        Bytes of `weights`, `optimiser`, `average` (a moving one, and what is exchanged), `activations` and all of it as
        `memory`; parameters `trained`; `flops` of an update, over all processes; `hours` of all updates.
    """
    every, rows = as_batch(data), -(-settings.batch_size // processes)
    stream = BatchStream(every, min(settings.batch_size, len(every)), seed=0, group=settings.group)
    widest = every.rows(every.attention_mask.sum(-1).argmax().reshape(1)).trimmed()
    given = None if widest.given is None else widest.given.expand(rows, -1)
    wide = Batch(widest.tokens.expand(rows, -1), widest.attention_mask.expand(rows, -1), given)
    make: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam
    options = {"accumulate": settings.accumulate, "bfloat16": settings.bfloat16}
    cost = update_cost(loss, wide, make, **options)
    drawn = [batch for _, batch in zip(range(BATCHES), stream, strict=False)]
    flops_of = {(wide.tokens.shape[1], wide.prefix): cost.flops / rows}  # of a row
    for batch in drawn:
        if (batch.tokens.shape[1], batch.prefix) not in flops_of:
            found = update_cost(loss, batch, make, **options).flops / len(batch)
            flops_of[batch.tokens.shape[1], batch.prefix] = found
    flops = sum(len(batch) * flops_of[batch.tokens.shape[1], batch.prefix] for batch in drawn) / len(drawn)
    flops *= settings.batch_size / stream.batch_size
    trained = sum(p.numel() for p in loss.parameters() if p.requires_grad)
    average = 4 * trained * ((settings.ema_decay is not None) + (processes > 1))
    return {
        "trained": trained,
        "weights": cost.weights,
        "optimiser": cost.optimizer,
        "average": average,
        "activations": cost.peak - cost.optimizer,
        "memory": cost.weights + average + cost.peak,
        "flops": flops,
        "hours": flops * settings.updates / (tflops * TERA * processes) / 3600,
    }


def count_flops(action: Callable[[], object]) -> int:
    """Floating-point operations of matrix products and attention that an action on the meta device would take."""
    with validation_enabled(False), _AsOnAccelerator(), FlopCounterMode(display=False) as counter:
        action()
    return int(counter.get_total_flops())


def on_shapes(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, made without a copy of its numbers."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for hook in filter(None, (getattr(part, "_hf_hook", None) for part in module.modules())):
        from accelerate.hooks import ModelHook

        memo[id(hook)] = ModelHook()  # one that does nothing, in place of what fetches numbers from elsewhere
    return copy.deepcopy(module, memo)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _AsOnAccelerator(TorchFunctionMode):
    """Attention in one kernel, and products in bfloat16 under autocast, neither of which the meta device knows.

    Nor does it know whether all of a mask is true, which masked models ask: they are told no, and keep the mask.
    """

    def __init__(self, bfloat16: bool = False) -> None:
        super().__init__()
        self.bfloat16 = bfloat16

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is Tensor.all and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.zeros((), dtype=torch.bool)
        if self.bfloat16 and (func in PRODUCTS or func is F.scaled_dot_product_attention):
            args, kwargs = tree_map_only(Tensor, _lowered, (args, kwargs))
        return _fused_attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _lowered(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() and tensor.is_meta else tensor


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    trained = torch.is_grad_enabled() and q.requires_grad
    mixed: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, trained, **options)[0]
    return mixed


class _Held(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in args:  # what was there before, parameters above all, is not counted
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        made = func(*args, **({} if kwargs is None else kwargs))
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if not tensor.is_meta or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size
