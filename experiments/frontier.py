"""Accuracy and likelihood against denoiser forwards: every heuristic and any number of learned orders, on one denoiser.

    orderppl frontier --denoiser runs/arithmetic-denoiser --split validation --out runs/frontier
    orderppl frontier --denoiser runs/arithmetic-denoiser --run runs/order-0 --run runs/order-1 --out runs/frontier
    orderppl frontier --config frontier_mod20 --denoiser runs/mod20-denoiser --shard 1/2 --out runs/frontier
    torchrun --nproc_per_node 2 -m -- orderppl.experiments.cli frontier --denoiser runs/d --run runs/o --out runs/f

Each learned order is compared with the best heuristic interpolated at the same mean NFE (`advantage`, positive is
better), paired over problems, everything estimated again in each bootstrap sample, the choice of the best heuristic
included: it is made on the rows of the comparison, which favours the heuristics. Tune on `--split validation`; look at
the test rows once.

Finished batches are kept in rows-*.jsonl: repeat the command after a kill, or with more arms, and it goes on. Shards
(`--shard 1/2`, `--shard 2/2`) each write a file of their own into the same folder; whichever ends last, or the command
without --shard, makes the table. (The `--` keeps torchrun from taking --run
for an option of its own.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm.auto import tqdm

from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.evaluation import PolicyCost, decode_answers, path_likelihood, policy_cost
from orderppl.experiments.build import (
    DenoiserConfig,
    SavedDenoiserConfig,
    TaskConfig,
    autocast,
    build_denoiser,
    build_task,
    saved_tokenizer,
)
from orderppl.experiments.build.denoisers import as_denoiser
from orderppl.experiments.config import RunConfig, config_dict, load_config, setting
from orderppl.experiments.evaluate import load_settings
from orderppl.experiments.frontier_report import Results, advantage_table, arm_table, frontier_figure, pass_table
from orderppl.experiments.identity import tensor_digest, value_digest
from orderppl.experiments.results import Record, save_figure
from orderppl.experiments.row_log import RowLog
from orderppl.experiments.sweeps import (
    Arm,
    DialsConfig,
    LearnedSweepConfig,
    SweepConfig,
    grouped_runs,
    heuristic_arms,
    learned_arms,
)
from orderppl.experiments.train_denoiser import Config as TrainDenoiserConfig
from orderppl.inference.batches import BatchStream
from orderppl.inference.checkpoints import fingerprint, write_text
from orderppl.inference.processes import Processes

CONFIG = "frontier"
DISTRIBUTED = True
COSTED_ROWS = 64  # rows on which the cost of a policy network is measured


@dataclass(frozen=True)
class SamplesConfig:
    """The second table: sampled tokens, and whether one of k samples is right."""

    count: int = setting(0, "samples of each problem; 0: no such table", at_least=0)
    temperature: float = setting(1.0, "of token sampling", above=0)
    k: tuple[int, ...] = setting((1, 4), "pass@k for these k; those above the count are left out", at_least=1)
    arms: tuple[str, ...] = setting(("*",), "which arms, by patterns of their names: 'threshold*'")


@dataclass(frozen=True)
class ComparisonConfig:
    """Which rows are looked at, what is measured on them, and the arms that nothing is learned for."""

    split: Literal["train", "validation", "test"] = setting("test", "rows to use", option="--split")
    rows: int | None = setting(None, "rows to use, from the first; null: all", at_least=1)
    batch_size: int = setting(256, "rows decoded together", at_least=1)
    length: int | None = setting(None, "canvas of every response, tokens; null: each row's own length", at_least=1)
    metrics: tuple[Literal["accuracy", "path_nats"], ...] = setting(
        ("accuracy", "path_nats"), "accuracy of decoded answers, where the task has some; teacher-forced nats per token"
    )
    heuristics: tuple[SweepConfig, ...] = setting((), "grids of policies without parameters")
    random_seeds: int = setting(3, "seeds of arms that draw their order", at_least=1)
    targets: tuple[float, ...] = setting((2.0, 2.5, 3.0, 4.0), "mean NFEs of the comparison", at_least=1)
    resamples: int = setting(2000, "bootstrap samples of the rows", at_least=100)
    samples: SamplesConfig = setting(SamplesConfig, "sampled tokens and pass@k")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if not self.metrics:
            raise UserError("metrics", "there is none", "use accuracy, path_nats or both")


@dataclass(frozen=True)
class Config(ComparisonConfig, RunConfig):
    """Settings of frontier."""

    source: str | None = setting(
        None, "run of train-denoiser: its denoiser, data and seed", file=True, option="--denoiser"
    )
    runs: tuple[str, ...] = setting((), "folder with an order.safetensors; repeat for more", option="--run")
    task: TaskConfig | None = setting(None, "data; null: that of --denoiser, or of the first --run")
    denoiser: DenoiserConfig | None = setting(None, "denoiser; null: that of --denoiser, or of the first --run")
    orders: tuple[LearnedSweepConfig, ...] = setting((), "learned curves, beside those of --run")
    dials: DialsConfig = setting(DialsConfig, "test-time dials of the runs of --run")
    shard: str | None = setting(None, "this process's share of the work: 1/4 to 4/4", option="--shard")


def run(config: Config, out: Path) -> Iterable[Record]:
    """Measure every arm on every row that is not measured yet; with all there, compare and show."""
    return compare(config, out)[1]


def compare(config: Config, out: Path) -> tuple[Results | None, list[Record]]:
    """Do what `run` does.

    Returns:
        The measurements, None while some are left to other processes, and the records.
    """
    processes = Processes.join(config.device)
    process, size = _share(config.shard, processes)
    study = Study(config)
    log = RowLog(out, study.identity, process, size)
    measure(study, log, process, size)
    processes.check_same("arms", [piece.key for piece in study.pieces], "start all processes with the same settings")
    if not processes.is_first:
        return None, []
    finished = log.read()
    missing = sum(piece.key not in finished for piece in study.pieces)
    if missing:
        text = f"{missing} of {len(study.pieces)} pieces are left to the other shards"
        Console().print(f"{text}; the last one to end makes the table.")
        return None, [{"metric": "missing", "value": missing, "shard": config.shard}]
    results = study.results(finished)
    records = results.records()
    tables = [arm_table(records, study.title)]
    if any(record["metric"] == "pass_at_k" for record in records):
        tables.append(pass_table(records, study.title))
    tables.append(advantage_table(records, study.title))
    page = StringIO()
    for console in (Console(), Console(file=page, width=240)):
        console.print(*tables, sep="\n")
    write_text(out / "tables.txt", page.getvalue())
    save_figure(frontier_figure(results), out / "frontier.png")
    return results, records


def measure(study: Study, log: RowLog, process: int, size: int) -> None:
    """Do the pieces of this process that nobody has done yet; each is in the log as soon as it is finished."""
    finished = log.read()
    mine = [piece for piece in study.pieces[process::size] if piece.key not in finished]
    for piece in tqdm(mine, desc="batches of arms", dynamic_ncols=True, disable=None):
        with autocast(study.config):
            log.append(piece.key, study.measured(piece))


@dataclass(frozen=True)
class Piece:
    """A piece of work: one arm with one seed on one batch.

    Attributes:
        arm: the arm.
        run: decoding, or revealing the true tokens.
        seed: of what is drawn.
        temperature: of token sampling.
        rows: numbers of its rows in the split.
        key: digest of all that distinguishes its result from others of the same log.
    """

    arm: Arm
    run: Literal["decoding", "teacher_forced"]
    seed: int
    temperature: float
    rows: tuple[int, ...]
    key: str


class Study:
    """The denoiser, the rows, the arms and the pieces of work of a comparison."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.task_config, denoiser_config, self.data_seed = subject(config)
        self.task = build_task(self.task_config, self.data_seed, saved_tokenizer(denoiser_config))
        module = build_denoiser(denoiser_config, self.task, self.task_config).to(config.device).eval()
        module.requires_grad_(False)
        self.module: nn.Module = module
        self.denoiser: Denoiser = as_denoiser(module)
        self.split = self._split()
        self.rows = self._unseen(denoiser_config)
        answers = self.task.tokenizer is not None and bool(self.task.references)
        self.metrics = tuple(metric for metric in config.metrics if answers or metric != "accuracy")
        if not self.metrics:
            raise UserError("metrics", f"{self.task.name} has no answers", "set metrics=path_nats")
        longest = int(self.split["attention_mask"].sum(-1).max()) if config.length is None else config.length
        self.arms = heuristic_arms(config.heuristics, self.task, longest)
        sweeps = (*config.orders, *grouped_runs(config.runs, config.dials))
        self.arms += learned_arms(sweeps, self.task, module, config.device)
        if not self.arms:
            raise UserError("heuristics", "there are no arms", "give heuristics, orders or --run")
        self.stream = BatchStream(self.split, config.batch_size, shuffle=False, device=config.device)
        self.digest = tensor_digest(module.state_dict())
        self.identity = {
            "denoiser": {"settings": _kind(denoiser_config), "weights": self.digest},
            "rows": {"split": config.split, "digest": tensor_digest(self.split)},
            "length": config.length,
            "device": torch.device(config.device).type,
            "dtype": config.dtype,
        }
        self.pieces = self._pieces()

    @property
    def title(self) -> str:
        """What is compared on what."""
        left_out = len(self.split["tokens"]) - len(self.rows)
        about = f", {left_out} rows left out that a run has seen in training" if left_out else ""
        return f"{self.task.name}, {self.config.split} split, n = {len(self.rows)}{about}"

    def _split(self) -> dict[str, Tensor]:
        held = self.task.held(self.config.split)
        split = {name: tensor[: self.config.rows] for name, tensor in held.items()}
        split.setdefault("attention_mask", torch.ones_like(split["tokens"], dtype=torch.bool))
        return split | {"row_ids": torch.arange(len(split["tokens"]))}

    def _unseen(self, denoiser: DenoiserConfig) -> Tensor:
        """Numbers of the rows that no run has seen in training: int64 [n].

        Runs on the same data under the same seed have not seen them. Another seed draws other data, also for a training
        seed of an order: then the rows themselves are compared.
        """
        everything = torch.arange(len(self.split["tokens"]))
        if self.config.split == "train":
            return everything
        origins: list[tuple[TaskConfig, int]] = []
        if self.config.source is not None:
            origins.append(_trained_on(self.config.source))
        origins += [(settings.task, settings.seed) for settings in map(load_settings, _folders(self.config))]
        seen: set[Row] = set()
        for task_config, seed in origins:
            if (task_config, seed) != (self.task_config, self.data_seed):
                seen |= set(_whole_rows(build_task(task_config, seed, saved_tokenizer(denoiser)).splits["train"]))
        unseen = torch.tensor([row not in seen for row in _whole_rows(self.split)])
        if not bool(unseen.any()):
            raise UserError("--run", "was trained on all of these rows", "compare it on other rows")
        return everything[unseen]

    def _pieces(self) -> list[Piece]:
        config = self.config
        size = self.split["attention_mask"].sum(-1)
        if "context_mask" in self.split:
            size = size * 2**20 + self.split["context_mask"].sum(-1)  # responses of equal length together
        rows = self.rows[size[self.rows].argsort(stable=True)].tolist()
        batches = [tuple(rows[start : start + config.batch_size]) for start in range(0, len(rows), config.batch_size)]
        sampled = config.samples
        runs: list[tuple[Arm, Literal["decoding", "teacher_forced"], int, float]] = []
        for arm in self.arms:
            seeds = range(config.seed, config.seed + (config.random_seeds if arm.draws else 1))
            if "accuracy" in self.metrics and arm.kind != "oracle":
                runs += [(arm, "decoding", seed, 0.0) for seed in seeds]
            if "path_nats" in self.metrics:
                runs += [(arm, "teacher_forced", seed, 0.0) for seed in seeds]
            if arm.kind != "oracle" and any(fnmatch(arm.name, pattern) for pattern in sampled.arms):
                draws = range(config.seed, config.seed + sampled.count)
                runs += [(arm, "decoding", seed, sampled.temperature) for seed in draws]
        pieces = []
        for arm, kind, seed, temperature in runs:
            head = {"arm": arm.identity, "run": kind, "seed": seed, "temperature": temperature}
            for batch in batches:
                key = value_digest(head | {"rows": batch})
                pieces.append(Piece(arm, kind, seed, temperature, batch, key))
        return pieces

    def measured(self, piece: Piece) -> dict[str, Any]:
        """Do a piece of work: its results by row, as JSON values."""
        begin = time.perf_counter()
        arm, task = piece.arm, self.task
        batch = self.stream.batch(torch.tensor(piece.rows))
        denoiser = self.denoiser if arm.denoiser is None else arm.denoiser
        options: dict[str, Any] = {"seed": piece.seed, "device": self.config.device}
        found: Mapping[str, Tensor]
        if piece.run == "decoding":
            assert task.tokenizer is not None
            answers = decode_answers(
                denoiser,
                arm.policy,
                [batch],
                arm.num_steps,
                decode_text=task.tokenizer.decode,
                references=[task.references[self.config.split][row] for row in piece.rows],
                grade=task.grade,
                length=self.config.length,
                temperature=piece.temperature,
                end_index=task.tokenizer.eos_index,
                **options,
            )
            found = {"correct": answers.correct.long(), "canvas": answers.canvas}
            counted: Any = answers
        else:
            path = path_likelihood(denoiser, arm.policy, [batch], arm.num_steps, **options)
            found = {"nats": path.nats, "canvas": path.tokens}
            counted = path
        found |= {name: getattr(counted, name) for name in ("tokens", "nfe", "fallback")}
        names = {"arm": arm.name, "run": piece.run, "seed": piece.seed, "temperature": piece.temperature}
        seconds = round(time.perf_counter() - begin, 4)
        values = {name: tensor.tolist() for name, tensor in found.items()}
        return {**names, "rows": list(piece.rows), **values, "seconds": seconds}

    def results(self, finished: Mapping[str, Mapping[str, Any]]) -> Results:
        """All that has been measured, arm by arm."""
        config = self.config
        labels: dict[str, str | int | float] = {
            "task": self.task.name,
            "split": config.split,
            "seed": config.seed,
            "data_seed": self.data_seed,
            "denoiser_weights": self.digest,
            "batch_size": config.batch_size,
            "canvas": "own length" if config.length is None else config.length,
        }
        results = Results(config, self.metrics, labels, self.arms, self.rows, self._costs())
        for piece in self.pieces:
            results.add(piece.arm, piece.run, piece.seed, piece.temperature, finished[piece.key])
        return results

    def _costs(self) -> dict[str, dict[str, float]]:
        """Parameters of every learned policy, and its cost as a share of that of the denoiser.

        Measured once for policies that differ in their weights and dials alone.
        """
        middle = self.pieces[len(self.pieces) // 2].rows
        batch = self.stream.batch(torch.tensor(middle[:COSTED_ROWS]))
        known: dict[str, PolicyCost] = {}
        found = {}
        for arm in self.arms:
            if arm.network is not None:
                kind = value_digest([fingerprint(arm.network), arm.identity["decision"], arm.num_steps])
                if kind not in known:
                    denoiser = self.denoiser if arm.denoiser is None else arm.denoiser
                    known[kind] = policy_cost(denoiser, arm.policy, batch, arm.num_steps, device=self.config.device)
                found[arm.name] = {
                    "policy_parameters": sum(parameter.numel() for parameter in arm.network.parameters()),
                    "policy_flops_share": known[kind].flops,
                    "policy_wall_share": known[kind].wall,
                }
        return found


def _share(shard: str | None, processes: Processes) -> tuple[int, int]:
    """Number of this process, from 0, and how many there are."""
    if shard is None:
        return processes.rank, processes.size
    if processes.size > 1:
        raise UserError("--shard", "given to several processes of a launcher", "leave it out: they share the work")
    number, slash, count = shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError("--shard", f"cannot read {shard!r}", "write 1/4 for the first of four shards")
    return int(number) - 1, int(count)


def subject(config: Config) -> tuple[TaskConfig, DenoiserConfig, int]:
    """Data, denoiser and seed of the data, from wherever they are given.

    Raises:
        UserError: they are not given at all.
    """
    task, denoiser, seed = config.task, config.denoiser, config.seed
    if config.source is not None:
        trained_on, data_seed = _trained_on(config.source)
        return task or trained_on, denoiser or SavedDenoiserConfig(run=config.source), data_seed
    folders = _folders(config)
    if (task is None or denoiser is None) and folders:
        learned = load_settings(folders[0])
        return task or learned.task, denoiser or learned.denoiser, learned.seed
    if task is None or denoiser is None:
        raise UserError("--denoiser", "there is no denoiser", "give the run of one, or --run")
    return task, denoiser, seed


def _folders(config: Config) -> list[str]:
    """Run folders of all learned orders."""
    return [*config.runs, *(run for order in config.orders for run in order.runs)]


def _trained_on(folder: str) -> tuple[TaskConfig, int]:
    """Data of a run of train-denoiser, and their seed."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UserError("--denoiser", f"{folder} is no run of train-denoiser", "give its run folder")
    # The run that it went on from may be gone.
    settings = load_config(TrainDenoiserConfig, path, ["denoiser=transformer"])
    return settings.task, settings.seed


Row = tuple[tuple[int, ...], tuple[int, ...]]


def _whole_rows(split: Mapping[str, Tensor]) -> list[Row]:
    """Prompt and response of every row, without padding."""
    parts = []
    for name, mask in (("context", "context_mask"), ("tokens", "attention_mask")):
        if name in split:
            present = split[mask].tolist() if mask in split else torch.ones_like(split[name]).tolist()
            pairs = zip(split[name].tolist(), present, strict=True)
            parts.append([tuple(token for token, here in zip(*pair, strict=True) if here) for pair in pairs])
        else:
            parts.append([()] * len(split["tokens"]))
    return list(zip(*parts, strict=True))


def _kind(config: DenoiserConfig) -> dict[str, Any]:
    """Settings of a denoiser, wherever its folder is."""
    return json.loads(json.dumps({key: value for key, value in config_dict(config).items() if key != "run"}))
