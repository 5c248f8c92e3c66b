"""Amortised guides: distributions over the order given the tokens, or given only what a decoder sees."""

if __name__ != "orderppl.guides":
    raise ImportError("import orderppl.guides, not guides")

from orderppl.guides.guide import PathGuide, RevealGuide
from orderppl.guides.heuristic import HeuristicGuide
from orderppl.guides.mean_field import MeanFieldGuide
from orderppl.guides.plackett_luce import PlackettLuceGuide
from orderppl.guides.policy import PolicyGuide
from orderppl.guides.posterior import PosteriorGuide
from orderppl.guides.random import RandomGuide
from orderppl.guides.renormalised_score import RenormalisedScoreGuide
from orderppl.guides.sequential import SequentialGuide

__all__ = [
    "HeuristicGuide",
    "MeanFieldGuide",
    "PathGuide",
    "PlackettLuceGuide",
    "PolicyGuide",
    "PosteriorGuide",
    "RandomGuide",
    "RenormalisedScoreGuide",
    "RevealGuide",
    "SequentialGuide",
]
