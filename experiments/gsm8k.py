"""Grade-school arithmetic (GSM8K): train a small denoiser, learn orders for it, answer the test problems.

    orderppl gsm8k --preset cpu --data ../shared/data/gsm8k --out runs/gsm8k
    orderppl gsm8k --preset cpu --data ../shared/data/gsm8k --out runs/gsm8k --form programs --stage order
    orderppl gsm8k --preset paper-tiny --data ../shared/data/gsm8k --out runs/gsm8k-tiny
    orderppl gsm8k --preset paper --device cuda --out runs/gsm8k-paper --stage estimate
    torchrun --nproc_per_node 8 -m orderppl.experiments.cli gsm8k --preset paper --device cuda --out runs/gsm8k-paper

Three stages per form: `denoiser`, `order` (one fit per learned arm) and `evaluate`. Each writes a folder of its own
under --out/FORM. A finished stage is not run again, a killed one goes on from its last checkpoint: repeat the command,
on as many processes as there are then. `estimate` says what memory and time the first two need, as they do themselves
before they begin. Everything is tuned and stopped on validation rows; only `evaluate` looks at the test rows.

`paper` is the experiment of arXiv 2602.23968; `paper-tiny` does all that it does, in small, with a random denoiser in
place of the public one, so that its numbers mean nothing. Both compare their orders as `orderppl frontier` does, by
several processes or by shards (`--shard 1/4`).

In the `programs` form the prompt gives the left side of every equation, so that exact match says something about a
small denoiser. In the `equations` form it has to find them in the question; read `path_nats` there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm.auto import tqdm

from orderppl.data.gsm8k import load_gsm8k
from orderppl.decoding import Policy, StochasticDecision, make_policy
from orderppl.denoising import Denoiser
from orderppl.errors import UserError, first_line
from orderppl.evaluation import evaluate_policies, paired_difference
from orderppl.experiments import frontier
from orderppl.experiments.build import (
    DENOISER_FILE,
    EasyFirstConfig,
    Gsm8kTask,
    PretrainedDenoiserConfig,
    ResidualPolicyConfig,
    StepPriceConfig,
    Task,
    TransformerConfig,
    build_denoiser,
    learned_policy,
    piece_size,
)
from orderppl.experiments.config import RunConfig, identity_dict, setting
from orderppl.experiments.estimate import Throughput, estimate_denoiser, estimate_order, measure_throughput, show
from orderppl.experiments.fit_order import ORDER_FILE, learned_modules
from orderppl.experiments.orders import OrderArm, Orders, check_names
from orderppl.experiments.results import Record, real
from orderppl.experiments.stages import Stages
from orderppl.experiments.stand_in import StandInConfig, write_stand_in
from orderppl.experiments.sweeps import LearnedSweepConfig
from orderppl.experiments.train_denoiser import Config as TrainDenoiserConfig
from orderppl.experiments.train_denoiser import DenoiserFitConfig, fit_denoiser
from orderppl.inference.batches import BatchStream
from orderppl.inference.checkpoints import file_digest, load_weights
from orderppl.inference.processes import Processes
from orderppl.models import EasyFirst
from orderppl.models.denoisers import TOKENIZER_FOLDER, masked_diffusion_nelbo

PRESETS = {"cpu": "gsm8k_cpu", "paper": "gsm8k_paper", "paper-tiny": "gsm8k_paper_tiny"}
CONFIG = "gsm8k_cpu"
DISTRIBUTED = True
STAND_IN = "stand-in"  # folder of a random model inside the run folder
STAND_IN_TEXTS = 2000  # its tokeniser is made from
FAMILIES = {"threshold": "threshold", "soft": "easy_first"}  # adaptive heuristics: their name in comparisons
Form = Literal["programs", "equations"]
Rows = dict[tuple[str, str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FormConfig:
    """The three stages of one form of the data."""

    task: Gsm8kTask = setting(Gsm8kTask, "data")
    denoiser: TransformerConfig | PretrainedDenoiserConfig | StandInConfig = setting(
        TransformerConfig, "a new one, a public one to train further, or a random one in its place", unnamed=True
    )
    training: DenoiserFitConfig = setting(DenoiserFitConfig, "training of the denoiser")
    orders: tuple[OrderArm, ...] = setting((), "learned arms")
    budgets: tuple[int, ...] = setting((2, 4, 8), "step budgets T of the fixed-budget heuristics", at_least=1)
    heuristics: tuple[str, ...] = setting(
        ("random", "left_to_right", "top_prob", "margin", "entropy"), "rankings with fixed budgets"
    )
    sizes: tuple[str, ...] = setting(("uniform", "cosine"), "their set sizes")
    thresholds: tuple[float, ...] = setting((0.5, 0.7, 0.9), "confidence thresholds", above=0, below=1)
    soft_thresholds: tuple[float, ...] = setting(
        (0.5, 0.9), "thresholds of sampled EasyFirst sets, what residual policies start from", above=0, below=1
    )
    sequential: tuple[str, ...] = setting(("left_to_right", "top_prob"), "rankings that reveal one token a step")
    random_seeds: int = setting(3, "seeds of arms that draw their order", at_least=1)
    decode: Literal["all", "longest"] = setting("all", "arms to decode: all, or those with the largest budget")
    rows: int | None = setting(None, "test rows to use, from the first; null: all", at_least=1)
    batch_size: int = setting(128, "test rows decoded together", at_least=1)
    compare: frontier.ComparisonConfig | None = setting(
        None, "the evaluation of `orderppl frontier`, in place of that from `budgets` to `batch_size`; null: the latter"
    )
    note: str = setting("", "shown under the table")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        check_names(self.orders)
        if not self.budgets:
            raise UserError("budgets", "there is none", "give at least one step budget, such as [4]")


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of gsm8k."""

    data: str = setting("openai/gsm8k", "folder of train.jsonl and test.jsonl, or a hub name", option="--data")
    form: Literal["programs", "equations", "both"] = setting("both", "programs, equations or both", option="--form")
    stage: Literal["estimate", "denoiser", "order", "evaluate", "all"] = setting(
        "all", "estimate (of the first two), denoiser, order, evaluate or all", option="--stage"
    )
    shard: str | None = setting(
        None, "this process's share of an evaluation by `compare`: 1/4 to 4/4", option="--shard", alters=False
    )
    device_tflops: float | None = setting(
        None, "throughput to estimate the time by, 10^12 operations a second; null: measured", above=0, alters=False
    )
    programs: FormConfig = setting(FormConfig, "the programs form")
    equations: FormConfig = setting(FormConfig, "the equations form")


