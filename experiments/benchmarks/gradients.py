"""Gradient estimators of one bound, and the problems on which they are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.poutine import Trace
from torch import Tensor

from orderppl import Batch, Policy, fit, follow
from orderppl.data import Antibodies, Chains, Examples, Gsm8k, Reactions, Sudoku
from orderppl.distributions.order_distribution import SetSequence
from orderppl.evaluation.intervals import Interval, bootstrap_mean
from orderppl.guides import PolicyGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.programs import RevealSites, local_parameters, temper
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable, UnmaskingModel
from orderppl.models.denoisers import AntibodyDenoiser, MarkovChainDenoiser, ReactionDenoiser, load_denoiser
from orderppl.policies import EntropyBound, Plan, RandomSteps

DEFAULT = "default"
LEFT = 98  # aligned positions of an antibody that are counted from the left end


class ExpectedELBO(RevealTraceGraph_ELBO):
    """The inner expectation over each set in closed form; the score function is left with what comes after the set.

    For policies and plans with inclusion probabilities q_ti, and l_i(s_t) = log p(x_i | s_t),

        surrogate = 1/K sum_k sum_t [ sum_i q_ti l_i(s_t) - w KL_t + stop(A_t) log q(z_t | M_t) ]
        A_t       = sum_{u > t} [ sum_i q_ui l_i(s_u) - w KL_u ], less its mean over the other orders
    """

    def _by_step(self, sites: RevealSites) -> tuple[Tensor, Tensor]:
        q, p, likelihood = sites.guide["fn"], sites.prior["fn"], sites.tokens["fn"]
        trajectory, met = likelihood.trajectory, q.met_sets() if sites.guide["infer"].get("met") else None
        sets = met or q.sets(trajectory.order, trajectory)
        probs = torch.stack([one.probs for one in sets.steps]) if isinstance(sets, SetSequence) else sets.probs
        hidden = trajectory.token_log_prob()  # l_i(s_t), [T, *, S]
        expected = (probs * hidden.masked_fill(probs == 0, 0.0)).sum(-1)  # [T, *]
        log_q, kl, kl_to_come = self._order_terms(q, p, trajectory)
        to_come = expected.flip(0).cumsum(0).flip(0) - expected - self.kl_weight * kl_to_come
        objective = expected.sum() - self.kl_weight * kl.sum()
        advantage = self._advantage(to_come.detach(), torch.zeros_like(to_come), trajectory.masked)
        return objective.detach(), -objective - (advantage * log_q).sum()


class StockELBO(RevealTraceGraph_ELBO):
    """Pyro's `TraceGraph_ELBO`, with a weight of the KL."""

    def _loss_and_surrogate_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        temper(model_trace, guide_trace, self.kl_weight)
        return TraceGraph_ELBO._loss_and_surrogate_loss_particle(self, model_trace, guide_trace)


def estimators(particles: int, kl_weight: float = 1.0) -> dict[str, RevealTraceGraph_ELBO]:
    """The ways to estimate the gradient of the bound."""
    return {
        DEFAULT: RevealTraceGraph_ELBO(particles, kl_weight=kl_weight),
        "leave-one-out": RevealTraceGraph_ELBO(particles, kl_weight=kl_weight, control_variate="none"),
        "gain": RevealTraceGraph_ELBO(particles, kl_weight=kl_weight, control_variate="gain"),
        "expected": ExpectedELBO(particles, kl_weight=kl_weight),
        "stock": StockELBO(particles, kl_weight=kl_weight),
    }


@dataclass(frozen=True)
class Pair:
    """What learns an order.

    Args:
        denoiser: frozen.
        policy: a plan, which is the guide of a uniform prior, or a policy that is its own guide.
        num_steps: T.
    """

    denoiser: Any
    policy: Policy
    num_steps: int

    @property
    def programs(self) -> tuple[UnmaskingModel, PolicyGuide]:
        """Model and guide."""
        prior = RandomSteps() if isinstance(self.policy, Plan) else self.policy
        model = UnmaskingModel(self.denoiser, prior, self.num_steps)
        return model, PolicyGuide(self.policy, self.denoiser, self.num_steps)

    def flat(self, value: Tensor) -> Tensor:
        """Gradient of a value with respect to what is learned, float64 [P]; the graph stays."""
        over = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(value, over, retain_graph=True, allow_unused=True)
        whole = [torch.zeros_like(p) if slope is None else slope for slope, p in zip(found, over, strict=True)]
        return torch.cat([slope.flatten() for slope in whole]).double()

    def draws(self, batch: Batch, particles: int, count: int) -> dict[str, Tensor]:
        """Gradients of the bound per sequence, float64 [count, P], by estimator; all see the same orders."""
        kinds, (model, guide) = estimators(particles), self.programs
        found: dict[str, list[Tensor]] = {name: [] for name in kinds}
        with local_parameters(model, guide), pyro.validation_enabled(False):
            for _ in range(count):
                (traces,) = kinds[DEFAULT]._get_traces(model, guide, (batch,), {})
                traces[0].compute_log_prob()
                traces[1].compute_score_parts()
                for name, kind in kinds.items():
                    _, surrogate_loss = kind._loss_and_surrogate_loss_particle(*traces)
                    found[name].append(self.flat(-surrogate_loss / (particles * len(batch))))
        return {name: torch.stack(draws) for name, draws in found.items()}


