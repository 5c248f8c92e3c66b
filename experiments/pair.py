"""The paper's pair, a posterior that sees the tokens beside a learned prior, on GSM8K programs: what becomes of it.

    python experiments/pair.py docs/results/frontier-programs-wide/denoiser ../shared/data/gsm8k --out runs/pair

All arms have the same prior, a policy that reads the denoiser's view of the state, and differ in guide and objective:

    learned                     the policy is its own guide: the KL is 0
    paper                       renormalised scores of the tokens (arXiv 2602.23968), which know nothing of the prior
    paper, from the prior       the same form, whose scores are the prior's and a correction that starts at zero
    paper, as the prior         the prior's own form, corrected likewise: the KL starts at 0
    paper, importance-weighted  the same, by the importance-weighted bound

`bound_nats` is the negative bound on held-out problems, nats per problem; the policies decode without their guide. What
is finished is kept: repeat the command to go on.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from jsonargparse import auto_cli
from rich.console import Console

from orderppl import Denoiser, evaluate, fit
from orderppl.data import Examples, Gsm8k
from orderppl.diagnostics import draw_orders
from orderppl.evaluation import Arm, paired_difference, summary, sweep
from orderppl.evaluation.intervals import bootstrap_mean
from orderppl.evaluation.results import results_table, write_results
from orderppl.guides import Guide, PolicyGuide, PosteriorGuide, RenormalisedScoreGuide
from orderppl.inference import ImportanceWeightedELBO, RevealTraceGraph_ELBO
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, UnmaskingModel
from orderppl.models.denoisers import load_denoiser

PARTICLES, BATCH_SIZE = 8, 8
Make = Callable[[LearnedPolicy, Denoiser, int], Guide]


def paper(policy: LearnedPolicy, denoiser: Denoiser, steps: int) -> Guide:
    """Scores of the tokens alone."""
    return RenormalisedScoreGuide(SequenceEncoder(denoiser.vocab_size, width=48), steps, temperature=0.1)


def corrected(policy: LearnedPolicy, denoiser: Denoiser, steps: int, temperature: float | None = None) -> Guide:
    """The prior, corrected by what the tokens say."""
    features = ("confidence", "margin", "entropy", "likelihood")
    network = PolicyNetwork(denoiser.vocab_size, 48, features=features, sees_truth=True, zero_init=True)
    return PosteriorGuide(policy, denoiser, steps, network, temperature=temperature)


ARMS: dict[str, tuple[Make, type[RevealTraceGraph_ELBO] | type[ImportanceWeightedELBO]]] = {
    "learned": (lambda policy, denoiser, steps: PolicyGuide(policy, denoiser, steps), RevealTraceGraph_ELBO),
    "paper": (paper, RevealTraceGraph_ELBO),
    "paper, from the prior": (partial(corrected, temperature=1.0), RevealTraceGraph_ELBO),
    "paper, as the prior": (corrected, RevealTraceGraph_ELBO),
    "paper, importance-weighted": (corrected, ImportanceWeightedELBO),
}


def learn(
    arm: str, denoiser: Denoiser, data: Examples, steps: int, updates: int, lr: float, seed: int, out: Path
) -> tuple[UnmaskingModel, Guide]:
    """Fit one pair; what a guide has of its own learns with `lr`, the prior with a third of it."""
    pyro.set_rng_seed(seed)
    policy = LearnedPolicy(PolicyNetwork(denoiser.vocab_size, 48, bias=-1.0))
    make, objective = ARMS[arm]
    model, guide = UnmaskingModel(denoiser, policy, steps), make(policy, denoiser, steps)
    own = "guide" if arm == "paper" else "correction"
    rates: Any = lr if arm == "learned" else {"model.policy": lr / 3, own: lr}
    settings: dict[str, Any] = {"updates": updates, "batch_size": BATCH_SIZE, "group": 20, "grad_clip": 1.0}
    settings |= {"schedule": "cosine", "warmup": 10, "seed": seed, "out": out, "resume": True}
    fit(model, guide, data, objective=objective(PARTICLES), optimizer=torch.optim.Adam, lr=rates, **settings)
    return model, guide


def main(
    denoiser: Path,
    gsm8k: Path,
    steps: int = 5,
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
    arms = sweep([{"policy": "Ranked", "score": ["random", "top_prob", "margin"], "budgets": [steps]}], seeds=(0, 1, 2))
    heuristics = [arm.name for arm in arms]
    spent = updates * BATCH_SIZE * (1 + (steps - 1) * PARTICLES)
    for seed in range(seeds):
        for name in ARMS:
            folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            model, guide = learn(name, network, splits["train"], steps, updates, lr, seed, folder)
            with torch.no_grad():
                weights = draw_orders(model, guide, test.batch, draws).log_weight.double()  # [draws, N]
            bound = bootstrap_mean(-weights.mean(0), seed=seed)
            record = {"metric": "bound_nats", "arm": name, "training_seed": seed, "draws": draws, "rows": spent}
            records.append(record | {"value": bound.value, "low": bound.low, "high": bound.high})
            several = {"seeds": tuple(range(draws))}
            for play, how in (("", several), (", mode", {"mode": True})):
                label, family = f"{name}{play} #{seed}", f"{name}{play}"
                arms.append(Arm(label, model.policy, steps, family=family, training_seed=seed, **how))  # type: ignore[arg-type]
    table = evaluate(arms, network, test, metrics=["accuracy", "path_nats"], out=out)
    records += summary(table, ["accuracy", "path_nats", "marginal_nats", "nfe"]).to_dict("records")
    for metric, played in (("accuracy", ", mode"), ("path_nats", "")):
        own = f"learned{played}"
        for other in [*(f"{name}{played}" for name in ARMS if name != "learned"), *heuristics]:
            found = paired_difference(table, own, other, metric)
            sign = 1 if metric == "accuracy" else -1
            ends = sorted((sign * found.low, sign * found.high))
            gain = {"metric": "advantage", "measured": metric, "arm": own, "of": other, "value": sign * found.value}
            records.append(gain | {"low": ends[0], "high": ends[1], "n_seeds": seeds, "rows": spent})
    labels = {"task": "programs", "steps": steps}
    config = {**labels, "seeds": seeds, "updates": updates, "lr": lr, "draws": draws, "test_rows": len(test)}
    write_results(out, "paper", config, pd.DataFrame(records).assign(**labels))
    Console().print(results_table([r for r in records if r["metric"] == "bound_nats"], rows=("arm", "training_seed")))
    Console().print(results_table([r for r in records if r["metric"] == "advantage"], rows=("measured", "arm", "of")))


if __name__ == "__main__":
    auto_cli(main)