def run(config: Config, out: Path) -> Iterable[Record]:
    """Run the stages that were asked for; print one table per form."""
    records: list[Record] = []
    forms: tuple[Form, ...] = ("programs", "equations") if config.form == "both" else (config.form,)
    for form in forms:
        study = Study(config, form, out / form)
        if config.stage == "estimate":
            records += study.estimate()
            continue
        if config.stage in ("denoiser", "all"):
            study.estimate(("denoiser",), unfinished=True)
            study.train()
        if config.stage in ("order", "all"):
            study.estimate(("order",), unfinished=True)
            study.learn_orders()
        found = study.evaluate() if config.stage in ("evaluate", "all") else []
        records += study.records()
        if study.settings.compare is not None:
            records += found
        elif found and study.processes.is_first:
            Console().print(arm_table(found, f"GSM8K, {form} form, test rows"), study.settings.note, "", sep="\n")
    return records


# --------------------------------------------------------------------------------------------------------------- stages


class Study:
    """The stages of one form in its folder.

    Args:
        config: of the experiment.
        form: which form.
        out: folder of the form.
    """

    def __init__(self, config: Config, form: Form, out: Path) -> None:
        self.config, self.form, self.out = config, form, out
        self.settings: FormConfig = getattr(config, form)
        self.task_config = replace(self.settings.task, data=config.data, form=form)
        self.processes = Processes.join(config.device)
        self.stages = Stages(out, config.seed, form, self.processes)
        self.orders = Orders(self.stages, config, self.task_config, out / "denoiser", lambda: self.start)
        self._loaded: nn.Module | None = None
        if config.shard is not None and self.settings.compare is None:
            raise UserError("--shard", f"{form} is not evaluated in shards", f"leave it out, or set {form}.compare")

    @property
    def task(self) -> Task:
        """The data."""
        return self.orders.task

    @cached_property
    def start(self) -> TransformerConfig | PretrainedDenoiserConfig:
        """What the training of the denoiser starts from; a stand-in is written when it is first needed, by all."""
        chosen = self.settings.denoiser
        if not isinstance(chosen, StandInConfig):
            return chosen
        folder = self.out / STAND_IN

        def texts() -> Iterator[str]:
            Console().print(f"No public model was asked for: a random one with its tokeniser goes to {folder}")
            rows, _ = load_gsm8k(self.task_config.data, self.form, validation=self.task_config.validation)
            for row in rows["train"].select(range(min(STAND_IN_TEXTS, len(rows["train"])))):
                yield from (row["prompt"], row["response"])

        self.processes.from_first(lambda: write_stand_in(chosen, folder, texts, self.config.seed))
        return PretrainedDenoiserConfig(
            model=str(folder),
            dtype="float64" if self.config.dtype == "float64" else "float32",
            tokenizer=str(folder / TOKENIZER_FOLDER),
        )

    def estimate(self, stages: Sequence[str] = ("denoiser", "order"), unfinished: bool = False) -> list[Record]:
        """Print what the trainings of these stages need; with `unfinished`, only those that are still to be done."""

        def wanted(stage: str, name: str) -> bool:
            return stage in stages and not (unfinished and self.stages.is_finished(name))

        arms = [arm for arm in self.settings.orders if wanted("order", arm.arm)]
        denoiser_too = wanted("denoiser", "denoiser")
        if not (arms or denoiser_too):
            return []
        training = self._training()  # on all processes: it may write a stand-in

        def measured() -> list[Record]:
            trained = self.stages.is_finished("denoiser")
            denoiser = (
                self.orders.denoiser() if trained else build_denoiser(training.denoiser, self.task, training.task)
            )
            try:
                found = [estimate_denoiser(training, self.task, denoiser)] if denoiser_too else []
                found += [estimate_order(a.arm, self.orders.config(a), self.orders.problem(a, denoiser)) for a in arms]
            except (RuntimeError, NotImplementedError) as error:  # a network that looks at numbers: it has none to see
                Console().print(f"There is no estimate for these networks: {first_line(error)}", markup=False)
                return []
            told = self.config.device_tflops
            if told is not None:
                return show(found, Throughput(told, "as device_tflops says"), self.config.device)
            return show(found, measure_throughput(denoiser, self.task, self.config), self.config.device)

        return [{"form": self.form, **record} for record in self.processes.from_first(measured)]

    def train(self) -> None:
        """Train the denoiser on the training rows; its run is one of train-denoiser."""
        folder = self.out / "denoiser"
        settings = self._training()

        def work(resume: bool) -> list[Record]:
            denoiser = build_denoiser(settings.denoiser, self.task, settings.task)
            fit_denoiser(settings, self.task, denoiser, folder, resume=resume)
            if not self.processes.is_first:
                return []
            rows = piece_size(settings.fit, settings.fit.batch_size)
            held_out = self.task.stream("validation", rows, shuffle=False, device=settings.device)
            bound = masked_diffusion_nelbo(denoiser, held_out, draws=8)
            n = {"split": "validation", "n": held_out.num_sequences}
            records: list[Record] = [
                {"metric": "elbo", "value": -bound["nelbo"], **n},
                {"metric": "nats_per_token", "value": bound["nats_per_token"], **n},
                {"metric": "parameters", "value": sum(parameter.numel() for parameter in denoiser.parameters())},
            ]
            if self.task.report is not None:
                records += [
                    {"metric": "rows", "value": count, "file": file, "outcome": outcome}
                    for file, outcome, count, _ in self.task.report.table()
                ]
            return records

        identity = identity_dict(settings) | {"denoiser": identity_dict(self.settings.denoiser)}
        self.stages.run("denoiser", settings, identity, work)

    def _training(self) -> TrainDenoiserConfig:
        return TrainDenoiserConfig(
            seed=self.config.seed,
            device=self.config.device,
            dtype=self.config.dtype,
            task=self.task_config,
            denoiser=self.start,
            fit=self.settings.training,
        )

    def learn_orders(self) -> None:
        """Fit every learned arm to the trained denoiser."""
        self._finished("denoiser")
        for arm in self.settings.orders:
            self.orders.learn(arm, arm.arm)

    def evaluate(self) -> list[Record]:
        """Compare all arms on the test rows."""
        weights = {arm.arm: file_digest(self._finished(arm.arm) / ORDER_FILE) for arm in self.settings.orders}
        denoiser = file_digest(self._finished("denoiser") / DENOISER_FILE)
        if self.settings.compare is not None:
            return self._compare(self.settings.compare)
        identity = {"denoiser": denoiser, "orders": weights, "seed": self.config.seed}
        identity |= {
            key: value for key, value in identity_dict(self.settings).items() if key not in ("training", "note")
        }

        def work(resume: bool) -> list[Record]:
            return list(self._evaluate()) if self.processes.is_first else []

        return self.stages.run("evaluation", self.settings, identity, work)

    def _compare(self, settings: frontier.ComparisonConfig) -> list[Record]:
        """The evaluation of `frontier`, which keeps its own record of what is finished."""
        learned = [
            LearnedSweepConfig(arm=arm.arm, runs=(str(self.out / arm.arm),), decisions=arm.decisions)
            for arm in self.settings.orders
        ]
        config = frontier.Config(
            **{item.name: getattr(settings, item.name) for item in fields(frontier.ComparisonConfig)},
            seed=self.config.seed,
            device=self.config.device,
            dtype=self.config.dtype,
            source=str(self.out / "denoiser"),
            orders=tuple(learned),
            shard=self.config.shard,
        )
        return [{"form": self.form, **record} for record in frontier.compare(config, self.out / "evaluation")[1]]

    def records(self) -> list[Record]:
        """What the finished stages found, with the seconds each took."""
        labels = {"task": "gsm8k", "form": self.form, "seed": self.config.seed}
        names = ("denoiser", *(arm.arm for arm in self.settings.orders), "evaluation")
        return [record for name in names for record in self.stages.records(name, labels)]

    def _finished(self, name: str) -> Path:
        kind = "denoiser" if name == "denoiser" else "order"
        return self.stages.finished(name, f"run --stage {kind} first")

    # ----------------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self) -> Iterator[Record]:
        settings, task = self.settings, self.task
        rows: Rows = {}
        nfe: dict[tuple[str, str], float] = {}  # (metric, arm) -> mean forwards of the run that measured the metric
        curves: dict[str, list[str]] = {"threshold": [], "soft": []}
        for arm in tqdm(list(self._arms()), desc=f"{self.form} arms", dynamic_ncols=True):
            wanted = settings.decode == "all" or arm.num_steps >= max(settings.budgets)
            metrics = ("accuracy", "path_nats", "nfe") if wanted else ("path_nats", "nfe")
            drawn: list[Rows] = []
            forwards: dict[str, list[float]] = {}
            for seed in range(self.config.seed, self.config.seed + (settings.random_seeds if arm.random else 1)):
                drawn.append({})
                found = evaluate_policies(
                    arm.denoiser or self._shared_denoiser(),
                    {arm.name: arm.policy},
                    self._test_batches(),
                    arm.num_steps,
                    metrics=metrics,
                    decode_text=task.tokenizer.decode if task.tokenizer is not None else None,
                    references=self._references(),
                    grade=task.grade,
                    seed=seed,
                    device=self.config.device,
                    rows=drawn[-1],
                )
                for record in found:
                    forwards.setdefault(str(record["metric"]), []).append(float(record["nfe"]))
                    yield record | {"family": arm.family, "parameters": arm.parameters, "policy_weights": arm.weights}
            for metric, arm_name in drawn[0]:  # comparisons use the mean over the seeds
                values = torch.stack([own[metric, arm_name][0] for own in drawn]).mean(0)  # [N]
                rows[metric, arm_name] = values, drawn[0][metric, arm_name][1]
                nfe[metric, arm_name] = sum(forwards[metric]) / len(drawn)
            if arm.family in curves:
                curves[arm.family].append(arm.name)
            if arm.family == "learned":
                yield from self._differences(arm, rows, nfe, curves)

    def _differences(
        self, arm: Arm, rows: Rows, nfe: Mapping[tuple[str, str], float], curves: Mapping[str, list[str]]
    ) -> Iterator[Record]:
        """Paired differences of a learned arm: at its own budget, or to families of thresholds at its mean NFE."""
        for metric in ("accuracy", "path_nats"):
            if (metric, arm.name) not in rows:
                continue
            own, weight = rows[metric, arm.name]
            others: dict[str, Tensor] = {}
            if arm.adaptive:
                for family, names in curves.items():
                    curve = [(nfe[metric, name], rows[metric, name][0]) for name in names if (metric, name) in rows]
                    matched = _at_equal_nfe(curve, nfe[metric, arm.name])
                    if matched is not None:
                        others[f"{FAMILIES[family]} at equal NFE"] = matched
            else:
                suffix = f" T={arm.num_steps}"
                others = {
                    name: values
                    for (kind, name), (values, _) in rows.items()
                    if kind == metric and name.endswith(suffix) and name != arm.name
                }
            for name, values in others.items():
                interval = paired_difference(own, values, weight, seed=self.config.seed)
                yield {
                    "metric": f"{metric}_difference",
                    "value": interval.value,
                    "low": interval.low,
                    "high": interval.high,
                    "arm": arm.name,
                    "baseline": name,
                    "steps": arm.num_steps,
                    "nfe": nfe[metric, arm.name],
                    "n": len(own),
                    "seed": self.config.seed,
                }

    def _arms(self) -> Iterator[Arm]:
        """Heuristics first, then what was learned."""
        settings = self.settings
        longest = self.task.longest
        for budget in settings.budgets:
            for name in settings.heuristics:
                for size in settings.sizes:
                    policy = make_policy(name, sizes=size)
                    yield Arm(f"{name} {size} T={budget}", policy, budget, "fixed", f"sizes={size}", name == "random")
        for tau in settings.thresholds:
            yield Arm(f"threshold {tau:g}", make_policy("threshold", tau=tau), longest, "threshold", f"tau={tau:g}")
        for tau in settings.soft_thresholds:
            soft = StochasticDecision(EasyFirst(tau), "sample")
            budget = max(settings.budgets)
            yield Arm(f"easy_first {tau:g} T={budget}", soft, budget, "soft", f"threshold={tau:g}, sampled", True)
        for name in settings.sequential:
            policy = make_policy(name)  # with a budget of one step per token: one token a step
            yield Arm(f"{name} sequential", policy, longest, "sequential", "one token a step", name == "random")
        for order in settings.orders:
            problem = self.orders.problem(order)
            load_weights(learned_modules(problem), self._finished(order.arm) / ORDER_FILE)
            problem.model.to(self.config.device)
            problem.guide.to(self.config.device)
            for decision in order.decisions:
                learned = learned_policy(problem, decision)
                name = f"{order.arm} ({decision}) T={order.num_steps}"
                weights = sum(parameter.numel() for parameter in problem.model.prior.parameters())
                yield Arm(
                    name,
                    learned,
                    order.num_steps,
                    "learned",
                    _described(order, decision),
                    decision == "sample",
                    order.adaptive,
                    weights,
                    problem.model.denoiser,
                )

    def _shared_denoiser(self) -> Denoiser:
        if self._loaded is None:
            self._loaded = self.orders.denoiser()
        assert isinstance(self._loaded, Denoiser)
        return self._loaded

    def _order_of_rows(self) -> Tensor:
        """Test rows to use, sorted by length so that rows decoded together are alike."""
        batch = self.task.splits["test"]
        length = batch["attention_mask"].sum(-1) + batch["context_mask"].sum(-1)  # [N]
        return length[: self.settings.rows].argsort(stable=True)

    def _test_batches(self) -> list[dict[str, Tensor]]:
        order = self._order_of_rows()
        rows = {name: tensor[order] for name, tensor in self.task.splits["test"].items()}
        stream = BatchStream(rows, self.settings.batch_size, shuffle=False, device=self.config.device)
        return list(stream.once())

    def _references(self) -> list[str]:
        return [self.task.references["test"][index] for index in self._order_of_rows().tolist()]


