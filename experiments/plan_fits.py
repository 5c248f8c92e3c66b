"""How the experiments fit a plan, or another policy."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

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


def updates_within(rows: int, batch_size: int, particles: int, steps: int) -> int:
    """Updates that a number of denoiser rows pays for.

    An update reads the fully hidden state of each sequence once and the T - 1 later ones once per order.
    """
    return max(rows // (batch_size * (1 + (steps - 1) * particles)), 1)


def learn_plan(
    plan: Policy,
    denoiser: Denoiser,
    train: Examples,
    steps: int,
    *,
    rows: int,
    lr: float,
    bonus: float,
    batch_size: int = 4,
    particles: int = 8,
    seed: int = 0,
    out: Path | None = None,
    **settings: Any,
) -> int:
    """Fit a plan with as many updates as `rows` pay for, see `fit_plan`; return their number."""
    pyro.set_rng_seed(seed)
    updates = updates_within(rows, batch_size, particles, steps)
    fit_plan(
        plan,
        denoiser,
        train,
        steps,
        bonus=bonus,
        fade=int(0.75 * updates),
        lr=lr,
        particles=particles,
        updates=updates,
        batch_size=batch_size,
        seed=seed,
        out=out,
        **settings,
    )
    return updates


def learn_plans(
    make: Callable[[int], Any],
    denoiser: Denoiser,
    train: Examples,
    steps: int,
    seeds: Iterable[int],
    out: Path,
    *,
    halved: bool = False,
    **budget: Any,
) -> dict[int, Any]:
    """Make and fit a plan on every seed; what is finished in `out` is read. See `learn_plan`.

    Args:
        make: number of steps -> a plan, or another policy.
        denoiser: see `orderppl.Denoiser`.
        train: rows to learn from.
        steps: step budget T.
        seeds: training seeds.
        out: folder of the runs.
        halved: learn for half as many steps, each of which is then played in two.
        budget: further arguments of `learn_plan`.
    """
    learned = (steps + 1) // 2 if halved else steps
    plans: dict[int, Any] = {}
    for seed in seeds:
        pyro.set_rng_seed(seed)
        plan = make(learned)
        learn_plan(plan, denoiser, train, learned, seed=seed, out=out / f"seed-{seed}", resume=True, **budget)
        plans[seed] = Halved(plan) if halved else plan
    return plans
