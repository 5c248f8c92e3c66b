"""What all guides share: the call of the model and the one site they sample."""

from __future__ import annotations

import pyro
from torch import Tensor

from orderppl.distributions import OrderDistribution
from orderppl.errors import UserError
from orderppl.policies import Policy
from orderppl.program import PyroProgram, rows_plate
from orderppl.unmasking import Batch


class Guide(PyroProgram):
    """Base of a guide q(r | x); a subclass says which distribution over orders it proposes.

        class MyGuide(Guide):
            sees_tokens = False  # it can decode as well

            def __init__(self, num_steps: int, num_tokens: int, width: int = 32) -> None:
                super().__init__(num_steps)
                self.network = SequenceEncoder(num_tokens, num_steps, width)

            def order(self, batch: Batch) -> OrderDistribution:
                return StepwiseOrder(self.network(batch), batch.latent)

    Args:
        num_steps: step budget T.
        shares_orders: draw the orders of all sequences of a batch from the same random numbers: one plan for all draws
            one order for all. Each order has the distribution that it had.

    Attributes:
        sees_tokens: False for a guide that is blind to what is to be revealed: it is given batches without these
            tokens, and its order is a plan that can be deployed.

    Raises:
        UserError: fewer than one step.
    """

    sees_tokens = True

    def __init__(self, num_steps: int, *, shares_orders: bool = False) -> None:
        super().__init__("guide")  # a root name of its own, see UnmaskingModel
        if num_steps < 1:
            raise UserError("num_steps", f"{num_steps} is below 1", "use at least one step")
        self.num_steps = num_steps
        self.shares_orders = shares_orders

    def order(self, batch: Batch) -> OrderDistribution:
        """Return q(r | x), batch shape [B], event [S]."""
        raise NotImplementedError

    def shown(self, batch: Batch) -> Batch:
        """What the guide may see of a batch."""
        return batch if self.sees_tokens else batch.hidden()

    def deployable(self) -> Policy | None:
        """The policy that the guide is without the tokens; None for a posterior, which cannot do without."""
        from orderppl.guides.plan import GuidePlan  # which is made of guides

        return None if self.sees_tokens else GuidePlan(self)

    def forward(self, batch: Batch | Tensor) -> dict[str, Tensor]:
        """Sample the site `reveal_step`.

        Args:
            batch: clean sequences; see `Batch.of`.

        Returns:
            The order under its site name, int64 [*, B, S]: -1 where a position is visible from the start.

        Raises:
            UserError: orders that are to be shared but are drawn step by step.
        """
        batch = Batch.of(batch)
        order = self.order(self.shown(batch))  # outside of the plate, which slows networks
        order = order.sharing_draws() if self.shares_orders else order
        with rows_plate(len(batch)):
            # What the draw has met on its way goes along with the site, for objectives that score the order next.
            return {"reveal_step": pyro.sample("reveal_step", order, infer={"met": order.met})}