@dataclass(frozen=True)
class Arm:
    """A policy to evaluate, as it is shown in the table."""

    name: str
    policy: Policy
    num_steps: int
    family: Literal["fixed", "threshold", "soft", "sequential", "learned"]
    parameters: str
    random: bool = False
    adaptive: bool = False
    weights: int = 0
    denoiser: Denoiser | None = None


def _described(order: OrderArm, decision: str) -> str:
    """What was learned, in a few words."""
    prior, price = order.prior, ""
    if isinstance(prior, StepPriceConfig):
        price, prior = f", price={prior.price:g}", prior.prior
    base = ""
    if isinstance(prior, ResidualPolicyConfig):
        base = f" on {prior.base.name}"
        if isinstance(prior.base, EasyFirstConfig):
            base += f" {prior.base.threshold:g}"
    return f"{prior.name}{base}, guide={order.guide.name}{price}, {decision}"


def _at_equal_nfe(curve: list[tuple[float, Tensor]], nfe: float) -> Tensor | None:
    """Per-row values of a family of arms, interpolated between the two arms around a mean NFE.

    That is the expectation of choosing between the two arms at random, at that mean NFE.

    Args:
        curve: mean NFE and values float [N] of every arm.
        nfe: where to read it.

    Returns:
        float [N]; None outside the curve.
    """
    curve = sorted(curve, key=lambda point: point[0])
    for (left, below), (right, above) in itertools.pairwise(curve):
        if left <= nfe <= right:
            share = 0.0 if right == left else (nfe - left) / (right - left)
            return (1 - share) * below + share * above
    return None


