"""Learn the order in which a pretrained model should write the product of a reaction.

    python experiments/reactions.py --train ../shared/data/reactions/reactions.csv --steps 4 --out runs/reactions

The reactants are given, the product is to be written. The order is a plan that reads what the denoiser expects while
the whole product is hidden, so the reactants through it. For many steps it can be learned for half as many, each of
which is then played in two (`--fit.halved true`). The table gives `path_nats` on held-out reactions: nats per
token along each arm's own order with the same number of steps. What the arms write freely is checked: `valid` SMILES,
`exact` products. The figure shows what was learned, token by token.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import pandas as pd
from jsonargparse import auto_cli
from opponents import best_of, spaced_orders, spaced_rules
from plan_fits import PlanFit, learn_plans, make_plan
from rich.console import Console

from orderppl import Denoiser, Policy, decode
from orderppl.data import Examples, Reactions
from orderppl.data.smiles import smiles_problem
from orderppl.evaluation.results import results_table, write_results
from orderppl.figures import save_figure
from orderppl.models.denoisers import ReactionDenoiser
from orderppl.policies import Ranked

from molecules import compare, figure_of, mean_by_group, revealed_steps, step_shares

FIT = PlanFit(bonus=0.3, schedule="cosine", group=8, grad_clip=1.0)


def token_kind(token: str) -> str | None:
    """Kind of a SMILES token."""
    if token[0] == "[":
        return "bracket atom"
    if token in "()":
        return "branch"
    if token[-1].isdigit():
        return "ring closure"
    if token in ("F", "Cl", "Br", "I"):
        return "halogen"
    named = {"C": "aliphatic C", "c": "aromatic c"} | dict.fromkeys("NOSPBnosp", "N, O, S, P")
    return named.get(token, "bond" if token in "=#-/\\" else None)


def written(policy: Policy, denoiser: Denoiser, examples: Examples, steps: int, arm: str) -> list[dict[str, object]]:
    """`valid` and `exact` shares of the products that an arm writes."""
    output = decode(denoiser, policy, examples.batch, max_steps=steps, mode=arm == "learned")
    products, truth = examples.texts(output.sequences), examples.texts(examples.batch.tokens)
    valid = [smiles_problem(product) is None for product in products]
    exact = [product == true for product, true in zip(products, truth, strict=True)]
    shares = {"valid": sum(valid) / len(valid), "exact": sum(exact) / len(exact)}
    return [{"metric": name, "value": share, "arm": arm, "n": len(valid)} for name, share in shares.items()]


def main(
    train: Path,
    steps: int = 4,
    family: Literal["scan", "independent"] = "scan",
    seeds: int = 1,
    split: int = 0,
    fit: PlanFit = FIT,
    rows_written: int = 32,
    out: Path = Path("runs/reactions"),
) -> None:
    """Learn a plan on every seed and compare on held-out reactions.

    Args:
        train: CSV file with a column rxn.
        steps: step budget T.
        family: steps that depend on each other in a scan, or independent ones.
        seeds: training seeds, from 0.
        split: seed of what is held out.
        fit: what a fit may spend, and how.
        rows_written: held-out products that are also written freely.
        out: folder of run and results.
    """
    denoiser = ReactionDenoiser()
    data = Reactions(str(train), seed=split)
    splits = data.splits(denoiser.tokenizer)
    make = partial(make_plan, family=family, vocab_size=denoiser.vocab_size)
    plans = learn_plans(make, denoiser, splits["train"], steps, range(seeds), out, fit)
    test = splits["test"]
    spaced = best_of([*spaced_orders(steps), *spaced_rules(steps)], denoiser, splits["validation"].take(48))
    records = compare(plans, denoiser, test, steps, spaced=spaced, out=out, title="Reactions")

    few = test.take(rows_written)
    arms: dict[str, Policy] = {"learned": plans[0], "random": Ranked("random"), "top_prob": Ranked("top_prob")}
    free = [record for arm, policy in arms.items() for record in written(policy, denoiser, few, steps, arm)]
    Console().print(results_table(free, title="Products written freely, most likely tokens"))

    batch = test.batch
    rows_read = zip(batch.tokens, batch.latent, strict=True)
    kinds = [[token_kind(test.spell(token)) for token in tokens[latent].tolist()] for tokens, latent in rows_read]
    means = mean_by_group(revealed_steps(plans[0], denoiser, batch, steps), kinds, "kind")
    chosen = batch.rows((batch.latent.sum(-1) - 36).abs().argsort(stable=True)[:2])
    shares = step_shares(plans[0], denoiser, chosen, steps)
    seen = [own[latent] for own, latent in zip(shares, chosen.latent, strict=True)]
    rows_shown = zip(chosen.tokens, chosen.latent, strict=True)
    labels = [[test.spell(token) for token in tokens[latent].tolist()] for tokens, latent in rows_shown]
    save_figure(figure_of(seen, labels, means, "kind"), out / "order.svg")
    label = {"task": "reactions", "rows": fit.rows, "steps": steps}
    config = {**asdict(fit), **label, "family": family, "seeds": seeds}
    write_results(out, "reactions", config, pd.concat([records, pd.DataFrame(free), means]).assign(**label))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
