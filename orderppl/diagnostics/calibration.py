"""Simulation-based calibration: does a guide draw from the posterior it claims to?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from scipy import stats
from torch import Tensor

from orderppl.decoding.decode import evaluation_mode
from orderppl.diagnostics.draws import checked, chunks, numbers, order_site, scored, seeded, traced
from orderppl.errors import UserError
from orderppl.inference.programs import Program, local_parameters
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import VISIBLE, steps_used

TestFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(reveal_step int64 [*, B, S], latent bool [B, S], log p(x, r) float64 [*, B]) -> float [*, B]."""

DIGITS = 4  # decimals of a test function that count: log-densities of one order differ in float32 by less


def step_at(order: Tensor, latent: Tensor, share: float) -> Tensor:
    """Reveal step of the position at a share of those to reveal in a row, float64 [*, B]."""
    target = (share * (latent.sum(-1) - 1)).floor().long()  # [B]
    position = ((latent.cumsum(-1) - 1 == target.unsqueeze(-1)) & latent).long().argmax(-1)  # [B]
    return order.gather(-1, position.expand(order.shape[:-1]).unsqueeze(-1)).squeeze(-1).double()


FUNCTIONS: dict[str, TestFunction] = {
    "first_step": lambda order, latent, _: step_at(order, latent, 0.0),
    "middle_step": lambda order, latent, _: step_at(order, latent, 0.5),
    "last_step": lambda order, latent, _: step_at(order, latent, 1.0),
    "mean_step": lambda order, latent, _: (order * latent).sum(-1) / latent.sum(-1),
    "first_before_last": lambda order, latent, _: (step_at(order, latent, 0) < step_at(order, latent, 1)).double(),
    "middle_before_first": lambda order, latent, _: (step_at(order, latent, 0.5) < step_at(order, latent, 0)).double(),
    "steps_used": lambda order, latent, _: steps_used(order).double(),
    # The only one that looks at the tokens. It cannot be left out: a guide that ignores x and draws from the prior
    # passes with every function of the order alone (Modrák et al., arXiv 2211.02383).
    "log_joint": lambda order, latent, log_joint: log_joint,
}


def simulate(sequential: Program, batch: Batch | Tensor) -> tuple[Tensor, Tensor]:
    """Draw an order and tokens for every row of a batch: r ~ p(r), x ~ p(x | r).

    Args:
        sequential: the step-by-step program, `SequentialUnmaskingModel`.
        batch: gives shapes, padding and given tokens; the tokens to reveal are ignored.

    Returns:
        reveal_step int64 [B, S] and tokens int64 [B, S].

    Raises:
        UserError: another program.
    """
    batch = checked(batch)
    with torch.no_grad(), local_parameters(sequential), evaluation_mode(sequential):
        trace = poutine.trace(poutine.uncondition(sequential)).get_trace(batch)
    sets = {name: site["value"] for name, site in trace.nodes.items() if name.startswith("reveal_")}
    if "reveal_0" not in sets:
        problem = f"samples no reveal sets, only {', '.join(trace.stochastic_nodes) or 'nothing'}"
        raise UserError("sequential", problem, "give SequentialUnmaskingModel(model.denoiser, model.policy, num_steps)")
    reveal_step = torch.full_like(batch.tokens, VISIBLE)
    for name, revealed in sets.items():
        reveal_step[detach_provenance(revealed).bool()] = int(name.removeprefix("reveal_"))
    return reveal_step, detach_provenance(trace.nodes["_RETURN"]["value"])


def calibrate(
    model: Program,
    guide: Program,
    sequential: Program,
    batch: Batch | Tensor,
    *,
    num_simulations: int = 512,
    num_draws: int = 63,
    functions: Mapping[str, TestFunction] | None = None,
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
        batch: shapes, padding and given tokens; its rows are used in turn.
        num_simulations: number of pairs (r, x).
        num_draws: K; K + 1 a multiple of the number of bins, 16, makes the bins equal.
        functions: test functions by name; `FUNCTIONS` when left out.
        seed: of everything random here; the global random state is left as it was.

    Returns:
        `rank` int64 [function, simulation]; over `function`: `p_value` of a chi-square test of uniformity, and `skew`,
        mean rank / K minus a half: positive where the guide's values are too small. Attributes `num_draws`,
        `num_simulations`, `seed`, `smallest_p`, the Bonferroni-corrected smallest p-value, and `summary`, one sentence.

    Raises:
        UserError: see `simulate`; fewer than 80 simulations, no draws, a row with nothing to reveal, or a model that is
            not what the step-by-step one generates from: with a price, a robust mixture, an answer or a temperature.
    """
    batch = checked(batch)
    if num_simulations < 80:
        raise UserError("num_simulations", f"{num_simulations} are too few to test", "use at least 80, better 500")
    if num_draws < 1:
        raise UserError("num_draws", f"{num_draws} is not positive", "use e.g. 63")
    if not bool(batch.latent.any(-1).all()):
        raise UserError("batch", "a row has nothing to reveal", "leave it out")
    functions = FUNCTIONS if functions is None else functions
    rows = torch.arange(num_simulations, device=batch.device) % len(batch)
    with seeded(seed, batch.device):
        shapes = batch.rows(rows)
        true_order, tokens = simulate(sequential, shapes)
        simulated = Batch(tokens, shapes.attention_mask, shapes.given)
        sizes = chunks(model, simulated, num_draws)
        drawn = [order_site(traced(guide, simulated, size), "guide")["value"] for size in sizes]  # [K, N, S]
        orders = torch.cat([true_order.unsqueeze(0), *drawn])
        log_joint = _log_joint(model, simulated, orders)
    orders, latent = orders.cpu(), simulated.latent.cpu()
    generator = np.random.default_rng(seed)
    values = [function(orders, latent, log_joint).double().numpy() for function in functions.values()]
    ranks = np.stack([_ranks(one, generator) for one in values])
    p_values = np.array([uniformity(row, num_draws) for row in ranks])
    smallest = min(1.0, float(p_values.min()) * len(functions))
    name = list(functions)[int(p_values.argmin())]
    summary = (
        f"no deviation from calibration found in {num_simulations} simulations (corrected p = {smallest:.2g})"
        if smallest > 0.01
        else f"not calibrated: {name} has uneven ranks (corrected p = {smallest:.2g}, {num_simulations} simulations)"
    )
    return xr.Dataset(
        {
            "rank": (("function", "simulation"), ranks),
            "p_value": ("function", p_values),
            "skew": ("function", ranks.mean(1) / num_draws - 0.5),
        },
        coords={"function": list(functions)},
        attrs={
            "num_draws": num_draws,
            "num_simulations": num_simulations,
            "seed": seed,
            "smallest_p": smallest,
            "summary": summary,
        },
    )


def _log_joint(model: Program, batch: Batch, orders: Tensor) -> Tensor:
    """log p(x, r) of orders int64 [K, N, S], all scored alike, so that equal orders are equal: float64 [K, N]."""
    found = []
    for some in orders.split(chunks(model, batch, len(orders))):
        sites = scored(model, batch, len(some), some)
        likelihood = sites.tokens["fn"]
        changed = likelihood.robustness != 0 or likelihood.wanted is not None or likelihood.temperature != 1
        if sites.factors or changed or likelihood.expected:
            problem = "has a price, a robust mixture, an answer, a temperature or expected tokens: it does not generate"
            raise UserError("model", problem, "calibrate a pair without them")
        found.append(numbers(sites).log_joint)
    return torch.cat(found)


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
