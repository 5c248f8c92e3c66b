"""How fast an SVI update is, and how much memory it takes, beside the same update written by hand in plain torch.

    orderppl benchmark speed --out runs/benchmark-speed
    orderppl benchmark speed --device cuda --out runs/benchmark-speed-gpu
    orderppl benchmark speed --set axes=trainable  # one comparison of the six
    orderppl benchmark speed --preset smdm         # where an update on a large frozen denoiser spends its time
    orderppl benchmark speed --preset quick        # seconds; the numbers mean little

An update is loss, gradient and Adam step on one batch with prompts. The library and its twin (`handwritten`) take
turns, update by update, in one process. `time_ratio` is the median over rounds of library / twin by wall clock, with a
95% interval of that median (the range of all rounds below 6); `cpu_time_ratio` is the same of the process's CPU time,
which other work on the machine disturbs less. `memory_ratio` compares the peak of what one update allocates on top of
what was there before. On a CPU one thread is used, unless `threads` says otherwise.

The axis `smdm`, of the preset of that name, has no twin: an update takes turns with the bare forwards it needs, on a
random SMDM of 50M parameters. `used_share` is the median of bare / update; the rest is split by a profile of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib
import pyro
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from orderppl.errors import UserError
from orderppl.experiments import handwritten
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.results import Record, results_table, save_figure
from orderppl.experiments.update_parts import PARTS, Clock, gradient_bytes, recorded_calls, saved_bytes
from orderppl.guides import MeanFieldGuide, PolicyGuide, SequentialGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.fit import OrderLoss
from orderppl.models import LearnedPolicy, SequentialUnmaskingModel, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import SmdmConfig, SmdmDenoiser, TransformerDenoiser
from orderppl.models.networks import PolicyNetwork, SequenceEncoder

PRESETS = {"quick": "speed_quick", "smdm": "speed_smdm"}
VARIANTS = ("library", "by hand")  # in this order in ratios
MODES = ("stacked", "sequential", "one_step", "policy")
Axis = Literal["steps", "length", "particles", "trainable", "precision", "compiled", "smdm"]
AXES: tuple[Axis, ...] = get_args(Axis)[:-1]


@dataclass(frozen=True)
class DenoiserSize:
    """A transformer denoiser, and the batch it is measured on."""

    width: int = setting(128, "size of the hidden vectors", at_least=8)
    layers: int = setting(3, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    batch_size: int = setting(8, "sequences B", at_least=1)
    particles: int = setting(4, "orders per sequence K", at_least=1)


def _large() -> DenoiserSize:
    return DenoiserSize(width=320, layers=8, heads=5, batch_size=4, particles=2)


@dataclass(frozen=True)
class SmdmCase:
    """A random SMDM, and what it is measured on."""

    denoiser: SmdmConfig = setting(partial(SmdmConfig, 10, 8, 512, 2048, 8192), "architecture; 50M parameters")
    modes: tuple[Literal["stacked", "sequential", "one_step", "policy"], ...] = setting(
        ("stacked", "policy"), "programs to measure"
    )
    steps: int = setting(3, "step budget T", at_least=2)
    length: int = setting(24, "response positions L", at_least=2)
    prompt: int = setting(8, "prompt tokens", at_least=1)
    batch_size: int = setting(2, "sequences B", at_least=1)
    particles: int = setting(2, "orders per sequence K", at_least=1)


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of benchmark speed."""

    axes: tuple[Axis, ...] = setting(AXES, "what is varied")
    steps: tuple[int, ...] = setting((2, 4, 8, 16, 32), "step budgets T", at_least=1, option="--steps")
    middle: int = setting(8, "step budget of everything that is not measured over T", at_least=2)
    lengths: tuple[int, ...] = setting((16, 32, 64), "response lengths of the growth", at_least=2)
    particles: tuple[int, ...] = setting((2, 4, 8), "particles of the growth", at_least=1)
    length: int = setting(32, "response positions L", at_least=2)
    prompt: int = setting(8, "prompt tokens", at_least=1)
    vocab_size: int = setting(128, "token classes V, MASK included", at_least=4)
    small: DenoiserSize = setting(DenoiserSize, "the small denoiser, 0.6M parameters")
    large: DenoiserSize = setting(_large, "the large denoiser, 10M parameters")
    smdm: SmdmCase = setting(SmdmCase, "the axis smdm")
    rounds: int = setting(15, "most paired updates of a measurement", at_least=1)
    least_rounds: int = setting(3, "fewest paired updates of a measurement", at_least=1)
    seconds: float = setting(5.0, "time after which a measurement takes no further rounds", above=0)
    threads: int = setting(1, "threads of torch on a CPU", at_least=1)
    compile_backend: str = setting("inductor", "of torch.compile")


