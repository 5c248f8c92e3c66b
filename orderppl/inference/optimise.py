"""The one training loop: any differentiable loss, any torch optimiser, logged, validated and resumable."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from orderppl.errors import UserError
from orderppl.inference.annealing import Anneal, set_dial
from orderppl.inference.batches import BatchStream
from orderppl.inference.checkpoints import CheckpointFolder, learned_state, write_text
from orderppl.inference.processes import Processes
from orderppl.randomness import keyed_draws

VALIDATION_SEED = 20_260_228  # validations use common random numbers and leave the training stream untouched


@dataclass
class FitResult:
    """What a fit did.

    Attributes:
        updates: finished updates, those before a resume included.
        trace: one record per update: `update` (1-based), `loss`, the loss's metrics, `grad_norm`, `lr`, dials; with
            Adam, at log points, `grad_mean_norm`, the norm of its running mean of the (clipped) gradient.
        validations: one record per validation: `update` and its numbers.
        best: the record of the best validation by the monitored number; None without validation.
        stopped_early: True when patience ran out before `updates`.
        seconds: wall-clock seconds of training, those before a resume included.
        out: folder of the log and the checkpoints.
    """

    updates: int
    trace: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped_early: bool = False
    seconds: float = 0.0
    out: Path | None = None

    @property
    def losses(self) -> list[float]:
        """Loss of every update."""
        return [record["loss"] for record in self.trace]

    @property
    def seconds_per_update(self) -> float:
        """Mean wall-clock seconds of an update."""
        return self.seconds / max(self.updates, 1)


class _Log:
    """Records of a run, one JSON object per line, kept in step with the checkpoints; one process `writes` them."""

    def __init__(self, path: Path | None, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def restart(self, update: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Forget everything after `update` (records a killed run wrote past its last checkpoint); return the rest."""
        kept: list[dict[str, Any]] = []
        if self.path is None:
            return [], []
        if self.path.exists() and update:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the line the kill cut short
                    break
                if record["update"] <= update:
                    kept.append(record)
        if self.writes:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        trace = [record for record in kept if "validation" not in record]
        validations = [{"update": r["update"], **r["validation"]} for r in kept if "validation" in r]
        return trace, validations

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        if self.path is not None and self.writes:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)


