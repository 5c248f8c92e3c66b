import itertools

import pytest
import torch
from torch import Tensor

from orderppl.config import build, describe
from orderppl.errors import UserError
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.unmasking import Denoiser


def enumerate_partitions(length: int, num_steps: int) -> Tensor:
    """All orders of positions in steps, int64 [T^L, L]."""
    return torch.tensor(list(itertools.product(range(num_steps), repeat=length)))


def sequences(states: int, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(states), repeat=length)))


def test_conditionals_equal_those_of_the_enumerated_joint() -> None:
    states, length = 3, 4
    denoiser = MarkovChainDenoiser(states, 0.7, length)
    assert isinstance(denoiser, Denoiser)
    every = sequences(states, length)  # [K^L, L]
    joint = denoiser.log_evidence(every).exp()
    assert joint.sum().item() == pytest.approx(1.0, abs=1e-12)
    attended = torch.ones(1, length, dtype=torch.bool)
    for state in itertools.product(range(states + 1), repeat=length):
        logits = denoiser(torch.tensor([state]), attended)[0].double().log_softmax(-1)
        for i in range(length):
            given = [j for j in range(length) if j != i and state[j] < states]
            agrees = (
                torch.stack([every[:, j] == state[j] for j in given]).all(0) if given else torch.ones(len(every)) > 0
            )
            exact = torch.stack([joint[agrees & (every[:, i] == k)].sum() for k in range(states)])
            torch.testing.assert_close(logits[i].exp(), exact / exact.sum(), atol=1e-6, rtol=0)


def test_padding_takes_no_place_in_the_chain() -> None:
    denoiser = MarkovChainDenoiser(4, 0.85, 12)
    state = torch.tensor([[0, 4, 4, 2, 1]])
    alone = denoiser(state, torch.ones(1, 5, dtype=torch.bool))
    spread = torch.tensor([[3, 0, 4, 3, 3, 4, 2, 1, 0], [4, 4, 4, 4, 4, 4, 4, 4, 4]])
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0], [0] * 9], dtype=torch.bool)
    padded = denoiser(spread, mask)
    torch.testing.assert_close(padded[0][mask[0]], alone[0], atol=1e-5, rtol=0)
    assert padded.isfinite().all()
    tokens = torch.tensor([[0, 1, 1, 3, 3]])
    right_padded = torch.tensor([[True, True, True, False, False]])
    assert denoiser.log_evidence(tokens, right_padded).item() == pytest.approx(
        denoiser.log_evidence(tokens[:, :3]).item()
    )


def test_revealing_one_at_a_time_gives_the_evidence_in_any_order() -> None:
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    tokens = torch.randint(0, 4, (10, 6))
    attended = torch.ones(10, 6, dtype=torch.bool)
    for _ in range(3):
        state, total = torch.full_like(tokens, 4), torch.zeros(10)
        for i in torch.randperm(6):
            total += denoiser(state, attended).log_softmax(-1)[:, i].gather(-1, tokens[:, i : i + 1])[:, 0]
            state[:, i] = tokens[:, i]
        torch.testing.assert_close(total.double(), denoiser.log_evidence(tokens), atol=1e-4, rtol=0)


def expected_gap(denoiser: MarkovChainDenoiser, order: Tensor, steps: int) -> float:
    """Exact expectation, over all sequences, of log evidence minus the log-likelihood along `order`."""
    every = sequences(denoiser.num_states, len(order))
    log_p = denoiser.log_evidence(every)
    path = torch.zeros_like(log_p)
    attended = torch.ones_like(every, dtype=torch.bool)
    for t in range(steps):
        state = torch.where(order >= t, denoiser.mask_index, every)
        token = denoiser(state, attended).log_softmax(-1).gather(-1, every[..., None])[..., 0]
        path += (token * (order == t)).sum(-1).double()
    return float((log_p.exp() * (log_p - path)).sum())


@pytest.mark.parametrize(("states", "length", "steps"), [(2, 5, 1), (2, 5, 2), (3, 5, 2), (2, 5, 3), (2, 4, 4)])
def test_best_order_equals_brute_force(states: int, length: int, steps: int) -> None:
    denoiser = MarkovChainDenoiser(states, 0.8, length)
    order, gap = denoiser.best_order(steps)
    brute = min(expected_gap(denoiser, other, steps) for other in enumerate_partitions(length, steps))
    assert gap == pytest.approx(brute, abs=1e-5)
    assert expected_gap(denoiser, order, steps) == pytest.approx(gap, abs=1e-5)


def test_expected_cost_of_any_order() -> None:
    denoiser = MarkovChainDenoiser(3, 0.8, 6)
    torch.manual_seed(0)
    for length in (1, 5, 6):
        for order in torch.randint(0, 4, (20, length)):
            assert denoiser.expected_cost(order) == pytest.approx(expected_gap(denoiser, order, 4), abs=1e-5)
    order, gap = MarkovChainDenoiser(4, 0.85, 16).best_order(3)
    assert MarkovChainDenoiser(4, 0.85, 16).expected_cost(order) == pytest.approx(gap, abs=1e-9)
    with pytest.raises(UserError, match="length: 7"):
        denoiser.expected_cost(torch.zeros(7, dtype=torch.long))


@pytest.mark.parametrize(("steps", "gap"), [(2, 1.892), (3, 0.457), (4, 0.0386), (5, 0.0)])
def test_best_order_of_the_reference_chain(steps: int, gap: float) -> None:
    order, found = MarkovChainDenoiser(4, 0.85, 16).best_order(steps)
    assert found == pytest.approx(gap, abs=6e-4)
    assert int(order.max()) == steps - 1
    assert int(order.min()) == 0


def test_best_order_of_a_part_of_the_chain() -> None:
    long, short = MarkovChainDenoiser(3, 0.9, 24), MarkovChainDenoiser(3, 0.9, 10)
    assert long.best_order(3)[1] == pytest.approx(0.699, abs=6e-4)
    assert long.best_order(3, length=10)[1] == pytest.approx(short.best_order(3)[1], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [((1, 0.5, 4), "num_states"), ((3, 1.0, 4), "stay"), ((3, 0.0, 4), "stay"), ((3, 0.5, 0), "length")],
)
def test_refuses_bad_chains(arguments: tuple[int, float, int], field: str) -> None:
    with pytest.raises(UserError) as caught:
        MarkovChainDenoiser(*arguments)
    assert caught.value.field == field


def test_refuses_longer_canvases_and_no_steps() -> None:
    denoiser = MarkovChainDenoiser(3, 0.5, 4)
    with pytest.raises(UserError, match="a canvas of 5 exceeds 4"):
        denoiser(torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5))
    with pytest.raises(UserError, match="num_steps: 0"):
        denoiser.best_order(0)
    with pytest.raises(UserError, match="length: 5"):
        denoiser.best_order(2, length=5)


def test_is_described_frozen_and_in_evaluation_mode() -> None:
    denoiser = MarkovChainDenoiser(3, 0.7, length=5)
    arguments = {"num_states": 3, "stay": 0.7, "length": 5}
    assert describe(denoiser) == {
        "class_path": "orderppl.models.denoisers.MarkovChainDenoiser",
        "init_args": arguments,
    }
    state, attended = torch.randint(0, 4, (4, 5)), torch.ones(4, 5, dtype=torch.bool)
    assert torch.equal(build(describe(denoiser))(state, attended), denoiser(state, attended))
    assert not denoiser.training
    assert not list(denoiser.parameters())