@dataclass(frozen=True)
class Case:
    """One thing to measure: a pair of programs, a denoiser and sizes."""

    mode: str
    denoiser: str
    size: DenoiserSize
    steps: int
    length: int
    trainable: bool = False
    precision: str = "float32"
    compiled: bool = False
    axis: Axis = "steps"

    @property
    def labels(self) -> dict[str, object]:
        """What identifies the case in a record."""
        return {
            "mode": self.mode,
            "denoiser": self.denoiser,
            "steps": self.steps,
            "length": self.length,
            "batch_size": self.size.batch_size,
            "particles": self.size.particles,
            "trainable": self.trainable,
            "precision": self.precision,
            "compiled": self.compiled,
            "axis": self.axis,
        }


@dataclass
class Timing:
    """Seconds of paired updates, by variant."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]


def run(config: Config, out: Path) -> Iterable[Record]:
    """Time, memory and denoiser rows of all modes; growth; compiled and low-precision denoisers."""
    if "steps" in config.axes and len(set(config.steps)) < 2:
        raise UserError("steps", f"{config.steps} has no growth to measure", "give at least two step budgets")
    records: list[Record] = []
    device = torch.device(config.device)
    cases = plan(config)
    with torch_threads(config.threads), pyro.validation_enabled(False):
        for case in tqdm(cases, desc="benchmark", dynamic_ncols=True):
            records += measure_or_report(config, case, device)
        if "smdm" in config.axes:
            for mode in tqdm(config.smdm.modes, desc="smdm", dynamic_ncols=True):
                records += measure_smdm(config, mode, device)
    records += growth(records)
    records = [{**record, "device": config.device} for record in records]
    show(records)
    if "steps" in config.axes:
        plot(records, out / "speed.png")
    return records


def plan(config: Config) -> list[Case]:
    """Everything that is measured, small cases first."""
    cases = []
    for name, size in (("0.6M", config.small), ("10M", config.large)):
        for mode in MODES:
            cases += [Case(mode, name, size, steps, config.length) for steps in config.steps]
    base = Case("stacked", "0.6M", config.small, config.middle, config.length)
    cases += [replace(base, length=length, axis="length") for length in config.lengths]
    for particles in config.particles:
        cases.append(replace(base, size=replace(config.small, particles=particles), axis="particles"))
    for name, size in (("0.6M", config.small), ("10M", config.large)):
        cases += [
            replace(base, mode=mode, denoiser=name, size=size, trainable=True, axis="trainable") for mode in MODES
        ]
    # Slow on CPUs without such instructions, so with the fewest steps.
    cases.append(replace(base, precision="bfloat16", steps=min(config.steps), axis="precision"))
    cases.append(replace(base, compiled=True, axis="compiled"))
    return [case for case in cases if case.axis in config.axes]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- the update


class KnownLogits(nn.Module):
    """Stands in for a denoiser at no cost: the same logits for every state."""

    def __init__(self, logits: Tensor, mask_index: int) -> None:
        super().__init__()
        self.logits, self.mask_index, self.vocab_size = logits, mask_index, logits.shape[-1]

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Return as many rows as there are states."""
        return self.logits[: len(state)]


