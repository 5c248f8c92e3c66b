"""Learn the order in which a pretrained model should write the CDR3 loops of a T-cell receptor, both chains together.

    python experiments/receptors.py --steps 4 --out runs/receptors-4

The lengths of both chains are given. Receptors are drawn from the model itself, one residue a step in random order:
there is no file of them here. So `path_nats` says how near parallel writing comes to the model's own distribution. The
order is a plan that reads what the model expects at the opening; opponents are as in `antibodies.py`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import auto_cli
from opponents import best_of, spaced_orders
from plan_fits import PlanFit, learn_plans

from orderppl import Batch, decode
from orderppl.data import Examples
from orderppl.evaluation.results import write_results
from orderppl.figures import save_figure
from orderppl.models import OpeningPlan, ScanNetwork
from orderppl.models.denoisers.receptor import ReceptorDenoiser
from orderppl.policies import Ranked, ScanPlan

from molecules import compare, figure_of, mean_by_group, revealed_steps, step_shares

SHORTEST, LONGEST = 12, 17  # residues of a drawn chain

FIT = PlanFit(batch_size=8)


def draw_receptors(denoiser: ReceptorDenoiser, count: int) -> Examples:
    """Draw pairs of chains from the denoiser, one residue a step in random order."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(SHORTEST, LONGEST + 1, (count, 2, 1), generator=generator)
    place = torch.arange(2 * LONGEST + 1)
    attended, between = place < sizes.sum(1) + 1, place == sizes[:, 0]
    tokens = torch.where(between, denoiser.tokenizer.between_index, denoiser.mask_index)
    canvas = Batch(tokens, attended, between)
    settings: dict[str, Any] = {"max_steps": 2 * LONGEST, "temperature": 1.0, "generator": generator}
    written = decode(denoiser, Ranked("random"), canvas, **settings)
    return Examples(Batch(written.sequences, attended, between), denoiser.tokenizer, whole=True)


def main(
    steps: int = 4,
    seeds: int = 3,
    count: int = 700,
    fit: PlanFit = FIT,
    out: Path = Path("runs/receptors"),
) -> None:
    """Learn a plan on every seed and compare on held-out receptors.

    Args:
        steps: step budget T.
        seeds: training seeds, from 0.
        count: receptors that are drawn; 200 are held out, 100 choose the spaced order.
        fit: what a fit may spend, and how.
        out: folder of runs and results.
    """
    denoiser = ReceptorDenoiser()
    drawn = draw_receptors(denoiser, count)
    test, validation, train = drawn.take(200), drawn.rows(slice(200, 300)), drawn.rows(slice(300, None))
    plans = learn_plans(
        lambda count: ScanPlan(ScanNetwork(count, OpeningPlan(16, denoiser.vocab_size))),
        *(denoiser, train, steps, range(seeds), out, fit),
    )
    spaced = best_of(spaced_orders(steps), denoiser, validation)
    records = compare(plans, denoiser, test, steps, spaced=spaced, out=out, title="Receptors")

    batch = test.batch.rows(slice(1))
    chains = [text.split(":") for text in test.texts(test.batch.tokens)]
    names = [["alpha"] * len(alpha) + ["beta"] * len(beta) for alpha, beta in chains]
    means = mean_by_group(revealed_steps(plans[0], denoiser, test.batch, steps), names, "chain")
    seen = batch.attention_mask[0]
    shares = step_shares(plans[0], denoiser, batch, steps)[0][seen]
    save_figure(figure_of([shares], [list(test.texts(batch.tokens, batch)[0])], means, "chain"), out / "order.svg")
    labels = {"task": "receptors", "rows": fit.rows, "steps": steps}
    config = {**labels, "seeds": seeds, "count": count, **asdict(fit)}
    write_results(out, "receptors", config, pd.concat([records, means]).assign(**labels))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
