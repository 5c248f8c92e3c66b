"""Simulation-based calibration: does a guide draw from the posterior it claims to?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from scipy import stats
from torch import Tensor

from orderppl.diagnostics.draws import STATES, Batch, check_batch, score_orders, seeded, traced
from orderppl.distributions import SetLaw, Tracked
from orderppl.errors import UserError
from orderppl.inference.programs import ARGUMENTS, Program, local_parameters, positional
from orderppl.states import VISIBLE, steps_used

TestFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(reveal_step int64 [*, B, L], attention_mask bool [B, L], log p(x, r) float64 [*, B]) -> float [*, B]."""

DIGITS = 4  # decimals of a test function that count: log-densities of one order differ in float32 by less


def default_functions() -> dict[str, TestFunction]:
    """Test functions of an order: where the first, middle and last position stand, and how the order fits the tokens.

    Only `log_joint`, log p(x, r), looks at the tokens. It cannot be left out: a guide that ignores x and draws from the
    prior passes with every function of the order alone (Modrák et al., arXiv 2211.02383).
    """

    def step_of(share: float) -> TestFunction:
        return lambda order, mask, _: _step_at(order, mask, share)

    def precedes(first: float, second: float) -> TestFunction:
        return lambda order, mask, _: (_step_at(order, mask, first) < _step_at(order, mask, second)).double()

    return {
        "first_step": step_of(0.0),
        "middle_step": step_of(0.5),
        "last_step": step_of(1.0),
        "mean_step": lambda order, mask, _: (order * mask).sum(-1) / mask.sum(-1),
        "first_before_last": precedes(0.0, 1.0),
        "middle_before_first": precedes(0.5, 0.0),
        "steps_used": lambda order, mask, _: steps_used(order).double(),
        "log_joint": lambda order, mask, log_joint: log_joint,
    }


def simulate(sequential: Program, batch: Batch) -> tuple[Tensor, Tensor]:
    """Draw an order and tokens for every row of a batch: r ~ p(r), x ~ p(x | r).

    Args:
        sequential: the step-by-step program, `SequentialUnmaskingModel`.
        batch: gives shapes, padding and prompts; its `tokens` are ignored.

    Returns:
        reveal_step int64 [B, L] and tokens int64 [B, L].

    Raises:
        UserError: another program, or a prior that is not normalised (`StepPrice`): nothing can be drawn from it.
    """
    check_batch(batch)
    with torch.no_grad(), local_parameters(sequential):
        trace = poutine.trace(poutine.uncondition(sequential)).get_trace(*positional(batch))
    sites = {name: trace.nodes[name] for name in trace.stochastic_nodes if name.startswith("reveal_")}
    if "reveal_0" not in sites:
        problem = f"samples no reveal sets, only {', '.join(trace.stochastic_nodes) or 'nothing'}"
        raise UserError("sequential", problem, "give SequentialUnmaskingModel(model.denoiser, model.prior, num_steps)")
    reveal_step = torch.full_like(batch["tokens"], VISIBLE)
    for name, site in sites.items():
        law = site["fn"].base if isinstance(site["fn"], Tracked) else site["fn"]
        if isinstance(law, SetLaw) and bool((law.log_weight != 0).any()):
            raise UserError("model.prior", "is not normalised: it has a price per step", "calibrate without the price")
        reveal_step = torch.where(site["value"].bool(), int(name.removeprefix("reveal_")), reveal_step)
    tokens: Tensor = trace.nodes["_RETURN"]["value"]
    return reveal_step, tokens


