"""Learn the order in which a small model should write the equation chains of GSM8K.

    python experiments/equations.py docs/results/frontier-equations/denoiser ../shared/data/gsm8k --steps 4

The question is given, the chain of equations is to be written. The order is a plan that reads what the denoiser expects
while the whole chain is hidden, so the question through it. For many steps it can be learned for half as many, each of
which is then played in two (`--fit.halved true`). The table gives `path_nats` on held-out problems: nats per token
along each arm's own order with the same number of steps.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli
from opponents import best_of, spaced_orders, spaced_rules
from plan_fits import PlanFit, learn_plans, make_plan

from orderppl.data import Gsm8k
from orderppl.evaluation.results import write_results
from orderppl.models.denoisers import load_denoiser

from molecules import compare

FIT = PlanFit(rows=300_000, bonus=0.3, schedule="cosine", batch_size=16, group=20, grad_clip=1.0)
LONGEST = {"max_prompt": 208, "max_length": 160}  # tokens; every row that has equations


def main(
    denoiser: Path,
    source: Path,
    steps: int = 4,
    family: Literal["scan", "independent"] = "scan",
    seeds: int = 1,
    fit: PlanFit = FIT,
    out: Path = Path("runs/equations"),
) -> None:
    """Learn a plan on every seed and compare on test problems.

    Args:
        denoiser: run folder of a denoiser of equations.
        source: folder of GSM8K.
        steps: step budget T.
        family: steps that depend on each other in a scan, or independent ones.
        seeds: training seeds, from 0.
        fit: what a fit may spend, and how.
        out: folder of runs and results.
    """
    network = load_denoiser(denoiser, read_up_to=sum(LONGEST.values())).requires_grad_(False)
    splits = Gsm8k(str(source), form="equations", min_count=20, **LONGEST).splits(network.tokenizer)
    make = partial(make_plan, family=family, vocab_size=network.vocab_size)
    plans = learn_plans(make, network, splits["train"], steps, range(seeds), out, fit)
    spaced = best_of([*spaced_orders(steps), *spaced_rules(steps)], network, splits["validation"].take(400))
    records = compare(plans, network, splits["test"], steps, spaced=spaced, out=out, title="Equations")
    label = {"task": "equations", "rows": fit.rows}
    config = {**asdict(fit), **label, "family": family, "steps": steps, "seeds": seeds}
    write_results(out, "equations", config, records.assign(**label))


if __name__ == "__main__":
    auto_cli(main)
