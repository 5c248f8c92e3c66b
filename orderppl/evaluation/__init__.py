"""Evaluation: one engine that makes a table, and pure functions of that table."""

from orderppl.evaluation.arms import Arm, sweep
from orderppl.evaluation.curves import advantages, frontier
from orderppl.evaluation.figures import frontier_figure
from orderppl.evaluation.table import paired_difference, summary

__all__ = [
    "Arm",
    "advantages",
    "frontier",
    "frontier_figure",
    "paired_difference",
    "summary",
    "sweep",
]
