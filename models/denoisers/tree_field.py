"""The exact denoiser of a Markov field on a binary tree, and the best order to reveal it in."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.errors import UserError
from orderppl.models.denoisers.evidence import evidence_by_place

LARGEST_JOINT = 2**22  # probabilities in a table of a node and its Markov boundary
LONGEST_SEARCH = 15  # nodes; the search for the best order looks at 3^nodes pairs of sets

Shape = tuple["Shape", ...]
"""What is revealed beyond an edge: () a revealed node, else what is revealed beyond the edges of a hidden one."""


def _normalised(message: Tensor) -> Tensor:
    return message / message.sum(-1, keepdim=True)


class TreeFieldDenoiser(Configurable, nn.Module):
    """Exact conditionals p(x_i | the other revealed tokens) of a symmetric Markov field on a complete binary tree.

    Nodes stand in level order, parent(i) = (i - 1) // 2. The root is uniform over K states; a child keeps the state of
    its parent with probability `stay`, else takes one of the others with equal probability. The first positions of the
    tree are a tree themselves, so a shorter canvas is one, too. There is nothing to train; MASK is the class behind the
    K states and gets no logit.

    Args:
        num_states: K.
        stay: probability of keeping the parent's state, strictly between 0 and 1.
        depth: levels; the tree has 2^depth - 1 nodes.

    Raises:
        UserError: fewer than two states, `stay` outside (0, 1), or no level.
    """

    transition: Tensor
    tokenizer = None

    def __init__(self, num_states: int, stay: float, depth: int = 4) -> None:
        super().__init__()
        if num_states < 2:
            raise UserError("num_states", f"{num_states} is too few", "use at least 2")
        if not 0 < stay < 1:
            raise UserError("stay", f"{stay} is not strictly between 0 and 1", "use e.g. 0.85")
        if depth < 1:
            raise UserError("depth", f"{depth} is not positive", "use at least 1")
        self.num_states, self.stay, self.depth = num_states, stay, depth
        self.length = 2**depth - 1
        self.vocab_size = self.mask_index = num_states
        transition = torch.full((num_states, num_states), (1 - stay) / (num_states - 1), dtype=torch.float64)
        self.register_buffer("transition", transition.fill_diagonal_(stay), persistent=False)
        edges = [(i, (i - 1) // 2) for i in range(1, self.length)]
        self._neighbours = [[a + b - i for a, b in edges if i in (a, b)] for i in range(self.length)]
        below = [1 << i for i in range(self.length)]  # a node and its descendants, as bits
        for child, parent in reversed(edges):
            below[parent] |= below[child]
        self._beyond = {(parent, child): below[child] for child, parent in edges}  # bits beyond a directed edge
        self._beyond |= {(child, parent): below[0] & ~below[child] for child, parent in edges}
        self._shapes: dict[tuple[int, int, int], Shape | None] = {}
        self._entropies: dict[Shape, float] = {}
        self.eval()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`. Exact to float64, returned in float32.

        Raises:
            UserError: the canvas is longer than the tree.
        """
        attended = attention_mask.bool()
        if state.shape[-1] > self.length:
            raise UserError("length", f"a canvas of {state.shape[-1]} exceeds {self.length}", "use a deeper tree")
        places = state, attended, self.mask_index, self.length
        evidence, node = evidence_by_place(*places, self.transition.dtype)  # [N, nodes, K], [N, S, K]
        said = self._said_by_others(evidence)  # [N, nodes, K]
        return said.gather(1, node.clamp(max=self.length - 1)).log().float()

    def _said_by_others(self, evidence: Tensor) -> Tensor:
        """Belief propagation: p(evidence of all other nodes | x_i) up to a factor, float64 [N, nodes, K].

        Args:
            evidence: float64 [N, nodes, K], p(evidence of the node | x_i).
        """
        own = [evidence[:, 2**d - 1 : 2 ** (d + 1) - 1] for d in range(self.depth)]  # by level, [N, 2^d, K]
        below = [torch.ones_like(level) for level in own]  # from the children of a node
        beside = [torch.ones_like(level) for level in own]  # from its sibling to their parent
        for d in range(self.depth - 1, 0, -1):
            siblings = _normalised((own[d] * below[d]) @ self.transition).unflatten(1, (-1, 2))  # [N, 2^(d-1), 2, K]
            below[d - 1] = siblings.prod(2)
            beside[d] = siblings.flip(2).flatten(1, 2)
        above = [torch.ones_like(own[0])]  # from the parent of a node: the root has none, it is uniform
        for d in range(1, self.depth):
            parent = (own[d - 1] * above[d - 1]).repeat_interleave(2, 1) * beside[d]
            above.append(_normalised(parent @ self.transition))
        return torch.cat(above, 1) * torch.cat(below, 1)

    def log_evidence(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log probability of whole trees under the field itself.

        Args:
            tokens: int64 [*, L], in level order.
            attention_mask: bool [*, L]; padding on the right.

        Returns:
            float64 [*], nats.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        tokens = tokens.clamp(0, self.num_states - 1)
        parent = (torch.arange(1, tokens.shape[-1], device=tokens.device) - 1) // 2
        step = self.transition.log()[tokens[..., parent], tokens[..., 1:]]  # [*, L - 1]
        first = -math.log(self.num_states) * mask[..., 0].double()
        return first + (step * mask[..., 1:]).sum(-1)

    def expected_cost(self, reveal_step: Tensor) -> float:
        """What a fixed order is expected to lose: entropy of the field minus expected path log-likelihood.

            sum_i H(x_i | x_S(i)) - H(x),   S(i) = {j : r_j < r_i}

        Args:
            reveal_step: int64 [nodes].

        Returns:
            Its gap, nats; exact.

        Raises:
            UserError: not one step for each node, or a tree too large to enumerate a Markov boundary.
        """
        steps = reveal_step.tolist()
        if len(steps) != self.length:
            raise UserError("reveal_step", f"{len(steps)} steps for {self.length} nodes", "give one for each node")
        before = [sum(1 << j for j in range(self.length) if steps[j] < step) for step in steps]
        return sum(self._entropy(node, revealed) for node, revealed in enumerate(before)) - self._field_entropy()

    def best_order(self, num_steps: int) -> tuple[Tensor, float]:
        """The fixed reveal steps with the smallest expected loss, by dynamic programming over the revealed sets.

            V_0(all) = 0,   V_k(S) = min over sets M of hidden nodes of sum_{i in M} H(x_i | x_S) + V_{k-1}(S + M)

        There are 3^nodes pairs (S, M), 14 million for 15 nodes.

        Args:
            num_steps: step budget T.

        Returns:
            reveal_step int64 [nodes], and its gap: entropy of the field minus expected path log-likelihood, nats.

        Raises:
            UserError: no step, or more than 15 nodes.
        """
        if num_steps < 1:
            raise UserError("num_steps", f"{num_steps} is not positive", "use at least 1")
        if self.length > LONGEST_SEARCH:
            raise UserError("depth", f"{self.length} nodes have too many orders to search", "use a depth of at most 4")
        everything = 2**self.length - 1
        value = np.full((num_steps + 1, everything + 1), np.inf)  # [steps left, S]
        value[:, everything] = 0.0
        chosen = np.full((num_steps + 1, everything + 1), everything)  # S + M of the best M
        for revealed in range(everything - 1, -1, -1):  # supersets first
            cost, after = np.zeros(1), np.array([revealed])  # of every M, by doubling
            for node in range(self.length):
                if not revealed >> node & 1:
                    cost = np.concatenate([cost, cost + self._entropy(node, revealed)])
                    after = np.concatenate([after, after | 1 << node])
            for left in range(1, num_steps + 1):
                total = cost + value[left - 1, after]
                best = int(total.argmin())
                value[left, revealed], chosen[left, revealed] = total[best], after[best]
        reveal_step, revealed = torch.zeros(self.length, dtype=torch.long), 0
        for left in range(num_steps, 0, -1):
            then = int(chosen[left, revealed])
            for node in range(self.length):
                if (then & ~revealed) >> node & 1:
                    reveal_step[node] = num_steps - left
            revealed = then
        return reveal_step, float(value[num_steps, 0] - self._field_entropy())

    def _field_entropy(self) -> float:
        edge = float(torch.special.entr(self.transition[0]).sum())
        return math.log(self.num_states) + (self.length - 1) * edge

    def _entropy(self, node: int, revealed: int) -> float:
        """H(x_node | x_S) in nats, S the bits of `revealed`."""
        return self._entropy_of(self._shape(node, -1, revealed) or ())

    def _shape(self, node: int, origin: int, revealed: int) -> Shape | None:
        """What is revealed beyond the edges of a hidden node, `origin` left out, as far as the Markov boundary.

        None for nothing. All edges are alike and reversible, so equal shapes have equal entropies.
        """
        parts = [self._part(node, other, revealed) for other in self._neighbours[node] if other != origin]
        return tuple(sorted(part for part in parts if part is not None)) or None

    def _part(self, origin: int, node: int, revealed: int) -> Shape | None:
        if revealed >> node & 1:
            return ()
        key = origin, node, revealed & self._beyond[origin, node]
        if key not in self._shapes:
            self._shapes[key] = self._shape(node, origin, revealed)
        return self._shapes[key]

    def _entropy_of(self, shape: Shape) -> float:
        if shape not in self._entropies:
            joint = self._likelihood(shape) / self.num_states  # p(boundary, x_i), float64 [A, K]
            entropy = torch.special.entr(joint).sum() - torch.special.entr(joint.sum(-1)).sum()
            self._entropies[shape] = float(entropy)
        return self._entropies[shape]

    def _likelihood(self, shape: Shape) -> Tensor:
        """p(boundary | state of a hidden node) for every assignment of the boundary: float64 [A, K]."""
        likelihood = self.transition.new_ones(1, self.num_states)
        for part in shape:
            through = self._likelihood(part) @ self.transition if part else self.transition  # over the edge
            if len(likelihood) * through.numel() > LARGEST_JOINT:
                raise UserError("depth", f"{self.depth} levels have too large a Markov boundary", "use fewer levels")
            likelihood = (likelihood.unsqueeze(1) * through).flatten(0, 1)
        return likelihood
