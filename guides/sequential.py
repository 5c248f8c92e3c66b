"""Any guide of this package, site by site, for the model that goes step by step."""

from __future__ import annotations

import pyro
import torch
from pyro.nn import PyroModule
from pyro.ops.provenance import detach_provenance, get_provenance
from torch import Tensor

from orderppl.distributions import Tracked
from orderppl.guides.guide import RevealGuide
from orderppl.states import same_step


class SequentialGuide(PyroModule):
    """The same law of orders with a site per step, as `SequentialUnmaskingModel` has.

        z_t ~ q(z_t | M_t, x, c)        site `reveal_{t}`, bool [B, L], for t < T; the last step leaves no choice

    Args:
        guide: says how the sets are distributed.
    """

    def __init__(self, guide: RevealGuide) -> None:
        super().__init__("guide")
        self.guide = guide

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sample the sites `reveal_{t}`; see `RevealGuide.forward`.

        Returns:
            The sets under their site names, bool [*, B, L].
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        masked = attention_mask.bool()
        drawn: dict[str, Tensor] = {}
        provenance: frozenset[str] = frozenset()  # of the sets so far, which work on plain tensors
        with pyro.plate("batch", len(tokens), dim=-1):
            order = self.guide.order_distribution(tokens, masked, context, context_mask)
            for t in range(order.num_steps - 1):
                sets = Tracked(order.set_at(masked, same_step(t, masked)), provenance)
                drawn[f"reveal_{t}"] = reveal = pyro.sample(f"reveal_{t}", sets)
                provenance |= get_provenance(reveal)
                masked = masked & ~detach_provenance(reveal)
        return drawn
