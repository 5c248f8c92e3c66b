import itertools

import pytest
import torch
from torch import Tensor

from orderppl.config import build, describe
from orderppl.errors import UserError
from orderppl.models.denoisers import TreeFieldDenoiser
from orderppl.unmasking import Denoiser


def enumerate_partitions(length: int, num_steps: int) -> Tensor:
    """All orders of positions in steps, int64 [T^L, L]."""
    return torch.tensor(list(itertools.product(range(num_steps), repeat=length)))


def trees(states: int, nodes: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(states), repeat=nodes)))


@pytest.mark.parametrize("states", [2, 3])
def test_conditionals_equal_those_of_the_enumerated_joint(states: int) -> None:
    denoiser = TreeFieldDenoiser(states, 0.7, 3)
    assert isinstance(denoiser, Denoiser)
    every = trees(states, 7)  # [K^7, 7]
    joint = denoiser.log_evidence(every).exp()
    assert joint.sum().item() == pytest.approx(1.0, abs=1e-12)
    torch.manual_seed(0)
    state = torch.randint(0, states + 1, (300, 7))  # with K = 2 about every seventh of all canvases
    log_probs = denoiser(state, torch.ones_like(state)).log_softmax(-1)
    for row, found in zip(state, log_probs.double().exp(), strict=True):
        agrees = (every == row) | (row == states)  # [K^7, 7]
        for i in range(7):
            weight = joint * torch.cat([agrees[:, :i], agrees[:, i + 1 :]], 1).all(1)
            exact = torch.stack([weight[every[:, i] == k].sum() for k in range(states)])
            torch.testing.assert_close(found[i], exact / exact.sum(), atol=1e-6, rtol=0)


def test_evidence_multiplies_over_the_edges() -> None:
    denoiser = TreeFieldDenoiser(3, 0.7, 3)
    tokens = torch.tensor([[0, 0, 1, 0, 2, 1, 1], [2, 2, 2, 2, 2, 2, 2]])
    expected = torch.tensor([0.7**4 * 0.15**2 / 3, 0.7**6 / 3], dtype=torch.float64).log()
    torch.testing.assert_close(denoiser.log_evidence(tokens), expected)


def test_revealing_one_at_a_time_gives_the_evidence_in_any_order() -> None:
    torch.manual_seed(0)
    denoiser = TreeFieldDenoiser(4, 0.85)
    tokens = torch.randint(0, 4, (10, 15))
    state, total = torch.full_like(tokens, 4), torch.zeros(10)
    for i in torch.randperm(15):
        total += denoiser(state, torch.ones_like(state)).log_softmax(-1)[:, i].gather(-1, tokens[:, i : i + 1])[:, 0]
        state[:, i] = tokens[:, i]
    torch.testing.assert_close(total.double(), denoiser.log_evidence(tokens), atol=1e-4, rtol=0)


def test_padding_takes_no_place_in_the_tree() -> None:
    denoiser = TreeFieldDenoiser(4, 0.85, 4)
    state = torch.tensor([[4, 0, 4, 2, 1]])
    alone = denoiser(state, torch.ones(1, 5))
    spread = torch.tensor([[3, 4, 0, 3, 3, 4, 2, 1, 0], [4] * 9])
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [0] * 9], dtype=torch.bool)
    padded = denoiser(spread, mask)
    torch.testing.assert_close(padded[0][mask[0]], alone[0], atol=1e-5, rtol=0)
    assert padded.isfinite().all()
    tokens, right_padded = torch.tensor([[0, 1, 1, 3, 3]]), torch.tensor([[True, True, True, False, False]])
    assert denoiser.log_evidence(tokens, right_padded).item() == pytest.approx(
        denoiser.log_evidence(tokens[:, :3]).item()
    )


def enumerated_cost(denoiser: TreeFieldDenoiser, orders: Tensor, num_steps: int) -> Tensor:
    """Log evidence minus the log-likelihood along every order (int64 [N, nodes]), expected over all trees: [N]."""
    every = trees(denoiser.num_states, denoiser.length)  # [X, L]
    log_p = denoiser.log_evidence(every)
    cost = []
    for order in orders:
        path = torch.zeros_like(log_p)
        for t in range(num_steps):
            state = torch.where(order >= t, denoiser.mask_index, every)
            log_probs = denoiser(state, torch.ones_like(state)).log_softmax(-1)
            path += (log_probs.gather(-1, every[..., None])[..., 0] * (order == t)).sum(-1).double()
        cost.append((log_p.exp() * (log_p - path)).sum())
    return torch.stack(cost)


