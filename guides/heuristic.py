"""Any decoding policy as a guide: controls, importance proposals, teachers."""

from __future__ import annotations

from orderppl.decoding.policy import Policy
from orderppl.denoising import Denoiser
from orderppl.distributions import HeuristicReveal, OrderedPartition
from orderppl.distributions.heuristic_reveal import check_smoothing
from orderppl.guides.guide import PathGuide
from orderppl.path import RevealPath


class HeuristicGuide(PathGuide):
    """q(z_t | s_t, x, c) = the set that a policy selects at s_t, each decision flipped with probability `smoothing`.

    Nothing is learned. With smoothing 0 it is a point mass, whose bound is the path log-likelihood that
    `orderppl.decoding.follow` measures, plus log p(r). A smoothed guide reaches every order (of sets that are not
    empty, if so asked for), as an importance proposal must. Oracles find the truth. A policy that draws (`random`, ties
    broken at random) gets noise of its own for every sequence and particle at each call: q is then the law given that
    noise, whose bound is valid but, for a point mass, has no term for the entropy of the draws; their law itself is a
    `PlackettLuceGuide` with equal scores.

    Args:
        policy: any object with `select(state)`, such as what `orderppl.decoding.make_policy` builds.
        denoiser: the model's denoiser, whose predictions the policy reads.
        num_steps: step budget T.
        smoothing: probability of a flip, at least 0 and below 1/2.
        non_empty: condition every set on revealing something; needed under smoothing where the prior does so.

    Raises:
        UserError: smoothing outside [0, 1/2).
    """

    def __init__(
        self, policy: Policy, denoiser: Denoiser, num_steps: int, smoothing: float = 0.0, non_empty: bool = False
    ) -> None:
        super().__init__(denoiser, num_steps)
        check_smoothing(smoothing)
        self.policy = policy
        self.smoothing = smoothing
        self.non_empty = non_empty or smoothing == 0
        self.sizes = getattr(policy, "sizes", None) if smoothing == 0 else None

    def law(self, path: RevealPath) -> OrderedPartition:
        """The policy followed along the true tokens."""
        return HeuristicReveal(path, self.policy, self.smoothing, self.non_empty)
