"""What a training will need, said before it begins: memory, operations, and time at a throughput."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from orderppl.inference.cost import GIB, TERA, find_costs


def show_costs(loss: nn.Module, data: Any, settings: Any, tflops: float, processes: int = 1) -> None:
    """Print `find_costs`."""
    found = find_costs(loss, data, settings, tflops, processes)
    table = Table(title="Before training: what each process needs", title_justify="left", show_header=False)
    for name, value in (
        ("parameters trained", f"{found['trained'] / 1e6:,.2f} M"),
        ("weights", _gib(found["weights"])),
        ("optimiser", _gib(found["optimiser"])),
        ("average, exchange", _gib(found["average"])),
        ("activations, gradients", _gib(found["activations"])),
        ("memory at most", _gib(found["memory"])),
        ("TFLOP of an update", f"{found['flops'] / TERA:,.3g}"),
        ("updates", f"{settings.updates:,}"),
        (f"hours of {processes} at {tflops:g} TFLOP/s each", f"{found['hours']:,.3g}"),
    ):
        table.add_row(name, value)
    Console().print(table)
    print("Not counted: validation, and what kernels and the allocator hold on top.")


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"
