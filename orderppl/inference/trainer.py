"""The one training loop: any differentiable loss, any torch optimiser, logged, validated and resumable."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from orderppl.errors import UserError
from orderppl.files import locked
from orderppl.inference.batches import BatchStream, Data, Piece
from orderppl.inference.checkpoints import CheckpointFolder, load_module_state, module_state
from orderppl.inference.log import Interrupt, Log, say
from orderppl.inference.optimizers import (
    averaged,
    make_optimizer,
    make_scheduler,
    mean_gradient_norm,
    moving_average,
    rates,
    set_to_average,
)
from orderppl.inference.processes import Processes
from orderppl.randomness import keyed_draws
from orderppl.runs import Kind, finish_run, start_run

VALIDATION_SEED = 20_260_228  # validations use common random numbers and leave the training stream untouched


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How parameters are trained.

    Args:
        updates: total number of updates, those before a resume included.
        batch_size: sequences per update.
        optimizer: makes the optimiser from the parameters, such as `torch.optim.AdamW` or
            `partial(torch.optim.Adam, lr=0.1)`; an optimiser that has been made trains what it was made for.
        lr: learning rate; the optimiser's own when left out. A mapping gives parts their own, by their dotted names:
            `{"guide": 0.01, "policy": 0.001}`.
        schedule: of the learning rate: constant, a cosine that ends at 0, or what makes a torch scheduler from the
            optimiser; stepped after every update.
        warmup: updates over which the learning rate rises, before a constant or cosine one.
        grad_clip: largest norm of the whole gradient.
        ema_decay: decay of an exponential moving average of the parameters (shorter at the start of training), with
            which the module is validated, and which it carries at the end.
        seed: of batches and random orders; left out, one is drawn from torch's generator.
        group: batches that are sorted by length together, against padding; 1 leaves rows unsorted.
        drop_last: leave out the short last batch of an epoch.
        accumulate: pieces that a process cuts its share of a batch into, one after another, to save memory. The update
            is that of the whole batch, up to rounding.
        bfloat16: run the loss under autocast in bfloat16.
        device: where to train; that of the module when left out. With several processes on CUDA, each takes the GPU of
            its local rank.
        log_every: updates between two log points (the host waits for the device there).
        validate_every: updates between two validations; the last update is always validated.
        checkpoint_every: updates between two checkpoints; the last update is always saved.
        progress: show what is trained, and a progress bar.

    Raises:
        UserError: a number that makes no sense.
    """

    updates: int = 1000
    batch_size: int = 32
    optimizer: Callable[..., Optimizer] | Optimizer | PyroOptim = torch.optim.Adam
    lr: float | dict[str, float] | None = None
    schedule: Literal["constant", "cosine"] | Callable[[Optimizer], LRScheduler] = "constant"
    warmup: int = 0
    grad_clip: float | None = None
    ema_decay: float | None = None
    seed: int | None = None
    group: int = 1
    drop_last: bool = False
    accumulate: int = 1
    bfloat16: bool = False
    device: str | torch.device | None = None
    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "group", "accumulate", "log_every", "validate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(name, f"{value} is not positive", "use at least 1")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise UserError("grad_clip", f"{self.grad_clip} is not positive", "use a positive norm or leave it out")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError("ema_decay", f"{self.ema_decay} is not in [0, 1)", "use e.g. 0.999 or leave it out")
        if not (callable(self.schedule) or self.schedule in ("constant", "cosine")):
            raise UserError("schedule", f"unknown schedule {self.schedule!r}", "use constant or cosine")


