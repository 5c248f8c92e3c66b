"""The pairs of prior and posterior of pair.py, and how they are fitted."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyro
import torch

from orderppl import Denoiser, fit
from orderppl.data import Examples
from orderppl.guides import Guide, PolicyGuide, PosteriorGuide, RenormalisedScoreGuide
from orderppl.inference import ImportanceWeightedELBO, RevealTraceGraph_ELBO
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, UnmaskingModel

PARTICLES, BATCH_SIZE = 8, 8
Name = Literal[
    "learned", "paper", "paper, 0.05", "paper, from the prior", "paper, as the prior", "paper, importance-weighted"
]
Make = Callable[[LearnedPolicy, Denoiser, int], Guide]


def paper(policy: LearnedPolicy, denoiser: Denoiser, steps: int, temperature: float = 0.1) -> Guide:
    """Scores of the tokens alone."""
    return RenormalisedScoreGuide(SequenceEncoder(denoiser.vocab_size, width=48), steps, temperature)


def corrected(policy: LearnedPolicy, denoiser: Denoiser, steps: int, temperature: float | None = None) -> Guide:
    """The prior, corrected by what the tokens say."""
    features = ("confidence", "margin", "entropy", "likelihood")
    network = PolicyNetwork(denoiser.vocab_size, 48, features=features, sees_truth=True, zero_init=True)
    return PosteriorGuide(policy, denoiser, steps, network, temperature=temperature)


ARMS: dict[Name, tuple[Make, type[RevealTraceGraph_ELBO] | type[ImportanceWeightedELBO]]] = {
    "learned": (lambda policy, denoiser, steps: PolicyGuide(policy, denoiser, steps), RevealTraceGraph_ELBO),
    "paper": (paper, RevealTraceGraph_ELBO),
    "paper, 0.05": (partial(paper, temperature=0.05), RevealTraceGraph_ELBO),
    "paper, from the prior": (partial(corrected, temperature=1.0), RevealTraceGraph_ELBO),
    "paper, as the prior": (corrected, RevealTraceGraph_ELBO),
    "paper, importance-weighted": (corrected, ImportanceWeightedELBO),
}


def learn(
    arm: Name, denoiser: Denoiser, data: Examples, steps: int, updates: int, lr: float, seed: int, out: Path
) -> tuple[UnmaskingModel, Guide]:
    """Fit one pair; what a guide has of its own learns with `lr`, the prior with a third of it."""
    pyro.set_rng_seed(seed)
    policy = LearnedPolicy(PolicyNetwork(denoiser.vocab_size, 48, bias=-1.0))
    make, objective = ARMS[arm]
    model, guide = UnmaskingModel(denoiser, policy, steps), make(policy, denoiser, steps)
    own = "correction" if isinstance(guide, PosteriorGuide) else "guide"
    rates: Any = lr if arm == "learned" else {"model.policy": lr / 3, own: lr}
    settings: dict[str, Any] = {"updates": updates, "batch_size": BATCH_SIZE, "group": 20, "grad_clip": 1.0}
    settings |= {"schedule": "cosine", "warmup": 10, "seed": seed, "out": out, "resume": True}
    fit(model, guide, data, objective=objective(PARTICLES), optimizer=torch.optim.Adam, lr=rates, **settings)
    return model, guide