def calibrate(
    model: Program,
    guide: Program,
    sequential: Program,
    batch: Batch,
    *,
    num_simulations: int = 512,
    num_draws: int = 63,
    functions: Mapping[str, TestFunction] | None = None,
    max_states: int = STATES,
    seed: int = 0,
) -> xr.Dataset:
    """Rank the order that made a sequence among the orders that the guide draws for it.

        r ~ p(r),  x ~ p(x | r),  r_1 .. r_K ~ q(r | x)
        rank = #{k : f(r_k) < f(r)} + uniform{0 .. #{k : f(r_k) = f(r)}}

    If q is the posterior, ranks are uniform on 0..K for every f (Talts et al., arXiv 1804.06788), ties included.

    Args:
        model: the unmasking program that scores orders.
        guide: its guide.
        sequential: the same process step by step, which generates; see `simulate`.
        batch: shapes, padding and prompts; its rows are used in turn.
        num_simulations: number of pairs (r, x).
        num_draws: K; K + 1 a multiple of the number of bins, 16, makes the bins equal.
        functions: test functions by name; `default_functions()` when left out.
        max_states: see `draw_orders`.
        seed: of everything random here; the global random state is left as it was.

    Returns:
        `rank` int64 [function, simulation]; over `function`: `p_value` of a chi-square test of uniformity, and `skew`,
        mean rank / K minus a half: positive where the guide's values are too small. Attributes `num_draws`,
        `num_simulations`, `seed`, `smallest_p`, the Bonferroni-corrected smallest p-value, and `summary`, one sentence.

    Raises:
        UserError: see `simulate`; fewer than 80 simulations, or no draws.
    """
    check_batch(batch)
    if num_simulations < 80:
        raise UserError("num_simulations", f"{num_simulations} are too few to test", "use at least 80, better 500")
    if num_draws < 1:
        raise UserError("num_draws", f"{num_draws} is not positive", "use e.g. 63")
    functions = default_functions() if functions is None else functions
    rows = torch.arange(num_simulations, device=batch["tokens"].device) % len(batch["tokens"])
    with seeded(seed, batch["tokens"].device):
        simulated = {name: value[rows] for name, value in batch.items() if name in ARGUMENTS}
        true_order, tokens = simulate(sequential, simulated)
        simulated["tokens"] = tokens
        drawn = traced(guide, simulated, num_draws).nodes["reveal_step"]["value"]  # [K, N, L]
        orders = torch.cat([true_order.unsqueeze(0), drawn])  # scored in one go, so that equal orders are equal
        log_prior, log_likelihood = score_orders(model, simulated, orders, max_states=max_states)
    orders = orders.cpu()
    mask = orders[0] != VISIBLE
    generator = np.random.default_rng(seed)
    ranks = np.stack(
        [
            _ranks(function(orders, mask, log_prior + log_likelihood).double().numpy(), generator)
            for function in functions.values()
        ]
    )
    result = xr.Dataset(
        {
            "rank": (("function", "simulation"), ranks),
            "p_value": ("function", [uniformity(row, num_draws) for row in ranks]),
            "skew": ("function", ranks.mean(1) / num_draws - 0.5),
        },
        coords={"function": list(functions)},
        attrs={"num_draws": num_draws, "num_simulations": num_simulations, "seed": seed},
    )
    p_values = result["p_value"].values
    smallest = min(1.0, float(p_values.min()) * len(functions))
    name = list(functions)[int(p_values.argmin())]
    result.attrs["smallest_p"] = smallest
    result.attrs["summary"] = (
        f"no deviation from calibration found in {num_simulations} simulations (corrected p = {smallest:.2g})"
        if smallest > 0.01
        else f"not calibrated: {name} has uneven ranks (corrected p = {smallest:.2g}, {num_simulations} simulations)"
    )
    return result


def uniformity(ranks: NDArray[np.int64], num_draws: int, bins: int = 16) -> float:
    """P-value of a chi-square test that ranks are uniform on 0..num_draws.

    Bins differ by at most one rank in width and are expected to hold that share; fewer are used where that expectation
    would fall below 5.
    """
    bins = max(2, min(bins, num_draws + 1, len(ranks) // 5))
    edge = np.linspace(0, num_draws + 1, bins + 1).round()
    seen, _ = np.histogram(ranks, edge - 0.5)
    expected = len(ranks) * np.diff(edge) / (num_draws + 1)
    return float(stats.chisquare(seen, expected).pvalue)


def _ranks(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Rank of the first value among the others, ties broken at random; [1 + K, N] -> [N]."""
    values = values.round(DIGITS)
    below = (values[1:] < values[0]).sum(0)
    ties = (values[1:] == values[0]).sum(0)
    return np.asarray(below + generator.integers(0, ties + 1))


def _step_at(order: Tensor, mask: Tensor, share: float) -> Tensor:
    """Reveal step of the attended position at a share of the row's length; padding may stand anywhere."""
    target = (share * (mask.sum(-1) - 1)).floor().long()  # [B]
    position = ((mask.cumsum(-1) - 1 == target.unsqueeze(-1)) & mask).long().argmax(-1)  # [B]
    return order.gather(-1, position.expand(order.shape[:-1]).unsqueeze(-1)).squeeze(-1).double()
