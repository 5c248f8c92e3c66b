"""What every objective of the library is to Pyro, and Pyro's own bounds in the same form."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.errors import UserError
from orderppl.program import announcing


class Objective(Configurable, ELBO):
    """Base of the objectives: a subclass gives value and surrogate, here are the three forms of a Pyro ELBO.

    Args:
        num_particles: orders drawn per sequence, K.
        max_plate_nesting: 1 for the programs of this library (the batch plate).
        vectorize_particles: draw them in one call, along a new leftmost dimension.
        kl_weight: weight of the KL (or of log q - log p) in the objective; 1 is the bound, less is a tempered one.

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
        **kwargs: Any,
    ) -> None:
        super().__init__(num_particles, max_plate_nesting, vectorize_particles=vectorize_particles, **kwargs)
        self.kl_weight = kl_weight
        self.metrics: dict[str, Tensor] = {}

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Return what is maximised, summed over the batch (0-dim), and a term whose gradient stands for its own."""
        raise NotImplementedError

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss summed over the batch (0-dim), with its gradient; does not wait for the device."""
        value, surrogate = self.value_and_surrogate(model, guide, args, kwargs)
        return -surrogate + (surrogate - value).detach()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss summed over the batch, nats, without keeping a graph."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss summed over the batch, nats, and add its gradient to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())


class StockObjective(Objective):
    """One of Pyro's bounds without a `differentiable_loss`, such as `TraceGraph_ELBO` and `RenyiELBO`.

    `TraceGraph_ELBO` has a surrogate. Others back-propagate by themselves; the gradient that `loss_and_grads` leaves
    is taken off the parameters and given back as the slope of a linear term. They wait for the device.

    Args:
        stock: the bound.

    Raises:
        UserError: when called, if `loss_and_grads` reaches no parameter (without a Pyro `param` site, `RenyiELBO`
            does not back-propagate at all).
    """

    def __init__(self, stock: ELBO) -> None:
        super().__init__(stock.num_particles)
        self.stock = stock

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.stock._get_trace(model, guide, args, kwargs)

    def value_and_surrogate(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        if isinstance(self.stock, TraceGraph_ELBO):
            elbo, surrogate_loss = self.stock._loss_and_surrogate_loss(model, guide, args, kwargs)
            return elbo, -surrogate_loss
        modules = [program for program in (model, guide) if isinstance(program, nn.Module)]
        over = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
        if not torch.is_grad_enabled() or not over:
            value = torch.tensor(-float(self.stock.loss(model, guide, *args, **kwargs)))
            return value, value
        kept = [parameter.grad for parameter in over]
        try:
            for parameter in over:
                parameter.grad = None
            with announcing(True):
                value = torch.tensor(-float(self.stock.loss_and_grads(model, guide, *args, **kwargs)))
            slopes = [(parameter, parameter.grad) for parameter in over if parameter.grad is not None]
        finally:
            for parameter, gradient in zip(over, kept, strict=True):
                parameter.grad = gradient
        if not slopes:
            problem = f"{type(self.stock).__name__} has reached no parameter of model and guide"
            raise UserError("objective", problem, "make them PyroModules, or use RevealTraceGraph_ELBO")
        surrogate = -torch.stack([(parameter * slope).sum() for parameter, slope in slopes]).sum()
        return value.to(surrogate.device), surrogate


def as_objective(elbo: ELBO) -> ELBO:
    """The bound itself when it has a `differentiable_loss`, else the same bound with one."""
    return elbo if hasattr(elbo, "differentiable_loss") else StockObjective(elbo)
