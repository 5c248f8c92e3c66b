"""The evidence lower bound of an unmasking program, with a low-variance gradient."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import TraceGraph_ELBO
from pyro.infer.tracegraph_elbo import TrackNonReparam, _construct_baseline
from pyro.infer.util import MultiFrameTensor, is_validation_enabled
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl.distributions import OrderedPartition, SetLaw
from orderppl.errors import UserError
from orderppl.inference.objective import Objective
from orderppl.inference.sites import RevealSites, Site, order_metrics, reveal_sites
from orderppl.states import reveal_set


class RevealTraceGraph_ELBO(Objective, TraceGraph_ELBO):
    """TraceGraph_ELBO for unmasking programs.

    With q_t = q(z_t | M_t, x), factorised over the masked positions, and l_i(s_t) = log p(x_i | s_t, c),

        ELBO = E_q[ sum_t sum_{i in z_t} l_i(s_t) ] - E_q[ sum_t KL(q_t || p_t) ]

    (the whole KL(q || p) where that has a closed form). Each reveal set z_t is credited with what it made easier:

        gain_t = sum_{u >= t} sum_{i in z_u} l_i(s_u) - sum_{i in M_t} l_i(s_t)

    the log-likelihood to come minus that of revealing everything now. The second sum is known before z_t is drawn, a
    baseline that costs nothing: the closed-form inner expectation over z_t and its matched control variate cancel to
    it. For K particles of one sequence, with the other particles' mean as a second baseline,

        surrogate = 1/K sum_k sum_t [ sum_{i in M_t} stop(q_ti) l_i(s_t) - kl_weight KL_t
                      + stop(gain_t^k - mean_{j != k} gain_t^j) log q(z_t^k | M_t^k)
                      - kl_weight stop(KL_t^k - mean_{j != k} KL_t^j) sum_{u < t} log q(z_u^k | M_u^k) ]

    With a `discount` < 1 the gain is that of the next few steps: with v_t the log-likelihood if everything left were
    revealed at step t (v_T: as it was revealed),

        gain_t = sum_{u >= t} discount^(u - t) (v_{u+1} - v_u)

    which is biased, and far less noisy where there are many steps (generalised advantages, arXiv 1506.02438, with
    v_t for the value).

    A likelihood with outliers puts its function of the whole sequence around each of the two sums of a gain, what was
    revealed before z_t included, and takes the place of the first term of the surrogate; where only an answer is asked
    for, the sums are over what is observed (see `RevealedTokens`).
    A program that looks at one random step per sequence cannot see gains; there the inner expectation itself is used,
    sum_i q_ti l_i(s_t) with its path-wise gradient and the score of the earlier sets (`credit="expected"`).
    Where a set law has no closed form, what was sampled stands in: sum_{i in z_t} l_i(s_t) for its expectation, and
    log q_t - log p_t for KL_t, both with the score of the step's own set as well.
    Any other pair of programs is handled as `TraceGraph_ELBO` does (score function restricted to downstream costs,
    Pyro's baselines), with registered KLs in closed form and the leave-one-out baseline.

    Args:
        num_particles: orders drawn per sequence, K.
        max_plate_nesting: 1 for the programs of this library (the batch plate).
        vectorize_particles: draw them in one call, along a new leftmost dimension.
        kl_weight: weight of the KL (or of log q - log p) in the objective; 1 is the ELBO, less is a tempered bound.
        analytic_kl: use registered divergences.
        leave_one_out: subtract the mean over the other particles from the score function's costs; needs more than one
            vectorised particle and is left out otherwise.
        credit: "gain" or "expected", see above; None chooses by the program.
        discount: of the later steps in a gain, in [0, 1]; 1 is unbiased.

    Attributes:
        metrics: detached 0-dim tensors of the last call on an unmasking program, per sequence: `elbo` (untempered),
            `log_likelihood`, `kl` (nats) and `steps`, the mean number of steps used.

    Raises:
        UserError: when called with credit="gain" for a one-step program, which would be biased, or with a discount for
            one that sees no gains.
        ValueError: a discount outside [0, 1].
    """

    def __init__(
        self,
        num_particles: int = 8,
        max_plate_nesting: int = 1,
        vectorize_particles: bool = True,
        *,
        kl_weight: float = 1.0,
        analytic_kl: bool = True,
        leave_one_out: bool = True,
        credit: Literal["gain", "expected"] | None = None,
        discount: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if not 0 <= discount <= 1:
            raise ValueError(f"discount: {discount} is not in [0, 1]; use 1, or a value such as 0.5 for many steps")
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, kl_weight=kl_weight, **kwargs)
        self.analytic_kl = analytic_kl
        self.leave_one_out = leave_one_out
        self.credit = credit
        self.discount = discount

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, args, kwargs)
        return elbo, -surrogate_loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """Run guide and model; densities of the sites only where they are used, or validated."""
        if isinstance(poutine.unwrap(guide), Messenger):
            return super()._get_trace(model, guide, args, kwargs)
        with TrackNonReparam():
            guide_trace = poutine.trace(guide, graph_type="dense").get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            model_trace = poutine.trace(replayed, graph_type="dense").get_trace(*args, **kwargs)
            if is_validation_enabled():
                check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
            if reveal_sites(model_trace, guide_trace) is None or is_validation_enabled():
                model_trace.compute_log_prob()
                guide_trace.compute_score_parts()
        if is_validation_enabled():
            check_if_enumerated(guide_trace)
            for site in (*model_trace.nodes.values(), *guide_trace.nodes.values()):
                if site["type"] == "sample":
                    check_site_shape(site, self.max_plate_nesting)
        return model_trace, guide_trace

    def _loss_and_surrogate_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        sites = reveal_sites(model_trace, guide_trace)
        if sites is None:
            return self._traced(model_trace, guide_trace)
        return self._by_step(sites)

    # -- unmasking programs ------------------------------------------------------------------------------------------

    def _by_step(self, sites: RevealSites) -> tuple[Tensor, Tensor]:
        q, p, likelihood = sites.guide["fn"], sites.prior["fn"], sites.tokens["fn"]
        order = detach_provenance(sites.guide["value"])  # [*, L]
        state = likelihood.state
        weight = state.num_steps / len(state.step)  # steps left out of a one-step program

        def site_scaled(by_step: Tensor, site: Site) -> Tensor:
            return scale_and_mask(by_step, site["scale"], site["mask"])

        tokens = detach_provenance(sites.tokens["value"])
        hidden = likelihood.token_log_prob(tokens)  # l_i(s_t), [S, *, L]
        revealed = reveal_set(order, state.step.unsqueeze(-1)) & state.masked
        every_step = len(state.step) == q.num_steps
        if self.credit == "gain" and not every_step:
            raise UserError("credit", "a one-step program cannot see gains", 'leave it out or use "expected"')
        if self.credit == "expected" and likelihood.is_whole:
            problem = "outliers and answers are scored by whole sequences"
            raise UserError("credit", problem, 'leave it out or use "gain"')
        if every_step:
            q.share(order, tokens, state)
            q_at, log_q = q.reveal_sets(order), q.step_log_prob(order)  # [T, *]
            before = log_q.cumsum(0) - log_q  # log q(z_{<t} | x)
        else:
            (q_at, before), log_q = q.looked_at(order, state.step), None  # [S, *]

        def own() -> Tensor:
            """log q(z_t | M_t), float [S, *]."""
            return q_at.log_prob(revealed) if log_q is None else log_q

        def total(by_position: Tensor) -> Tensor:
            return weight * site_scaled(by_position.sum(-1), sites.tokens)  # [S, *]

        def expected(probs: Tensor) -> Tensor:
            return total(probs * hidden.masked_fill(probs == 0, 0.0))  # [S, *]

        def scored(log_likelihood: Tensor) -> Tensor:
            """Of whole sequences: float of shape [.., *]."""
            return site_scaled(likelihood.robust(log_likelihood), sites.tokens)

        by_step = likelihood.observed(hidden, revealed)  # log p(x_{z_t} | s_t), [S, *]
        reward = scored(by_step.sum(0)) if every_step else weight * site_scaled(by_step, sites.tokens)
        credit = self.credit or ("gain" if every_step else "expected")
        if self.discount != 1 and credit == "expected":
            raise UserError("discount", "only gains are discounted", "set it to 1, or look at all steps")
        # Credited with gains, the gradient of the expectation reaches the denoiser only: for a frozen one, spare it.
        probs = _inclusion_probs(q_at) if credit == "expected" or hidden.requires_grad else None  # [S, *, L]
        if credit == "gain":
            fit = reward if probs is None or likelihood.is_whole else expected(probs.detach())
            everything = likelihood.observed(hidden, state.masked)  # [T, *]
            at_once = by_step.cumsum(0) - by_step + everything  # if everything left were revealed now
            terms = [(self._gains(scored(at_once), reward), own())]
        elif probs is None:
            fit = weight * site_scaled(by_step, sites.tokens)  # by step, for their scores
            terms = [(fit, before + own())]
        else:
            fit = expected(probs)
            terms = [(fit, before)]

        kl = self._closed_form_kl(q, p)
        if kl is not None:  # [*], whatever order was drawn
            kl = site_scaled(kl, sites.guide)
        else:
            by_step, exact = self._step_kl(q_at, p, order, state.step)
            kl = weight * site_scaled(by_step, sites.guide)  # [S, *]
            terms.append((-self.kl_weight * kl, before if exact else before + own()))
        state.laws.clear()  # a later evaluation may find other parameters
        objective = fit.sum() - self.kl_weight * kl.sum()
        surrogate = objective + sum((self._centred(cost.detach()) * score).sum() for cost, score in terms)
        elbo = (reward.sum() - self.kl_weight * kl.sum()).detach()

        self.metrics = order_metrics(reward.sum(), kl.sum(), order)
        return elbo, -surrogate

    def _gains(self, at_once: Tensor, reward: Tensor) -> Tensor:
        """What each set made easier, float [T, *], from v_t (float [T, *]) and v_T (float [*])."""
        if self.discount == 1:
            return reward - at_once
        step = torch.arange(len(at_once), device=at_once.device)
        later = step - step[:, None]  # [T, T], u - t
        weight = torch.where(later >= 0, self.discount ** later.clamp(min=0).to(at_once.dtype), 0.0)
        made_easier = torch.cat([at_once[1:], reward[None]]) - at_once  # [T, *]
        return torch.tensordot(weight, made_easier, 1)

    def _centred(self, cost: Tensor) -> Tensor:
        """Subtract from costs (float [S, K, ..]) the mean over the other particles."""
        if not (self.leave_one_out and self.vectorize_particles and self.num_particles > 1):
            return cost
        return cost - (cost.sum(1, keepdim=True) - cost) / (self.num_particles - 1)

    def _step_kl(self, q_at: SetLaw, p: OrderedPartition, order: Tensor, step: Tensor) -> tuple[Tensor, bool]:
        """KL(q_t || p_t) at each step, float [S, *], or else the sampled log-ratio; and which of the two it is."""
        p_at = p.reveal_sets(order, p.steps)
        if p_at.batch_shape[0] != len(step):
            p_at = p_at.at(step)
        kl = self._closed_form_kl(q_at, p_at)
        if kl is not None:
            return kl, True
        revealed = reveal_set(order, step.unsqueeze(-1))
        return q_at.log_prob(revealed) - p_at.log_prob(revealed), False

    def _closed_form_kl(self, q: Any, p: Any) -> Tensor | None:
        if not self.analytic_kl:
            return None
        try:
            return kl_divergence(q, p)
        except NotImplementedError:
            return None

    # -- any other pair of programs ----------------------------------------------------------------------------------

    def _traced(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        terms: list[tuple[Site, Tensor, Tensor]] = []  # site, cost, its path-wise part
        for name, site in guide_trace.nodes.items():
            if site["type"] != "sample":
                continue
            prior = model_trace.nodes.get(name)
            kl = None if prior is None else self._closed_form_kl(site["fn"], prior["fn"])
            if kl is not None:
                cost = -self.kl_weight * scale_and_mask(kl, site["scale"], site["mask"])
                terms.append((site, cost, cost))
                continue
            terms.append((site, -self.kl_weight * site["log_prob"], -self.kl_weight * site["score_parts"].entropy_term))
            if prior is not None:
                log_prior = self.kl_weight * prior["log_prob"]
                terms.append((prior, log_prior, log_prior))
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample" and name not in guide_trace.nodes:
                terms.append((site, site["log_prob"], site["log_prob"]))

        elbo: Any = 0.0
        surrogate: Any = 0.0
        stacks: dict[tuple[str, ...], Any] = {}  # plates of a site, by their names
        together: dict[tuple[tuple[str, ...], frozenset[str]], Tensor] = {}  # costs with one origin
        for site, tracked, path in terms:
            upstream, cost, path = get_provenance(tracked), detach_provenance(tracked), detach_provenance(path)
            elbo = elbo + cost.detach().sum()
            if not is_identically_zero(path):
                surrogate = surrogate + path.sum()
            plates = tuple(frame.name for frame in site["cond_indep_stack"])
            stacks[plates] = site["cond_indep_stack"]
            so_far = together.get((plates, upstream))
            together[plates, upstream] = cost.detach() if so_far is None else so_far + cost.detach()
        sums: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        for (plates, upstream), cost in together.items():
            for name in upstream:
                sums[name, plates] = sums[name, plates] + cost if (name, plates) in sums else cost
        costs: dict[str, MultiFrameTensor] = defaultdict(MultiFrameTensor)
        for (name, plates), cost in sums.items():
            costs[name].add((stacks[plates], cost))

        baseline_loss: Any = 0.0
        particles = self.num_particles if self.leave_one_out and self.vectorize_particles else 1
        for name, frames in costs.items():
            site = guide_trace.nodes[name]
            cost = frames.sum_to(site["cond_indep_stack"])
            if particles > 1:  # the particle plate is the outermost dimension
                cost = cost - (cost.sum(0, keepdim=True) - cost) / (particles - 1)
            use_baseline, loss, baseline = _construct_baseline(name, site, cost)
            if use_baseline:
                cost = cost - detach_provenance(baseline)
                baseline_loss = baseline_loss + detach_provenance(loss)
            score = detach_provenance(site["score_parts"].score_function)
            surrogate = surrogate + (score * detach_provenance(cost).detach()).sum()
        return elbo, -surrogate + baseline_loss


def _inclusion_probs(law: SetLaw) -> Tensor | None:
    """Inclusion probability of each position, float [*, L]; None when the law has no closed form for it."""
    try:
        return law.probs
    except NotImplementedError:
        return None
