"""The regime of arXiv 2602.23968 in miniature, and what each ingredient is worth.

    orderppl train-denoiser --config ablate_denoiser --out runs/ablate-denoiser
    orderppl ablate --denoiser runs/ablate-denoiser --out runs/ablate
    orderppl ablate --denoiser runs/ablate-denoiser --out runs/ablate --seeds 5       # goes on with more training seeds

Fixed numbers of tokens per step (random is the paper's IID, top_prob, margin), with and without ranking the ends of the
canvas last, against the paper's guide with a learned prior of its own, at 5, 10 and 15 steps; its temperature; and arms
that differ from the reference in one ingredient. All in one grid, the config. Learned arms are decoded by the mode of
their prior and by drawing from it. `difference` is learned minus the reference arm, paired over problems; `frontier`
explains everything else. Finished fits and measurements are kept: repeat the command to go on after a kill.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from orderppl.errors import UserError
from orderppl.experiments import comparison
from orderppl.experiments.config import setting
from orderppl.experiments.results import Record, real, save_figure
from orderppl.inference.checkpoints import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG = "ablate"


@dataclass(frozen=True)
class Config(comparison.Config):
    """Settings of ablate."""

    reference: str = setting("paper_T5", "learned arm that the others are compared with")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        names = [arm.arm for arm in self.learn]
        if names and self.reference not in names:
            raise UserError("reference", f"no arm {self.reference!r}", f"use one of {', '.join(names)}")
        if self.curve is not None:
            raise UserError("curve", "arms of an ablation are no points of a curve", "set it to null")


def run(config: Config, out: Path) -> Iterable[Record]:
    """Learn every arm, measure all, and show what the ingredients are worth."""
    results, records = comparison.learn_and_compare(config, out)
    if results is None:
        return records
    decisions = dict.fromkeys(decision for arm in config.learn for decision in arm.decisions)
    for decision in decisions:
        others = [f"{arm.arm} ({decision})" for arm in config.learn]
        records += results.differences(f"{config.reference} ({decision})", others)
    page = StringIO()
    for console in (Console(), Console(file=page, width=200)):
        console.print(ingredient_table(records, config.reference))
    write_text(out / "ingredients.txt", page.getvalue())
    save_figure(ingredient_figure(records), out / "ingredients.png")
    return records


def ingredient_table(records: Sequence[Record], reference: str) -> Table:
    """One line per learned arm and decision: means over training seeds, and paired differences from the reference.

    Args:
        records: of the run.
        reference: name of the reference arm.
    """
    lines = _lines(records)
    table = Table(title=f"Learned arms, and their difference from {reference}", title_justify="left")
    for column in (
        "arm",
        "steps",
        "NFE",
        "seeds",
        "accuracy % (seeds)",
        "difference",
        "path_nats (seeds)",
        "difference",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for family, found in lines.items():
        first = found["nfe"][0]
        nfe = sum(real(record, "value") for record in found["nfe"]) / len(found["nfe"])
        cells = [family, str(first["steps"]), f"{nfe:.2f}", str(len(found["nfe"]))]
        for metric, factor, digits in (("accuracy", 100, 1), ("path_nats", 1, 4)):
            values = [factor * real(record, "value") for record in found.get(metric, [])]
            spread = f" ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.{digits}f}{spread}" if values else "")
            gaps = found.get(f"{metric}_difference", [])
            numbers = [factor * real(gaps[0], key) for key in ("value", "low", "high")] if gaps else []
            cells.append("{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*numbers, d=digits) if gaps else "")
        table.add_row(*cells)
    return table


def ingredient_figure(records: Sequence[Record]) -> Figure:
    """One panel per metric: the difference of every learned arm from the reference, with its 95% interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = _lines(records)
    metrics = [
        metric for metric in ("accuracy", "path_nats") if any(f"{metric}_difference" in x for x in lines.values())
    ]
    figure, axes = plt.subplots(
        1, max(len(metrics), 1), figsize=(12, 1 + 0.25 * len(lines)), sharey=True, squeeze=False
    )
    for axis, metric in zip(axes[0], metrics, strict=False):
        gaps = {
            family: found[f"{metric}_difference"][0]
            for family, found in lines.items()
            if f"{metric}_difference" in found
        }
        values = [real(record, "value") for record in gaps.values()]
        ends = [[abs(real(r, "value") - real(r, key)) for r in gaps.values()] for key in ("low", "high")]
        axis.errorbar(values, list(gaps), xerr=ends, fmt="o", markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("accuracy, right is better" if metric == "accuracy" else "nats per token, left is better")
    axes[0, 0].invert_yaxis()
    figure.suptitle("Difference from the reference arm decoded in the same way")
    figure.tight_layout()
    return figure


def _lines(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Family of learned arms -> metric -> its records, one per training seed."""
    lines: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        metric = str(record["metric"])
        if record.get("kind") == "learned" and metric in ("accuracy", "path_nats", "nfe"):
            lines.setdefault(str(record["family"]), {}).setdefault(metric, []).append(record)
    for record in records:
        if str(record["metric"]).endswith("_difference"):
            lines[str(record["arm"])].setdefault(str(record["metric"]), []).append(record)
    return lines
