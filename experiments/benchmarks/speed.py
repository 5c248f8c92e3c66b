"""Time and memory of an SVI update, beside the same update written by hand in plain torch."""
# ruff: noqa: B008  (what defaults call makes frozen dataclasses)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm
from updates import BY_HAND, LIBRARY, MODES, Axis, Case, Shape, Size, make_updates

from orderppl.evaluation.timing import Rounds, take_turns

from timing import Records, command, finish, peak_bytes, random_batch

BARE = "bare forwards"


def main(
    out: Path | None = None,
    axes: tuple[Axis, ...] = ("steps", "length", "particles", "trainable", "precision", "compiled"),
    steps: tuple[int, ...] = (2, 4, 8, 16, 32),
    lengths: tuple[int, ...] = (16, 32, 64),
    particles: tuple[int, ...] = (2, 4, 8),
    shape: Shape = Shape(),
    small: Size = Size(),
    large: Size = Size(320, 8, 5, 4, 2),
    smdm: Size = Size(512, 10, 8, 2, 2),
    smdm_shape: Shape = Shape(3, 24, 8, 8193),
    rounds: Rounds = Rounds(),
    device: str = "cpu",
) -> None:
    """Time an SVI update of the library beside the same update by hand in plain torch (`handwritten.py`).

    An update is loss, gradient and Adam step on one batch with prompts, by one CPU thread. Library and twin take turns,
    update by update, in one process. `time_ratio` is the median over rounds of library / twin by wall clock, with a 95%
    interval of that median; `cpu_time_ratio` the same of the process's CPU time, which other work on the machine
    disturbs less. `memory_ratio` compares the peak of what one update allocates on top of what was there before. On the
    axis smdm there is no twin: an update takes turns with the bare forwards it needs.
    `--axes '[steps]' --steps '[2, 8]'` takes two minutes, the defaults a quarter of an hour.

    Args:
        out: folder for results.json.
        axes: what is varied.
        steps: step budgets T of the axis steps.
        lengths: response lengths of the axis length.
        particles: orders per sequence of the axis particles.
        shape: everything that is not varied.
        small: the small denoiser, 0.6M parameters.
        large: the large denoiser, 10M parameters.
        smdm: a random SMDM of 50M parameters.
        smdm_shape: what it is measured on.
        rounds: how long library and twin take turns.
        device: of torch.
    """
    config = {key: value if key == "device" else str(value) for key, value in locals().items() if key != "out"}
    base = Case("steps", "stacked", "0.6M", small, shape)
    sizes = (("0.6M", small), ("10M", large))
    both = [replace(base, mode=mode, denoiser=name, size=size) for name, size in sizes for mode in MODES]
    cases = [replace(case, shape=replace(shape, steps=count)) for case in both for count in steps]
    cases += [replace(base, axis="length", shape=replace(shape, length=length)) for length in lengths]
    cases += [replace(base, axis="particles", size=replace(small, particles=count)) for count in particles]
    cases += [replace(case, axis="trainable", trainable=True) for case in both]
    # Slow on CPUs without such instructions, so with the fewest steps.
    cases.append(replace(base, axis="precision", precision="bfloat16", shape=replace(shape, steps=min(steps))))
    cases.append(replace(base, axis="compiled", compiled=True))
    for trainable in (False, True):
        cases += [Case("smdm", mode, "smdm", smdm, smdm_shape, trainable) for mode in ("stacked", "policy")]
    records: Records = []
    with pyro.validation_enabled(False):
        for case in tqdm([case for case in cases if case.axis in axes], dynamic_ncols=True):
            records += [{**record, **case.labels, "device": device} for record in measure(case, rounds, device)]
    rows = ("axis", "mode", "denoiser", "steps", "length", "particles", "trainable")
    ratios = {"metrics": ("time_ratio", "cpu_time_ratio", "memory_ratio"), "columns": ("metric", "of")}
    costs = {"metrics": ("seconds", "peak_megabytes", "denoiser_rows"), "columns": ("metric", "variant")}
    tables = [ratios | {"title": "SVI update / ...", "rows": rows}, costs | {"title": "Costs", "rows": rows}]
    finish(out, "speed", config, records, tables)


def measure(case: Case, rounds: Rounds, device: str) -> Records:
    """All numbers of one case; a compiler that fails leaves one record with the reason."""
    torch.manual_seed(0)
    shape, place = case.shape, torch.device(device)
    batch = random_batch(case.size.batch_size, shape.prompt, shape.length, shape.vocab_size, seed=0).to(device)
    denoiser = case.make_denoiser().to(device)
    network: Any = torch.compile(denoiser) if case.compiled else denoiser
    updates = make_updates(case, network, batch)
    calls: list[tuple[Tensor, Tensor]] = []
    handle = denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    try:
        updates[LIBRARY]()
    except Exception as error:  # what torch.compile raises depends on its backend
        if not case.compiled:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [{"metric": "compile_available", "value": 0, "reason": reason}]
    finally:
        handle.remove()
    other = BARE if case.axis == "smdm" else BY_HAND
    bare: Callable[[], None] = partial(forwards, network, calls)
    variants = {LIBRARY: updates[LIBRARY], other: bare if other == BARE else updates[BY_HAND]}
    for variant in variants.values():
        variant()  # the first time is never measured
    timing = take_turns(variants, rounds, place)
    memory = {name: peak_bytes(variant, place) for name, variant in variants.items()}
    rows = sum(len(state) for state, _ in calls) / case.size.batch_size
    return [
        *timing.ratios(LIBRARY, other),
        *timing.seconds(),
        {"metric": "memory_ratio", "value": memory[LIBRARY] / memory[other], "of": other},
        {"metric": "denoiser_rows", "value": rows, "variant": LIBRARY},
        *({"metric": "peak_megabytes", "value": size / 2**20, "variant": name} for name, size in memory.items()),
    ]


@torch.no_grad()
def forwards(denoiser: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> None:
    """The denoiser calls of an update, and nothing else."""
    for state, attention_mask in calls:
        denoiser(state, attention_mask)


if __name__ == "__main__":
    command(main)
