"""A random order and a posterior over it: what a guide that sees the tokens adds on a chain where all is known.

    python experiments/posterior.py --seeds 3 --out runs/posterior

The prior of the program is a learned plan, played out at random; its guide sees the tokens. `gap_nats` is the log
evidence minus the bound (and minus the importance-weighted bound), nats per sequence, beside the gap of the best fixed
order. A random order is a better model of the sequences than a fixed one; one order drawn from its prior is no better
decode.
"""

from functools import partial
from pathlib import Path

import pandas as pd
import pyro
import torch
from jsonargparse import auto_cli
from rich.console import Console
from torch import Tensor

from orderppl import fit
from orderppl.data import Chains
from orderppl.diagnostics import draw_orders
from orderppl.evaluation.intervals import bootstrap_mean
from orderppl.evaluation.results import results_table, write_results
from orderppl.guides import Guide, MeanFieldGuide
from orderppl.inference import Anneal, RevealTraceGraph_ELBO
from orderppl.inference.importance_weighted import importance_bound
from orderppl.models import PositionTable, SequenceEncoder, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan


def learn(
    data: Chains, denoiser: MarkovChainDenoiser, steps: int, seed: int, updates: int, out: Path
) -> tuple[UnmaskingModel, Guide]:
    """Fit a learned prior and its posterior; the KL comes in slowly."""
    pyro.set_rng_seed(seed)
    model = UnmaskingModel(denoiser, Plan(PositionTable(denoiser.length, steps, noise=0.5)), steps)
    encoder = SequenceEncoder(data.vocab_size, steps, width=32, layers=1, heads=2, zero_init=True)
    guide = MeanFieldGuide(encoder, steps)
    fit(
        model,
        guide,
        data.splits()["train"],
        objective=RevealTraceGraph_ELBO(num_particles=16),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        updates=updates,
        batch_size=32,
        seed=seed,
        anneal={"objective.kl_weight": Anneal(0.05, 1.0, int(0.6 * updates))},
        out=out,
    )
    return model, guide


def main(
    seeds: int = 3, steps: int = 2, updates: int = 1000, draws: int = 64, out: Path = Path("runs/posterior")
) -> None:
    """Fit per seed and measure the bounds on the test split, beside what is best without a guide.

    Args:
        seeds: training seeds, from 0.
        steps: step budget T.
        updates: SVI updates per seed.
        draws: orders per sequence of the bounds.
        out: folder of runs and results.
    """
    data, denoiser = Chains(), MarkovChainDenoiser(4, 0.85, 16)
    test = data.splits()["test"].batch
    evidence = denoiser.log_evidence(test.tokens).double()
    _, cost = denoiser.best_order(steps)
    records: list[dict[str, object]] = [{"metric": "expected_gap_nats", "value": cost, "arm": "best fixed order"}]
    for seed in range(seeds):
        model, guide = learn(data, denoiser, steps, seed, updates, out / f"seed-{seed}")
        weights = draw_orders(model, guide, test, draws).log_weight.double()  # [draws, N]
        bounds: dict[str, Tensor] = {"bound": weights.mean(0), "importance-weighted bound": importance_bound(weights)}
        for arm, bound in bounds.items():
            gap = bootstrap_mean(evidence - bound, seed=seed)
            record = {"metric": "gap_nats", "value": gap.value, "low": gap.low, "high": gap.high}
            records.append(record | {"arm": arm, "training_seed": seed, "draws": draws})
    table = pd.DataFrame(records).assign(task="chain", steps=steps)
    write_results(out, "posterior", {"seeds": seeds, "steps": steps, "updates": updates, "draws": draws}, table)
    Console().print(results_table(table, title=f"Exact chain, {steps} steps: gap to the log evidence, nats"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
