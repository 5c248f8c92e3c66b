"""A relaxed, biased gradient of the bound: for ablations."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops.provenance import detach_provenance
from pyro.poutine import Trace
from torch import Tensor

from orderppl.distributions import StepwiseReveal
from orderppl.errors import UserError
from orderppl.inference.elbo import RevealTraceGraph_ELBO
from orderppl.inference.sites import RevealSites, order_metrics, require_all_steps
from orderppl.randomness import uniform
from orderppl.states import masked_before, stacked_steps


class RelaxedELBO(RevealTraceGraph_ELBO):
    """The bound at hard orders, differentiated through soft ones: straight-through Gumbel-softmax, biased.

        value     = sum_t sum_i y_it l_i(s_t) - kl_weight KL,        y_i = one-hot of r_i,  r ~ q
        gradient  = that of the same expression where d y_i stands for d softmax((log q_i + G_i) / temperature)
                    and position i is visible to degree v_it = sum_{u < t} y_iu before step t

    G is Gumbel noise given that it has led to r (so that orders are drawn as everywhere else), held fixed. Every state
    is read once, by `SoftDenoiser.soft_logits`. The value is an unbiased estimate of the bound, and so is the gradient
    for a denoiser that is trained with it. The gradient for the guide is not one of the bound:

    - the slope of the softmax stands for a jump between corners, with another size on average; at a low temperature it
      is large and rare, at a high one small;
    - all positions move at once along the slope at one corner, but what a position is worth depends on which others
      are visible: the objective is not linear in y;
    - soft visibility is a road between "hidden" and "revealed" on which the denoiser was never trained: its slope at a
      corner, which is all that is looked at, need not have to do with the difference of the corners;
    - a denoiser that reads the position it predicts (`reads_itself`, as a `TransformerDenoiser`) gets better at a token
      by seeing some of it, and the guide is paid for that leak. It cannot say either what waiting would have been
      worth, at steps after r_i, without seeing the token: l_i(s_{r_i}) stands for that. On a chain this alone can turn
      the direction around. The exact `MarkovChainDenoiser` has neither fault;
    - where KL(q || p) has no closed form, its terms along the hard order are used without a gradient through the order.

    Use `RevealTraceGraph_ELBO` to fit an order, this to show what an unbiased gradient is worth.

    Reference: Jang et al., arXiv 1611.01144; Gumbels given the arg-max: Paulus et al., arXiv 2010.04838.

    Args:
        num_particles: orders drawn per sequence, K.
        max_plate_nesting: see `Objective`.
        vectorize_particles: see `Objective`.
        temperature: positive, of the softmax.
        kl_weight: weight of the KL; 1 is the bound.

    Attributes:
        metrics: see `Objective`.

    Raises:
        UserError: a temperature that is not positive; when called, for a guide whose steps are not independent
            categoricals (`StepwiseReveal`: `MeanFieldGuide`), a denoiser that is no `SoftDenoiser`, or a one-step
            program.
    """

    def __init__(
        self,
        num_particles: int = 8,
        max_plate_nesting: int = 1,
        vectorize_particles: bool = True,
        *,
        temperature: float = 0.5,
        kl_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, kl_weight=kl_weight, **kwargs)
        if not temperature > 0:
            raise UserError("temperature", f"{temperature} is not positive", "use a value such as 0.5")
        self.temperature = temperature

    def _traced(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        remedy = "give an UnmaskingModel and a MeanFieldGuide, or use RevealTraceGraph_ELBO"
        raise UserError("model", "is no stacked unmasking program", remedy)

    def _by_step(self, sites: RevealSites) -> tuple[Tensor, Tensor]:
        q, p, likelihood = sites.guide["fn"], sites.prior["fn"], sites.tokens["fn"]
        if not isinstance(q, StepwiseReveal):
            problem = f"draws its order from a {type(q).__name__}, which has no relaxation"
            raise UserError("guide", problem, "use a MeanFieldGuide, or RevealTraceGraph_ELBO")
        require_all_steps(likelihood, "a relaxed bound")
        if likelihood.is_whole:
            field = "outlier" if likelihood.outlier else "asked"
            raise UserError(field, "a relaxed bound knows none", "leave it out, or use RevealTraceGraph_ELBO")
        if likelihood.temperature != 1:
            raise UserError("temperature", "a relaxed bound knows none", "use 1, or RevealTraceGraph_ELBO")
        order = detach_provenance(sites.guide["value"])  # [*, L]
        step = likelihood.state.step  # [T, *]
        hard, soft = relaxed_steps(q.logits, order, self.temperature)  # [T, *, L]
        chosen = hard + (soft - soft.detach())  # straight through: the value of one, the slope of the other

        tokens = torch.where(q.masked, detach_provenance(sites.tokens["value"]), 0)  # [*, L]
        visible = chosen.cumsum(0) - chosen
        visible = visible.masked_fill(~q.masked, 1.0)
        canvas = likelihood.state.canvas
        log_probs = canvas.soft_logits(tokens.expand(visible.shape), visible).log_softmax(-1)
        said = log_probs.gather(-1, tokens.expand(visible.shape).unsqueeze(-1)).squeeze(-1)  # l_i(s_t), [T, *, L]
        if canvas.denoiser.reads_itself:
            own = (hard * said.detach()).sum(0)  # l_i(s_{r_i}), [*, L]
            said = torch.where(masked_before(order, stacked_steps(q.num_steps, order)), said, own)
        said = said.masked_fill(~q.masked, 0.0)
        fit = scale_and_mask((chosen * said).sum(-1), sites.tokens["scale"], sites.tokens["mask"]).sum()

        kl = self._closed_form_kl(q, p)
        if kl is None:
            kl, _ = self._step_kl(q.reveal_sets(order), p, order, step)
        kl = scale_and_mask(kl, sites.guide["scale"], sites.guide["mask"]).sum()
        likelihood.state.laws.clear()
        objective = fit - self.kl_weight * kl
        self.metrics = order_metrics(fit, kl, order)
        return objective.detach(), -objective


def relaxed_steps(log_probs: Tensor, order: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One-hot steps of drawn orders and the Gumbel-softmax that leads to them.

        z_r = -log E_r,    z_t = -log(E_t / q_t + E_r) for t != r,    E ~ Exp(1):    z = log q + G given arg max z = r

    Args:
        log_probs: float [*, L, T], log q; differentiable.
        order: int64 [*, L], drawn from it; -1 at padding, whose rows are 0.
        temperature: of the softmax.

    Returns:
        Two float [T, *, L]; the second has the slope of softmax((log q + G) / temperature) at fixed G.
    """
    num_steps = log_probs.shape[-1]
    steps = stacked_steps(num_steps, order)  # [T, 1.., 1]
    hard = (order == steps).to(log_probs.dtype)
    log_q = log_probs.movedim(-1, 0)  # [T, *, L]
    with torch.no_grad():
        noise = torch.stack([uniform(order.shape, order.device) for _ in range(num_steps)]).to(log_q.dtype)
        exponential = -noise.clamp(torch.finfo(log_q.dtype).tiny, 1 - torch.finfo(log_q.dtype).eps / 2).log()
        own = (hard * exponential).sum(0)  # E_r, [*, L]
        perturbed = -torch.where(hard > 0, exponential, exponential / log_q.exp() + own).log()
        gumbel = perturbed - log_q
    soft = ((log_q + gumbel) / temperature).softmax(0)
    return hard, soft.masked_fill(order < 0, 0.0)
