"""The best orders to reveal a Markov chain in: the best fixed one, and the best policy of all."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orderppl.distributions import DecidedSet
from orderppl.errors import UserError
from orderppl.policies import Policy
from orderppl.unmasking import State

if TYPE_CHECKING:
    from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser

Matrix = NDArray[np.float64]

OPEN, HALF_OPEN, CLOSED, CLOSED_BY_OTHERS = range(4)
"""Kinds of a gap: no revealed end, one, two; of two with different tokens, where the tokens are looked at."""


def entropy(p: Matrix) -> float:
    """Entropy of a distribution, nats."""
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())


def nearest_revealed(tokens: Tensor, revealed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest revealed position strictly to the left of each one.

    Args:
        tokens: int64 [*, S].
        revealed: bool [*, S].
        position: int64 [*, S], number of a position in the chain, from 1.

    Returns:
        Its number, 0 for none, and its token, of any value for none: int64 [*, S] each.
    """
    column = torch.arange(tokens.shape[-1], device=tokens.device)
    nearest = torch.where(revealed, column, -1).cummax(-1).values
    nearest = torch.cat([torch.full_like(nearest[..., :1], -1), nearest[..., :-1]], -1)
    found = nearest.clamp(min=0)
    return torch.where(nearest >= 0, position.gather(-1, found), 0), tokens.gather(-1, found)


class GapSearch:
    """The best reveal set of every gap of a chain and number of steps left, by dynamic programming.

    A gap is a run of hidden positions. Given its revealed ends its tokens are independent of all others, and a reveal
    set {b_1 < ... < b_m} splits it into gaps with one step less, so that with b_0 and b_{m+1} the ends

        V_k(gap) = min over sets of  sum_j H(x_{b_j} | ends) + sum_j E[ V_{k-1}(gap between b_j and b_{j+1}) | ends ]

    where all that is left is revealed at k = 1. The first sum is the loss of predicting the set's tokens independently
    of each other; the expectation is over what they are in truth, two tokens of a Markov bridge. So the best set is a
    shortest path from end to end: its nodes are revealed positions, its edges are the gaps that remain.

    By symmetry V_k depends on the size of a gap and on its kind only. A policy sees whether the tokens at two revealed
    ends are equal; a fixed order does not, and takes the mean over them. A one-ended gap stands with its revealed end
    on the left. Time O(T L^3).

    Args:
        powers: float64 [L + 1, K, K], powers of the transition matrix, which is doubly stochastic and has one number
            on and one off its diagonal.
        num_steps: step budget T.
        sees_tokens: search for the best policy rather than the best fixed order.

    Attributes:
        value: float64 [T + 1, kinds, L + 1], V_k(kind, size) in nats.
        chosen: (k, kind, size) -> positions 1..size of the best set, never empty.

    Raises:
        UserError: no step.
    """

    def __init__(self, powers: Matrix, num_steps: int, sees_tokens: bool) -> None:
        if num_steps < 1:
            raise UserError("num_steps", f"{num_steps} is not positive", "use at least 1")
        self.powers, self.sees_tokens, self.num_steps, self.length = powers, sees_tokens, num_steps, len(powers) - 1
        kinds = range(4 if sees_tokens else 3)
        self.value = np.zeros((num_steps + 1, len(kinds), self.length + 1))
        self.chosen: dict[tuple[int, int, int], list[int]] = {}
        gaps = [(kind, size) for kind in kinds for size in range(1, self.length + 1 - min(kind, CLOSED))]
        known = {gap: (self.costs(*gap), self._equal(*gap)) for gap in gaps}
        for kind, size in gaps:
            self.value[1, kind, size] = known[kind, size][0].sum()
            self.chosen[1, kind, size] = list(range(1, size + 1))
        for left in range(2, num_steps + 1):
            for kind, size in gaps:
                self._solve(left, kind, size, *known[kind, size])

    def costs(self, kind: int, size: int) -> Matrix:
        """H(x_b | ends) of every position of a gap: float64 [size]."""
        if kind == OPEN:
            return np.full(size, np.log(self.powers.shape[-1]))
        if kind == HALF_OPEN:
            return np.array([entropy(power[0]) for power in self.powers[1 : size + 1]])
        if self.sees_tokens:
            return self._costs_between(size, kind - CLOSED)
        equal = self.powers[size + 1, 0, 0]
        return equal * self._costs_between(size, 0) + (1 - equal) * self._costs_between(size, 1)

    def _costs_between(self, size: int, right: int) -> Matrix:
        """H(x_b | left = 0, right) of every position between two revealed ends: float64 [size]."""
        joint = self.powers[1 : size + 1, 0] * self.powers[size:0:-1, :, right]  # [size, K]
        return np.array([entropy(p) for p in joint / joint.sum(-1, keepdims=True)])

    def _equal(self, kind: int, size: int) -> Matrix:
        """P(x_a = x_b | ends) for a < b from end 0 to end size + 1: float64 [size + 2, size + 2]."""
        place = np.arange(size + 2)
        equal = self.powers[np.clip(place - place[:, None], 0, self.length), 0, 0]
        if not self.sees_tokens or kind < CLOSED:
            return equal
        right = kind - CLOSED
        reach = self.powers[: size + 2, 0] @ np.swapaxes(self.powers[: size + 2, :, right], 0, 1)  # [a, to the end]
        return equal * reach[:, ::-1] / self.powers[size + 1, 0, right]

    def _solve(self, left: int, kind: int, size: int, costs: Matrix, equal: Matrix) -> None:
        """Find the shortest path through one gap."""
        before = self.value[left - 1]
        best, origin = (
            np.zeros(size + 2),
            np.zeros(size + 2, dtype=int),
        )  # cheapest way to a node, its own cost included
        for node in range(1, size + 2):
            gaps = node - 1 - np.arange(node)  # hidden positions between an earlier node and this one
            edges = before[CLOSED, gaps]
            if self.sees_tokens:
                same = equal[:node, node]
                edges = same * edges + (1 - same) * before[CLOSED_BY_OTHERS, gaps]
            is_last = node == size + 1
            if is_last and kind < CLOSED:  # the right end is not revealed
                edges = before[HALF_OPEN, gaps]
            if kind == OPEN:  # nor is the left one
                edges[0] = before[OPEN if is_last else HALF_OPEN, gaps[0]]
            total = best[:node] + edges
            origin[node] = int(total.argmin())
            best[node] = total[origin[node]] + (0.0 if is_last else costs[node - 1])
        path, node = [], int(origin[size + 1])
        while node:
            path.append(node)
            node = int(origin[node])
        self.value[left, kind, size] = best[size + 1]
        # what is best after waiting is as good now
        self.chosen[left, kind, size] = path[::-1] or self.chosen[left - 1, kind, size]

    def fixed_order(self) -> Tensor:
        """The reveal steps of the best sets, whatever the tokens: int64 [L]."""
        reveal_step = torch.zeros(self.length, dtype=torch.long)

        def assign(left: int, start: int, size: int, ends: tuple[bool, bool]) -> None:
            if not size:
                return
            picked = self.chosen[left, sum(ends), size]
            if ends == (False, True):  # mirrored: the table has the revealed end on the left
                picked = [size + 1 - node for node in reversed(picked)]
            for node in picked:
                reveal_step[start + node - 1] = self.num_steps - left
            for a, b in itertools.pairwise([0, *picked, size + 1]):
                inner = (ends[0] if a == 0 else True, ends[1] if b == size + 1 else True)
                assign(left - 1, start + a, b - a - 1, inner)

        assign(self.num_steps, 0, self.length, (False, False))
        return reveal_step


