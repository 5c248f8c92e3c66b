"""Guides over the reveal order: the variational families."""

if __name__ != "orderppl.guides":
    raise ImportError("import orderppl.guides, not guides")

from orderppl.guides.guide import Guide
from orderppl.guides.policy import PolicyGuide, PosteriorGuide
from orderppl.guides.posteriors import MeanFieldGuide, PlackettLuceGuide, RenormalisedScoreGuide
from orderppl.guides.sequential import SequentialGuide

__all__ = [
    "Guide",
    "MeanFieldGuide",
    "PlackettLuceGuide",
    "PolicyGuide",
    "PosteriorGuide",
    "RenormalisedScoreGuide",
    "SequentialGuide",
]
