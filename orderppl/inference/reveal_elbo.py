"""The evidence lower bound of an unmasking program, with a low-variance gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceGraph_ELBO
from pyro.infer.tracegraph_elbo import TrackNonReparam
from pyro.infer.util import is_validation_enabled
from pyro.ops.provenance import detach_provenance
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_if_enumerated, check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from orderppl.distributions import OrderDistribution
from orderppl.distributions.order_distribution import PolicyOrder, kl_by_step
from orderppl.distributions.revealed_tokens import RevealedTokens
from orderppl.errors import UserError
from orderppl.inference.objective import Objective
from orderppl.inference.programs import RevealSites, mean_metrics, order_metrics, reveal_sites, temper
from orderppl.randomness import stratified_uniform
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import Trajectory


class RevealTraceGraph_ELBO(Objective, TraceGraph_ELBO):
    """TraceGraph_ELBO for unmasking programs.

    With R(r) = log p(x | r) plus further factors of the model, KL_t = KL(q_t || p_t) of the set distributions at step
    t, and weight w of the KL,

        ELBO = E_q[ R(r) ] - w E_q[ sum_t KL_t ]

    (the whole KL(q || p) where that has a closed form). For K orders of one sequence,

        surrogate = 1/K sum_k [ R(r^k) - w sum_t KL_t^k + sum_t stop(A_t^k) log q(z_t^k | M_t^k) ]
        A_t^k     = (C_t^k - mean_{j != k} C_t^j) - c_t^k (v_t^k - mean_{j != k} v_t^j)
        C_t       = R(r) - w sum_{u > t} KL_u

    v_t is the log-likelihood if everything left were revealed at step t: known before z_t is drawn, and so a control
    variate that costs nothing. Its coefficient c_t^k is the slope of C_t on v_t among the *other* orders of the
    sequence, weighted by how much is left to reveal, within [0, 1]; r^k has no part in it, so the gradient is unbiased.
    With less than three orders it is 0.

    With n scored steps R is estimated at n of the T states of every order, which saves forwards of the denoiser where
    nobody else reads it: R = T / n sum_t log p(z_t | s_t) over steps (j + u) T / n, j = 0..n-1, rounded down, one
    uniform u per sequence, so that every step has the same chance and all orders of a sequence the same steps. C_t
    then counts what is scored from step t on, and v_t what the last scored state before it says of what is left: the
    gradient stays unbiased. Where guide or policy read the denoiser at every step anyway, all steps are scored.

    What has no closed form stands in as it was drawn: log q_t - log p_t for KL_t, with the score of the step's own set
    as well. A robust likelihood puts its function of the whole sequence around R and v_t; where only an answer
    is wanted, both are over what is observed (see `RevealedTokens`). Any other pair of programs goes through Pyro's own
    `TraceGraph_ELBO`, with the weight of the KL.

    Args:
        num_particles: orders drawn per sequence, K.
        max_plate_nesting: 1 for the programs of this library (the batch plate).
        vectorize_particles: draw them in one call, along a new leftmost dimension; the baselines need it.
        kl_weight: weight of the KL (or of log q - log p) in the objective; 1 is the ELBO, less is a tempered bound.
        control_variate: coefficient of v_t: "fitted", or a fixed one. "none" (0) is the plain leave-one-out estimator;
            with "gain" (1) each set is credited with what it made easier.
        scored_steps: steps of every order that the denoiser scores in an update, n; all T when left out.

    Attributes:
        metrics: detached 0-dim tensors of the last call on an unmasking program, per sequence: `elbo` (untempered),
            `log_likelihood` (with further factors), `kl` (nats) and `steps`, the mean number of steps used.
    """

    def __init__(
        self,
        num_particles: int = 8,
        max_plate_nesting: int = 1,
        vectorize_particles: bool = True,
        *,
        kl_weight: float = 1.0,
        control_variate: Literal["fitted", "none", "gain"] | float = "fitted",
        scored_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, kl_weight=kl_weight, **kwargs)
        if isinstance(control_variate, str) and control_variate not in ("fitted", "none", "gain"):
            raise UserError("control_variate", f"{control_variate!r}", "use fitted, none, gain or a number")
        if scored_steps is not None and scored_steps < 1:
            raise UserError("scored_steps", f"{scored_steps} is below 1", "score at least one step, or leave it out")
        self.control_variate, self.scored_steps = control_variate, scored_steps
        self._found: list[dict[str, Tensor]] = []  # metrics of every particle, or of all together

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        self._found.clear()
        elbo, surrogate_loss = self._loss_and_surrogate_loss(model, guide, args, kwargs)
        self.metrics = mean_metrics(self._found)
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
            is_stacked = reveal_sites(model_trace, guide_trace) is not None  # the bound asks for its densities itself
            if not is_stacked:
                model_trace.compute_log_prob()
                guide_trace.compute_score_parts()
        if is_validation_enabled():
            check_if_enumerated(guide_trace)
            for site in (*model_trace.nodes.values(), *guide_trace.nodes.values()):
                if site["type"] == "sample":
                    shape = torch.empty(site["fn"].batch_shape, device="meta")
                    check_site_shape(site | {"log_prob": shape} if is_stacked else site, self.max_plate_nesting)
        return model_trace, guide_trace

    def _loss_and_surrogate_loss_particle(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        sites = reveal_sites(model_trace, guide_trace)
        if sites is None:
            temper(model_trace, guide_trace, self.kl_weight)
            return super()._loss_and_surrogate_loss_particle(model_trace, guide_trace)
        return self._by_step(sites)

    def _by_step(self, sites: RevealSites) -> tuple[Tensor, Tensor]:
        q, p, likelihood = sites.guide["fn"], sites.prior["fn"], sites.tokens["fn"]
        order = detach_provenance(sites.guide["value"])  # [*, S]
        path, met = likelihood.path, sites.guide["infer"].get("met")
        # A guide may look at other tokens, or through another denoiser: the model reads its states itself then.
        is_met = bool(met) and path.is_that_of(met[0].state)
        trajectory = Trajectory(path, order, met) if is_met else likelihood.trajectory
        # Whether all states are read anyway is known after the densities of the order.
        terms = None if self.scored_steps is None else self._order_terms(q, p, trajectory)
        steps = self._steps_to_score(likelihood, trajectory)
        reward, to_come, baseline = self._likelihood(sites, likelihood, trajectory, steps)  # [*], [T, *] or [*], [T, *]
        log_q, kl, kl_to_come = self._order_terms(q, p, trajectory) if terms is None else terms  # [P, *], P = T or 1
        own, shared = self._factors(sites)  # [*] or 0, [K, 1] or 0
        reward, to_come = reward + own, to_come + own
        kl = kl.masked_fill(~_is_proper(order, path.batch), torch.inf)

        def scaled(values: Tensor) -> Tensor:
            return scale_and_mask(values, sites.guide["scale"], sites.guide["mask"])

        kl, kl_to_come = scaled(kl), scaled(kl_to_come)
        if len(log_q) == 1:
            baseline, to_come = baseline[:1], to_come if steps is None else to_come[:1]
        cost = (to_come + shared - self.kl_weight * kl_to_come).detach()
        advantage = self._advantage(cost, baseline.detach(), trajectory.masked)
        log_likelihood = reward.sum() + torch.as_tensor(shared).sum()
        objective = log_likelihood - self.kl_weight * kl.sum()
        surrogate = objective + (advantage * log_q).sum()
        self._found.append(order_metrics(log_likelihood, kl.sum(), order))
        return objective.detach(), -surrogate

    def _steps_to_score(self, likelihood: RevealedTokens, trajectory: Trajectory) -> Tensor | None:
        """Some of the steps, int64 [n, .., B]; None: all of them.

        Raises:
            UserError: a likelihood that is no sum over steps.
        """
        total, count = trajectory.num_steps, self.scored_steps
        if count is None or count >= total or trajectory.states.predictions.was_read:
            return None
        if likelihood.robustness:
            problem = "a robust likelihood is no sum over steps"
            raise UserError("scored_steps", problem, "leave it out, or the robustness of the model")
        order = trajectory.order
        start = torch.arange(count, device=order.device)[:, None]
        drawn = stratified_uniform(order.shape[-2], order.device)  # [B]
        step = ((start + drawn) * (total / count)).long().clamp(max=total - 1)
        return step.reshape((count,) + (1,) * (order.dim() - 2) + (-1,))

    def _likelihood(
        self, sites: RevealSites, likelihood: RevealedTokens, trajectory: Trajectory, steps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What every order earns by its tokens.

        Returns:
            R of every order, float [*]; what of it the choice at step t has a part in, float [T, *] (or all of it,
            [*]); and v_t: what would come if everything left were revealed at step t, float [T, *].
        """

        def scored(log_likelihood: Tensor) -> Tensor:
            robust = likelihood.robust(log_likelihood)
            return scale_and_mask(robust, sites.tokens["scale"], sites.tokens["mask"])

        tokens, masked = detach_provenance(sites.tokens["value"]), trajectory.masked
        some = trajectory if steps is None else Trajectory(trajectory.path, trajectory.order, step=steps)
        hidden = likelihood.said(some, tokens)  # l_i(s_t), [n, *, S]
        by_step = likelihood.observed(hidden, some.revealed, some.masked)  # log p(x_{z_t} | s_t), [n, *]
        reward = scored(by_step.sum(0))
        if steps is None:
            with torch.no_grad():
                at_once = likelihood.observed(hidden, masked, masked)
                return reward, reward, scored(by_step.cumsum(0) - by_step + at_once)
        share = trajectory.num_steps / len(steps)
        with torch.no_grad():
            every = trajectory.step.unsqueeze(1)  # [T, 1, *]
            to_come = (by_step * (some.step >= every)).sum(1)  # [T, *]
            last = (some.step <= every).sum(1)  # number of states scored up to step t, [T, *]
            said = hidden.gather(0, (last - 1).clamp_min(0).unsqueeze(-1).expand(masked.shape))
            left = likelihood.observed(said, masked, masked).masked_fill(last == 0, 0.0)
        return share * reward, share * scored(to_come), scored(left)

    def _factors(self, sites: RevealSites) -> tuple[Tensor | float, Tensor | float]:
        """Further factors of every sequence, float [*], and of all of them together, outside of their plate."""
        own, shared = torch.zeros(()), 0.0
        for site in sites.factors:
            log_factor = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
            if site["cond_indep_stack"] == sites.tokens["cond_indep_stack"]:
                own = own + detach_provenance(log_factor)
            else:
                shared = shared + detach_provenance(log_factor)
        return own, shared

    def _order_terms(
        self, q: OrderDistribution, p: OrderDistribution, trajectory: Trajectory
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of every part of the order, KL of every part, and KL that its choice has a part in.

        Returns:
            float [P, *] each; the second may have P = 1 and a broader shape.
        """
        order, steps = trajectory.order, trajectory.num_steps
        if not (q.has_steps and p.has_steps):  # whole orders
            return self._whole_order_terms(q, p, order)
        met = q.met_sets() if isinstance(q, PolicyOrder) and trajectory.met else None
        q_sets = q.sets(order, trajectory) if met is None else met
        log_q = q_sets.log_prob(trajectory.revealed)  # [T, *]
        try:
            whole = kl_divergence(q, p)  # [*], whatever order was drawn
            return log_q, whole.expand(order.shape[:-1]).unsqueeze(0), torch.zeros_like(log_q)
        except NotImplementedError:
            p_sets = p.sets(order, trajectory)
        try:
            kl = kl_by_step(q_sets, p_sets, steps)  # [T, *]
            own = kl
        except NotImplementedError:
            kl = log_q.detach() - p_sets.log_prob(trajectory.revealed)
            own = torch.zeros_like(kl)  # a log-ratio depends on the step's own set as well
        return log_q, kl, kl.flip(0).cumsum(0).flip(0) - own

    def _whole_order_terms(
        self, q: OrderDistribution, p: OrderDistribution, order: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`_order_terms` with P = 1."""
        log_q = q.log_prob(order).unsqueeze(0)
        try:
            whole = kl_divergence(q, p).expand(order.shape[:-1]).unsqueeze(0)
            return log_q, whole, torch.zeros_like(log_q)
        except NotImplementedError:
            ratio = log_q.detach() - p.log_prob(order).unsqueeze(0)
            return log_q, ratio, ratio

    def _advantage(self, cost: Tensor, baseline: Tensor, masked: Tensor) -> Tensor:
        """A_t^k, float [T, *], from C_t and v_t, float [T, *] each, and M_t, bool [T, *, S]."""
        count = self.num_particles
        if not (self.vectorize_particles and count > 1):
            return cost
        cost, baseline = (centred(x) for x in torch.broadcast_tensors(cost, baseline))  # [T, K, ..]
        if self.control_variate != "fitted":
            fixed = {"none": 0.0, "gain": 1.0}.get(str(self.control_variate))
            return cost - (float(self.control_variate) if fixed is None else fixed) * baseline
        slope = _slope(baseline, cost, masked[: len(cost)].sum(-1)).clamp(0.0, 1.0)
        return cost - slope * baseline

    def explain(self, model: Any, guide: Any, *args: Any) -> str | None:
        """Why the bound of a batch is not finite, where that can be told."""
        with torch.no_grad():
            pairs = [reveal_sites(*traces) for traces in self._get_traces(model, guide, args, {})]
            causes = (self._cause(sites) for sites in pairs if sites is not None)
            return next((cause for cause in causes if cause is not None), None)

    def _cause(self, sites: RevealSites) -> str | None:
        likelihood, order = sites.tokens["fn"], detach_provenance(sites.guide["value"])
        batch, trajectory = likelihood.path.batch, Trajectory(likelihood.path, order)
        if not bool(_is_proper(order, batch).all()):
            return "the guide reveals given positions or padding, or leaves out what is to be revealed"
        mask_index = likelihood.path.denoiser.mask_index
        if bool(((batch.tokens == mask_index) & batch.latent).any()):
            return "the MASK token is among the tokens to reveal"
        said = trajectory.token_log_prob(None, likelihood.temperature)
        if bool(said.isnan().any()):
            return "the denoiser gives NaN"
        impossible = (said.isneginf() & trajectory.revealed).nonzero()
        if len(impossible):
            row, place = impossible[0, -2:].tolist()
            return f"token {int(batch.tokens[row, place])} at position {place} has probability 0"
        _, kl, _ = self._order_terms(sites.guide["fn"], sites.prior["fn"], trajectory)
        if bool(kl.isnan().any()):
            return "the guide or the model's policy gives NaN"
        if bool(kl.isposinf().any()):
            return "the guide reveals sets that the model's policy forbids, such as none at all"
        return None


def _is_proper(order: Tensor, batch: Batch) -> Tensor:
    """Whether orders (int64 [*, S]) reveal what is to be revealed, and nothing else: bool [*]."""
    return ((order >= 0) == batch.latent).all(-1)


def _slope(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Weighted slope of y on x among the other orders, float [T, K, ..]; 0 where fewer than two of them differ.

    Where more is left to reveal the score is larger, so that these orders weigh more: the number of masked positions.
    """

    def others(values: Tensor) -> Tensor:
        return values.sum(1, keepdim=True) - values

    total = others(weight.expand_as(x)).clamp(min=1)
    mean_x, mean_y = others(weight * x) / total, others(weight * y) / total
    products, squares = others(weight * x * y) / total - mean_x * mean_y, others(weight * x * x) / total - mean_x**2
    enough = squares > 1e-5 * x.square().mean(1, keepdim=True)  # of rounding
    return torch.where(enough, products / squares.masked_fill(~enough, 1.0), 0.0)


def centred(values: Tensor) -> Tensor:
    """Subtract the mean over the other orders: float [T, K, ..]."""
    count = values.shape[1]
    return (values - values.mean(1, keepdim=True)) * (count / (count - 1))