def make_batch(config: Config, case: Case, device: torch.device) -> dict[str, Tensor]:
    """Random tokens; responses and prompts between half and all of their room."""
    generator = torch.Generator().manual_seed(config.seed)
    count, classes = case.size.batch_size, config.vocab_size - 1

    def ragged(length: int) -> tuple[Tensor, Tensor]:
        sizes = torch.randint(-(-length // 2), length + 1, (count, 1), generator=generator)
        return torch.randint(classes, (count, length), generator=generator), torch.arange(length) < sizes

    tokens, attention_mask = ragged(case.length)
    context, context_mask = ragged(config.prompt)
    batch = {"tokens": tokens, "attention_mask": attention_mask, "context": context, "context_mask": context_mask}
    return {name: value.to(device) for name, value in batch.items()}


def make_denoiser(config: Config, case: Case, device: torch.device) -> nn.Module:
    """A transformer with random weights."""
    size = case.size
    denoiser = TransformerDenoiser(
        config.vocab_size,
        config.vocab_size - 1,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        max_length=case.length + config.prompt,
    )
    return denoiser.requires_grad_(case.trainable).to(device)


def make_updates(
    config: Config, case: Case, denoiser: Any, batch: dict[str, Tensor], device: torch.device
) -> dict[str, Callable[[], None]]:
    """The update of the library and the one by hand, of the same networks."""
    learner, losses = make_losses(config, case, denoiser, batch, device)
    update = make_update(learner, denoiser, device, case.precision)
    return {name: partial(update, loss) for name, loss in losses.items()}


def make_update(
    learner: nn.Module,
    denoiser: nn.Module,
    device: torch.device,
    precision: str = "float32",
    clock: Clock | None = None,
) -> Callable[[Callable[[], Tensor]], None]:
    """One step on a loss; a clock is told of its parts."""
    parameters = [p for module in (learner, denoiser) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)
    part = nullcontext if clock is None else clock.part

    def update(loss: Callable[[], Tensor]) -> None:
        with part("rest"), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        with part("backward"):
            value.backward()
        with part("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # at the end: what is held between updates is the same for both

    return update


def make_losses(
    config: Config, case: Case, denoiser: Any, batch: dict[str, Tensor], device: torch.device
) -> tuple[nn.Module, dict[str, Callable[[], Tensor]]]:
    """What learns the order, and the loss of the library and the one by hand."""
    steps, particles = case.steps, case.size.particles
    learner: nn.Module
    model: nn.Module
    guide: nn.Module
    if case.mode == "policy":
        learner = LearnedPolicy(PolicyNetwork(config.vocab_size)).to(device)
        model, guide = UnmaskingModel(denoiser, learner, steps), PolicyGuide(learner, denoiser, steps)
        by_hand = partial(handwritten.tied_policy_update, denoiser, learner.logits)
    else:
        learner = SequenceEncoder(config.vocab_size, steps).to(device)
        guide = MeanFieldGuide(learner, steps)
        if case.mode == "sequential":
            model, guide = SequentialUnmaskingModel(denoiser, UniformSteps(), steps), SequentialGuide(guide)
        else:
            model = UnmaskingModel(denoiser, UniformSteps(), steps, one_step=case.mode == "one_step")
        functions = {
            "stacked": handwritten.stacked_update,
            "sequential": handwritten.sequential_update,
            "one_step": handwritten.one_step_update,
        }
        by_hand = partial(functions[case.mode], denoiser, learner)
    library = OrderLoss(model, guide, RevealTraceGraph_ELBO(particles))
    losses: dict[str, Callable[[], Tensor]] = {
        "library": lambda: library(**batch),
        "by hand": lambda: by_hand(**batch, num_steps=steps, num_particles=particles),
    }
    return learner, losses


# -------------------------------------------------------------------------------------------------------- measurements


def measure(config: Config, case: Case, device: torch.device) -> list[Record]:
    """All numbers of one case."""
    torch.manual_seed(config.seed)
    batch = make_batch(config, case, device)
    denoiser = make_denoiser(config, case, device)
    network = denoiser if not case.compiled else compiled(denoiser, config.compile_backend)
    updates = make_updates(config, case, network, batch, device)

    rows = {name: denoiser_rows(network, update) / case.size.batch_size for name, update in updates.items()}  # warm-up
    timing = take_turns(config, updates, device)
    memory = {name: peak_bytes(update, device) for name, update in updates.items()}
    records: list[Record] = [
        ratio("time_ratio", timing.wall, case),
        ratio("cpu_time_ratio", timing.cpu, case),
        {"metric": "memory_ratio", "value": memory["library"] / memory["by hand"], **case.labels},
    ]
    for name in VARIANTS:
        labels = {"variant": name, **case.labels}
        low, high = median_interval(timing.wall[name])
        seconds = statistics.median(timing.wall[name])
        records += [
            {"metric": "seconds_per_update", "value": seconds, "low": low, "high": high, **labels},
            {"metric": "cpu_seconds_per_update", "value": statistics.median(timing.cpu[name]), **labels},
            {"metric": "peak_megabytes", "value": memory[name] / 2**20, **labels},
            {"metric": "denoiser_rows", "value": rows[name], **labels},
        ]
    if not (case.trainable or case.compiled):
        records += host(config, case, batch, timing, device)
    return records


def measure_or_report(config: Config, case: Case, device: torch.device) -> list[Record]:
    """As `measure`; a denoiser that cannot be compiled here leaves one record with the reason."""
    if not case.compiled:
        return measure(config, case, device)
    try:
        records = measure(config, case, device)
    except Exception as error:  # what torch.compile raises depends on its backend
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [{"metric": "compile_available", "value": 0, "reason": reason, **case.labels}]
    return [*records, {"metric": "compile_available", "value": 1, **case.labels}]


def host(config: Config, case: Case, batch: dict[str, Tensor], timing: Timing, device: torch.device) -> list[Record]:
    """What an update takes without its denoiser: seconds, and their share of the update with it."""
    most = case.size.batch_size * case.size.particles * case.steps
    width = case.length + config.prompt
    logits = torch.randn(most, width, config.vocab_size, device=device)
    logits[..., -1] = -torch.inf  # MASK; the denoiser's callers write the same there
    with torch.no_grad():
        stand_in = KnownLogits(logits, config.vocab_size - 1)
    updates = make_updates(config, case, stand_in, batch, device)
    for update in updates.values():
        update()
    bare = take_turns(config, updates, device)
    records: list[Record] = []
    for name in VARIANTS:
        seconds, whole = (statistics.median(taken.wall[name]) for taken in (bare, timing))
        labels = {"variant": name, **case.labels}
        records.append({"metric": "host_seconds", "value": seconds, **labels})
        records.append({"metric": "host_share", "value": seconds / whole, **labels})
    return records


def measure_smdm(config: Config, mode: str, device: torch.device) -> list[Record]:
    """How much of an update on a large denoiser is forwards of it, where the rest goes, and what is kept of them."""
    settings = config.smdm
    size = DenoiserSize(batch_size=settings.batch_size, particles=settings.particles)
    case = Case(mode, "smdm", size, settings.steps, settings.length, axis="smdm")
    sized = replace(config, vocab_size=settings.denoiser.vocab_size + 1, prompt=settings.prompt)
    torch.manual_seed(config.seed)
    batch = make_batch(sized, case, device)
    denoiser = SmdmDenoiser(settings.denoiser).eval().requires_grad_(False).to(device)
    learner, losses = make_losses(sized, case, denoiser, batch, device)
    loss, clock = losses["library"], Clock(device)
    update = partial(make_update(learner, denoiser, device), loss)
    with recorded_calls(denoiser) as calls:
        update()

    @torch.no_grad()
    def bare() -> None:
        for state, attention_mask in calls:
            denoiser(state, attention_mask)

    bare()
    timing = take_turns(config, {"update": update, "bare": bare}, device)
    profiled = partial(make_update(learner, denoiser, device, clock=clock), loss)
    with clock.inside(denoiser, "denoiser"), clock.inside(learner, "network"):
        profiled()  # the optimiser makes its state
        clock.restart()
        for _ in range(config.least_rounds):
            profiled()
    rows = sum(len(state) for state, _ in calls)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    gflop = forward_gflop(settings.denoiser, settings.length + settings.prompt)
    labels = case.labels
    records: list[Record] = [
        {"metric": "parameters", "value": parameters, **labels},
        {"metric": "gflop_per_forward", "value": gflop, **labels},
        {"metric": "denoiser_rows", "value": rows / settings.batch_size, **labels},
        ratio("used_share", timing.wall, case, ("bare", "update")),
        ratio("cpu_used_share", timing.cpu, case, ("bare", "update")),
    ]
    for name, seconds in timing.wall.items():
        middle, (low, high) = statistics.median(seconds), median_interval(seconds)
        records += [
            {"metric": "seconds", "value": middle, "low": low, "high": high, "variant": name, **labels},
            {"metric": "forwards_per_second", "value": rows / middle, "variant": name, **labels},
            {"metric": "gflop_per_second", "value": rows * gflop / middle, "variant": name, **labels},
        ]
    whole = sum(clock.seconds.values())
    for name in PARTS:
        records.append({"metric": "part_share", "value": clock.seconds[name] / whole, "part": name, **labels})
    memory = {"one forward": peak_bytes(bare, device), "frozen": peak_bytes(update, device)}
    saved = {"frozen": saved_bytes(denoiser, loss)}
    gradient = {"frozen": gradient_bytes(denoiser, loss)}
    denoiser.requires_grad_(True)
    trained = partial(make_update(learner, denoiser, device), loss)
    trained()
    memory["trained"], saved["trained"] = peak_bytes(trained, device), saved_bytes(denoiser, loss)
    gradient["trained"] = gradient_bytes(denoiser, loss)
    for metric, found in (("peak_megabytes", memory), ("saved_megabytes", saved), ("gradient_megabytes", gradient)):
        records += [{"metric": metric, "value": b / 2**20, "variant": name, **labels} for name, b in found.items()]
    return records


def forward_gflop(config: SmdmConfig, width: int) -> float:
    """Arithmetic of one forward on one row: two operations per weight and token, and attention; GFLOP."""
    w = config.n_embd
    weights = config.n_layer * (4 * w * w + 3 * w * config.intermediate_size) + config.vocab_size * w
    return (2 * weights * width + config.n_layer * 4 * width * width * w) / 1e9


def compiled(denoiser: nn.Module, backend: str) -> nn.Module:
    """The denoiser through torch.compile, with the attributes that the library reads."""
    network = torch.compile(denoiser, backend=backend)
    assert isinstance(network, nn.Module)
    return network


def denoiser_rows(denoiser: nn.Module, update: Callable[[], None]) -> int:
    """Sequences that pass through the denoiser in one update, softly revealed ones included."""
    rows = []
    handle = denoiser.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    soft_logits: Any = getattr(denoiser, "soft_logits", None)

    def counted(tokens: Tensor, visible: Tensor, attention_mask: Tensor) -> Tensor:
        rows.append(len(tokens))
        logits: Tensor = soft_logits(tokens, visible, attention_mask)
        return logits

    if soft_logits is not None:
        vars(denoiser)["soft_logits"] = counted
    try:
        update()
    finally:
        handle.remove()
        vars(denoiser).pop("soft_logits", None)
    return sum(rows)


def take_turns(config: Config, updates: dict[str, Callable[[], None]], device: torch.device) -> Timing:
    """Time warm variants one after another, round by round, each round in the other order."""
    timing = Timing({name: [] for name in updates}, {name: [] for name in updates})
    begin = time.perf_counter()
    for index in range(config.rounds):
        for name in updates if index % 2 == 0 else reversed(updates):
            wall, cpu = timed(updates[name], device)
            timing.wall[name].append(wall)
            timing.cpu[name].append(cpu)
        if index + 1 >= config.least_rounds and time.perf_counter() - begin > config.seconds:
            break
    return timing


def timed(update: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of one update; waits for the device before and after it only."""
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    update()
    _wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(update: Callable[[], None], device: torch.device) -> int:
    """Most memory that one update holds at a time, on top of what is held before it, bytes."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    held = peak = 0
    kineto = profiled.profiler.kineto_results
    events = (event for event in kineto.events() if event.name() == "[memory]")  # every allocation and release
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def ratio(metric: str, seconds: dict[str, list[float]], case: Case, variants: tuple[str, str] = VARIANTS) -> Record:
    """Median of the paired ratios of two variants."""
    ratios = [first / second for first, second in zip(*(seconds[name] for name in variants), strict=True)]
    low, high = median_interval(ratios)
    return {"metric": metric, "value": statistics.median(ratios), "low": low, "high": high, **case.labels}


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median with this probability, or all values where they are too few."""
    ordered, n, below = sorted(values), len(values), 0.0
    rank = 0
    for below_rank in range(n // 2):
        below += math.comb(n, below_rank) / 2**n  # P(at most this many values below the median)
        if below > (1 - level) / 2:
            break
        rank = below_rank
    return ordered[rank], ordered[n - 1 - rank]


def growth(records: Sequence[Record]) -> list[Record]:
    """Slopes of log seconds and log memory of an update over log T, L and K: 1 is proportional."""
    made: list[Record] = []
    for axis in ("steps", "length", "particles"):
        for metric, name in (("seconds_per_update", "time_slope"), ("peak_megabytes", "memory_slope")):
            points: dict[tuple[object, ...], list[tuple[float, float]]] = {}
            for record in records:
                if record["metric"] == metric and record["axis"] == axis:
                    key = (record["mode"], record["denoiser"], record["variant"])
                    pair = math.log(float(str(record[axis]))), math.log(float(str(record["value"])))
                    points.setdefault(key, []).append(pair)
            for (mode, denoiser, variant), pairs in points.items():
                if len({x for x, _ in pairs}) > 1:
                    slope = statistics.linear_regression(*zip(*pairs, strict=True)).slope
                    labels = {"mode": mode, "denoiser": denoiser, "variant": variant, "axis": axis}
                    made.append({"metric": name, "value": slope, **labels})
    return made


# ------------------------------------------------------------------------------------------------------ table and plot


def show(records: Sequence[Record]) -> None:
    """Print what the targets are about: ratios by mode, denoiser and T, then everything else."""
    console = Console()

    def table(title: str, rows: Sequence[str], columns: Sequence[str], **wanted: Any) -> None:
        chosen = [r for r in records if all(r.get(key) in values for key, values in wanted.items())]
        if chosen:
            console.print(results_table(chosen, rows=rows, columns=columns, title=title))

    ratios = ("time_ratio", "cpu_time_ratio", "memory_ratio")
    by_size = ("mode", "denoiser", "steps")
    table("SVI update / twin by hand", by_size, ("metric",), metric=ratios, axis=("steps",))
    table("Seconds per update, wall clock", by_size, ("variant",), metric=("seconds_per_update",), axis=("steps",))
    table("Share of the update without the denoiser", by_size, ("variant",), metric=("host_share",), axis=("steps",))
    table("Denoiser rows per sequence", by_size, ("variant",), metric=("denoiser_rows",), axis=("steps",))
    other = ("axis", "mode", "denoiser", "length", "particles")
    table("Other settings", other, ("metric",), metric=ratios, axis=AXES[1:])
    smdm = {"rows": ("mode",), "axis": ("smdm",)}
    facts = ("parameters", "gflop_per_forward", "denoiser_rows", "used_share", "cpu_used_share")
    table("A large denoiser: bare forwards / update", columns=("metric",), metric=facts, **smdm)
    rates = ("seconds", "forwards_per_second", "gflop_per_second")
    table("A large denoiser: rates", columns=("metric", "variant"), metric=rates, **smdm)
    table("A large denoiser: where an update spends its time", columns=("part",), metric=("part_share",), **smdm)
    held = ("peak_megabytes", "saved_megabytes", "gradient_megabytes")
    table("A large denoiser: memory on top of the weights", columns=("metric", "variant"), metric=held, **smdm)
    slopes = ("time_slope", "memory_slope")
    table("Growth: log-log slopes", ("mode", "denoiser", "axis"), ("metric", "variant"), metric=slopes)
    for record in records:
        if record["metric"] == "compile_available" and not record["value"]:
            console.print(f"torch.compile is not available: {record['reason']}", markup=False)


def plot(records: Sequence[Record], path: Path) -> None:
    """Draw time and memory ratios, and seconds per update, over T."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colours = dict(zip(MODES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    metrics = ("time_ratio", "memory_ratio", "seconds_per_update")
    for panel, metric in zip(panels, metrics, strict=True):
        lines: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
        for record in records:
            is_shown = record.get("variant", "library") == "library"
            if record["metric"] == metric and record.get("axis") == "steps" and is_shown:
                x, y = float(str(record["steps"])), float(str(record["value"]))
                low, high = (float(str(record.get(end, y))) for end in ("low", "high"))
                lines.setdefault((str(record["mode"]), str(record["denoiser"])), []).append((x, y, y - low, high - y))
        for (mode, denoiser), points in lines.items():
            xs, ys, below, above = zip(*sorted(points), strict=True)
            style = "-" if denoiser == "10M" else "--"
            label = f"{mode}, {denoiser}"
            panel.errorbar(xs, ys, (below, above), color=colours[mode], linestyle=style, marker=".", label=label)
        panel.set_xscale("log", base=2)
        panel.set(xlabel="steps T", title=metric.replace("_", " "))
    for panel, target in ((panels[0], 1.5), (panels[0], 1.1), (panels[1], 1.1)):
        panel.axhline(target, color="0.6", linewidth=0.8)
    panels[2].set_yscale("log")
    panels[2].legend(fontsize="x-small")
    save_figure(figure, path)
