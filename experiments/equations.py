"""Learn the order in which a small model should write the equation chains of GSM8K.

    python experiments/equations.py docs/results/frontier-equations/denoiser ../shared/data/gsm8k --steps 4

The question is given, the chain of equations is to be written. The order is a plan that reads what the denoiser expects
while the whole chain is hidden, so the question through it. For many steps it can be learned for half as many, each of
which is then played in two (`--family halved`). The table gives `path_nats` on held-out problems: nats per token along
each arm's own order with the same number of steps.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from opponents import best_of, spaced_orders, spaced_rules
from plan_fits import learn_plans, make_plan

from orderppl.data import Gsm8k
from orderppl.evaluation.results import write_results
from orderppl.models.denoisers import load_denoiser

from molecules import compare

LONGEST = {"max_prompt": 208, "max_length": 160}  # tokens; every row that has equations


def main(
    denoiser: Path,
    source: Path,
    steps: int = 4,
    family: Literal["scan", "halved", "independent"] = "scan",
    seeds: int = 1,
    rows: int = 300_000,
    lr: float = 0.01,
    bonus: float = 0.3,
    schedule: Literal["constant", "cosine"] = "cosine",
    bfloat16: bool = False,
    out: Path = Path("runs/equations"),
) -> None:
    """Learn a plan on every seed and compare on test problems.

    Args:
        denoiser: run folder of a denoiser of equations.
        source: folder of GSM8K.
        steps: step budget T.
        family: steps that depend on each other in a scan, the same for half as many steps, each of which is then played
            in two, or independent ones.
        seeds: training seeds, from 0.
        rows: denoiser rows that a fit may spend.
        lr: learning rate.
        bonus: weight of the entropy bonus at the start; it fades.
        schedule: of the learning rate.
        bfloat16: fit under autocast, faster where the processor knows the format; what is compared is float32.
        out: folder of runs and results.
    """
    network = load_denoiser(denoiser, read_up_to=sum(LONGEST.values())).requires_grad_(False)
    splits = Gsm8k(str(source), form="equations", min_count=20, **LONGEST).splits(network.tokenizer)
    budget: dict[str, Any] = {"rows": rows, "lr": lr, "bonus": bonus, "schedule": schedule, "bfloat16": bfloat16}
    budget |= {"halved": family == "halved", "batch_size": 16, "group": 20, "grad_clip": 1.0}
    make = partial(make_plan, family=family, vocab_size=network.vocab_size)
    plans = learn_plans(make, network, splits["train"], steps, range(seeds), out, **budget)
    spaced = best_of([*spaced_orders(steps), *spaced_rules(steps)], network, splits["validation"].take(400))
    records = compare(plans, network, splits["test"], steps, spaced=spaced, out=out, title="Equations")
    label = {"task": "equations", "rows": rows}
    config = {**budget, **label, "family": family, "steps": steps, "seeds": seeds}
    write_results(out, "equations", config, records.assign(**label))


if __name__ == "__main__":
    auto_cli(main)
