"""Learn the order in which a small English model should write sentences, and compare it with every order by hand.

    python experiments/english.py --denoiser runs/english-denoiser --steps 4 --out runs/english-4
    python experiments/english.py --hides '[A-Za-z]{4,}' --written words --out runs/words-4    # of four letters or more

What a pattern hides is written, or all, by a plan or a policy that scans positions. Opponents are all heuristics and
the best of what spaces out a step: dilated and periodic orders, rankings and a threshold, chosen on validation rows.
The figure shows one text in two orders. What is finished is kept: repeat the command to go on.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from itertools import product
from math import log
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import pandas as pd
from jsonargparse import auto_cli
from opponents import best_of, spaced_orders, spaced_rules
from plan_fits import PlanFit, learn_plans

from orderppl import Policy, load_run
from orderppl.config import build
from orderppl.evaluation.results import write_results
from orderppl.figures import COLOURS, GREY, INK, STYLE, WIDTH, save_figure
from orderppl.models import OpeningPlan, PolicyNetwork, ScanNetwork
from orderppl.policies import Plan, Ranked, ScanPlan, ScanPolicy

from molecules import compare, mean_by_group, revealed_steps, side_by_side

SMALL = re.compile("an?|the|of|to|in|on|at|for|from|by|with|and|or|but|if|that|than|as|is|are|was|were|be|ha[sd]|have")
FIT = PlanFit(rows=40_000, bonus=0.3, schedule="cosine", batch_size=8, group=8, grad_clip=1.0)
ASKED = re.compile("how|many|much|what|who|when|which|where")


def kind_of(token: str) -> str:
    """Kind of a token of English."""
    if token.startswith("##") or not token.isalpha():
        return "end of a word" if token.startswith("##") else "number" if token.isdecimal() else "sign"
    return "small word" if SMALL.fullmatch(token) else "question word" if ASKED.fullmatch(token) else "other word"


def make_policy(steps: int, family: str, vocab_size: int, given: bool) -> Policy:
    """A policy that sees what has been revealed, or a plan that knows places, and what the denoiser says first."""
    if family == "policy":
        seen = PolicyNetwork(vocab_size, width=32, layers=1, heads=2, reads_tokens=False, vectors=16)
        return ScanPolicy(ScanNetwork(2, seen, bias=-log(max(steps - 1, 1))))  # one in T at the start
    places = OpeningPlan(steps if family == "independent" else 16, vocab_size, reads_opening=given)
    return Plan(places) if family == "independent" else ScanPlan(ScanNetwork(steps, places))


def main(
    denoiser: Path = Path("runs/english-denoiser"),
    hides: str | None = None,
    written: str = "all",
    steps: int = 4,
    family: Literal["scan", "independent", "policy"] = "scan",
    seeds: int = 3,
    fit: PlanFit = FIT,
    tested: int = 300,
    out: Path = Path("runs/english"),
) -> None:
    """Learn on every seed and compare on held-out sentences.

    Args:
        denoiser: run folder of a denoiser of texts.
        hides: regular expression of what is to be written; the rest is given. None: all is to be written.
        written: name of what is to be written, a label of the records.
        steps: step budget T.
        family: a plan of steps that depend on each other in a scan, one of independent steps, or a policy that scans.
        seeds: training seeds, from 0.
        fit: what a fit may spend, and how.
        tested: held-out sentences that are scored.
        out: folder of runs and results.
    """
    run = load_run(denoiser)
    data, network = run.config["data"], run.denoiser
    splits = build({**data, "init_args": {**data["init_args"], "hides": hides}}).splits(run.tokenizer)
    make = partial(make_policy, family=family, vocab_size=network.vocab_size, given=hides is not None)
    plans = learn_plans(make, network, splits["train"], steps, range(seeds), out, fit)
    spaced = best_of([*spaced_orders(steps, hides is not None), *spaced_rules(steps)], network, splits["validation"])
    test = splits["test"].take(tested)
    batch = test.batch
    records = compare(plans, network, test, steps, spaced=spaced, out=out, title="English", drawn=family == "policy")
    spelled = [[test.spell(token) for token in batch.tokens[row][own].tolist()] for row, own in enumerate(batch.latent)]
    compared: dict[str, Policy] = {"learned": plans[0], spaced.name: spaced.policy}
    compared |= {score: Ranked(score) for score in ("top_prob", "left_to_right")}  # type: ignore[arg-type]
    when = {arm: revealed_steps(policy, network, batch, steps) for arm, policy in compared.items()}
    means = mean_by_group(when["learned"], [[kind_of(token) for token in row] for row in spelled], "kind")
    together = [{"metric": "neighbours_together", "arm": arm, "value": side_by_side(own)} for arm, own in when.items()]
    chosen = int((batch.latent.sum(-1) - 24).abs().argmin())
    texts = [test.spell(token) for token in batch.tokens[chosen].tolist()]
    shown = [i for i, there in enumerate(batch.attention_mask[chosen]) if there and not texts[i].startswith("[")]
    columns = {arm: when[arm][chosen, shown].tolist() for arm in ("top_prob", "learned")}
    save_figure(figure_of([texts[i] for i in shown], columns), out / "order.svg")
    label = {"task": "english", "written": written, "rows": fit.rows, "steps": steps}
    config = {**label, **asdict(fit), "hides": hides, "family": family, "seeds": seeds, "tested": tested}
    write_results(out, "english", config, pd.concat([records, pd.DataFrame(together), means]).assign(**label))


def figure_of(tokens: list[str], columns: Mapping[str, list[int]], width: int = 62) -> Any:
    """One text under some orders, below each other, step by step; what is given (step -1) is always there."""
    places, x, y = [], 0, 0
    for token in tokens:
        text = token.removeprefix("##")
        x += bool(x) and text == token and token.isalnum()
        x, y = (0, y + 1) if x + len(text) > width else (x, y)
        places.append((x, y, text))
        x += len(text)
    last, lines = max(max(when) for when in columns.values()), y + 1
    high = (last + 1) * (lines + 0.5)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(WIDTH, len(columns) * (0.14 * high + 0.3)), layout="constrained")
        for axis, (arm, when) in zip(figure.subplots(len(columns), 1), columns.items(), strict=True):
            axis.set(xlim=(0, width), ylim=(high, -1))
            axis.set_title(arm, loc="left")
            axis.axis("off")
            for step, (own, (x, y, text)) in product(range(last + 1), list(zip(when, places, strict=True))):
                look = {"color": COLOURS[1] if own == step else INK if own < step else GREY, "family": "monospace"}
                text = text if own <= step else "\u00b7" * len(text)
                axis.text(x, step * (lines + 0.5) + y, text, fontsize=7, **look)
    return figure


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
