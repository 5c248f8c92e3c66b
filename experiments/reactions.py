"""Learn the order in which a pretrained reaction model should write the product, given the reactants.

    orderppl reactions --train reactions.csv --steps 4 --out runs/reactions
    orderppl reactions --train train.csv --test test.csv --steps 8

The whole product starts masked; its length is known. The order is a plan that reads the reactants: from where each
token stands and from what the denoiser expects there before anything is revealed, which is the first forward of any
decoding. The table gives `path_nats` on held-out reactions: nats per product token along each arm's own order. The
oracle ranks positions by the probability of the true token. Written freely, token by token the most likely one, the
arms are compared by `valid` (well-formed SMILES) and `exact` (the product itself). Everything but the last table looks
at training rows; validation rows are for tuning: `--set task.held_out=...`, `orderppl evaluate --split validation`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from rich.console import Console

from orderppl.data.smiles import smiles_problem
from orderppl.errors import UserError
from orderppl.experiments.build import ReactionDenoiserConfig, ReactionTask
from orderppl.experiments.config import setting
from orderppl.experiments.molecules import (
    Comparison,
    MoleculeConfig,
    best_heuristic,
    learn_and_compare,
    revealed_steps,
    step_probabilities,
)
from orderppl.experiments.results import Record, results_table, save_figure

CONFIG = "reactions"
KINDS = ("aliphatic C", "aromatic c", "N, O, S, P", "halogen", "bracket atom", "bond", "branch", "ring closure")


@dataclass(frozen=True)
class Config(MoleculeConfig):
    """Settings of reactions."""

    train: str | None = setting(None, "CSV file of training reactions", file=True, option="--train")
    test: str | None = setting(None, "CSV file of held-out reactions", file=True, option="--test")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        if not isinstance(self.task, ReactionTask) or not isinstance(self.denoiser, ReactionDenoiserConfig):
            raise UserError("task.name", f"is {self.task.name!r}", "use `orderppl fit-order` for other tasks")


def run(config: Config, out: Path, resume: bool = False) -> Iterable[Record]:
    """Learn the order, compare on held-out reactions, write products, draw the figure."""
    assert isinstance(config.task, ReactionTask)
    train = config.train or config.task.train
    if train is None:
        raise UserError("train", "no reactions", "give a CSV file with a column rxn: --train reactions.csv")
    task = replace(config.task, train=train, test=config.test or config.task.test)
    comparison = learn_and_compare(config, task, out, resume, {"task": "reactions"}, "Reactions")
    records = list(comparison.records)
    report = comparison.problem.task.report
    assert report is not None
    for file, outcome, count, example in report.table():
        records.append({"metric": "load_rows", "value": count, "file": file, "outcome": outcome, "example": example})
    if config.rows_written:
        records += write_products(config, comparison)
    records += kind_steps(comparison)
    plot_order(comparison, records, out / "order.png")
    return records


def write_products(config: Config, comparison: Comparison) -> list[Record]:
    """`valid` and `exact` shares of the products that arms write."""
    tokenizer = comparison.problem.task.tokenizer
    assert tokenizer is not None
    truth = [
        tokenizer.decode(tokens[attended].tolist())
        for batch in comparison.test
        for tokens, attended in zip(batch["tokens"], batch["attention_mask"].bool(), strict=True)
    ]
    records: list[Record] = []
    arms = dict.fromkeys(["learned", best_heuristic(comparison.records), "random uniform", "top_prob uniform"])
    for arm in arms:
        rows = comparison.written(arm, config.rows_written, config.num_steps, 0.0, config.seed)
        products = [tokenizer.decode(row) for row in rows]
        valid = torch.tensor([smiles_problem(product) is None for product in products])
        exact = torch.tensor([product == true for product, true in zip(products, truth, strict=False)])
        records += [comparison.record("valid", valid.double(), arm), comparison.record("exact", exact.double(), arm)]
    Console().print(results_table(records, title="Products written freely, most likely tokens"))
    return records


def token_kind(token: str) -> str | None:
    """Kind of a SMILES token, for the figure."""
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


def kind_steps(comparison: Comparison) -> list[Record]:
    """`mean_step` of every kind of token, from 0, over the held-out products."""
    problem = comparison.problem
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for batch in comparison.test:
        revealed = revealed_steps(comparison, batch)
        attended = batch["attention_mask"].cpu().bool()
        for token, step in zip(batch["tokens"].cpu()[attended].tolist(), revealed[attended].tolist(), strict=True):
            kind = token_kind(problem.task.spell(token))
            if kind is not None:
                steps[kind].append(float(step))
    found = {kind: torch.tensor(values) for kind, values in steps.items() if values}
    return [comparison.record("mean_step", values, "learned", kind=kind) for kind, values in found.items()]


def plot_order(comparison: Comparison, records: Iterable[Record], path: Path) -> None:
    """Draw P(step | position) of two held-out products, token by token, and the mean step of every kind of token."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problem, size = comparison.problem, comparison.test[0]["attention_mask"].sum(-1)
    chosen = (size - 36).abs().argsort(stable=True)[:2]
    batch = {name: tensor[chosen] for name, tensor in comparison.test[0].items()}
    probs, attended = step_probabilities(comparison, batch), batch["attention_mask"].cpu().bool()
    figure, axes = plt.subplots(len(chosen) + 1, 1, figsize=(9, 5.4), layout="constrained")
    for row, axis in enumerate(axes[:-1]):
        image = axis.imshow(probs[row][attended[row]].T.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1)
        names = [problem.task.spell(token) for token in batch["tokens"][row].cpu()[attended[row]].tolist()]
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set(ylabel="step", yticks=range(probs.shape[-1]))
    axes[0].set_title("P(step | position)")
    figure.colorbar(image, ax=list(axes[:-1]))
    means = {str(r["kind"]): float(str(r["value"])) for r in records if r["metric"] == "mean_step"}
    axes[-1].bar(list(means), list(means.values()), color="#0072b2")
    axes[-1].set(ylabel="mean step")
    axes[-1].tick_params(axis="x", labelsize=8)
    save_figure(figure, path)
