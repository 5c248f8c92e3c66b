"""The main job in a few minutes: learn two orders, one where the best is known and one on a real pretrained model.

    make quickstart

The first part is an exact Markov chain (4 states, 16 positions, 4 steps): the log evidence and the best fixed order are
known. The second is a pretrained antibody model; without a file, sequences are drawn from it. All tables of the parts
are in `results.json` of their folders; the page with the replay is in `report`.
"""

import io
import textwrap
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from jsonargparse import auto_cli

from orderppl import evaluate, load_run
from orderppl.data import Antibodies, Chains
from orderppl.evaluation import Arm, paired_difference
from orderppl.evaluation.results import read_results
from orderppl.models.denoisers import AntibodyDenoiser, MarkovChainDenoiser
from orderppl.policies import FixedOrder, Ranked
from orderppl.report import write_report

import antibodies
import chain

WIDTH, STEPS, LENGTH = 79, 4, 16


def say(text: str) -> None:
    """Print a paragraph that fits the screen."""
    print(textwrap.fill(text, WIDTH), flush=True)


def line(label: str, value: float, low: float, high: float) -> str:
    """A mean and its interval."""
    return f"  {label:<44} {value:7.3f}  [{low:.3f}, {high:.3f}]"


def chain_part(out: Path) -> None:
    """Learn on the chain, and compare with what is provably best."""
    with redirect_stdout(io.StringIO()):  # its table is wider than the screen
        chain.main(seeds=1, steps=STEPS, length=LENGTH, out=out)
    exact = {r["arm"]: r["value"] for r in read_results(out)["records"] if r["metric"] == "expected_gap_nats"}
    print("\n  expected gap to the log evidence, nats per sequence (0 is perfect)")
    for arm, label in (("best fixed order", "provable optimum"), ("learned", "learned"), ("random order", "random")):
        print(f"  {label:<44} {exact[arm]:7.3f}")

    denoiser = MarkovChainDenoiser(4, 0.85, LENGTH)
    order, _ = denoiser.best_order(STEPS)
    scores = ("random", "top_prob", "margin", "entropy")
    others = [Arm(s, Ranked(s, temperature=chain.TIES_AT_RANDOM), STEPS) for s in scores]
    learned = Arm("learned", load_run(out / "seed-0").policy, STEPS, mode=True)
    arms = [learned, Arm("the best fixed order", FixedOrder(order.tolist()), STEPS), *others]
    table = evaluate(arms, denoiser, Chains(length=LENGTH).splits()["test"], batch_size=500)
    print("\n  learned better by, paired over 2,000 test sequences  [95% interval]")
    for arm in arms[1:]:
        loss = paired_difference(table, "learned", arm.name, "nats")
        print(line(f"than {arm.name}", -loss.value, -loss.high, -loss.low))


def antibody_part(train: Path | None, rows: int, out: Path) -> None:
    """Learn on the antibody model, and compare with every heuristic."""
    with redirect_stdout(io.StringIO()):
        antibodies.main(train, steps=STEPS, fit=replace(antibodies.FIT, rows=rows), out=out)
    document = read_results(out)
    nats = {r["arm"]: r for r in document["records"] if r["metric"] == "path_nats"}
    gains = [r for r in document["records"] if r["metric"] == "advantage"]
    shown = ["learned", *dict.fromkeys(r["of"] for r in gains), "random uniform T=4", "greedy oracle uniform"]
    labels = {gains[0]["of"]: "best heuristic", gains[-1]["of"]: "best spaced order", shown[-1]: "sees the truth"}
    print("\n  nats per residue along an arm's own order (lower is better)  [95% interval]")
    for arm in dict.fromkeys(shown):
        note = f" ({labels[arm]})" if arm in labels else ""
        print(line(arm + note, *(nats[arm][key] for key in ("value", "low", "high"))))
    print(f"\n  learned better by, paired over {int(nats['learned']['n'])} held-out sequences  [95% interval]")
    for gain in gains:
        print(line(f"than the {labels[gain['of']]}", gain["value"], gain["low"], gain["high"]))


def main(train: Path | None = None, rows: int = 25_000, out: Path = Path("runs/quickstart")) -> None:
    """Learn both orders and compare them.

    Args:
        train: FASTA or CSV file of antibody sequences; drawn from the model when left out.
        rows: denoiser rows that the second fit may spend.
        out: folder of runs and results.
    """
    began = perf_counter()
    say(
        f"1. An exact Markov chain: {LENGTH} positions are written in {STEPS} denoiser forwards. The best fixed order"
        " is known by dynamic programming; the order is learned by stochastic variational inference alone."
    )
    chain_part(out / "chain")
    print()
    say(f"2. A pretrained antibody model writes heavy variable domains in {STEPS} forwards.")
    antibody_part(train, rows, out / "antibodies")

    denoiser = AntibodyDenoiser()
    source = out / "antibodies" / "drawn.fasta" if train is None else train
    test = Antibodies(str(source)).splits(denoiser.tokenizer)["test"].take(2)
    page = write_report(out / "antibodies", out / "report", examples=test, problems=2)
    print(f"\nDone in {perf_counter() - began:.0f} seconds. Watch both orders write, in a browser:\n  {page}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
