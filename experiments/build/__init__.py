"""From settings to objects: task data, denoiser, prior, guide, objective and optimiser, each chosen by its name.

Another prior, guide or denoiser is one line of YAML (`prior: cosine_steps`) or of the command line
(`--set guide=random`); what a kind can be told is its dataclass here.
"""

from orderppl.experiments.build.denoisers import (
    DENOISER_FILE,
    AntibodyDenoiserConfig,
    DenoiserConfig,
    ReactionDenoiserConfig,
    SavedDenoiserConfig,
    TransformerConfig,
    TreeDenoiserConfig,
    build_denoiser,
    save_tokenizer,
    saved_tokenizer,
)
from orderppl.experiments.build.guides import GuideConfig, MeanFieldConfig, PolicyGuideConfig, RandomGuideConfig
from orderppl.experiments.build.objectives import ElboConfig, RevealTraceGraphConfig
from orderppl.experiments.build.priors import (
    EasyFirstConfig,
    LearnedPolicyConfig,
    PriorConfig,
    ResidualPolicyConfig,
    StepPriceConfig,
)
from orderppl.experiments.build.problem import (
    FitConfig,
    OptimizerConfig,
    OrderConfig,
    OrderProblem,
    RefineConfig,
    WarmStartConfig,
    autocast_dtype,
    build_imitation,
    build_optimizer,
    build_problem,
    build_schedule,
    learned_policy,
)
from orderppl.experiments.build.tasks import (
    AntibodyTask,
    ArithmeticTask,
    ChainTask,
    Gsm8kTask,
    ReactionTask,
    Task,
    TaskConfig,
    TreeTask,
    build_task,
)

__all__ = [
    "DENOISER_FILE",
    "AntibodyDenoiserConfig",
    "AntibodyTask",
    "ArithmeticTask",
    "ChainTask",
    "DenoiserConfig",
    "EasyFirstConfig",
    "ElboConfig",
    "FitConfig",
    "Gsm8kTask",
    "GuideConfig",
    "LearnedPolicyConfig",
    "MeanFieldConfig",
    "OptimizerConfig",
    "OrderConfig",
    "OrderProblem",
    "PolicyGuideConfig",
    "PriorConfig",
    "RandomGuideConfig",
    "ReactionDenoiserConfig",
    "ReactionTask",
    "RefineConfig",
    "ResidualPolicyConfig",
    "RevealTraceGraphConfig",
    "SavedDenoiserConfig",
    "StepPriceConfig",
    "Task",
    "TaskConfig",
    "TransformerConfig",
    "TreeDenoiserConfig",
    "TreeTask",
    "WarmStartConfig",
    "autocast_dtype",
    "build_denoiser",
    "build_imitation",
    "build_optimizer",
    "build_problem",
    "build_schedule",
    "build_task",
    "learned_policy",
    "save_tokenizer",
    "saved_tokenizer",
]