class _Pending:
    """Numbers of the updates since the last log point, left on the device until then."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.values: list[tuple[str, Tensor]] = []
        self.counts: list[int] = []

    def add(self, record: dict[str, Any], values: dict[str, Tensor]) -> None:
        self.records.append(record)
        self.counts.append(len(values))
        # cloned: a metric may be a buffer that the next update overwrites
        self.values.extend((name, value.detach().double().clone()) for name, value in values.items())

    def flush(self) -> list[dict[str, Any]]:
        """Fetch everything with one synchronisation."""
        if not self.records:
            return []
        numbers = iter(torch.stack([value for _, value in self.values]).tolist())
        names = iter(name for name, _ in self.values)
        done = []
        for record, count in zip(self.records, self.counts, strict=True):
            values = dict(itertools.islice(zip(names, numbers, strict=True), count))
            seconds = record.pop("seconds")
            done.append({"update": record.pop("update"), **values, **record, "seconds": seconds})
        self.records, self.values, self.counts = [], [], []
        return done


def _mean_gradient_norm(optimizer: Optimizer) -> Tensor | None:
    """Norm of the running mean of the gradient that Adam keeps, bias-corrected; None for other optimisers."""
    states = [state for state in optimizer.state.values() if "exp_avg" in state]
    if not states:
        return None
    decay = optimizer.param_groups[0]["betas"][0]
    return nn.utils.get_total_norm([state["exp_avg"] for state in states]) / (1 - decay ** states[0]["step"])


def _parameters(loss: nn.Module, stream: BatchStream) -> list[nn.Parameter]:
    if any(is_lazy(parameter) for parameter in loss.parameters()):  # get their shapes from a first look at the data
        with torch.no_grad():
            loss(**stream.batch(torch.arange(1)))
    found = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    if not found:
        raise UserError("loss", "has no parameter that requires a gradient", "unfreeze a network or skip the fit")
    return found


@contextmanager
def _swapped(parameters: list[Tensor], values: list[Tensor] | None) -> Iterator[None]:
    """Hold averaged values in the parameters for a while."""
    if values is None:
        yield
        return
    own = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _check(records: list[dict[str, Any]], out: Path | None) -> None:
    for record in records:
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record[name]):
                what = "the loss" if name == "loss" else "the gradient"
                kept = f"; the last good checkpoint in {out} is kept" if out else ""
                raise UserError(
                    "loss",
                    f"{what} is {record[name]} at update {record['update']}",
                    f"lower the learning rate, set grad_clip, or soften the annealed temperature{kept}",
                )


def optimise(
    loss: nn.Module,
    stream: BatchStream,
    *,
    updates: int,
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    grad_clip: float | None = None,
    accumulate: int = 1,
    dials: Mapping[str, Anneal] | None = None,
    targets: Mapping[str, Any] | None = None,
    log_every: int = 10,
    validate: Callable[[], dict[str, float]] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    monitor: str = "loss",
    monitor_mode: Literal["min", "max"] = "min",
    restore_best: bool | None = None,
    ema_decay: float | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    out: Path | str | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    description: str = "fit",
) -> FitResult:
    """Minimise `loss(**batch)` over the parameters that require a gradient.

    Random orders, steps and maskings are functions of (seed, epoch, row of the data set) alone (`keyed_draws`), where
    the seed is one draw from torch's global generator at the start. On the CPU an interrupted and resumed run is
    bit-equal to an uninterrupted one: that seed and the generator's state, for losses that draw by torch themselves,
    are part of the checkpoint, and batches come from the stream. The host waits for the device only at log, validation
    and checkpoint points; the log still holds every update. With `ema_decay` the module is validated with, and carries
    at the end, the averaged parameters.

    Launched by `torchrun` or `accelerate launch`, the same call trains on all processes: each takes its rows of every
    batch, gradients and logged numbers are means over the whole batch, the first process validates, logs and saves
    (into a folder that all can read), and all end with the same parameters. They, and the losses, are those of one
    process up to rounding, whatever the number of processes, also after a resume on another number. What a loss draws
    by torch's own functions (dropout, say) does differ. Every process has to make the same data and call.

    Args:
        loss: module whose call returns a differentiable scalar, a mean over the sequences of the batch; an attribute
            `metrics`, a dict of 0-dim tensors of the last call, is logged when present. An attribute `counts`, a dict,
            says for `loss` and metrics that are no mean over sequences how many items they are a mean over (tokens,
            say), so that several processes can weigh them.
        stream: batches, as keyword arguments of `loss`.
        updates: total number of updates, those before a resume included.
        optimizer: makes the optimiser from the trainable parameters, e.g. `partial(torch.optim.Adam, lr=0.1)`.
        scheduler: makes a learning-rate scheduler from the optimiser; stepped after every update.
        grad_clip: largest norm of the whole gradient.
        accumulate: pieces that a process cuts its share of a batch into, one after another, to save memory. The update
            is that of the whole batch, up to rounding.
        dials: dotted name -> annealed value, set before every update by its 0-based index.
        targets: the objects that dial names start with.
        log_every: updates between two log points (host synchronisation).
        validate: called without gradient at validation points, under its own fixed random seed.
        validate_every: updates between two validations; the last update is always validated.
        patience: stop after this many validations in a row without an improvement of `monitor`.
        monitor: name of the validation number that decides which module is the best.
        monitor_mode: whether small (`min`) or large (`max`) is good.
        restore_best: load the best validated module at the end; by default when `patience` is set.
        ema_decay: decay of an exponential moving average of the parameters (shorter at the start of training).
        device: where to train; the module and the batches are moved there. With several processes on CUDA, each takes
            the GPU of its local rank.
        autocast_dtype: run the loss under autocast in this dtype (bfloat16).
        out: folder for `log.jsonl` and `checkpoints/`.
        checkpoint_every: updates between two checkpoints; the last update is always saved when `out` is given.
        resume: continue from the newest checkpoint in `out`; from the start when there is none. Frozen parameters are
            not in it: build them as before.
        progress: show a progress bar with loss, ELBO, expected steps and seconds per update.
        description: label of the progress bar.

    Returns:
        The trace and what was found.

    Raises:
        UserError: a wrong option, a loss or gradient that is not finite, a checkpoint of another run, or processes that
            hold different data.
    """
    for name, value in {
        "updates": updates,
        "accumulate": accumulate,
        "log_every": log_every,
        "validate_every": validate_every,
        "patience": patience,
        "checkpoint_every": checkpoint_every,
    }.items():
        if value is not None and value < 1:
            raise UserError(name, f"{value} is not positive", "use at least 1")
    if grad_clip is not None and not grad_clip > 0:
        raise UserError("grad_clip", f"{grad_clip} is not positive", "use a positive norm or leave it out")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise UserError("ema_decay", f"{ema_decay} is not in [0, 1)", "use e.g. 0.999 or leave it out")
    if autocast_dtype == torch.float16:
        raise UserError("autocast_dtype", "float16 needs loss scaling, which is not done here", "use bfloat16")
    if patience is not None and (validate is None or validate_every is None):
        raise UserError("patience", "early stopping needs validations", "give validate and validate_every")
    if resume and out is None:
        raise UserError("resume", "there is no folder to resume from", "give out")
    dials, targets = dict(dials or {}), dict(targets or {})
    restore_best = patience is not None if restore_best is None else restore_best

    where = torch.device(device if device is not None else next(loss.parameters()).device)
    processes = Processes.join(where)
    if processes.size > 1 and where.type == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    loss.to(where)
    stream.device = where
    processes.check_same("stream", stream.checksum(), "make the data and the stream from fixed seeds on every process")
    parameters: list[Tensor] = list(_parameters(loss, stream))
    shared_loss = processes.wrapped(loss)
    seed = int(torch.randint(2**62, ()))
    seed = processes.from_first(lambda: seed)
    opt = optimizer(parameters)
    schedule = None if scheduler is None else scheduler(opt)
    average = None if ema_decay is None else [parameter.detach().clone() for parameter in parameters]
    result = FitResult(updates=0, out=None if out is None else Path(out))
    best_weights: dict[str, Tensor] | None = None
    stale = 0

    checkpoints = None
    log = _Log(None)
    if result.out is not None:
        checkpoints = CheckpointFolder(result.out / "checkpoints")
        if not resume and checkpoints.latest() is not None:
            raise UserError("out", f"{result.out} already holds a run", "resume it or choose another folder")
        result.out.mkdir(parents=True, exist_ok=True)
        log = _Log(result.out / "log.jsonl", processes.is_first)
        loaded = checkpoints.load(loss, where) if resume else None
        if loaded is not None:
            state, best_weights = loaded
            stream.load_state_dict(state["stream"])
            opt.load_state_dict(state["optimizer"])
            if schedule is not None:
                schedule.load_state_dict(state["scheduler"])
            if average is not None:
                if state["average"] is None:
                    raise UserError("ema_decay", "the checkpoint has no average", "resume with the settings it had")
                average = [saved.to(where) for saved in state["average"]]
            result.updates, result.seconds = state["update"], state["seconds"]
            result.best, stale, result.stopped_early = state["best"], state["stale"], state["stopped_early"]
            seed = state.get("seed", seed)
            _set_rng_state(state["rng"], where)
        result.trace, result.validations = log.restart(result.updates)

    def save() -> None:
        if checkpoints is None or not processes.is_first:
            return
        state = {
            "update": result.updates,
            "seed": seed,
            "optimizer": opt.state_dict(),
            "scheduler": None if schedule is None else schedule.state_dict(),
            "average": average,
            "stream": stream.state_dict(),
            "rng": _rng_state(where),
            "best": result.best,
            "stale": stale,
            "stopped_early": result.stopped_early,
            "seconds": result.seconds,
        }
        checkpoints.save(result.updates, loss, state, best_weights)

    pending = _Pending()
    silent = not (progress and processes.is_first)
    bar = tqdm(total=updates, initial=result.updates, desc=description, disable=silent, dynamic_ncols=True)

    def flush() -> None:
        records = pending.flush()
        _check(records, None if checkpoints is None or checkpoints.latest() is None else result.out)
        result.trace.extend(records)
        log.write(records)
        if records:
            last = records[-1]
            shown = {name: f"{last[name]:.4g}" for name in ("loss", "elbo", "steps") if name in last}
            bar.set_postfix(shown | {"s/update": f"{result.seconds_per_update:.3g}"}, refresh=False)

    def measured() -> dict[str, float]:
        assert validate is not None
        with torch.autocast(where.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            return {name: float(value) for name, value in validate().items()}

    def run_validation() -> None:
        nonlocal stale, best_weights
        devices = [where] if where.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), _swapped(parameters, average):
            torch.manual_seed(VALIDATION_SEED)
            numbers = processes.from_first(measured)
            if monitor not in numbers:
                raise UserError(
                    "monitor", f"validation gives {', '.join(numbers)}, not {monitor!r}", "name one of them"
                )
            record = {"update": result.updates, **numbers}
            result.validations.append(record)
            log.write([{"update": result.updates, "validation": numbers}])
            sign = 1 if monitor_mode == "min" else -1
            score = sign * numbers[monitor]
            if math.isfinite(score) and (result.best is None or score < sign * result.best[monitor]):
                result.best, stale = record, 0
                if restore_best:
                    best_weights = {name: tensor.detach().clone() for name, tensor in learned_state(loss).items()}
            else:
                stale += 1
        if patience is not None and stale >= patience:
            result.stopped_early = True

    def gradient() -> dict[str, Tensor]:
        """Leave the gradient of the next batch in the parameters, and return the numbers of its log line."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor | int] = {}
        whole = processes.size == 1 and accumulate == 1
        for piece, batch in enumerate(stream.pieces(accumulate)):
            # The processes exchange gradients once, after the last piece.
            with processes.apart(shared_loss) if piece < accumulate - 1 else nullcontext():
                with (
                    keyed_draws(seed, stream.keys),
                    torch.autocast(where.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
                ):
                    objective = shared_loss(**batch)
                values = {"loss": objective, **getattr(loss, "metrics", {})}
                if whole:
                    objective.backward()
                    return values
                # The gradient of a mean over pieces is a sum: how many items it is over is known after the last one.
                items = dict.fromkeys(values, len(next(iter(batch.values())))) | getattr(loss, "counts", {})
                items = {name: count * stream.weight for name, count in items.items()}
                (objective * items["loss"]).backward()
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().double() * items[name]
                counts[name] = counts.get(name, 0) + items[name]
        means, totals = processes.means(sums, counts)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, processes.size / totals["loss"])  # the processes' gradients come averaged
        return means

    stream.share(processes.rank, processes.size)
    if not processes.is_first:  # losses that draw by torch should not draw the same for other rows
        torch.manual_seed(seed ^ (processes.rank << 40) ^ result.updates)
    try:
        started = time.perf_counter() - result.seconds
        while result.updates < updates and not result.stopped_early:
            values_of_dials = {name: anneal(result.updates) for name, anneal in dials.items()}
            for name, setting in values_of_dials.items():
                set_dial(targets, name, setting)
            opt.zero_grad(set_to_none=True)
            try:
                values = gradient()
            except (RuntimeError, ValueError, Warning) as error:
                flush()  # an earlier update that was not finite is the cause, not what a sampler says about it now
                if processes.size > 1:
                    error.add_note(f"in process {processes.rank} of {processes.size}, update {result.updates + 1}")
                raise
            if grad_clip is not None:
                norm = nn.utils.clip_grad_norm_(parameters, grad_clip)
            else:
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            rates = {"lr": float(opt.param_groups[0]["lr"])}
            opt.step()
            if schedule is not None:
                schedule.step()
            if average is not None and ema_decay is not None:
                decay = min(ema_decay, (1 + result.updates) / (10 + result.updates))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            result.updates += 1
            result.seconds = time.perf_counter() - started
            record = {"update": result.updates, **values_of_dials, **rates, "seconds": round(result.seconds, 3)}
            last = result.updates == updates
            log_due = last or result.updates % log_every == 0
            mean_norm = _mean_gradient_norm(opt) if log_due else None
            extra = {} if mean_norm is None else {"grad_mean_norm": mean_norm}
            pending.add(record, {**values, "grad_norm": norm, **extra})
            bar.update()

            due = validate is not None and (last or (validate_every and result.updates % validate_every == 0))
            save_due = checkpoint_every is not None and result.updates % checkpoint_every == 0
            if log_due or due or save_due:
                flush()
            if due:
                run_validation()
            if save_due or last or result.stopped_early:
                save()
        flush()
    finally:
        bar.close()
        stream.share(0, 1)

    if processes.size > 1:  # what the script draws next is the same everywhere; by then the files are written, too
        _set_rng_state(processes.from_first(lambda: _rng_state(where)), where)
    with torch.no_grad():
        if restore_best and best_weights is not None:
            loss.load_state_dict(best_weights, strict=False)
        elif average is not None:
            torch._foreach_copy_(parameters, average)
    return result
