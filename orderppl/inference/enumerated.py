"""The ELBO of small programs as a sum over all orders."""

from __future__ import annotations

from typing import Any

from pyro.infer import Trace_ELBO
from torch import Tensor

from orderppl.errors import UserError
from orderppl.inference.exact import all_orders, exact_terms, order_distribution
from orderppl.inference.objective import Objective
from orderppl.unmasking.trajectory import steps_used


class EnumeratedELBO(Objective, Trace_ELBO):
    """The ELBO without Monte Carlo, for few positions and steps.

        ELBO = sum_r q(r | x) [ log p(x | r) + kl_weight (log p(r) - log q(r | x)) ]     over all T^C orders r

    with C columns in which some row has a position to reveal. Value and gradient are exact, for model and guide, up to
    rounding. Needs T^C B T denoiser rows: an oracle for tests and for telling an optimisation failure from a noisy
    gradient.

    Args:
        max_orders: largest T^C that is enumerated.
        kl_weight: 1 for the ELBO.

    Attributes:
        metrics: those of `Objective`, all exact.

    Raises:
        UserError: when called, for more than `max_orders` orders, a pair without a `reveal_step` site that is an
            `OrderDistribution`.
    """

    def __init__(self, max_orders: int = 10_000, *, kl_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(1, kl_weight=kl_weight, **kwargs)
        self.max_orders = max_orders

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        guide_order = order_distribution(guide, *args, **kwargs)
        length, steps = len(guide_order.columns), guide_order.num_steps
        if steps**length > self.max_orders:
            problem = f"{steps}^{length} = {steps**length} orders of {length} positions in {steps} steps, more than"
            remedy = "use RevealTraceGraph_ELBO, fewer positions or steps, or raise max_orders"
            raise UserError("max_orders", f"{problem} {self.max_orders}", remedy)
        terms = exact_terms(model, guide, all_orders(guide, *args, **kwargs), *args, **kwargs)
        elbo = terms.elbo(self.kl_weight).sum()
        whole, fit = (terms.elbo(weight).detach().mean() for weight in (1.0, 0.0))
        count = (terms.log_guide.detach().exp() * steps_used(terms.orders)).sum(0).mean()
        self.metrics = {"elbo": whole, "log_likelihood": fit, "kl": fit - whole, "steps": count}
        return elbo, elbo
