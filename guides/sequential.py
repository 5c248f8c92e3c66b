"""Any guide of this package, site by site, for the model that goes step by step."""

from __future__ import annotations

import pyro
from pyro.ops.provenance import detach_provenance, get_provenance
from torch import Tensor

from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.distributions.tracked import Tracked
from orderppl.errors import UserError
from orderppl.guides.guide import Guide
from orderppl.program import PyroProgram, rows_plate
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import same_step


class SequentialGuide(PyroProgram):
    """The same distribution of orders with a site per step, as `SequentialUnmaskingModel` has.

        z_t ~ q(z_t | M_t, x)        site `reveal_{t}`, bool [B, S], for t < T; the last step leaves no choice

    Args:
        guide: says how the sets are distributed.

    Raises:
        UserError: when called, a guide that draws whole orders, whose sets are not known one by one.
    """

    def __init__(self, guide: Guide) -> None:
        super().__init__("guide")
        self.guide = guide

    def forward(self, batch: Batch | Tensor) -> dict[str, Tensor]:
        """Sample the sites `reveal_{t}`; see `Guide.forward`.

        Returns:
            The sets under their site names, bool [*, B, S].
        """
        batch = Batch.of(batch)
        masked, carry = batch.latent, None
        drawn: dict[str, Tensor] = {}
        provenance: frozenset[str] = frozenset()  # of the sets so far, which work on plain tensors
        with rows_plate(len(batch)):
            order = self.guide.order(self.guide.shown(batch))
            if not order.has_steps:
                raise UserError("guide", "draws whole orders, whose sets are not known one by one", "use it as it is")
            for t in range(order.num_steps - 1):
                if isinstance(order, PolicyOrder):
                    state = order.path.state(masked, same_step(t, masked)).replace(carry=carry)
                    sets, carry = order.policy.at_step(state)
                else:
                    sets = order.set_at(masked, same_step(t, masked))
                drawn[f"reveal_{t}"] = reveal = pyro.sample(f"reveal_{t}", Tracked(sets, provenance))
                provenance |= get_provenance(reveal)
                masked = masked & ~detach_provenance(reveal)
        return drawn
