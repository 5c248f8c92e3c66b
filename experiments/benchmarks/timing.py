"""What the benchmarks share: peak memory, random rows, records and how they are shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from orderppl import Batch
from orderppl.errors import UserError
from orderppl.evaluation.results import results_table, write_results
from orderppl.evaluation.timing import wait

Records = list[dict[str, object]]


def command(main: Callable[..., Any]) -> None:
    """Run a benchmark by the arguments of the command line, on one thread; bad input is one line."""
    torch.set_num_threads(1)
    try:
        auto_cli(main, as_positional=False, description=(main.__doc__ or "").partition("Args:")[0])
    except UserError as error:
        sys.exit(f"error: {error}")


def peak_bytes(update: Callable[[], object], device: torch.device) -> int:
    """Most memory that one update holds at a time, on top of what is held before it, bytes."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    held = peak = 0
    kineto = profiled.profiler.kineto_results
    events = (event for event in kineto.events() if event.name() == "[memory]")  # every allocation and release
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's profiler says of itself from standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def random_batch(count: int, prompt: int, length: int, vocab_size: int, seed: int) -> Batch:
    """Random tokens: prompts, then responses to reveal, each between half and all of its room; the last id is MASK."""
    generator = torch.Generator().manual_seed(seed)

    def ragged(room: int) -> tuple[Tensor, Tensor]:
        sizes = torch.randint(-(-room // 2), room + 1, (count, 1), generator=generator)
        return torch.randint(vocab_size - 1, (count, room), generator=generator), torch.arange(room) < sizes

    (context, context_mask), (tokens, mask) = ragged(prompt), ragged(length)
    attention = torch.cat([context_mask, mask], 1)
    is_prompt = (torch.arange(prompt + length) < prompt).expand(count, -1)
    batch = Batch(torch.cat([context, tokens], 1), attention, is_prompt & attention)
    assert batch.prefix == prompt  # asked here, before the batch goes to a device
    return batch


def finish(
    out: Path | None, name: str, config: Mapping[str, Any], records: Records, tables: Sequence[Mapping[str, Any]]
) -> None:
    """Print tables and write the records.

    Args:
        out: folder of `results.json`; nothing is written without one.
        name: of the benchmark.
        config: its settings, JSON values.
        records: see `orderppl.evaluation.write_results`.
        tables: one each: `title`, `rows` and `columns` of `results_table`, `metrics`, and further labels it shows only.
    """
    console = Console()
    for table in tables:
        layout = {key: table[key] for key in ("title", "rows", "columns")}
        wanted = {key: value for key, value in table.items() if key not in layout and key != "metrics"}
        shown = [r for r in records if all(r.get(key) == value for key, value in wanted.items())]
        shown = [record for record in shown if record["metric"] in table["metrics"]]
        if shown:
            console.print(results_table(shown, **layout))
    if out is not None:
        console.print(f"{len(records)} records in {write_results(out, name, config, records)}")
