"""The evidence lower bound of an unmasking program, with a low-variance gradient."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer import TraceGraph_ELBO
from pyro.infer.tracegraph_elbo import _construct_baseline
from pyro.infer.util import MultiFrameTensor
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl.distributions import OrderedPartition, RevealedTokens
from orderppl.states import reveal_set, steps_used

Site = dict[str, Any]


class RevealSites(NamedTuple):
    """The sites of a (model, guide) pair that the closed forms apply to."""

    guide: Site  # q(r | x), an OrderedPartition
    prior: Site  # p(r), an OrderedPartition
    tokens: Site  # p(x | r), RevealedTokens


class RevealTraceGraph_ELBO(TraceGraph_ELBO):  # noqa: N801 (Pyro's naming)
    """TraceGraph_ELBO for unmasking programs.

    Per step t, with q_t = q(z_t | M_t, x) factorised over the masked positions:

        F_t  = sum_{i in M_t} q_ti l_i(s_t) - kl_weight KL(q_t || p_t)        (inner expectation in closed form)
        ELBO = E_q[ sum_t F_t ]

    and for K particles of one sequence, with the other particles' mean as baseline,

        surrogate = 1/K sum_k sum_t [ F_t^k + stop(F_t^k - mean_{j != k} F_t^j) sum_{u < t} log q(z_u^k | M_u^k) ]

    which is the reward-to-go form of the score function with its sums exchanged, so that it also serves a program that
    looks at one random step per sequence. Where the whole KL(q || p) has a closed form it is used instead of the
    per-step one. Any other pair of programs is handled as `TraceGraph_ELBO` does (score function restricted to
    downstream costs, Pyro's baselines), with registered KLs in closed form and the leave-one-out baseline.

    Adds `differentiable_loss`, so that `elbo(model, guide)` is a module that any `torch.optim` optimiser can train.

    Args:
        num_particles: orders drawn per sequence, K.
        max_plate_nesting: 1 for the programs of this library (the batch plate).
        vectorize_particles: draw them in one call, along a new leftmost dimension.
        kl_weight: weight of the KL (or of log q - log p) in the objective; 1 is the ELBO, less is a tempered bound.
        analytic_kl: use registered divergences.
        leave_one_out: subtract the mean over the other particles from the score function's costs; needs more than one
            vectorised particle and is left out otherwise.
        rao_blackwell: take the inner expectation over each reveal set in closed form.

    Attributes:
        metrics: detached 0-dim tensors of the last call on an unmasking program, per sequence: `elbo` (untempered),
            `log_likelihood`, `kl` (nats) and `steps`, the mean number of steps used.
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
        rao_blackwell: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles=vectorize_particles, **kwargs)
        self.kl_weight = kl_weight
        self.analytic_kl = analytic_kl
        self.leave_one_out = leave_one_out
        self.rao_blackwell = rao_blackwell
        self.metrics: dict[str, Tensor] = {}

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return -ELBO summed over the batch (0-dim); its gradient is that of the surrogate. No host synchronisation."""
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, args, kwargs)
        return surrogate_loss + (-elbo - surrogate_loss).detach()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return -ELBO summed over the batch, nats, without keeping a graph."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def _loss_and_surrogate_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        sites = _reveal_sites(model_trace, guide_trace)
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

        q_sets = q.reveal_sets(order)  # [T, *]
        q_at = q_sets if len(state.step) == q.num_steps else q_sets.at(state.step)  # [S, *]

        token_log_prob = likelihood.token_log_prob(detach_provenance(sites.tokens["value"]))  # l_i(s_t), [S, *, L]
        if self.rao_blackwell:
            probs = q_at.probs
            fit = (probs * token_log_prob.masked_fill(probs == 0, 0.0)).sum(-1)
        else:
            revealed = reveal_set(order, state.step.unsqueeze(-1))
            fit = token_log_prob.masked_fill(~revealed, 0.0).sum(-1)
        fit = weight * site_scaled(fit, sites.tokens)  # [S, *]

        whole_kl = self._closed_form_kl(q, p)
        if whole_kl is not None:
            kl = site_scaled(whole_kl, sites.guide)  # [*], no dependence on the drawn order
            objective = fit
        else:
            step_kl = self._step_kl(q_at, p, order, state.step)
            kl = weight * site_scaled(step_kl, sites.guide)  # [S, *]
            objective = fit - self.kl_weight * kl
        elbo = objective.sum() if whole_kl is None else objective.sum() - self.kl_weight * kl.sum()

        earlier = q.step_log_prob(order).cumsum(0)  # [T, *]
        earlier = torch.cat([torch.zeros_like(earlier[:1]), earlier[:-1]])  # log q(z_{<t} | x)
        if len(state.step) != q.num_steps:
            earlier = earlier.gather(0, state.step.expand((len(state.step),) + earlier.shape[1:]))
        cost = objective.detach()
        if self.leave_one_out and self.vectorize_particles and self.num_particles > 1:
            cost = cost - (cost.sum(1, keepdim=True) - cost) / (self.num_particles - 1)  # particles are dimension 1
        surrogate = elbo + (cost * earlier).sum()

        drawn = order[..., 0].numel()
        log_likelihood = fit.detach().sum() / drawn
        divergence = kl.detach().sum() / drawn
        self.metrics = {
            "elbo": log_likelihood - divergence,
            "log_likelihood": log_likelihood,
            "kl": divergence,
            "steps": steps_used(order).float().mean(),
        }
        return elbo.detach(), -surrogate

    def _step_kl(self, q_at: Any, p: OrderedPartition, order: Tensor, step: Tensor) -> Tensor:
        """KL(q_t || p_t) at each step, float [S, *]; the sampled log-ratio when `analytic_kl` is off."""
        p_at = p.reveal_sets(order, p.steps)
        if len(p_at.log_weight) != len(step):
            p_at = p_at.at(step)
        if self.analytic_kl:
            return kl_divergence(q_at, p_at)
        revealed = reveal_set(order, step.unsqueeze(-1))
        return q_at.log_prob(revealed) - p_at.log_prob(revealed)

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
        costs: dict[str, MultiFrameTensor] = defaultdict(MultiFrameTensor)
        for site, cost, path in terms:
            elbo = elbo + detach_provenance(cost.sum()).detach()
            if not is_identically_zero(path):
                surrogate = surrogate + detach_provenance(path.sum())
            for upstream in get_provenance(cost):
                costs[upstream].add((site["cond_indep_stack"], detach_provenance(cost).detach()))

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


def _reveal_sites(model_trace: Trace, guide_trace: Trace) -> RevealSites | None:
    """The three sites of an unmasking program, or None when the pair has another shape."""
    latent = [s for s in guide_trace.nodes.values() if s["type"] == "sample"]
    observed = [s for s in model_trace.nodes.values() if s["type"] == "sample" and s["is_observed"]]
    if len(latent) != 1 or len(observed) != 1 or latent[0]["name"] not in model_trace.nodes:
        return None
    guide, tokens = latent[0], observed[0]
    prior = model_trace.nodes[guide["name"]]
    kinds = ((guide, OrderedPartition), (prior, OrderedPartition), (tokens, RevealedTokens))
    if not all(isinstance(site["fn"], kind) for site, kind in kinds):
        return None
    return RevealSites(guide, prior, tokens)