@dataclass(repr=False)
class FitResult:
    """What a fit did.

    Attributes:
        updates: finished updates, those before a resume included.
        trace: one record per update: `update` (1-based), `loss`, the loss's metrics, `grad_norm`, annealed numbers,
            `lr`; with Adam, at log points, `grad_mean_norm`, the norm of its running mean of the (clipped) gradient.
        validations: one record per validation: `update` and its numbers.
        seconds: wall-clock seconds of training, those before a resume included.
        out: folder of the run.
    """

    updates: int
    trace: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    out: Path | None = None

    @property
    def losses(self) -> list[float]:
        """Loss of every update."""
        return [record["loss"] for record in self.trace]

    def __repr__(self) -> str:
        last = self.trace[-1] if self.trace else {}
        numbers = "".join(f", {name}={last[name]:.4g}" for name in ("loss", "elbo", "steps") if name in last)
        where = "" if self.out is None else f", out={str(self.out)!r}"
        return f"FitResult(updates={self.updates}{numbers}, seconds={self.seconds:.3g}{where})"


@dataclass
class TrainState:
    """All that the next update depends on: what a checkpoint holds.

    Attributes:
        loss: what is minimised, with the parameters that are trained.
        optimizer: of these parameters.
        scheduler: of the learning rate.
        average: moving average of the parameters.
        stream: the batches, and how far they are.
        seed: of the random orders.
        update: finished updates.
        seconds: wall-clock seconds of training.
    """

    loss: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    average: AveragedModel | None
    stream: BatchStream
    seed: int
    update: int = 0
    seconds: float = 0.0

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The state in tensors, numbers, strings and containers of them."""
        parts = {name: getattr(self, name) for name in ("optimizer", "scheduler", "average", "stream")}
        return {
            **{name: None if part is None else part.state_dict() for name, part in parts.items()},
            **{name: getattr(self, name) for name in ("seed", "update", "seconds")},
            "module": module_state(self.loss),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UserError: it belongs to other data, another architecture, another denoiser or other settings.
        """
        load_module_state(self.loss, saved["module"])
        for name in ("stream", "optimizer", "scheduler", "average"):
            part = getattr(self, name)
            if (part is None) != (saved[name] is None):
                had, has = ("none", "one") if saved[name] is None else ("one", "none")
                problem = f"the checkpoint has {had}, this run has {has}"
                raise UserError(name, problem, "resume with the settings of the interrupted run")
            if part is not None:
                part.load_state_dict(saved[name])
        self.seed, self.update, self.seconds = saved["seed"], saved["update"], saved["seconds"]
        torch.set_rng_state(saved["rng"])


