"""The cost of a policy, against products counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orderppl.decoding import make_policy
from orderppl.errors import UserError
from orderppl.evaluation import policy_cost


class Linear(nn.Module):
    """One product of [N S, width] and [width, 3] per call: 2 N S width 3 operations."""

    mask_index, vocab_size = 3, 3

    def __init__(self, width):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, width), nn.Linear(width, 3, bias=False)

    def forward(self, state, attention_mask):
        return self.head(self.embedding(state))


class Networked:
    """Reveals two positions a step, and multiplies [N, 6] by [6, 12] on the way."""

    def __init__(self):
        self.inner, self.weight = make_policy("left_to_right", sizes=2.0), torch.ones(6, 12)

    def select(self, state):
        _ = state.masked.float() @ self.weight
        return self.inner.select(state)


BATCH = {"tokens": torch.zeros(5, 6, dtype=torch.int64), "attention_mask": torch.ones(5, 6, dtype=torch.bool)}


def test_the_share_of_a_network_is_that_of_its_products():
    cost = policy_cost(Linear(8), Networked(), BATCH, 6, repeats=1)
    # 3 forwards of 5 rows each; the last of 6 budgeted steps is never reached, so the policy is asked every time
    assert cost.flops == pytest.approx((2 * 6 * 12) / (2 * 6 * 8 * 3))
    assert cost.wall >= 0


def test_a_policy_without_products_costs_none():
    assert policy_cost(Linear(8), make_policy("margin"), BATCH, 3, repeats=1).flops == 0
    with pytest.raises(UserError, match="repeats"):
        policy_cost(Linear(8), make_policy("margin"), BATCH, 3, repeats=0)
