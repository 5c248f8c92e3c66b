"""Evaluation: one engine that makes a table, and pure functions of that table."""

from orderppl.evaluation.arms import Arm, standard_heuristics, sweep
from orderppl.evaluation.curves import Frontier, advantages, aup, frontier
from orderppl.evaluation.engine import evaluate
from orderppl.evaluation.figures import frontier_figure
from orderppl.evaluation.intervals import Interval, bootstrap_mean
from orderppl.evaluation.results import plain_records, read_results, results_table, write_results
from orderppl.evaluation.table import paired_difference, pass_at_k, summary

__all__ = [
    "Arm",
    "Frontier",
    "Interval",
    "advantages",
    "aup",
    "bootstrap_mean",
    "evaluate",
    "frontier",
    "frontier_figure",
    "paired_difference",
    "pass_at_k",
    "plain_records",
    "read_results",
    "results_table",
    "standard_heuristics",
    "summary",
    "sweep",
    "write_results",
]
