"""The unmasking process as Pyro programs, learned policies, and the networks they are made of."""

if __name__ != "orderppl.models":
    raise ImportError("import orderppl.models, not models")

from orderppl.models.learned import LearnedPolicy
from orderppl.models.networks import (
    GroupedNetwork,
    OpeningPlan,
    PolicyNetwork,
    PositionTable,
    ScanNetwork,
    SequenceEncoder,
)
from orderppl.models.unmasking import SequentialUnmaskingModel, UnmaskingModel

__all__ = [
    "GroupedNetwork",
    "LearnedPolicy",
    "OpeningPlan",
    "PolicyNetwork",
    "PositionTable",
    "ScanNetwork",
    "SequenceEncoder",
    "SequentialUnmaskingModel",
    "UnmaskingModel",
]
