"""What a training will need, said before it begins: memory, operations, and time at the throughput of this device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from orderppl.experiments.build import OrderConfig, OrderProblem, Task, autocast, autocast_dtype, build_optimizer
from orderppl.experiments.config import RunConfig
from orderppl.experiments.results import Record, environment
from orderppl.experiments.train_denoiser import Config as TrainDenoiserConfig
from orderppl.inference.cost import UpdateMemory, count_flops, on_shapes, update_flops, update_memory
from orderppl.inference.fit import OrderLoss
from orderppl.inference.processes import Processes
from orderppl.models.denoisers import MaskedDiffusionLoss

BATCHES = 4  # whose operations are counted
ENOUGH = 0.5  # seconds of a forward that shows the throughput of a device
MOST_ROWS = 64  # of such a forward
GIB, TERA = 2**30, 1e12


@dataclass(frozen=True)
class Throughput:
    """How fast matrix products are here.

    Attributes:
        tflops: 10^12 floating-point operations a second, of one process.
        source: where the number is from.
    """

    tflops: float
    source: str


@dataclass(frozen=True)
class Estimate:
    """What a training needs, of each process.

    Attributes:
        name: of the training.
        trained: parameters that are trained.
        parameters: all of them.
        memory: of an update on the widest rows.
        average: bytes of the averaged weights and of the exchange between processes.
        flops: operations of an update of all processes.
        updates: how many there are.
        processes: that share an update.
        accumulate: pieces of each process's share.
    """

    name: str
    trained: int
    parameters: int
    memory: UpdateMemory
    average: int
    flops: float
    updates: int
    processes: int
    accumulate: int

    @property
    def bytes(self) -> int:
        """Most memory held at a time."""
        return self.memory.weights + self.average + self.memory.peak

    def hours(self, tflops: float) -> float:
        """Time of all updates at a throughput of each process."""
        return self.flops * self.updates / (tflops * TERA * self.processes) / 3600


def estimate_denoiser(config: TrainDenoiserConfig, task: Task, denoiser: nn.Module) -> Estimate:
    """What the training of a denoiser needs."""
    optimizer = partial(torch.optim.AdamW, lr=config.fit.lr)
    trained = [parameter.requires_grad for parameter in denoiser.parameters()]
    denoiser.requires_grad_(True)
    try:
        return _estimate("denoiser", MaskedDiffusionLoss(denoiser), task, optimizer, config, config.fit)
    finally:
        for parameter, was in zip(denoiser.parameters(), trained, strict=True):
            parameter.requires_grad_(was)


def estimate_order(name: str, config: OrderConfig, problem: OrderProblem) -> Estimate:
    """What the learning of an order needs; a warm start is not counted."""
    loss = OrderLoss(problem.model, problem.guide, problem.elbo)
    return _estimate(name, loss, problem.task, build_optimizer(config.optimizer), config, config.fit)


def _estimate(
    name: str,
    loss: nn.Module,
    task: Task,
    optimizer: Callable[..., Optimizer],
    config: RunConfig,
    fit: Any,
) -> Estimate:
    processes = Processes.join(config.device).size
    options: dict[str, Any] = {"accumulate": fit.accumulate, "autocast_dtype": autocast_dtype(config)}
    share = -(-fit.batch_size // processes)
    memory = update_memory(loss, _widest(task, share), optimizer, **options)
    stream = task.stream("train", min(fit.batch_size, _rows(task)), seed=config.seed, group=fit.group)
    batches = [next(stream) for _ in range(min(BATCHES, stream.batches_per_epoch))]
    scale = fit.batch_size / stream.batch_size
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    copies = (fit.ema_decay is not None) + (processes > 1)
    return Estimate(
        name=name,
        trained=sum(parameter.numel() for parameter in trained),
        parameters=sum(parameter.numel() for parameter in loss.parameters()),
        memory=memory,
        average=copies * sum(parameter.numel() * parameter.element_size() for parameter in trained),
        flops=scale * update_flops(loss, batches),
        updates=fit.updates,
        processes=processes,
        accumulate=fit.accumulate,
    )


def _rows(task: Task) -> int:
    return len(task.splits["train"]["tokens"])


def _widest(task: Task, rows: int) -> dict[str, Tensor]:
    """So many rows, all as wide as the longest."""
    return {name: tensor[:1].expand(rows, *tensor.shape[1:]) for name, tensor in task.splits["train"].items()}


def measure_throughput(denoiser: nn.Module, task: Task, config: RunConfig) -> Throughput:
    """Time forwards of the denoiser on more and more rows as wide as the longest; the fastest counts."""
    device = torch.device(config.device)
    shapes = on_shapes(denoiser)
    best, count = 0.0, 1
    denoiser.to(device)
    with torch.no_grad(), autocast(config):
        while True:
            mask = torch.ones(count, task.canvas_length, dtype=torch.bool, device=device)
            tokens = torch.zeros(count, task.canvas_length, dtype=torch.int64, device=device)
            flops = count_flops(partial(shapes, tokens.to("meta"), mask.to("meta")))
            denoiser(tokens, mask)  # warm
            _wait(device)
            begin = time.perf_counter()
            denoiser(tokens, mask)
            _wait(device)
            seconds = time.perf_counter() - begin
            best = max(best, flops / seconds / TERA)
            if seconds > ENOUGH or count >= MOST_ROWS:
                break
            count *= 2
    name = environment(config.device)["device_name"]
    return Throughput(best, f"measured, forwards of this denoiser on {count} rows, {name}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(estimates: Sequence[Estimate], speed: Throughput, device: str) -> list[Record]:
    """Print the estimates, and give them as records."""
    table = Table()
    table.add_column("")
    for estimate in estimates:
        table.add_column(estimate.name, justify="right")
    lines: dict[str, Callable[[Estimate], str]] = {
        "parameters trained": lambda e: f"{e.trained / 1e6:,.1f} M",
        "parameters in all": lambda e: f"{e.parameters / 1e6:,.1f} M",
        "weights": lambda e: _gib(e.memory.weights),
        "optimiser": lambda e: _gib(e.memory.optimizer),
        "average, exchange": lambda e: _gib(e.average),
        "activations, gradients": lambda e: _gib(e.memory.peak - e.memory.optimizer),
        "memory at most": lambda e: _gib(e.bytes),
        "pieces of an update": lambda e: f"{e.accumulate}",
        "TFLOP of an update": lambda e: f"{e.flops / TERA:,.3g}",
        "updates": lambda e: f"{e.updates:,}",
        "EFLOP in all": lambda e: f"{e.flops * e.updates / 1e18:,.3g}",
        "hours": lambda e: f"{e.hours(speed.tflops):,.3g}",
    }
    for head, cell in lines.items():
        table.add_row(head, *(cell(estimate) for estimate in estimates))
    processes = estimates[0].processes
    console = Console(soft_wrap=True)
    console.print("Before training: what each process needs", table, sep="\n")
    console.print(
        f"{processes} process{'es' if processes > 1 else ''} at {speed.tflops:,.3g} TFLOP/s ({speed.source})."
    )
    console.print("Not counted: validation, warm starts, and what kernels and the allocator hold on top.")
    room = torch.cuda.get_device_properties(device).total_memory if torch.device(device).type == "cuda" else None
    for estimate in estimates:
        if room is not None and estimate.bytes > room:
            need, have = _gib(estimate.bytes), _gib(room)
            console.print(f"{estimate.name} needs {need}, {device} has {have}: raise accumulate of its fit.")
    records: list[Record] = []
    for estimate in estimates:
        labels: dict[str, object] = {"stage": estimate.name, "processes": estimate.processes}
        labels |= {"accumulate": estimate.accumulate, "tflops": speed.tflops, "throughput": speed.source}
        numbers = {
            "estimated_bytes": estimate.bytes,
            "estimated_flops_per_update": estimate.flops,
            "estimated_hours": estimate.hours(speed.tflops),
        }
        records += [{"metric": name, "value": value, **labels} for name, value in numbers.items()]
    return records


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"
