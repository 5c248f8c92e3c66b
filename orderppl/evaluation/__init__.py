"""Evaluation: answers, path likelihood, intervals and the records of a comparison."""

from orderppl.evaluation.answers import answers_match, exact_match, parse_answer
from orderppl.evaluation.cost import PolicyCost, policy_cost
from orderppl.evaluation.evaluate import DecodedAnswers, Grade, decode_answers, evaluate_policies
from orderppl.evaluation.frontier import Advantage, Frontier, Point
from orderppl.evaluation.intervals import Interval, bootstrap_mean, paired_difference
from orderppl.evaluation.path_likelihood import PathLikelihood, batch_canvas, path_likelihood

__all__ = [
    "Advantage",
    "DecodedAnswers",
    "Frontier",
    "Grade",
    "Interval",
    "PathLikelihood",
    "Point",
    "PolicyCost",
    "answers_match",
    "batch_canvas",
    "bootstrap_mean",
    "decode_answers",
    "evaluate_policies",
    "exact_match",
    "paired_difference",
    "parse_answer",
    "path_likelihood",
    "policy_cost",
]