def train(
    loss: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    anneal: Callable[[int], dict[str, float]] | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    out: Path | None = None,
    resume: bool = False,
    description: str = "fit",
    parts: Mapping[str, Any] | None = None,
) -> FitResult:
    """Minimise `loss(batch)` over the parameters that require a gradient.

    Random orders, steps and maskings are functions of (seed, epoch, row of the data set) alone (`keyed_draws`). On the
    CPU an interrupted and resumed run is bit-equal to an uninterrupted one: the state of torch's generator, for losses
    that draw by torch themselves, is part of the checkpoint. The host waits for the device only at log, validation and
    checkpoint points; the log still holds every update.

    Launched by `torchrun` or `accelerate launch`, the same call trains on all processes: each takes its rows of every
    batch, gradients and logged numbers are means over the whole batch, the first process validates, logs and saves
    (into a folder that all can read), and all end with the same parameters. They, and the losses, are those of one
    process up to rounding, whatever the number of processes, also after a resume on another number. What a loss draws
    by torch's own functions (dropout, say) does differ. Every process has to make the same data and call.

    Args:
        loss: module whose call with a `Batch` returns a differentiable scalar, a mean over its sequences (over the
            positions to reveal if it has a true attribute `per_token`). Optional: an attribute `metrics`, a dict of
            0-dim tensors of the last call, means as well, which are logged; a method `explain(batch)` that says why the
            loss of a batch is not finite, or returns None.
        data: see `as_batch`.
        settings: how.
        anneal: called before every update with its 0-based index; sets numbers, and returns them for the log.
        validate: called without gradient at validation points, under its own fixed random seed.
        out: folder for `log.jsonl` and `checkpoints/`. Ctrl-C and SIGTERM leave a checkpoint there.
        resume: continue from the newest checkpoint in `out`; from the start when there is none. Frozen parameters are
            not in it: build them as before.
        description: label of the progress bar.
        parts: what the run is made of, see `orderppl.runs.start_run`: `out` becomes a folder that every command reads.

    Returns:
        The trace and what was found.

    Raises:
        UserError: a wrong setting, an object among `parts` that a config cannot describe, a loss or gradient that is
            not finite, a checkpoint of another run, or processes that hold different data.
    """
    if not any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError("loss", "has no parameter that requires a gradient", "unfreeze a network or skip the fit")
    processes = Processes.join(settings.device or module_device(loss))
    with ExitStack() as held:
        if out is not None:
            processes.from_first(lambda: held.enter_context(locked(out)))
        checkpoints = None if out is None else CheckpointFolder(out / "checkpoints")
        saved = _saved(checkpoints, resume, processes)
        if out is not None and parts is not None:
            kind: Kind = "order" if "model" in parts else "denoiser"
            processes.from_first(partial(start_run, out, kind, parts, resume=resume))
        state, shared = _start(loss, data, settings, processes, saved)
        log = Log(None if out is None else out / "log.jsonl", processes.is_first)
        log.restart(state.update)
        quiet = not (settings.progress and processes.is_first)
        if not quiet:
            say(f"{description}: {_parts(loss)}")

        held.enter_context(torch.enable_grad())
        interrupt = held.enter_context(Interrupt(armed=out is not None))
        bar = held.enter_context(tqdm(total=settings.updates, initial=state.update, desc=description, disable=quiet))
        began, stop, check = time.perf_counter() - state.seconds, 0, partial(_refuse, out=out)
        while state.update < settings.updates and not stop:
            known = {} if anneal is None else anneal(state.update)
            pieces = list(state.stream.pieces(settings.accumulate, processes.rank, processes.size))
            try:
                values = _gradient(state, shared, pieces, settings, processes)
            except (RuntimeError, ValueError, Warning):
                log.flush(check)  # an earlier update that was not finite is the cause
                raise
            if state.update == 0 or state.stream.device.type == "cpu":  # before it spoils the parameters
                now = {name: float(values[name]) for name in ("loss", "grad_norm")} | {"update": state.update + 1}
                _refuse(now, out, partial(_causes, state, pieces, processes))
            known |= rates(state.optimizer)
            _step(state)
            state.seconds = time.perf_counter() - began

            due = partial(_due, state.update, settings.updates)
            if due(settings.log_every) and (norm := mean_gradient_norm(state.optimizer)) is not None:
                values["grad_mean_norm"] = norm
            log.add(state.update, values, known | {"seconds": round(state.seconds, 3)})
            bar.update()
            if due(settings.log_every) or processes.size == 1:
                stop = max(processes.gathered(interrupt.signal))
            save = bool(stop) or due(settings.checkpoint_every)
            if save or due(settings.log_every) or due(settings.validate_every):
                log.flush(check)
                bar.set_postfix(_shown(log.trace[-1]), refresh=False)
            if validate is not None and due(settings.validate_every):
                log.validated(state.update, processes.from_first(partial(_measure, state, validate, settings)))
            if save and checkpoints is not None and processes.is_first:
                checkpoints.save(state.state_dict())

        if not stop:
            set_to_average(state.parameters, state.average)
            if out is not None and parts is not None:
                processes.from_first(partial(finish_run, out, parts, state.update))
    if stop:
        if processes.is_first:
            say(f"interrupted: update {state.update} is saved in {out}; go on with resume")
        signal.raise_signal(stop)
    if processes.size > 1:  # what the script draws next is the same everywhere; by then the files are written
        torch.set_rng_state(processes.from_first(torch.get_rng_state))
    return FitResult(state.update, log.trace, log.validations, state.seconds, out)


# ---- the parts of the loop


