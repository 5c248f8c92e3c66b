"""The least variance that a baseline could leave to the score-function gradient of an order, by enumeration.

A baseline of reveal set z_t may depend on what was drawn before it, z_{<t}. With the gradient g of one order and the
score s_t = d log q(z_t | z_{<t}), the best one subtracts for every history h

    b(h) = E[ <g, s_t> | h ] / E[ |s_t|^2 | h ]

    Var[ g - sum_t b s_t ] = Var[g] - sum_t sum_h E[ <g, s_t>; h ]^2 / E[ |s_t|^2; h ]

for scores of different histories do not correlate. A baseline that may also differ between the parameters has the same
formula parameter by parameter. Both know expectations that no estimator knows: they are bounds, not estimators.
"""

from __future__ import annotations

import torch
from pyro import poutine
from torch import Tensor

from orderppl.experiments.replicates import Problem, Replicates
from orderppl.inference import RevealTraceGraph_ELBO, all_orders, exact_terms
from orderppl.inference.exact import order_law
from orderppl.states import masked_before

BY_HISTORY, BY_PARAMETER = "limit: baseline by history", "limit: also by parameter"


def baseline_limits(problem: Problem, particles: int) -> dict[str, float]:
    """Least variance of the order's gradient, summed over its coordinates, with independent particles.

    Args:
        problem: makes the pair; short enough to sum over all orders.
        particles: K.
    """
    one = problem(1, False)
    orders = all_orders(one.guide, **one.batch)  # [N, 1, L]
    log_q = exact_terms(one.model, one.guide, orders, **one.batch).log_guide[:, 0]
    possible = log_q > -torch.inf
    orders, probability = orders[possible, 0], log_q[possible].double().exp().detach()
    gradient, scores = _gradient_and_scores(problem(len(orders), False), orders)
    weight = probability.unsqueeze(-1)
    variance = (weight * gradient.square()).sum(0) - (weight * gradient).sum(0).square()  # [P]
    saved_by_history, saved_by_parameter = 0.0, torch.zeros_like(variance)
    for step, score in enumerate(scores):
        history = torch.where(masked_before(orders, step), len(scores), orders).unique(dim=0, return_inverse=True)[1]
        empty = score.new_zeros(int(history.max()) + 1, score.shape[-1])
        products = empty.index_add(0, history, weight * gradient * score)  # E[g_p s_tp; h], [H, P]
        squares = empty.index_add(0, history, weight * score.square())
        saved_by_history += float(_ratio(products.sum(-1).square(), squares.sum(-1)).sum())
        saved_by_parameter += _ratio(products.square(), squares).sum(0)
    total = float(variance.sum())
    return {
        BY_HISTORY: (total - saved_by_history) / particles,
        BY_PARAMETER: (total - float(saved_by_parameter.sum())) / particles,
    }


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Quotients, 0 where there is nothing to divide by."""
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)


def _gradient_and_scores(pair: Replicates, orders: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The default gradient without a baseline, float64 [N, P], and the scores of its T sets, [N, P] each.

    Args:
        pair: with a row for every order.
        orders: int64 [N, L].
    """

    def gradient_of(value: Tensor) -> Tensor:
        for leaf in pair.parameters["order"]:
            leaf.grad = None
        if value.requires_grad:
            value.backward(retain_graph=True)  # the steps share the law
        return pair.gradients()["order"]

    drawn = poutine.trace(pair.guide).get_trace(**pair.batch)
    drawn.nodes["reveal_step"]["value"] = orders
    guide = poutine.replay(pair.guide, trace=drawn)
    gradient = -gradient_of(RevealTraceGraph_ELBO(1).differentiable_loss(pair.model, guide, **pair.batch))
    law = order_law(pair.guide, **pair.batch)
    return gradient, [gradient_of(law.step_log_prob(orders)[step].sum()) for step in range(pair.model.num_steps)]
