"""What others learn on the same denoiser: each a policy, the fits it goes through, and how it is played.

learn2pd         a filter on the confidences, which learns what is right already (arXiv 2509.25188)
policy_gradient  Bernoulli decisions from the confidences; right answers are rewarded, more with fewer steps
(arXiv 2512.09106)
sas              the same policy; the likelihood of the data is rewarded, with a group baseline (arXiv 2606.23567)
dultra           decisions from the denoiser's hidden states: imitates the factor rule, then goes on by policy
gradient (arXiv 2512.21446)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orderppl import Policy, State
from orderppl.config import Configurable
from orderppl.distributions import DecidedSet
from orderppl.evaluation import Arm
from orderppl.guides import PolicyGuide
from orderppl.inference import AnswerReward, Imitation, RevealTraceGraph_ELBO, Rollout
from orderppl.models import LearnedPolicy, PolicyNetwork
from orderppl.models.denoisers import OwnOutput
from orderppl.policies import CorrectOracle, Eager, Factor
from orderppl.policies.policy import LOGIT_LIMIT
from orderppl.policies.scores import best_of, confidence, first_of
from orderppl.policies.wrappers import Wrapper
from orderppl.runs import Run
from orderppl.unmasking.trajectory import Path

FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)  # of probabilities: more or fewer forwards


class ConfidenceFilter(Configurable, nn.Module):
    """Learn2PD's network: two linear layers over the confidences of a canvas. The most confident one always passes."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(length, length), nn.GELU(), nn.Linear(length, length))

    def forward(self, state: State) -> Tensor:
        """Log-odds that what the denoiser says is right, float [*, S]."""
        sure, start, size = confidence(state), state.batch.prefix, self.layers[0].in_features
        seen = nn.functional.pad(sure[..., start:], (0, size - (sure.shape[-1] - start)))
        logits = nn.functional.pad(self.layers(seen)[..., : sure.shape[-1] - start], (start, 0))
        return torch.where(best_of(sure, state.masked), LOGIT_LIMIT, logits)


class ExpectedCount(Wrapper):
    """dUltra's decoding: as many of the most probable positions as are expected, the sum of all p, at least one."""

    def __init__(self, policy: LearnedPolicy, factor: float = 1.0) -> None:
        super().__init__(policy)
        self.factor = factor

    def forward(self, state: State) -> DecidedSet:
        """The most probable ones."""
        logits = self.policy.logits(state)
        count = (self.factor * logits.sigmoid() * state.masked).sum(-1).floor().clamp(min=1)
        return DecidedSet(first_of(logits, state.masked, count), state.masked, True)


@dataclass
class Fit:
    """One fit: the data, the objective, and the denoiser rows that it reads per sequence and update."""

    data: Any
    objective: Any
    rows: int


@dataclass
class Peer:
    """A learned opponent.

    Attributes:
        policy: what is learned.
        fits: one after another.
        play: the policy and a factor of its probabilities -> what decodes.
        mode: whether most probable sets are played.
        steps: step budget that it is played with; a step per token when left out.
    """

    policy: LearnedPolicy
    fits: list[Fit]
    play: Callable[[LearnedPolicy, float], Policy]
    mode: bool
    steps: int | None


def peers(run: Run, own: OwnOutput, speed: float, price: float, start: float = -2.0) -> dict[str, Peer]:
    """Every peer for the data and the denoiser of a run.

    Args:
        run: a learned order.
        own: what its denoiser writes itself.
        speed: exponent of the steps saved, in the reward of `policy_gradient`.
        price: of a step, in that of `dultra`.
        start: log-odds of the Bernoulli policies at first. Where they leave something to the last step of every row no
            step is saved, and nothing is rewarded.
    """
    denoiser, data, steps, answer = run.denoiser, run.data, run.num_steps, run.model.answer
    places = max(part.batch.tokens.shape[1] - part.batch.prefix for part in data.splits().values())
    opening = Path(data.splits()["train"].batch.rows(slice(1)), denoiser, 1).opening()
    width = opening.hidden(lambda inside: inside).shape[-1]
    right = {"answer": answer} if answer is not None else {"graded_by": data}
    small = {"width": 64, "layers": 1, "heads": 2, "reads_tokens": False}

    def bernoulli(*features: str, **options: Any) -> LearnedPolicy:
        return LearnedPolicy(PolicyNetwork(denoiser.vocab_size, features=features, bias=start, **small, **options))

    def imitate(teacher: Policy, shown: Any) -> Fit:
        return Fit(shown, Imitation(PolicyGuide(teacher, denoiser, steps)), steps)

    played, group = 1 + (steps - 1) * 8, 8
    answers = Fit(data, Rollout(AnswerReward(speed=speed, **right), group), played)
    likelihood = Fit(data, RevealTraceGraph_ELBO(group, control_variate="none"), played)
    stepwise = Fit(data, Rollout(AnswerReward(price=price, **right), 12), 1 + (steps - 1) * 12)
    return {
        "learn2pd": Peer(LearnedPolicy(ConfidenceFilter(places)), [imitate(CorrectOracle(), own)], Eager, True, None),
        "policy_gradient": Peer(bernoulli("confidence"), [answers], Eager, False, steps),
        "policy_gradient sas": Peer(bernoulli("confidence"), [likelihood], Eager, False, steps),
        "dultra": Peer(
            bernoulli("hidden", hidden=width),
            [imitate(Factor(1.0), data), stepwise],
            ExpectedCount,
            True,
            steps,
        ),
    }


def arms_of(name: str, peer: Peer, seed: int, label: str = "") -> list[Arm]:
    """A peer with more and fewer forwards."""
    arms, seeds = list[Arm](), (0,) if peer.mode else (0, 1, 2)
    for factor in FACTORS:
        played: dict[str, Any] = {"mode": peer.mode, "training_seed": seed, "setting": {"factor": factor}}
        played |= {"family": f"{name}{label}", "seeds": seeds}
        arms.append(Arm(f"{name}{label} {factor=:g} #{seed}", peer.play(peer.policy, factor), peer.steps, **played))
    return arms