# ---- problems


@dataclass(frozen=True)
class Files:
    """Where data and denoisers are; what is missing is left out.

    Args:
        antibodies: CSV or FASTA file of heavy chains.
        reactions: CSV file of reactions.
        gsm8k: folder of the data set.
        programs: run folder of a denoiser of GSM8K programs.
        sudoku: run folder of a denoiser of sudoku puzzles.
    """

    antibodies: str = "../shared/data/antibodies/heavy.csv"
    reactions: str = "../shared/data/reactions/reactions.csv"
    gsm8k: str = "../shared/data/gsm8k"
    programs: str = "docs/results/frontier-programs/denoiser"
    sudoku: str = "docs/results/sudoku/denoiser"


@dataclass(frozen=True)
class Task:
    """A pair on real data, and how it is learned; `effort` scales the number of updates."""

    pair: Pair
    data: Mapping[str, Examples]
    batch_size: int
    lr: float
    effort: float = 1.0

    def fit(self, objective: RevealTraceGraph_ELBO, updates: int, seed: int = 0, out: Path | None = None) -> int:
        """Learn for a while, or go on from what is in `out`; returns the denoiser rows that it all took."""
        model, guide = self.pair.programs
        optimizer = partial(torch.optim.Adam, lr=self.lr)
        settings: dict[str, Any] = {"batch_size": self.batch_size, "progress": False, "seed": seed}
        settings |= {} if out is None else {"out": out, "resume": True}
        fit(model, guide, self.data["train"], objective=objective, optimizer=optimizer, updates=updates, **settings)
        return updates * self.batch_size * (1 + (self.pair.num_steps - 1) * objective.num_particles)

    def nats(self, rows: int = 64, draws: int = 8) -> Interval:
        """Nats per token along drawn orders of held-out rows."""
        held_out = self.data["validation" if "validation" in self.data else "test"]  # antibodies have no third part
        batch, pair = held_out.batch.rows(slice(rows)).trimmed(), self.pair
        with torch.no_grad():
            drawn = [follow(pair.policy, pair.denoiser, batch, pair.num_steps).nats for _ in range(draws)]
        count = batch.latent.sum(-1).double()
        return bootstrap_mean(torch.stack(drawn).double().mean(0) / count, count)


def chain(files: Files) -> Task:
    """A plan on the exact Markov chain."""
    pair = Pair(MarkovChainDenoiser(4, 0.85, 16), Plan(PositionTable(16, 4, noise=0.1)), 4)
    return Task(pair, Chains().splits(), 8, 0.1)


def antibodies(files: Files) -> Task:
    """A plan on a pretrained antibody model."""
    denoiser, data = AntibodyDenoiser().requires_grad_(False), Antibodies(files.antibodies)
    plan = Plan(PositionTable(data.length, 4, split=LEFT, counts="attended", noise=0.1))
    return Task(Pair(denoiser, plan, 4), data.splits(denoiser.tokenizer), 4, 0.2)


def reactions(files: Files) -> Task:
    """A plan on a pretrained model of reactions."""
    denoiser, data = ReactionDenoiser().requires_grad_(False), Reactions(files.reactions)
    plan = Plan(PositionTable(data.length, 4, noise=0.1))
    return Task(Pair(denoiser, plan, 4), data.splits(denoiser.tokenizer), 2, 0.2, 0.25)


def programs(files: Files) -> Task:
    """A policy that is its own guide, on GSM8K programs."""
    denoiser = load_denoiser(files.programs)
    data = Gsm8k(files.gsm8k, form="programs", max_prompt=41, max_length=56)
    policy = LearnedPolicy(PolicyNetwork(denoiser.vocab_size))
    return Task(Pair(denoiser, policy, 5), data.splits(denoiser.tokenizer), 8, 0.002, 0.5)


def sudoku(files: Files) -> Task:
    """A policy that is its own guide, on sudoku."""
    denoiser = load_denoiser(files.sudoku)
    network = PolicyNetwork(denoiser.vocab_size, width=48, places=16, zero_init=True)
    pair = Pair(denoiser, LearnedPolicy(network, EntropyBound(0.5, temperature=0.1)), 4)
    return Task(pair, Sudoku(train=4000, min_clues=2, max_clues=4).splits(denoiser.tokenizer), 8, 0.003)


TASKS = {make.__name__: make for make in (chain, antibodies, reactions, programs, sudoku)}
