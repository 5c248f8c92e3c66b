"""Orders that are learned for a trained denoiser, with several seeds each, and held against all heuristics."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from orderppl.errors import UserError
from orderppl.experiments import frontier
from orderppl.experiments.build import SavedDenoiserConfig
from orderppl.experiments.config import setting
from orderppl.experiments.frontier_report import Results
from orderppl.experiments.orders import OrderArm, Orders, check_names
from orderppl.experiments.results import Record
from orderppl.experiments.stages import Stages
from orderppl.experiments.sweeps import LearnedSweepConfig

ORDERS = "orders"  # folder of what is learned: orders/seed-0/ARM is a run of fit-order


@dataclass(frozen=True)
class Config(frontier.Config):
    """A frontier, and what to learn for it."""

    learn: tuple[OrderArm, ...] = setting((), "orders to learn")
    training_seeds: int = setting(3, "fits of each of them, from --seed upwards", at_least=1, option="--seeds")
    curve: str | None = setting(None, "name of the curve that they are points of, such as one per step budget")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        check_names(self.learn)
        decisions = {arm.decisions for arm in self.learn}
        if self.curve is not None and len(decisions) > 1:
            raise UserError("curve", "arms that are decoded in different ways", "give all the same decisions")


def learn_and_compare(config: Config, out: Path) -> tuple[Results | None, list[Record]]:
    """Learn what is not learned yet, then measure and show what is not measured yet.

    Returns:
        What `frontier.compare` returns, with records of the time that every fit took.
    """
    task, denoiser, data_seed = frontier.subject(config)
    if not isinstance(denoiser, SavedDenoiserConfig):
        raise UserError("--denoiser", f"{denoiser.name} is no run of train-denoiser", "give the folder of one")
    stages = Stages(out / ORDERS, data_seed, ORDERS)
    orders = Orders(stages, config, task, Path(denoiser.run))
    names: list[str] = []
    sweeps: list[LearnedSweepConfig] = []
    for seed in range(config.seed, config.seed + config.training_seeds):
        for arm in config.learn:
            orders.learn(arm, f"seed-{seed}/{arm.arm}", seed)
        runs = {arm.arm: str(out / ORDERS / f"seed-{seed}" / arm.arm) for arm in config.learn}
        names += [f"seed-{seed}/{arm}" for arm in runs]
        if config.curve is not None and runs:
            decisions = config.learn[0].decisions
            sweeps.append(LearnedSweepConfig(arm=config.curve, runs=tuple(runs.values()), decisions=decisions))
        else:
            sweeps += [
                LearnedSweepConfig(arm=arm.arm, runs=(runs[arm.arm],), decisions=arm.decisions) for arm in config.learn
            ]
    plain = {item.name: getattr(config, item.name) for item in fields(frontier.Config)}
    compared = replace(frontier.Config(**plain), orders=(*config.orders, *sweeps))
    labels = {"task": task.name, "data_seed": data_seed}
    times = [record for name in names for record in stages.records(name, labels)]
    results, records = frontier.compare(compared, out)
    return results, [*records, *times]