# ---------------------------------------------------------------------------------------------------------------- table


def arm_table(records: Iterable[Record], title: str) -> Table:
    """One line per arm: what it is, its steps, and its exact match and path likelihood with 95% intervals.

    Args:
        records: of an evaluation; several seeds of an arm are averaged.
        title: shown above the table.
    """
    arms: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        if record["metric"] in ("accuracy", "path_nats", "nfe"):
            arms.setdefault(str(record["arm"]), {}).setdefault(str(record["metric"]), []).append(record)
    table = Table(title=title, title_justify="left")
    for column in ("arm", "parameters", "policy weights", "steps", "NFE mean (min-max)"):
        table.add_column(column, justify="left" if column in ("arm", "parameters") else "right")
    for column in ("exact match %", "path_nats", "n", "seeds"):
        table.add_column(column, justify="right")
    for arm, metrics in arms.items():
        cost = metrics.get("nfe", metrics["path_nats"])
        first = cost[0]
        low = min(int(real(record, "nfe_min")) for record in cost)
        high = max(int(real(record, "nfe_max")) for record in cost)
        table.add_row(
            arm,
            str(first["parameters"]),
            str(first["policy_weights"]),
            str(first["steps"]),
            f"{_mean(cost, 'nfe'):.2f} ({low}-{high})",
            _interval(metrics.get("accuracy", []), 100, 1),
            _interval(metrics.get("path_nats", []), 1, 3),
            str(first["n"]),
            str(len(cost)),
        )
    return table


def _mean(records: list[Record], key: str) -> float:
    return sum(real(record, key) for record in records) / len(records)


def _interval(records: list[Record], factor: float, digits: int) -> str:
    if not records:
        return ""
    value, low, high = (f"{factor * _mean(records, key):.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
