"""The unmasking process as Pyro programs, the reveal priors they can have, and denoisers."""

if __name__ != "orderppl.models":
    raise ImportError("import orderppl.models, not models")

from orderppl.models.architectures import ARCHITECTURES
from orderppl.models.finishing import AnswerOdds, FinishingPolicy
from orderppl.models.order_policy import DenoiserIdentity, OrderPolicy, as_policy
from orderppl.models.price import PriceRange
from orderppl.models.priors import (
    BoundedEntropy,
    CosineSteps,
    EasyFirst,
    FixedSizes,
    HeldBack,
    HeuristicPrior,
    LearnedPolicy,
    LearnedSchedule,
    LearnedSteps,
    LeftToRight,
    LogitPrior,
    RankedPolicy,
    ResidualPolicy,
    RevealPrior,
    ScheduledSteps,
    StepPrice,
    UniformSteps,
)
from orderppl.models.unmasking import SequentialUnmaskingModel, UnmaskingModel

__all__ = [
    "ARCHITECTURES",
    "AnswerOdds",
    "BoundedEntropy",
    "CosineSteps",
    "DenoiserIdentity",
    "EasyFirst",
    "FinishingPolicy",
    "FixedSizes",
    "HeldBack",
    "HeuristicPrior",
    "LearnedPolicy",
    "LearnedSchedule",
    "LearnedSteps",
    "LeftToRight",
    "LogitPrior",
    "OrderPolicy",
    "PriceRange",
    "RankedPolicy",
    "ResidualPolicy",
    "RevealPrior",
    "ScheduledSteps",
    "SequentialUnmaskingModel",
    "StepPrice",
    "UniformSteps",
    "UnmaskingModel",
    "as_policy",
]
