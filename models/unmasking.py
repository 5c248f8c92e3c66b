"""The unmasking process as a Pyro program."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro.nn import PyroModule
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from orderppl.data.answer_tokens import NO_TOKEN
from orderppl.denoising import Canvas, Denoiser
from orderppl.distributions import HiddenTokens, RevealedTokens, Tracked
from orderppl.errors import UserError
from orderppl.models.priors import RevealPrior
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState, same_step


class UnmaskingModel(PyroModule):
    """The generative program of masked diffusion with the order as its latent variable, scored in one piece.

        r ~ prior                                  ordered partition of the positions, site `reveal_step`
        x ~ prod_t prod_{i : r_i = t} Denoiser(s_t, c)_i        site `tokens`; see `RevealedTokens`

    All T states of an order are stacked and go through the denoiser in one call. The states are built from the
    observed tokens: to generate, use `SequentialUnmaskingModel`.

    Args:
        denoiser: see `Denoiser`; freeze it with `requires_grad_(False)` to learn the order alone.
        prior: distribution over orders.
        num_steps: step budget T.
        one_step: look at one uniformly drawn step per sequence instead of all T; unbiased, T times fewer denoiser rows.
        outlier: share of sequences that may be anything, at least 0 and below 1.
        asked: tokens, int64 [B, L], `NO_TOKEN` at padding -> bool [B, L], which of them are asked for, such as
            `AnswerTokens`; all when left out.
        temperature: at which tokens are drawn, that of the decoder; positive. Greedy tokens are the limit 0, towards
            which the likelihood becomes a yes or no per token: 0.25 with outliers comes close.

    Raises:
        UserError: a share outside [0, 1), a temperature that is not positive, or a share or an answer in a program that
            looks at one step, which only estimates p(x | r).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        prior: RevealPrior,
        num_steps: int,
        one_step: bool = False,
        outlier: float = 0.0,
        asked: Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
    ) -> None:
        if not 0 <= outlier < 1:
            raise UserError("outlier", f"{outlier} is not in [0, 1)", "use 0 for none, or a share such as 0.5")
        if outlier and one_step:
            raise UserError("outlier", "a one-step program only estimates the likelihood of a sequence", "use 0")
        if asked is not None and one_step:
            raise UserError("asked", "a one-step program does not see when the answer is there", "leave it out")
        if not temperature > 0:
            raise UserError(
                "temperature", f"{temperature} is not positive", "use 1, or 0.25 to come close to greedy tokens"
            )
        super().__init__("model")  # a root name of its own, or pyro.infer.SVI confuses its parameters with the guide's
        self.denoiser = denoiser
        self.prior = prior
        self.num_steps = num_steps
        self.one_step = one_step
        self.outlier = outlier
        self.asked = asked
        self.temperature = temperature

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Score a batch.

        Args:
            tokens: int64 [B, L], response tokens.
            attention_mask: bool [B, L], False at padding; all True when left out.
            context: int64 [B, C], prompt tokens.
            context_mask: bool [B, C].

        Returns:
            The order, int64 [*, B, L].
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        canvas = Canvas(self.denoiser, attention_mask, context, context_mask)
        path = RevealPath(canvas, tokens, self.num_steps, self.one_step)
        asked = None if self.asked is None else self.asked(tokens.masked_fill(~canvas.attention_mask, NO_TOKEN))
        with pyro.plate("batch", len(tokens), dim=-1):
            reveal_step = pyro.sample("reveal_step", self.prior(path))
            likelihood = RevealedTokens(path(reveal_step), reveal_step, self.outlier, asked, self.temperature)
            pyro.sample("tokens", likelihood, obs=tokens)
        return reveal_step


class SequentialUnmaskingModel(PyroModule):
    """The same process step by step, with a site per step; generative under `poutine.uncondition`.

        z_t ~ prior(s_t, c, t)          site `reveal_{t}`, bool [B, L]; observed at the last step: everything left
        x_i ~ Denoiser(s_t, c)_i        site `tokens_{t}`, for i in z_t
        s_{t+1} = s_t with z_t filled in

    Args:
        denoiser: see `Denoiser`.
        prior: distribution over reveal sets.
        num_steps: step budget T.
    """

    def __init__(self, denoiser: Denoiser, prior: RevealPrior, num_steps: int) -> None:
        super().__init__("model")
        self.denoiser = denoiser
        self.prior = prior
        self.num_steps = num_steps

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Score or generate a batch; see `UnmaskingModel.forward`.

        Under `poutine.uncondition` the values of `tokens` are ignored and only its shape is used.

        Returns:
            The completed sequences, int64 [B, L].
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(tokens, dtype=torch.bool)
        canvas = Canvas(self.denoiser, attention_mask, context, context_mask)
        prior, masked = self.prior, canvas.attention_mask
        state = torch.where(masked, canvas.mask_index, tokens)
        memory: dict[str, Tensor] = {}  # of a prior that looks back
        scored = torch.where(masked, tokens, 0)  # padding may hold ids that are no class of the denoiser
        provenance: frozenset[str] = frozenset()  # of all that was drawn so far; the steps work on plain tensors
        with pyro.plate("batch", len(tokens), dim=-1):
            for t in range(self.num_steps):
                seen = UnmaskingState(state, masked, same_step(t, masked), self.num_steps, canvas, memory=memory)
                sets = prior.distribution(seen)
                if t < self.num_steps - 1:
                    reveal = pyro.sample(f"reveal_{t}", Tracked(sets, provenance))
                    provenance |= get_provenance(reveal)
                    reveal = detach_provenance(reveal)
                else:  # no choice is left; the site counts the price of a step
                    reveal = masked
                    pyro.sample(f"reveal_{t}", Tracked(sets.certain(seen.is_last), provenance), obs=masked)
                # The sampled value, not `tokens`, builds the next state: it is the generated one under uncondition.
                value = pyro.sample(f"tokens_{t}", Tracked(HiddenTokens(seen, reveal), provenance), obs=scored)
                provenance |= get_provenance(value)
                value = detach_provenance(value)
                if value is scored:
                    seen.token_log_prob(scored)
                    seen.forget_logits()  # or the trace would hold those of all steps
                state = torch.where(reveal, value, state)
                masked = masked & ~reveal
        return track_provenance(state, provenance)
