"""The exact denoiser of a stationary Markov chain, and the best order to reveal it in."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.errors import UserError
from orderppl.models.denoisers.chain_orders import OPEN, GapPolicy, GapSearch, entropy, nearest_revealed


class MarkovChainDenoiser(Configurable, nn.Module):
    """Exact conditionals p(x_i | the other revealed tokens) of a symmetric chain.

    The chain starts uniformly over K states and keeps its state with probability `stay`, else moves to one of the
    others with equal probability. A hidden token depends on its nearest revealed neighbours only, through powers of
    the transition matrix. There is nothing to train; MASK is the class behind the K states and gets no logit.

    Args:
        num_states: K.
        stay: probability of keeping the state, strictly between 0 and 1.
        length: longest canvas.

    Raises:
        UserError: fewer than two states, `stay` outside (0, 1), or no position.
    """

    log_power: Tensor
    tokenizer = None

    def __init__(self, num_states: int, stay: float, length: int) -> None:
        super().__init__()
        if num_states < 2:
            raise UserError("num_states", f"{num_states} is too few", "use at least 2")
        if not 0 < stay < 1:
            raise UserError("stay", f"{stay} is not strictly between 0 and 1", "use e.g. 0.85")
        if length < 1:
            raise UserError("length", f"{length} is not positive", "use at least 1")
        self.num_states, self.stay, self.length = num_states, stay, length
        self.vocab_size = self.mask_index = num_states
        self.transition = np.full((num_states, num_states), (1 - stay) / (num_states - 1))
        np.fill_diagonal(self.transition, stay)
        powers = [np.eye(num_states)]
        for _ in range(length):
            powers.append(powers[-1] @ self.transition)
        self._powers = np.stack(powers)  # [L + 1, K, K]
        # Row 0 stands for "no neighbour on that side": it says nothing.
        log_power = np.concatenate([np.zeros((1, num_states, num_states)), np.log(self._powers[1:])])
        self.register_buffer("log_power", torch.from_numpy(log_power), persistent=False)
        self.eval()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`. Exact to float64, returned in float32.

        Raises:
            UserError: the canvas is longer than the chain.
        """
        attended = attention_mask.bool()
        if state.shape[-1] > self.length:
            raise UserError("length", f"a canvas of {state.shape[-1]} exceeds {self.length}", "use a longer chain")
        left = self._side(state, attended)  # [N, S, K]
        right = self._side(state.flip(-1), attended.flip(-1)).flip(-2)
        return (left + right).float()

    def _side(self, state: Tensor, attended: Tensor) -> Tensor:
        """Log-likelihood of every state given the nearest revealed token strictly to the left: float64 [N, S, K].

        The chain is reversible with a uniform stationary distribution, so the flipped canvas gives the right side.
        """
        position = attended.long().cumsum(-1)  # padding takes no place in the chain
        number, token = nearest_revealed(state, attended & (state != self.mask_index), position)
        distance = torch.where(number > 0, position - number, 0).clamp(0, self.length)
        token = token.clamp(0, self.num_states - 1)
        return self.log_power[distance, token]

    def log_evidence(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log probability of whole chains under the chain itself.

        Args:
            tokens: int64 [*, L].
            attention_mask: bool [*, L]; padding on the right.

        Returns:
            float64 [*], nats.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        tokens = tokens.clamp(0, self.num_states - 1)
        step = self.log_power[1][tokens[..., :-1], tokens[..., 1:]]  # [*, L - 1]
        first = -math.log(self.num_states) * mask[..., 0].double()
        return first + (step * mask[..., 1:]).sum(-1)

    def best_order(self, num_steps: int, length: int | None = None) -> tuple[Tensor, float]:
        """The fixed reveal steps with the smallest expected loss; see `GapSearch`.

        Args:
            num_steps: step budget T.
            length: number of positions; the chain's length when left out.

        Returns:
            reveal_step int64 [L], and its gap: entropy of the chain minus expected path log-likelihood, nats.

        Raises:
            UserError: no step, or more positions than the chain has.
        """
        search = self.search(num_steps, length, sees_tokens=False)
        return search.fixed_order(), self._gap(search)

    def expected_cost(self, reveal_step: Tensor) -> float:
        """What a fixed order is expected to lose: entropy of the chain minus expected path log-likelihood.

            sum_i H(x_i | nearest revealed on both sides) - H(x),   j revealed where r_j < r_i

        Args:
            reveal_step: int64 [L].

        Returns:
            Its gap, nats; exact.

        Raises:
            UserError: no step, or more of them than the chain has positions.
        """
        steps = reveal_step.tolist()
        search = self.search(1, len(steps), sees_tokens=False)
        total = 0.0
        for i, step in enumerate(steps):
            earlier = [j for j, other in enumerate(steps) if other < step]
            left = max((j for j in earlier if j < i), default=None)
            right = min((j for j in earlier if j > i), default=None)
            ends = (left is not None) + (right is not None)
            if left is None and right is not None:  # mirrored: the revealed end stands on the left
                left, right, i = -right, None, -i
            before = -1 if left is None else left
            size = i - before if right is None else right - before - 1
            total += float(search.costs(ends, size)[i - before - 1])
        return total - self._entropy(len(steps))

    def best_policy(self, num_steps: int, length: int | None = None) -> tuple[GapPolicy, float]:
        """The policy with the smallest expected loss of all that see what is revealed; see `GapSearch`.

        With two steps it is the best fixed order, because the first set is chosen before anything is seen. With more
        it may choose a set by whether the revealed tokens around a gap are equal.

        Args:
            num_steps: step budget T.
            length: number of positions; the chain's length when left out.

        Returns:
            The policy, and its gap: entropy of the chain minus expected path log-likelihood, nats.

        Raises:
            UserError: no step, or more positions than the chain has.
        """
        policy = GapPolicy(self, num_steps, length)
        return policy, self._gap(policy.search)

    def search(self, num_steps: int, length: int | None, sees_tokens: bool) -> GapSearch:
        """The best reveal sets; arguments and errors as of `best_order`, `sees_tokens` as of `GapSearch`."""
        length = self.length if length is None else length
        if not 1 <= length <= self.length:
            raise UserError("length", f"{length} is not within 1..{self.length}", "build a longer chain")
        return GapSearch(self._powers[: length + 1], num_steps, sees_tokens)

    def _gap(self, search: GapSearch) -> float:
        return float(search.value[search.num_steps, OPEN, search.length] - self._entropy(search.length))

    def _entropy(self, length: int) -> float:
        """Entropy of a chain of `length` positions, nats."""
        return math.log(self.num_states) + (length - 1) * entropy(self.transition[0])
