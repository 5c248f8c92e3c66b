"""How the experiments fit a plan."""

from functools import partial
from typing import Any

import torch

from orderppl import Denoiser, fit
from orderppl.guides import PolicyGuide
from orderppl.inference import Anneal, RevealTraceGraph_ELBO
from orderppl.models import UnmaskingModel
from orderppl.policies import RandomSteps
from orderppl.policies.plans import Planned


def fit_plan(
    plan: Planned,
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
