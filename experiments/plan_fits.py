"""How the experiments fit a plan, or another policy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import torch

from orderppl import Denoiser, Policy, fit
from orderppl.data import Examples
from orderppl.guides import PolicyGuide
from orderppl.inference import Anneal, RevealTraceGraph_ELBO
from orderppl.models import OpeningPlan, ScanNetwork, UnmaskingModel
from orderppl.policies import Halved, Plan, RandomSteps, ScanPlan
from orderppl.policies.plans import Planned

RATES = (0.0, 0.5, 0.75, 0.9)  # of the traces of a scan


def make_plan(steps: int, family: str, vocab_size: int) -> Planned:
    """A plan that reads what is expected while everything is hidden."""
    if family == "independent":
        return Plan(OpeningPlan(steps, vocab_size))
    return ScanPlan(ScanNetwork(steps, OpeningPlan(16, vocab_size), rates=RATES), beams=64)


def fit_plan(
    plan: Policy,
    denoiser: Denoiser,
    data: Any,
    steps: int,
    *,
    bonus: float,
    fade: int,
    lr: float,
    particles: int = 8,
    expected: bool = False,
    **settings: Any,
) -> None:
    """Fit a plan against uniform steps, so that the KL is an entropy bonus, which fades.

    Args:
        plan: what is learned.
        denoiser: see `orderppl.Denoiser`.
        data: see `orderppl.fit`.
        steps: step budget T.
        bonus: weight of the entropy bonus at the start.
        fade: updates after which it is gone.
        lr: learning rate of Adam.
        particles: orders per sequence.
        expected: see `UnmaskingModel`.
        settings: further arguments of `fit`.
    """
    fit(
        UnmaskingModel(denoiser, RandomSteps(), steps, expected=expected),
        PolicyGuide(plan, denoiser, steps),
        data,
        objective=RevealTraceGraph_ELBO(num_particles=particles),
        optimizer=partial(torch.optim.Adam, lr=lr),
        anneal={"objective.kl_weight": Anneal(bonus, 0.0, fade)},
        **settings,
    )


@dataclass(frozen=True, kw_only=True)
class PlanFit:
    """What a fit of a plan may spend, and how.

    Attributes:
        rows: denoiser rows that it may read.
        lr: learning rate of Adam.
        schedule: of the learning rate.
        bonus: weight of the entropy bonus at the start; it fades.
        batch_size: sequences of an update.
        particles: orders per sequence.
        group: batches that are sorted by length together.
        grad_clip: largest norm of the gradient.
        halved: learn for half as many steps, each of which is then played in two.
        bfloat16: fit under autocast, up to twice as fast where the processor knows the format; what is compared is
            float32.
    """

    rows: int = 60_000
    lr: float = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    bonus: float = 0.1
    batch_size: int = 4
    particles: int = 8
    group: int = 1
    grad_clip: float | None = None
    halved: bool = False
    bfloat16: bool = False

    def updates(self, steps: int) -> int:
        """Updates that the rows pay for.

        An update reads the fully hidden state of each sequence once and the T - 1 later ones once per order.
        """
        return max(self.rows // (self.batch_size * (1 + (steps - 1) * self.particles)), 1)


def learn_plans(
    make: Callable[[int], Any],
    denoiser: Denoiser,
    train: Examples,
    steps: int,
    seeds: Iterable[int],
    out: Path,
    fit: PlanFit,
) -> dict[int, Any]:
    """Make and fit a plan on every seed, see `fit_plan`; what is finished in `out` is read.

    Args:
        make: number of steps -> a plan, or another policy.
        denoiser: see `orderppl.Denoiser`.
        train: rows to learn from.
        steps: step budget T.
        seeds: training seeds.
        out: folder of the runs.
        fit: what a fit may spend.
    """
    learned = (steps + 1) // 2 if fit.halved else steps
    updates, plans = fit.updates(learned), dict[int, Any]()
    same = ("lr", "schedule", "bonus", "batch_size", "particles", "group", "grad_clip", "bfloat16")
    settings: dict[str, Any] = {name: getattr(fit, name) for name in same}
    settings |= {"updates": updates, "fade": int(0.75 * updates), "resume": True}
    for seed in seeds:
        pyro.set_rng_seed(seed)
        plan = make(learned)
        pyro.set_rng_seed(seed)
        fit_plan(plan, denoiser, train, learned, seed=seed, out=out / f"seed-{seed}", **settings)
        plans[seed] = Halved(plan) if fit.halved else plan
    return plans
