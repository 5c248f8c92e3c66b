"""Learn the order in which a pretrained antibody model should write a variable domain, or its loops.

    python experiments/antibodies.py --train ../shared/data/antibodies/heavy.csv --steps 4 --out runs/antibodies
    python experiments/antibodies.py --train heavy.csv --regions CDR1,CDR2,CDR3 --steps 4 --out runs/loops
    python experiments/antibodies.py --out runs/drawn          # no file: sequences drawn from the model itself

The order is a plan: one distribution over the steps per aligned position, blind to the residues that are to be written
and therefore deployable. With `--regions` only these are written and the framework is given. The table gives
`path_nats` on held-out sequences: nats per residue along each arm's own order, with the same number of steps (adaptive
rules use as many as they need, up to that budget). The oracle ranks positions by the probability of the true residue.
With `--judged` arms also write freely, and an independent model judges the residues that they wrote. Loops are compared
with those of training sequences, and with each other: edits per residue. The figure shows what was learned.
"""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from antibody_judge import AntibodyJudge
from antibody_sequences import domains, draw_sequences
from jsonargparse import auto_cli
from opponents import best_of, spaced_orders, spaced_rules
from plan_fits import PlanFit, learn_plans
from rich.console import Console

from orderppl import Policy, decode
from orderppl.data import Antibodies, Examples
from orderppl.data.sequences import REGIONS, antibody_regions
from orderppl.errors import UserError
from orderppl.evaluation import Arm
from orderppl.evaluation.results import results_table, write_results
from orderppl.figures import save_figure
from orderppl.inference.refine import refine_plan
from orderppl.models import PositionTable
from orderppl.models.denoisers import AntibodyDenoiser
from orderppl.policies import Plan, Ranked

from molecules import compare, figure_of, mean_by_group, revealed_steps, step_shares

FIT = PlanFit(lr=0.2, bonus=0.03)
LEFT = {"H": 98, "L": 88}  # aligned positions counted from the left end; the others are counted from the right end


def searched(plan: Plan, denoiser: AntibodyDenoiser, rows: Examples, steps: int, most: int) -> Plan:
    """What a local search on training rows, which looks at so many plans, makes of a plan."""
    table: Any = deepcopy(plan.network)
    looks: dict[str, Any] = {"index": table.index(rows.batch), "screen": 64, "max_evaluations": most}
    table.set_steps(refine_plan(denoiser, rows.batch, table.logits.argmax(-1), steps, **looks).steps)
    return Plan(table)


def main(
    train: Path | None = None,
    steps: int = 4,
    regions: str | None = None,
    names: str | None = None,
    chain: Literal["H", "L"] = "H",
    seeds: int = 1,
    split: int = 0,
    fit: PlanFit = FIT,
    search: int = 0,
    judged: int = 0,
    out: Path = Path("runs/antibodies"),
) -> None:
    """Learn a plan and compare it on held-out domains.

    Args:
        train: FASTA or CSV file; sequences are drawn from the model when left out.
        steps: step budget T.
        regions: what is to be written, such as CDR1,CDR2,CDR3; the whole domain when left out.
        names: regular expression of the names to use.
        chain: heavy (`H`) or light (`L`) chains.
        seeds: fits, whose seeds count from that of the split.
        split: seed of what is held out.
        fit: what a fit may spend, and how.
        search: plans that a local search from the learned one looks at, a yardstick; 0: none.
        judged: held-out domains that are also written freely and judged by an independent model (antiberty, 97 MB).
        out: folder of run and results.
    """
    if search and fit.halved:
        raise UserError("search", "a plan for half as many steps is not searched on", "leave out fit.halved")
    denoiser = AntibodyDenoiser(chain)
    source = draw_sequences(denoiser, out / "drawn.fasta", chain == "L") if train is None else train
    data = Antibodies(str(source), regions=regions, names=names, seed=split)
    splits = data.splits(denoiser.tokenizer)
    plans = learn_plans(
        lambda count: Plan(PositionTable(data.length, count, split=LEFT[chain], counts="attended")),
        *(denoiser, splits["train"], steps, range(split, split + seeds), out, fit),
    )
    test, plan = splits["test"], plans[split]
    spaced = best_of([*spaced_orders(steps), *spaced_rules(steps)], denoiser, splits["train"].take(64))
    settings: dict[str, Any] = {"spaced": spaced, "out": out, "title": regions or "Antibodies"}
    if search:
        long = searched(plan, denoiser, splits["train"], steps, search)
        settings["others"] = [Arm("long search", long, steps, family="long search", mode=True)]
    records = compare(plans, denoiser, test, steps, **settings)
    parts = [antibody_regions(domain) for domain in domains(test)]
    known = test.rows(torch.tensor([row for row, found in enumerate(parts) if found is not None]))
    found = [part for part in parts if part is not None]
    wanted = [latent[seen] for latent, seen in zip(known.batch.latent, known.batch.attention_mask, strict=True)]
    groups = [[name for name, own in zip(*row, strict=True) if own] for row in zip(found, wanted, strict=True)]
    means = mean_by_group(revealed_steps(plan, denoiser, known.batch, steps), groups, "region")
    means = means.sort_values("region", key=lambda names: names.map(REGIONS.index))
    longest = max(range(len(found)), key=lambda row: len(found[row]))
    row = known.rows([longest]).batch
    shares = step_shares(plan, denoiser, row, steps)[row.attention_mask]
    save_figure(figure_of([shares], [found[longest]], means, "region"), out / "order.svg")
    if judged:
        natural = domains(splits["train"])
        arms: dict[str, Policy] = {"learned": plan, spaced.name: spaced.policy, "random": Ranked("random")}
        arms |= {"top_prob": Ranked("top_prob"), "entropy": Ranked("entropy")}
        judge, few = AntibodyJudge(), known.take(judged)
        opinions = judge.records("held-out domains", domains(few), wanted[:judged], found, natural)
        for arm, policy in arms.items():
            output = decode(denoiser, policy, few.batch, max_steps=steps, mode=arm == "learned", temperature=1.0)
            opinions += judge.records(arm, domains(few, output.sequences), wanted[:judged], found, natural)
        Console().print(results_table(opinions, rows=("arm", "region"), columns=("metric",), title="Written freely"))
        means = pd.concat([means, pd.DataFrame(opinions)])
    labels = {"task": "antibodies", "sequences": "file" if train else "drawn", "chain": chain, "rows": fit.rows}
    config = {**labels, **asdict(fit), "steps": steps, "regions": regions, "names": names, "seeds": seeds}
    write_results(out, "antibodies", config, pd.concat([records, means.assign(steps=steps)]).assign(**labels))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