def _saved(checkpoints: CheckpointFolder | None, resume: bool, processes: Processes) -> dict[str, Any] | None:
    """The state to go on from, or None at the start of a run."""
    if checkpoints is None:
        if resume:
            raise UserError("resume", "there is no folder to resume from", "give out")
        return None
    out = checkpoints.path.parent
    if not resume and checkpoints.latest() is not None:
        raise UserError("out", f"{out} already holds a run", "resume it or choose another folder")
    saved = checkpoints.load()
    if resume and saved is None and processes.is_first:
        say(f"no checkpoint in {out}: starting at the first update")
    return saved


def _start(
    loss: nn.Module, data: Data, settings: TrainSettings, processes: Processes, saved: Mapping[str, Any] | None
) -> tuple[TrainState, nn.Module]:
    """The state before the first update, or that of a checkpoint, and the loss as the processes share it."""
    device = torch.device(settings.device or module_device(loss))
    if processes.size > 1 and device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    loss.to(device)
    seed = settings.seed
    if seed is None:
        seed = int(torch.randint(2**62, ())) if saved is None else saved["seed"]
    seed = processes.gathered(seed)[0]
    stream = BatchStream(
        data,
        settings.batch_size,
        seed=seed,
        drop_last=settings.drop_last,
        group=settings.group,
        per_token=getattr(loss, "per_token", False),
        device=device,
    )
    if processes.size > 1 and len(set(processes.gathered(stream.digest))) > 1:
        raise UserError("data", "differs between the processes", "make it from fixed seeds on every process")
    if any(is_lazy(parameter) for parameter in loss.parameters()):  # get their shapes from a first look at the data
        with torch.no_grad():
            loss(next(stream.once()).batch)
    named = {name: parameter for name, parameter in loss.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(settings.optimizer, named, settings.lr)
    scheduler = make_scheduler(settings.schedule, optimizer, settings.warmup, settings.updates)
    shared = processes.wrapped(loss)  # from here on the parameters are those of the first process
    state = TrainState(loss, optimizer, scheduler, None, stream, seed)
    if settings.ema_decay is not None:
        state.average = moving_average(state.parameters, settings.ema_decay)
    if saved is not None:
        state.load_state_dict(saved)
    loss.zero_grad(set_to_none=True)
    if not processes.is_first:  # losses that draw by torch should not draw the same for other rows
        torch.manual_seed(seed ^ (processes.rank << 40) ^ state.update)
    return state, shared


def _gradient(
    state: TrainState, loss: nn.Module, pieces: list[Piece], settings: TrainSettings, processes: Processes
) -> dict[str, Tensor]:
    """Leave the gradient of a batch in the parameters; return its loss, metrics and norm, of all processes."""
    means: dict[str, Tensor] = {}
    for piece in pieces:
        # The processes exchange gradients once, after the last piece.
        with nullcontext() if piece is pieces[-1] else processes.apart(loss):
            with keyed_draws(state.seed, piece.keys), _autocast(state, settings):
                value = loss(piece.batch)
            (value * (piece.share * processes.size)).backward()  # the processes' gradients come averaged
        for name, number in {"loss": value, **getattr(state.loss, "metrics", {})}.items():
            means[name] = means.get(name, 0) + number.detach().double() * piece.share
    values = processes.sums(means)
    gradients = [parameter.grad for parameter in state.parameters if parameter.grad is not None]
    values["grad_norm"] = nn.utils.get_total_norm(gradients)
    if settings.grad_clip is not None:
        nn.utils.clip_grads_with_norm_(state.parameters, settings.grad_clip, values["grad_norm"])
    return values


def _step(state: TrainState) -> None:
    """Change the parameters by the gradient that they hold."""
    state.optimizer.step()
    state.loss.zero_grad(set_to_none=True)  # also what an optimiser that was given leaves out
    if state.scheduler is not None:
        state.scheduler.step()
    if state.average is not None:
        state.average.update_parameters(nn.ParameterList(state.parameters))
    state.update += 1


def _measure(
    state: TrainState, validate: Callable[[], Mapping[str, float]], settings: TrainSettings
) -> dict[str, float]:
    """Validate in evaluation mode, the averaged parameters where there is an average."""
    device = state.stream.device
    with (
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        _autocast(state, settings),
        averaged(state.parameters, state.average),
        frozen(state.loss),
    ):
        torch.manual_seed(VALIDATION_SEED)
        return {name: float(value) for name, value in validate().items()}


def _autocast(state: TrainState, settings: TrainSettings) -> torch.autocast:
    return torch.autocast(state.stream.device.type, dtype=torch.bfloat16, enabled=settings.bfloat16)


def _refuse(record: Mapping[str, Any], out: Path | None, causes: Callable[[], list[str]] = list) -> None:
    """Stop at an update whose loss or gradient is not finite."""
    for name, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
        if not math.isfinite(record[name]):
            problem = f"{what} is {record[name]} at update {record['update']}"
            remedy = "lower the learning rate, set grad_clip, or soften the annealed temperature"
            for cause in causes()[:1]:
                problem, remedy = f"{problem}: {cause}", "see to that first"
            if out is not None and CheckpointFolder(out / "checkpoints").latest() is not None:
                remedy += f"; the last good checkpoint in {out} is kept"
            raise UserError("loss", problem, remedy)


def _causes(state: TrainState, pieces: list[Piece], processes: Processes) -> list[str]:
    """What the loss says about the first row of each process that it cannot take."""
    explain = getattr(state.loss, "explain", lambda batch: None)

    def first() -> str | None:
        for batch, keys, _ in pieces:
            for place, row in enumerate(keys.rows[keys.mine].tolist()):
                one = slice(place, place + 1)
                places = None if keys.places is None else keys.places[one]
                with torch.no_grad(), keyed_draws(state.seed, replace(keys, mine=keys.mine[one], places=places)):
                    if cause := explain(batch.rows(one)):
                        return f"row {row} of the data: {cause}"
        return None

    return [cause for cause in processes.gathered(first()) if cause is not None]


def _due(update: int, updates: int, every: int | None) -> bool:
    return update == updates or bool(every and update % every == 0)


def _shown(record: Mapping[str, Any]) -> dict[str, str]:
    """What a progress bar says of an update."""
    shown = {name: f"{record[name]:.4g}" for name in ("loss", "elbo", "steps") if name in record}
    return shown | {"s/update": f"{record['seconds'] / record['update']:.3g}"}


def _parts(loss: nn.Module) -> str:
    """The parts of a loss that are trained and those that are frozen, with their numbers of parameters."""
    sizes: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for name, parameter in loss.named_parameters():
        part = ".".join(name.split(".")[: 2 if name.startswith("model.") else 1])
        sizes[parameter.requires_grad][part] += parameter.numel()
    said = {key: ", ".join(f"{part} ({size:,})" for part, size in found.items()) for key, found in sizes.items()}
    return f"training {said[True]}" + (f"; frozen: {said[False]}" if said[False] else "")


def module_device(module: nn.Module) -> torch.device:
    """Where the parameters of a module are, or its buffers."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def described(data: Data) -> Data:
    """The data where a config can describe them; None for tensors and other things that a script has made."""
    return data if "_made_by" in getattr(data, "__dict__", {}) else None


@contextmanager
def frozen(module: object, unless: bool = False) -> Iterator[None]:
    """Hold a module without gradients and in evaluation mode; afterwards it is as it was.

    Args:
        module: nothing happens to what is no torch module.
        unless: let it be trained instead: one that comes frozen as a whole gets gradients meanwhile.
    """
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    modes, flags = [part.training for part in parts], [parameter.requires_grad for parameter in parameters]
    for part in parts:
        part.training &= unless
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(unless and (flag or (not any(flags) and parameter.is_floating_point())))
    try:
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
