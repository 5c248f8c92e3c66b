"""What a policy costs beside the denoiser it decides for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from orderppl.decoding import PathOutput, PlannedOrder, Policy, follow
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.evaluation.path_likelihood import Batch, batch_canvas, batch_rows


@dataclass(frozen=True)
class PolicyCost:
    """Cost of a policy as a share of that of the denoiser, for the same orders.

    Attributes:
        flops: floating-point operations of matrix products and attention; counted, the same on every machine.
        wall: wall-clock time; measured.
    """

    flops: float
    wall: float


def policy_cost(
    denoiser: Denoiser,
    policy: Policy,
    batch: Batch,
    num_steps: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    repeats: int = 3,
) -> PolicyCost:
    """Follow a policy, then its finished orders as a plan that costs nothing to look up; the rest is the policy.

    Args:
        denoiser: see `Denoiser`.
        policy: decides the reveal sets.
        batch: rows to measure on; see `path_likelihood`.
        num_steps: step budget T.
        seed: of stochastic policies.
        device: where to run; that of the batch when left out.
        repeats: runs of each kind, alternating; the fastest of each counts.

    Raises:
        UserError: no repeats.
    """
    if repeats < 1:
        raise UserError("repeats", f"{repeats} runs", "give at least 1")
    canvas, tokens = batch_canvas(denoiser, batch, device)
    rows = batch_rows(batch, 0)

    def run(decider: Policy) -> PathOutput:
        generator = torch.Generator().manual_seed(seed)
        return follow(decider, canvas, tokens, num_steps, generator=generator, row_ids=rows)

    plan = PlannedOrder(run(policy).reveal_step)
    with sdpa_kernel(SDPBackend.MATH):  # the counter knows matrix products, not every fused kernel
        whole, bare = _flops(run, policy), _flops(run, plan)
    own, planned = [], []
    for _ in range(repeats):
        own.append(_seconds(run, policy, tokens.device))
        planned.append(_seconds(run, plan, tokens.device))
    wall = min(own) / min(planned) - 1
    return PolicyCost(whole / bare - 1 if bare else 0.0, max(wall, 0.0))


def _flops(run: Callable[[Policy], object], policy: Policy) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run(policy)
    return int(counter.get_total_flops())


def _seconds(run: Callable[[Policy], object], policy: Policy, device: torch.device) -> float:
    begin = time.perf_counter()
    run(policy)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
