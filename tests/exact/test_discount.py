"""Gains of the next few steps: what they estimate, against enumeration over all orders."""

import pyro
import pytest
import torch
from torch import Tensor

from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.guides import PolicyGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.exact import all_orders
from orderppl.models import LearnedPolicy, UnmaskingModel
from orderppl.states import UnmaskingState, partial_state

from programs import StateTable, TableDenoiser, flat_gradient, learned, make_batch

STEPS = 3


@pytest.fixture(autouse=True)
def local_parameters():
    with pyro.settings.context(module_local_params=True):
        yield


def enumerated_gradient(policy: LearnedPolicy, denoiser: TableDenoiser, orders: Tensor, discount: float) -> Tensor:
    """Sum over orders of q(r) sum_t gain_t d log q(z_t), for every row of the batch."""
    batch = make_batch_of_rows()
    tokens, attention = batch["tokens"], batch["attention_mask"]
    canvas = Canvas(denoiser, attention)
    total = torch.zeros(())
    for order in orders:  # [B, L]
        log_q, values, so_far = [], [], torch.zeros(len(tokens))
        for t in range(STEPS):
            masked = (order >= t) & attention
            state = UnmaskingState(
                partial_state(tokens, masked, denoiser.mask_index), masked, torch.full((len(tokens),), t), STEPS, canvas
            )
            nats = state.log_probs.gather(-1, tokens[..., None])[..., 0].detach()  # l_i(s_t)
            values.append(so_far + torch.where(masked, nats, 0.0).sum(-1))
            revealed = (order == t) & attention
            last = t == STEPS - 1
            log_q.append(torch.zeros(len(tokens)) if last else policy.distribution(state).log_prob(revealed))
            so_far = so_far + torch.where(revealed, nats, 0.0).sum(-1)
        values.append(so_far)
        made_easier = [values[t + 1] - values[t] for t in range(STEPS)]
        gains = [sum(discount ** (u - t) * made_easier[u] for u in range(t, STEPS)) for t in range(STEPS)]
        probability = torch.stack(log_q).sum(0).exp().detach()  # q(r), 0 for impossible orders
        possible = probability > 0
        for one, gain in zip(log_q, gains, strict=True):
            total = total + (probability * torch.where(possible, one, 0.0) * gain)[possible].sum()
    return flat_gradient(total, learned(policy))


def make_batch_of_rows() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return make_batch(padded=False)


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.0])
def test_discounted_gains_estimate_what_enumeration_gives(discount: float) -> None:
    """60 calls of 128 particles; |z| < 5 in every coordinate. At 1 it is the gradient of the bound itself."""
    torch.manual_seed(3)
    pyro.set_rng_seed(3)
    denoiser = TableDenoiser().requires_grad_(False)
    policy = LearnedPolicy(StateTable())
    model, guide = UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS)
    batch = make_batch_of_rows()
    exact = enumerated_gradient(policy, denoiser, all_orders(guide, **batch), discount)
    elbo = RevealTraceGraph_ELBO(128, discount=discount)
    pyro.set_rng_seed(4)
    draws = torch.stack(
        [flat_gradient(-elbo.differentiable_loss(model, guide, **batch), learned(policy)) for _ in range(60)]
    )
    error, spread = draws.mean(0) - exact, draws.std(0)
    moving = spread > 1e-5
    assert moving.any()
    assert (error / (spread / 60**0.5))[moving].abs().max() < 5
    assert error[~moving].abs().max() < 2e-3 if (~moving).any() else True


def test_a_discount_needs_gains() -> None:
    policy, denoiser = LearnedPolicy(StateTable()), TableDenoiser().requires_grad_(False)
    model, guide = UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS)
    with pytest.raises(UserError, match="^discount: only gains"):
        RevealTraceGraph_ELBO(4, discount=0.5, credit="expected").loss(model, guide, **make_batch_of_rows())


def test_discounts_outside_0_to_1_are_refused() -> None:
    with pytest.raises(ValueError, match="discount: 1.5 is not in"):
        RevealTraceGraph_ELBO(discount=1.5)