class GapPolicy(Policy):
    """Reveals in every gap what a search that sees the tokens found to be best there.

    Args:
        denoiser: the chain.
        num_steps: largest step budget.
        length: longest row; that of the chain when left out.

    Raises:
        UserError: no step, or longer rows than the chain.
    """

    non_empty = True
    chosen: Tensor

    def __init__(self, denoiser: MarkovChainDenoiser, num_steps: int, length: int | None = None) -> None:
        super().__init__()
        self.search = denoiser.search(num_steps, length, sees_tokens=True)
        self.mask_index = denoiser.mask_index
        size = self.search.length + 1
        chosen = torch.zeros(*self.search.value.shape, size, dtype=torch.bool)  # [steps left, kind, size, offset]
        for key, positions in self.search.chosen.items():
            chosen[key][positions] = True
        self.register_buffer("chosen", chosen, persistent=False)

    def forward(self, state: State) -> DecidedSet:
        """Look every gap up by its ends, size and the steps left.

        Raises:
            UserError: more steps, or longer rows, than were searched for.
        """
        if int(torch.as_tensor(state.num_steps).max()) > self.search.num_steps:
            problem = f"{state.num_steps} steps for a policy of {self.search.num_steps}"
            raise UserError("max_steps", problem, "allow as many steps as the policy has")
        if state.shape[-1] > self.search.length:
            problem = f"a canvas of {state.shape[-1]} exceeds {self.search.length}"
            raise UserError("length", problem, "use a longer chain")
        attended = state.attention_mask
        revealed = attended & (state.tokens != self.mask_index)
        position = attended.long().cumsum(-1)  # 1.. from the left end, padding takes no place in the chain
        last = position[..., -1:]
        mirrored = last + 1 - position  # 1.. from the right end
        left, left_token = nearest_revealed(state.tokens, revealed, position)
        flipped = nearest_revealed(state.tokens.flip(-1), revealed.flip(-1), mirrored.flip(-1))
        right, right_token = (end.flip(-1) for end in flipped)
        size = last - right - left
        closed = (left > 0).long() + (right > 0).long()  # two ends: CLOSED
        kind = closed + ((closed == CLOSED) & (left_token != right_token)).long()
        offset = torch.where((left == 0) & (right > 0), mirrored - right, position - left)
        steps_left = torch.as_tensor(state.steps_left).unsqueeze(-1).expand_as(size)
        return DecidedSet(self.chosen[steps_left, kind, size, offset] & state.masked, state.masked, non_empty=True)
