"""Several orders for one trained denoiser, each learned in a stage of its own; every one is a run of fit-order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import nn

from orderppl.errors import UserError
from orderppl.experiments.build import (
    DENOISER_FILE,
    DenoiserConfig,
    ElboConfig,
    FitConfig,
    GuideConfig,
    LearnedPolicyConfig,
    OptimizerConfig,
    OrderProblem,
    PolicyGuideConfig,
    PriorConfig,
    RevealTraceGraphConfig,
    SavedDenoiserConfig,
    Task,
    TaskConfig,
    build_denoiser,
    build_problem,
    build_task,
    saved_tokenizer,
)
from orderppl.experiments.config import RunConfig, identity_dict, setting
from orderppl.experiments.fit_order import Config as FitOrderConfig
from orderppl.experiments.fit_order import fit_problem, save_order
from orderppl.experiments.results import Record
from orderppl.experiments.stages import Stages
from orderppl.inference.checkpoints import file_digest


@dataclass(frozen=True)
class OrderArm:
    """One order to learn."""

    arm: str = setting("learned", "its name in the table and its folder")
    num_steps: int = setting(4, "step budget T", at_least=1)
    prior: PriorConfig = setting(LearnedPolicyConfig, "p(order)")
    guide: GuideConfig = setting(PolicyGuideConfig, "q(order | sequence)")
    freeze_denoiser: bool = setting(True, "learn the order only")
    elbo: ElboConfig = setting(RevealTraceGraphConfig, "the objective", unnamed=True)
    optimizer: OptimizerConfig = setting(OptimizerConfig, "the optimiser")
    fit: FitConfig = setting(FitConfig, "the training loop")
    decisions: tuple[Literal["mode", "sample", "rank"], ...] = setting(
        ("mode",), "how it is decoded: mode, sample, rank; one arm each"
    )
    adaptive: bool = setting(False, "chooses its number of steps; compared with thresholds at equal mean NFE")


def check_names(orders: Sequence[OrderArm]) -> None:
    """Refuse two arms of one name.

    Raises:
        UserError: names the arms.
    """
    names = [arm.arm for arm in orders]
    if len(set(names)) < len(names):
        raise UserError("orders", f"two arms have one name: {', '.join(names)}", "give each its own")


class Orders:
    """Learns orders for one trained denoiser.

    Args:
        stages: where, and the seed of the data.
        common: device and dtype.
        task: data.
        run: the train-denoiser run.
        start: gives what that run starts from, whose tokeniser reads the data before there is the run.
    """

    def __init__(
        self,
        stages: Stages,
        common: RunConfig,
        task: TaskConfig,
        run: Path,
        start: Callable[[], DenoiserConfig] | None = None,
    ) -> None:
        self.stages, self.common, self.task_config, self.start = stages, common, task, start
        self.saved = SavedDenoiserConfig(run=str(run))

    @cached_property
    def task(self) -> Task:
        """The data, read when first needed; with the tokeniser of the denoiser, once there is one."""
        tokenizer = saved_tokenizer(self.saved)
        if tokenizer is None and self.start is not None:
            tokenizer = saved_tokenizer(self.start())
        return build_task(self.task_config, self.stages.seed, tokenizer)

    def denoiser(self) -> nn.Module:
        """The trained denoiser."""
        return build_denoiser(self.saved, self.task, self.task_config).to(self.common.device)

    def config(self, arm: OrderArm, seed: int | None = None) -> FitOrderConfig:
        """Settings of fit-order for an arm; the seed is that of the data when left out."""
        return FitOrderConfig(
            seed=self.stages.seed if seed is None else seed,
            device=self.common.device,
            dtype=self.common.dtype,
            num_steps=arm.num_steps,
            task=self.task_config,
            denoiser=self.saved,
            freeze_denoiser=arm.freeze_denoiser,
            prior=arm.prior,
            guide=arm.guide,
            elbo=arm.elbo,
            optimizer=arm.optimizer,
            fit=arm.fit,
        )

    def problem(self, arm: OrderArm, denoiser: nn.Module | None = None) -> OrderProblem:
        """The objects of an arm, before its fit; with another denoiser than the trained one, where it is given."""
        return build_problem(self.config(arm), self.task, self.denoiser() if denoiser is None else denoiser)

    def learn(self, arm: OrderArm, stage: str, seed: int | None = None) -> None:
        """Fit an arm, unless that is done.

        Args:
            arm: what to learn.
            stage: folder of its stage.
            seed: of the fit; that of the data when left out.
        """
        settings, folder = self.config(arm), self.stages.out / stage
        identity = identity_dict(settings) | {"denoiser": file_digest(Path(self.saved.run) / DENOISER_FILE)}
        if seed is not None:
            identity["fit_seed"] = seed

        def work(resume: bool) -> list[Record]:
            problem = self.problem(arm)
            fit_problem(self.config(arm, seed), problem, folder, resume=resume)
            if self.stages.processes.is_first:
                save_order(replace(settings, seed=self.stages.seed), problem, folder)
            return []

        self.stages.run(stage, settings, identity, work, seed)
