"""The paper's pair, a posterior that sees the tokens beside a learned prior, on GSM8K programs: what becomes of it.

    python experiments/pair.py docs/results/frontier-programs-wide/denoiser ../shared/data/gsm8k --out runs/pair

All arms have the same prior, a policy that reads the denoiser's view of the state, and differ in guide and objective:

    learned                     the policy is its own guide: the KL is 0
    paper                       renormalised scores of the tokens (arXiv 2602.23968), which know nothing of the prior,
                                at temperature 0.1; `paper, 0.05` at half of it
    paper, from the prior       the same form, whose scores are the prior's and a correction that starts at zero
    paper, as the prior         the prior's own form, corrected likewise: the KL starts at 0
    paper, importance-weighted  the same, by the importance-weighted bound

`bound_nats` is the negative bound on held-out problems, nats per problem; the policies decode without their guide, and
are compared with the paper's heuristics at their own mean number of forwards and at T. What is finished is kept: repeat
the command to go on.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jsonargparse import auto_cli
from pair_fits import ARMS, BATCH_SIZE, PARTICLES, Name, learn
from rich.console import Console

from orderppl import evaluate
from orderppl.data import Gsm8k
from orderppl.diagnostics import draw_orders
from orderppl.evaluation import Arm, advantages, paired_difference, summary, sweep
from orderppl.evaluation.intervals import bootstrap_mean
from orderppl.evaluation.results import results_table, write_results
from orderppl.evaluation.table import higher_is_better
from orderppl.models.denoisers import load_denoiser

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15)  # steps of the heuristics, as far as T; between them they are mixed
HEURISTICS = ("random", "top_prob", "margin")


def better(table: pd.DataFrame, metric: str, arm: str, other: str) -> dict[str, Any]:
    """How much better an arm is than another, paired: a record."""
    found = paired_difference(table, *((arm, other) if higher_is_better(metric) else (other, arm)), metric)
    ends = {"value": found.value, "low": found.low, "high": found.high}
    return {"metric": "advantage", "arm": arm, "of": other, **ends}


def main(
    denoiser: Path,
    gsm8k: Path,
    steps: int = 5,
    pairs: tuple[Name, ...] = tuple(ARMS),
    seeds: int = 3,
    updates: int = 250,
    lr: float = 0.003,
    rows: int = 300,
    draws: int = 8,
    out: Path = Path("runs/pair"),
) -> None:
    """Fit every arm on every seed and compare bounds and decoding on held-out problems.

    Args:
        denoiser: run folder of train-denoiser.
        gsm8k: folder of the data set.
        steps: step budget T.
        pairs: what is fitted; the others are compared with the first one.
        seeds: training seeds, from 0.
        updates: SVI updates of a fit.
        lr: learning rate of a guide; a prior beside one has a third of it.
        rows: test problems.
        draws: orders per problem, of bounds and of policies that draw.
        out: folder of runs and results.
    """
    network = load_denoiser(denoiser)
    data = Gsm8k(str(gsm8k), form="programs", max_number=199, max_equations=6, max_prompt=48, max_length=64)
    splits = data.splits(network.tokenizer)
    test = splits["test"].take(rows)
    records: list[dict[str, Any]] = []
    budgets = sorted({*(budget for budget in BUDGETS if budget < steps), steps})
    arms = sweep([{"policy": "Ranked", "score": list(HEURISTICS), "budgets": budgets}], seeds=(0, 1, 2))
    spent = updates * BATCH_SIZE * (1 + (steps - 1) * PARTICLES)
    bounds: dict[str, Any] = dict.fromkeys(pairs, 0.0)  # mean over the seeds, float64 [N]
    for seed in range(seeds):
        for name in pairs:
            folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            model, guide = learn(name, network, splits["train"], steps, updates, lr, seed, folder)
            with torch.no_grad():
                weights = draw_orders(model, guide, test.batch, draws).log_weight.double()  # [draws, N]
            bound = bootstrap_mean(-weights.mean(0), seed=seed)
            bounds[name] += weights.mean(0) / seeds
            record = {"metric": "bound_nats", "arm": name, "training_seed": seed, "draws": draws, "rows": spent}
            records.append(record | {"value": bound.value, "low": bound.low, "high": bound.high})
            plays: dict[str, dict[str, Any]] = {"": {"seeds": tuple(range(draws))}, ", mode": {"mode": True}}
            for play, how in plays.items():
                how |= {"family": f"{name}{play}", "training_seed": seed, "setting": {"played": play or "drawn"}}
                arms.append(Arm(f"{name}{play} #{seed}", model.policy, steps, **how))
    table = evaluate(arms, network, test, metrics=["accuracy", "path_nats"], out=out)
    whole = table[table["steps"] == steps]  # without the smaller budgets of the heuristics
    records += summary(whole, ["accuracy", "path_nats", "marginal_nats", "nfe"]).to_dict("records")
    for metric, played in (("accuracy", ", mode"), ("path_nats", "")):
        families = [f"{name}{played}" for name in pairs]
        for family in families:
            gains = [better(table, metric, families[0], family)] if family != families[0] else []
            for rule in HEURISTICS:
                gains.append(better(table, metric, family, f"{rule} T={steps}") | {"of": rule, "forwards": "T"})
                two = table[table["family"].isin([rule, family])]
                found = advantages(two, metrics=[metric], opponents=[rule]).query("metric == 'advantage'")
                gain = found[["metric", "value", "low", "high"]].iloc[0].to_dict()
                gains.append({**gain, "arm": family, "of": rule, "forwards": "equal"})
            records += [{"measured": metric, "n_seeds": seeds, "rows": spent, **gain} for gain in gains]
    for name in pairs[1:]:
        gain = bootstrap_mean(bounds[name] - bounds[pairs[0]])
        ends = {"value": gain.value, "low": gain.low, "high": gain.high, "n_seeds": seeds, "rows": spent}
        records.append({"metric": "advantage", "measured": "bound", "arm": name, "of": pairs[0], **ends})
    labels = {"task": "programs", "steps": steps}
    config = {**labels, "seeds": seeds, "updates": updates, "lr": lr, "draws": draws, "test_rows": len(test)}
    write_results(out, "paper", config, pd.DataFrame(records).assign(**labels))
    for metric, by in (("bound_nats", ("arm", "training_seed")), ("advantage", ("measured", "arm", "of", "forwards"))):
        Console().print(results_table([record for record in records if record["metric"] == metric], rows=by))


if __name__ == "__main__":
    auto_cli(main)