@pytest.mark.parametrize(("states", "num_steps", "every"), [(2, 2, 1), (2, 3, 16), (3, 3, 97)])
def test_expected_cost_equals_enumeration(states: int, num_steps: int, every: int) -> None:
    """All orders of seven nodes in two steps, and some in three."""
    denoiser = TreeFieldDenoiser(states, 0.8, 3)
    orders = enumerate_partitions(7, num_steps)[::every]
    found = torch.tensor([denoiser.expected_cost(order) for order in orders], dtype=torch.float64)
    torch.testing.assert_close(found, enumerated_cost(denoiser, orders, num_steps), atol=1e-5, rtol=0)


def test_expected_cost_of_the_reference_tree_equals_sampling() -> None:
    """50 000 drawn trees of 15 nodes, z within 4."""
    denoiser = TreeFieldDenoiser(4, 0.85)
    order = torch.tensor([2, 2, 0, 1, 1, 2, 2, 0, 2, 1, 2, 0, 2, 1, 2])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 4, (50_000, 15), generator=generator)  # the root, and what a node changes to
    for i in range(1, 15):
        stays = torch.rand(50_000, generator=generator) < 0.85
        moved = (tokens[:, (i - 1) // 2] + 1 + tokens[:, i] % 3) % 4
        tokens[:, i] = torch.where(stays, tokens[:, (i - 1) // 2], moved)
    gap = denoiser.log_evidence(tokens)
    for t in range(3):
        state = torch.where(order >= t, denoiser.mask_index, tokens)
        log_probs = denoiser(state, torch.ones_like(state)).log_softmax(-1)
        gap -= (log_probs.gather(-1, tokens[..., None])[..., 0] * (order == t)).sum(-1)
    error = float(gap.std() / len(gap) ** 0.5)
    assert abs(float(gap.mean()) - denoiser.expected_cost(order)) < 4 * error


@pytest.mark.parametrize(("depth", "num_steps"), [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3)])
def test_best_order_equals_brute_force(depth: int, num_steps: int) -> None:
    denoiser = TreeFieldDenoiser(3, 0.8, depth)
    order, gap = denoiser.best_order(num_steps)
    brute = min(denoiser.expected_cost(other) for other in enumerate_partitions(denoiser.length, num_steps))
    assert gap == pytest.approx(brute, abs=1e-9)
    assert denoiser.expected_cost(order) == pytest.approx(gap, abs=1e-9)
    assert int(order.min()) >= 0
    assert int(order.max()) < num_steps


def test_best_order_of_the_reference_tree() -> None:
    denoiser = TreeFieldDenoiser(4, 0.85)
    order, gap = denoiser.best_order(3)
    assert gap == pytest.approx(0.2711, abs=1e-4)
    assert order.tolist() == [0, 2, 2, 1, 1, 1, 1] + 8 * [2]
    assert denoiser.expected_cost(order) == pytest.approx(gap, abs=1e-9)
    by_level = torch.tensor([0, 1, 1, 2, 2, 2, 2] + 8 * [3])
    assert denoiser.expected_cost(by_level) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((1, 0.5, 3), "num_states"), ((3, 1.0, 3), "stay"), ((3, 0.0, 3), "stay"), ((3, 0.5, 0), "depth")],
)
def test_refuses_bad_trees(arguments: tuple[int, float, int], field: str) -> None:
    with pytest.raises(UserError) as caught:
        TreeFieldDenoiser(*arguments)
    assert caught.value.field == field


def test_refuses_what_is_too_large() -> None:
    denoiser = TreeFieldDenoiser(3, 0.5, 2)
    with pytest.raises(UserError, match="a canvas of 4 exceeds 3"):
        denoiser(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4))
    with pytest.raises(UserError, match="num_steps: 0"):
        denoiser.best_order(0)
    with pytest.raises(UserError, match="reveal_step: 2"):
        denoiser.expected_cost(torch.zeros(2, dtype=torch.long))
    large = TreeFieldDenoiser(4, 0.5, 5)
    with pytest.raises(UserError, match="depth: 31 nodes"):
        large.best_order(2)
    with pytest.raises(UserError, match="depth: 5 levels"):  # 16 leaves around the root
        large.expected_cost(torch.tensor(15 * [1] + 16 * [0]))


def test_is_described_frozen_and_in_evaluation_mode() -> None:
    denoiser = TreeFieldDenoiser(3, 0.7)
    spec = describe(denoiser)
    assert spec["class_path"] == "orderppl.models.denoisers.TreeFieldDenoiser"
    assert spec["init_args"] == {"num_states": 3, "stay": 0.7, "depth": 4}
    state, attended = torch.randint(0, 4, (4, 15)), torch.ones(4, 15, dtype=torch.bool)
    assert torch.equal(build(spec)(state, attended), denoiser(state, attended))
    assert not denoiser.training
    assert not list(denoiser.parameters())
