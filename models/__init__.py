"""The unmasking process as Pyro programs, the reveal priors they can have, and denoisers."""

if __name__ != "orderppl.models":
    raise ImportError("import orderppl.models, not models")

from orderppl.models.price import PriceRange
from orderppl.models.priors import (
    CosineSteps,
    EasyFirst,
    FixedSizes,
    HeuristicPrior,
    LearnedPolicy,
    LearnedSchedule,
    LearnedSteps,
    LeftToRight,
    LogitPrior,
    ResidualPolicy,
    RevealPrior,
    ScheduledSteps,
    StepPrice,
    UniformSteps,
)
from orderppl.models.unmasking import SequentialUnmaskingModel, UnmaskingModel

__all__ = [
    "CosineSteps",
    "EasyFirst",
    "FixedSizes",
    "HeuristicPrior",
    "LearnedPolicy",
    "LearnedSchedule",
    "LearnedSteps",
    "LeftToRight",
    "LogitPrior",
    "PriceRange",
    "ResidualPolicy",
    "RevealPrior",
    "ScheduledSteps",
    "SequentialUnmaskingModel",
    "StepPrice",
    "UniformSteps",
    "UnmaskingModel",
]
