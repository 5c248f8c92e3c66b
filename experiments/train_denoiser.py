"""Train a small masked-diffusion transformer on a task.

    orderppl train-denoiser --out runs/arithmetic-denoiser
    orderppl train-denoiser --config arithmetic_denoiser --set task.variant=dual --set fit.updates=6000
    orderppl train-denoiser --out runs/arithmetic-denoiser --resume          # after an interruption
    orderppl train-denoiser --set denoiser.name=saved --set denoiser.run=runs/arithmetic-denoiser --out runs/longer
    torchrun --nproc_per_node 2 -m orderppl.experiments.cli train-denoiser --out runs/arithmetic-denoiser

The run folder holds denoiser.safetensors with its architecture in denoiser.json and the tokeniser, which
`denoiser: {name: saved, run: ...}` of fit-order reads, besides log.jsonl, checkpoints, config.yaml and results.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import nn

from orderppl.errors import UserError
from orderppl.experiments.build import (
    DENOISER_FILE,
    ArithmeticTask,
    ChainTask,
    Gsm8kTask,
    LoopConfig,
    PretrainedDenoiserConfig,
    SavedDenoiserConfig,
    SudokuTask,
    Task,
    TransformerConfig,
    autocast_dtype,
    build_denoiser,
    build_task,
    compiling,
    loop_options,
    piece_size,
    save_tokenizer,
    saved_tokenizer,
)
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.results import Record, results_table
from orderppl.inference.checkpoints import save_weights
from orderppl.inference.processes import Processes
from orderppl.models.denoisers import masked_diffusion_nelbo, train_denoiser

CONFIG = "arithmetic_denoiser"
DISTRIBUTED = True


@dataclass(frozen=True)
class DenoiserFitConfig(LoopConfig):
    """The training loop of a denoiser."""

    updates: int = setting(3000, "updates", at_least=1)
    batch_size: int = setting(64, "sequences per update", at_least=1)
    group: int = setting(1, "batches sorted by length together, against padding; 1: rows stay unsorted", at_least=1)
    lr: float = setting(1e-3, "largest learning rate of AdamW", above=0)
    weight_decay: float = setting(0.01, "decay of the weights", at_least=0)
    warmup: int = setting(100, "updates of the linear warm-up", at_least=0)
    ema_decay: float | None = setting(0.999, "decay of the averaged weights", above=0, below=1)
    grad_clip: float | None = setting(1.0, "largest gradient norm", above=0)
    log_every: int = setting(50, "updates between two points of the log", at_least=1, alters=False)
    validate_every: int = setting(500, "updates between two validations", at_least=1)
    patience: int | None = setting(None, "validations without progress before stopping", at_least=1)
    checkpoint_every: int | None = setting(500, "updates between two checkpoints", at_least=1, alters=False)


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of train-denoiser."""

    task: ArithmeticTask | Gsm8kTask | SudokuTask | ChainTask = setting(ArithmeticTask, "data")
    denoiser: TransformerConfig | SavedDenoiserConfig | PretrainedDenoiserConfig = setting(
        TransformerConfig, "architecture, or a trained or public denoiser to go on from"
    )
    fit: DenoiserFitConfig = setting(DenoiserFitConfig, "the training loop")

    def __post_init__(self) -> None:
        """Refuse weights that training would round away."""
        if getattr(self.denoiser, "dtype", None) == "bfloat16":
            problem = "the updates of weights in bfloat16 are lost in rounding"
            raise UserError("denoiser.dtype", problem, "set it to float32, and --dtype bfloat16 for the computation")


def run(config: Config, out: Path, resume: bool = False) -> Iterable[Record]:
    """Train, save, and measure the bound on the test split."""
    task = build_task(config.task, config.seed, saved_tokenizer(config.denoiser))
    denoiser = build_denoiser(config.denoiser, task, config.task)
    fit_denoiser(config, task, denoiser, out, resume=resume)
    if not Processes.join(config.device).is_first:
        return []
    test = task.stream("test", piece_size(config.fit, config.fit.batch_size), shuffle=False, device=config.device)
    bound = masked_diffusion_nelbo(denoiser, test, draws=8)
    labels = {"task": task.name, "split": "test", "seed": config.seed, "n": test.num_sequences}
    records: list[Record] = [
        {"metric": "elbo", "value": -bound["nelbo"], **labels},
        {"metric": "nats_per_token", "value": bound["nats_per_token"], **labels},
        {"metric": "parameters", "value": sum(parameter.numel() for parameter in denoiser.parameters()), **labels},
    ]
    if task.report is not None:
        records += [
            {"metric": "rows", "value": count, "task": task.name, "file": file, "outcome": outcome}
            for file, outcome, count, _ in task.report.table()
        ]
    Console().print(results_table(records[:3], rows=("task", "split"), title="Masked-diffusion bound, nats"))
    return records


def fit_denoiser(config: Config, task: Task, denoiser: nn.Module, out: Path, resume: bool = False) -> None:
    """Run the training that a config describes, with its log and checkpoints in `out`, and save the denoiser there.

    Raises:
        UserError: a public model that has no form of its own to be saved in.
    """
    settings = config.fit
    if getattr(denoiser, "config", None) is None:
        remedy = "use SMDM here, or fit-order with freeze_denoiser=false"
        raise UserError("denoiser.model", f"a {type(denoiser).__name__} is not trained on by itself", remedy)
    with compiling(denoiser, settings):
        train_denoiser(
            denoiser,
            task.stream(
                "train",
                settings.batch_size,
                seed=config.seed,
                drop_last=settings.batch_size <= _rows(task),
                group=settings.group,
            ),
            updates=settings.updates,
            validation=task.stream("validation", piece_size(settings, settings.batch_size), shuffle=False),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            ema_decay=settings.ema_decay,
            grad_clip=settings.grad_clip,
            validate_every=settings.validate_every,
            patience=settings.patience,
            device=config.device,
            autocast_dtype=autocast_dtype(config),
            out=out,
            resume=resume,
            **loop_options(settings),
        )
    if not Processes.join(config.device).is_first:
        return
    save_weights(denoiser, out / DENOISER_FILE)
    if task.tokenizer is not None:
        save_tokenizer(task.tokenizer, out)


def _rows(task: Task) -> int:
    return len(task.splits["train"]["tokens"])
