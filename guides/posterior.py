"""Sets that depend on everything: the tokens, the state on the way and the denoiser's view of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from orderppl.denoising import Denoiser
from orderppl.distributions import BernoulliSet, OrderedPartition, SequentialReveal
from orderppl.guides.guide import PathGuide
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState


class PosteriorGuide(PathGuide):
    """q(z_t | s_t, x, c) = prod_{i in M_t} Bernoulli( z_ti; sigmoid(network(s_t, x)_i) ), divided by Z if `non_empty`.

    The most flexible family here: with x given, s_t says which positions are revealed, so every set may depend on all
    sets before it (the exact posterior p(z_t | z_{<t}, x) is also a function of these). What it cannot say is a
    dependence between the positions of one set; a guide that is autoregressive within the sets as well would cost one
    network pass per position instead of one per step. One pass per step is also the price over a guide with one score
    per position.

    Args:
        network: (state, tokens) -> logits, float [*, L], for states with leading shape `*` and tokens int64 [B, L].
        denoiser: the model's denoiser, whose predictions the network may read.
        num_steps: step budget T.
        non_empty: condition every set on revealing something; needed where the prior does so.
    """

    def __init__(
        self,
        network: nn.Module | Callable[[UnmaskingState, Tensor], Tensor],
        denoiser: Denoiser,
        num_steps: int,
        non_empty: bool = False,
    ) -> None:
        super().__init__(denoiser, num_steps)
        self.network = network
        self.non_empty = non_empty

    def law(self, path: RevealPath) -> OrderedPartition:
        """A chain of Bernoulli sets, each asked for at its own state."""

        def sets(state: UnmaskingState) -> BernoulliSet:
            return BernoulliSet(self.network(state, path.tokens), state.masked, self.non_empty)

        return SequentialReveal(path, sets)
