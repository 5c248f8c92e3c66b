"""From settings to objects: task data, denoiser, prior, guide, bound and optimiser, each chosen by its name.

Another prior, guide or denoiser is one line of YAML (`prior: cosine_steps`) or of the command line
(`--set guide=random`); what a kind can be told is its dataclass here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyro
import torch
from datasets import Dataset, DatasetDict
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from orderppl import guides, models
from orderppl.data.arithmetic import generate_arithmetic
from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors, tokenize
from orderppl.data.gsm8k import augment_programs, load_gsm8k
from orderppl.data.report import LoadReport
from orderppl.data.sequences import load_sequences
from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from orderppl.data.trees import sample_trees
from orderppl.decoding import PlannedOrder, Policy, SetSizes, StochasticDecision, make_policy, make_sizes
from orderppl.denoising import Canvas, Denoiser
from orderppl.errors import UserError
from orderppl.experiments.config import RunConfig, setting
from orderppl.inference import (
    EnumeratedELBO,
    Imitation,
    ImportanceWeightedELBO,
    RelaxedELBO,
    RevealTraceGraph_ELBO,
    SequenceWakeSleep,
)
from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.checkpoints import load_weights, read_config
from orderppl.models import networks
from orderppl.models.denoisers import AntibodyDenoiser, MarkovChainDenoiser, TransformerDenoiser, TreeFieldDenoiser
from orderppl.models.priors import RevealPrior

DENOISER_FILE = "denoiser.safetensors"
TOKENIZER_FILE, TOKENIZER_FOLDER = "tokenizer.json", "tokenizer"

# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class ChainTask:
    """Sequences of a stationary Markov chain, all of one length."""

    name: Literal["chain"] = "chain"
    num_states: int = setting(4, "states K", at_least=2)
    stay: float = setting(0.85, "probability of repeating a state", above=0, below=1)
    length: int = setting(16, "positions L", at_least=1)
    train: int = setting(4000, "training sequences", at_least=1)
    validation: int = setting(500, "validation sequences", at_least=1)
    test: int = setting(2000, "test sequences", at_least=1)


@dataclass(frozen=True)
class TreeTask:
    """States of a Markov field on a complete binary tree, in level order."""

    name: Literal["tree"] = "tree"
    num_states: int = setting(4, "states K", at_least=2)
    stay: float = setting(0.85, "probability of keeping the parent's state", above=0, below=1)
    depth: int = setting(4, "levels; a tree has 2^depth - 1 positions", at_least=1)
    train: int = setting(4000, "training sequences", at_least=1)
    validation: int = setting(500, "validation sequences", at_least=1)
    test: int = setting(2000, "test sequences", at_least=1)


@dataclass(frozen=True)
class ArithmeticTask:
    """Generated arithmetic word problems, answered by a chain of equations."""

    name: Literal["arithmetic"] = "arithmetic"
    variant: Literal["chain", "mod20", "dual"] = setting("chain", "kind of problem")
    train: int = setting(20_000, "training problems", at_least=1)
    validation: int = setting(500, "validation problems", at_least=1)
    test: int = setting(500, "test problems", at_least=1)
    num_operations: int = setting(4, "operations of a problem", at_least=1)
    limit: int = setting(20, "largest number", at_least=4)
    max_context: int = setting(64, "longest prompt, tokens", at_least=1)
    max_length: int = setting(64, "longest response, tokens", at_least=1)


@dataclass(frozen=True)
class Gsm8kTask:
    """GSM8K: questions, or programs, and their equation chains."""

    name: Literal["gsm8k"] = "gsm8k"
    data: str = setting("openai/gsm8k", "folder or file of JSON lines, or a hub name")
    form: Literal["full", "equations", "programs"] = setting("programs", "what prompt and response are")
    validation: float = setting(0.05, "share of the training prompts held out", above=0, below=1)
    max_number: int = setting(99, "programs: largest integer; also the largest number token", at_least=9)
    max_equations: int = setting(4, "programs: most equations", at_least=1)
    augment: int = setting(0, "programs: training rows made with re-drawn constants", at_least=0)
    tokenizer: str | None = setting(None, "Hugging Face tokeniser; a small vocabulary is built when left out")
    number_mode: Literal["digits", "numbers"] = setting("numbers", "one token per digit or per number")
    min_count: int = setting(1, "words seen less often in training become unknown", at_least=1)
    max_context: int = setting(128, "longest prompt, tokens", at_least=1)
    max_length: int = setting(96, "longest response, tokens", at_least=1)
    separator: bool = setting(True, "end prompts by a separator, from which a new denoiser counts response positions")


@dataclass(frozen=True)
class AntibodyTask:
    """Variable domains of antibodies from FASTA or CSV files."""

    name: Literal["antibodies"] = "antibodies"
    train: str | None = setting(None, "FASTA or CSV file of training sequences", file=True)
    test: str | None = setting(None, "FASTA or CSV file of held-out sequences", file=True)
    column: str | None = setting(None, "CSV column of the sequences")
    held_out: float = setting(0.3, "share of the training file held out without a test file", above=0, below=1)
    max_length: int = setting(142, "longest sequence, residues", at_least=1)


TaskConfig = ChainTask | TreeTask | ArithmeticTask | Gsm8kTask | AntibodyTask


@dataclass
class Task:
    """Data of a task, ready for batches.

    Attributes:
        name: of the task.
        splits: `train`, `validation` (where there is one) and `test`, each a dictionary of padded tensors.
        vocab_size: number of token ids, MASK included.
        mask_index: id of MASK.
        tokenizer: of text tasks.
        references: text tasks: reference answers of every split.
        report: what a loader rejected.
        separator: id of the token that ends every prompt, if one does.
    """

    name: str
    splits: dict[str, dict[str, Tensor]]
    vocab_size: int
    mask_index: int
    tokenizer: Tokenizer | None = None
    references: dict[str, list[str]] = field(default_factory=dict)
    report: LoadReport | None = None
    separator: int | None = None

    def stream(self, split: str, batch_size: int, **options: Any) -> BatchStream:
        """Batches of a split; see `BatchStream`."""
        return BatchStream(self.held(split), batch_size, **options)

    def held(self, split: str) -> dict[str, Tensor]:
        """Tensors of a split; the test split stands in for a validation split that the task does not have."""
        if split not in self.splits and split != "validation":
            raise UserError("split", f"{self.name} has no split {split!r}", f"use one of {', '.join(self.splits)}")
        return self.splits.get(split, self.splits["test"])

    def spell(self, token: int) -> str:
        """One token as text: a piece of the tokeniser, a residue, or the number of a state."""
        if self.tokenizer is not None:
            return self.tokenizer.tokens[token]
        return AntibodyDenoiser.decode(torch.tensor([token])) if self.name == "antibodies" else str(token)

    @property
    def longest(self) -> int:
        """Longest response of any split, tokens."""
        return max(batch["tokens"].shape[1] for batch in self.splits.values())

    @property
    def canvas_length(self) -> int:
        """Longest prompt plus longest response of any split, tokens."""
        return max(
            batch["tokens"].shape[1] + (batch["context"].shape[1] if "context" in batch else 0)
            for batch in self.splits.values()
        )


def build_task(config: TaskConfig, seed: int, tokenizer: Tokenizer | None = None) -> Task:
    """Make or read the data of a task.

    Args:
        config: which task.
        seed: of generated data and drawn splits.
        tokenizer: of the denoiser that will read the data; built from the training split when left out.
    """
    if isinstance(config, ChainTask | TreeTask):
        law: dict[str, Any] = {"num_states": config.num_states, "stay": config.stay}
        sample: Callable[..., Dataset]
        if isinstance(config, ChainTask):
            sample = partial(sample_chains, **law, length=config.length)
        else:
            sample = partial(sample_trees, **law, depth=config.depth)
        sizes = {"train": config.train, "validation": config.validation, "test": config.test}
        splits = {
            split: tensors(sample(size, seed=3 * seed + index)) for index, (split, size) in enumerate(sizes.items())
        }
        return Task(config.name, splits, config.num_states + 1, config.num_states)
    if isinstance(config, AntibodyTask):
        if config.train is None:
            raise UserError("task.train", "no sequences", "give a FASTA or CSV file")
        rows, report = load_sequences(
            config.train,
            config.test,
            column=config.column,
            held_out=config.held_out,
            seed=seed,
            max_length=config.max_length,
        )
        return antibody_task({split: list(rows[split]["sequence"]) for split in rows}, report)
    if isinstance(config, ArithmeticTask):
        texts = generate_arithmetic(
            config.variant,
            train=config.train,
            validation=config.validation,
            test=config.test,
            num_operations=config.num_operations,
            limit=config.limit,
            seed=seed,
        )
        largest, mode, min_count = max(config.limit, 20), "numbers", 1
        report = LoadReport(config.name)
    else:
        texts, report = load_gsm8k(
            config.data,
            config.form,
            validation=config.validation,
            seed=seed,
            max_number=config.max_number,
            max_equations=config.max_equations,
        )
        largest, mode, min_count = config.max_number, config.number_mode, config.min_count
        if config.tokenizer is not None and tokenizer is None:
            tokenizer = load_tokenizer(config.tokenizer)
        if config.augment and config.form == "programs":
            held_out = [texts[split] for split in texts if split != "train"]
            made = augment_programs(texts["train"], config.augment, seed, held_out=held_out, max_number=largest)
            texts["train"] = Dataset.from_list([*texts["train"], *made])
    if tokenizer is None:
        vocabulary = (text for column in ("prompt", "response") for text in texts["train"][column])
        tokenizer = WordTokenizer.build(vocabulary, mode, largest, min_count)  # type: ignore[arg-type]
    return _text_task(config, texts, tokenizer, report)


def _text_task(
    config: ArithmeticTask | Gsm8kTask, texts: DatasetDict, tokenizer: Tokenizer, report: LoadReport
) -> Task:
    separate = isinstance(config, Gsm8kTask) and config.separator
    tokenized = {
        split: tokenize(
            rows,
            tokenizer,
            config.max_context,
            config.max_length,
            separate=separate,
            on_long="report",
            report=report,
            name=split,
        )
        for split, rows in texts.items()
    }
    return Task(
        config.name,
        {split: tensors(rows, tokenizer.pad_index) for split, rows in tokenized.items()},
        tokenizer.vocab_size,
        tokenizer.mask_index,
        tokenizer,
        {split: [str(answer) for answer in rows["answer"]] for split, rows in tokenized.items()},
        report,
        tokenizer.eos_index if separate else None,
    )


def antibody_task(sequences: Mapping[str, Iterable[str]], report: LoadReport | None = None) -> Task:
    """Residue sequences as a task of the antibody denoiser.

    Args:
        sequences: `train` and `test`, one-letter residues.
        report: of the loader.
    """
    rows = {
        split: Dataset.from_list([{"tokens": AntibodyDenoiser.encode(sequence)} for sequence in texts])
        for split, texts in sequences.items()
    }
    from orderppl.models.denoisers.antibody import MASK, PADDING

    return Task(
        "antibodies", {split: tensors(data, PADDING) for split, data in rows.items()}, MASK + 1, MASK, report=report
    )


# ------------------------------------------------------------------------------------------------------------ denoisers


@dataclass(frozen=True)
class ChainDenoiserConfig:
    """The exact conditionals of the task's Markov chain."""

    name: Literal["markov_chain"] = "markov_chain"


@dataclass(frozen=True)
class TreeDenoiserConfig:
    """The exact conditionals of the task's field on a tree."""

    name: Literal["tree_field"] = "tree_field"


@dataclass(frozen=True)
class AntibodyDenoiserConfig:
    """The pretrained antibody model."""

    name: Literal["antibody"] = "antibody"
    chain: Literal["H", "L"] = setting("H", "heavy or light chains")


@dataclass(frozen=True)
class SavedDenoiserConfig:
    """A transformer that `train-denoiser` has trained."""

    name: Literal["saved"] = "saved"
    run: str = setting("runs/train-denoiser", "its run folder", file=True)


@dataclass(frozen=True)
class TransformerConfig:
    """A new transformer."""

    name: Literal["transformer"] = "transformer"
    width: int = setting(128, "size of the hidden vectors", at_least=8)
    layers: int = setting(3, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    positions: Literal["rotary", "learned"] = setting("rotary", "position information")
    tied: bool = setting(True, "share embedding and output head")
    number_features: bool = setting(True, "start number embeddings as Fourier features of their value")


DenoiserConfig = (
    ChainDenoiserConfig | TreeDenoiserConfig | AntibodyDenoiserConfig | SavedDenoiserConfig | TransformerConfig
)


def saved_tokenizer(config: DenoiserConfig) -> Tokenizer | None:
    """Tokeniser that a trained denoiser came with, if it has one."""
    if not isinstance(config, SavedDenoiserConfig):
        return None
    for path in (Path(config.run) / TOKENIZER_FILE, Path(config.run) / TOKENIZER_FOLDER):
        if path.exists():
            return load_tokenizer(path)
    return None


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Put a tokeniser beside the denoiser it belongs to, where `saved_tokenizer` finds it."""
    if isinstance(tokenizer, WordTokenizer):
        tokenizer.save(out / TOKENIZER_FILE)
    elif isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.tokenizer.save_pretrained(str(out / TOKENIZER_FOLDER))


def build_denoiser(config: DenoiserConfig, task: Task, task_config: TaskConfig) -> nn.Module:
    """Make or load the denoiser of a task.

    Raises:
        UserError: the denoiser does not belong to the task.
    """
    denoiser: nn.Module
    if isinstance(config, ChainDenoiserConfig):
        if not isinstance(task_config, ChainTask):
            raise UserError("denoiser.name", f"markov_chain cannot read {task.name}", "choose another denoiser")
        denoiser = MarkovChainDenoiser(task_config.num_states, task_config.stay, task_config.length)
    elif isinstance(config, TreeDenoiserConfig):
        if not isinstance(task_config, TreeTask):
            raise UserError("denoiser.name", f"tree_field cannot read {task.name}", "choose another denoiser")
        denoiser = TreeFieldDenoiser(task_config.num_states, task_config.stay, task_config.depth)
    elif isinstance(config, AntibodyDenoiserConfig):
        if not isinstance(task_config, AntibodyTask):
            raise UserError("denoiser.name", f"antibody cannot read {task.name}", "choose another denoiser")
        denoiser = AntibodyDenoiser.from_wheel(config.chain)
    elif isinstance(config, SavedDenoiserConfig):
        weights = Path(config.run) / DENOISER_FILE
        denoiser = TransformerDenoiser(**read_config(weights))
        load_weights(denoiser, weights)
        if (denoiser.vocab_size, denoiser.mask_index) != (task.vocab_size, task.mask_index):
            problem = f"has {denoiser.vocab_size} tokens, {task.name} has {task.vocab_size}"
            raise UserError("denoiser.run", problem, "use a denoiser trained on this task")
        if task.canvas_length > denoiser.max_length:
            problem = f"{config.run} reads {denoiser.max_length} tokens, the longest row has {task.canvas_length}"
            raise UserError("task.max_length", problem, "lower it, or train a denoiser on longer rows")
    else:
        values = task.tokenizer.number_values() if config.number_features and task.tokenizer is not None else None
        denoiser = TransformerDenoiser(
            task.vocab_size,
            task.mask_index,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            max_length=task.canvas_length,
            number_values=values,
            tied=config.tied,
            positions=config.positions,
            separator_index=task.separator,
            prompt_room=max(
                (batch["context"].shape[1] for batch in task.splits.values() if "context" in batch), default=1
            ),
        )
    return denoiser


# ------------------------------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class TableConfig:
    """Free numbers per position."""

    name: Literal["table"] = "table"
    split: int | None = setting(None, "positions indexed from the left end; the others from the right", at_least=0)
    noise: float = setting(0.0, "standard deviation of the initial numbers", at_least=0)


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer over prompt and response."""

    name: Literal["transformer"] = "transformer"
    width: int = setting(64, "size of the hidden vectors", at_least=8)
    layers: int = setting(2, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    zero_init: bool = setting(False, "start with all outputs 0")


SequenceConfig = TableConfig | EncoderConfig


@dataclass(frozen=True)
class PolicyNetworkConfig:
    """Reads a partially revealed sequence and the denoiser's view of it."""

    width: int = setting(64, "size of the hidden vectors", at_least=8)
    layers: int = setting(2, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    features: tuple[str, ...] = setting(networks.FEATURES, "denoiser features: confidence, margin, entropy")
    reads_tokens: bool = setting(True, "see revealed tokens and prompt")
    bias: float = setting(-2.0, "initial logit")


@dataclass(frozen=True)
class PosteriorNetworkConfig:
    """Reads the true tokens, a partially revealed sequence and the denoiser's view of it."""

    width: int = setting(64, "size of the hidden vectors", at_least=8)
    layers: int = setting(2, "blocks", at_least=1)
    heads: int = setting(4, "attention heads", at_least=1)
    features: tuple[str, ...] = setting(
        networks.TRUTH_FEATURES, "denoiser features: confidence, margin, entropy, likelihood (of the true token)"
    )
    reads_tokens: bool = setting(True, "see the prompt, and the revealed tokens apart from the true ones")
    bias: float = setting(-1.0, "initial logit")


def build_sequence_network(config: SequenceConfig, task: Task, out: int) -> nn.Module:
    """Network from whole sequences to `out` numbers per response position."""
    if isinstance(config, TableConfig):
        return networks.PositionTable(task.longest, out, split=config.split, noise=config.noise)
    return networks.SequenceEncoder(
        task.vocab_size,
        out,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        max_length=task.canvas_length,
        zero_init=config.zero_init,
    )


def build_policy_network(
    config: PolicyNetworkConfig | PosteriorNetworkConfig, task: Task, zero_init: bool = False
) -> nn.Module:
    """Network from states, or from states and true tokens, to reveal logits."""
    return networks.PolicyNetwork(
        task.vocab_size,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        features=config.features,
        reads_tokens=config.reads_tokens,
        zero_init=zero_init,
        bias=config.bias,
        sees_truth=isinstance(config, PosteriorNetworkConfig),
    )


# ------------------------------------------------------------------------------------------------------------ set sizes


@dataclass(frozen=True)
class UniformSizesConfig:
    """Equal sets over the step budget; one position a step when there are as many steps as positions."""

    name: Literal["uniform"] = "uniform"


@dataclass(frozen=True)
class CosineSizesConfig:
    """Small sets first."""

    name: Literal["cosine"] = "cosine"


@dataclass(frozen=True)
class FractionalSizesConfig:
    """A given mean number of positions per step."""

    name: Literal["fractional"] = "fractional"
    mean: float = setting(2.0, "positions per step", at_least=1)


SizesConfig = UniformSizesConfig | CosineSizesConfig | FractionalSizesConfig


def build_sizes(config: SizesConfig) -> SetSizes:
    """Schedule of set sizes."""
    return make_sizes(config.mean if isinstance(config, FractionalSizesConfig) else config.name)


# ----------------------------------------------------------------------------------------------------------- heuristics


Policies = Literal[
    "random",
    "top_prob",
    "margin",
    "entropy",
    "left_to_right",
    "threshold",
    "factor",
    "entropy_bound",
    "klass",
    "oracle_margin",
    "greedy_oracle",
]


@dataclass(frozen=True)
class HeuristicConfig:
    """A decoding policy without parameters, and the options that it has."""

    policy: Policies = setting("top_prob", "the decoding policy")
    sizes: SizesConfig | None = setting(None, "ranking policies: positions revealed at each step; null: uniform")
    ties: Literal["leftmost", "random"] | None = setting(None, "ranking policies: first of equally good positions")
    tau: float | None = setting(None, "threshold, klass: confidence", at_least=0, at_most=1)
    factor: float | None = setting(None, "factor: f", above=0)
    gamma: float | None = setting(None, "entropy_bound: nats", at_least=0)
    eps: float | None = setting(None, "klass: bound of the KL of two predictions in a row, nats", above=0)
    stable_steps: int | None = setting(None, "klass: predictions in a row", at_least=1)
    block_size: int | None = setting(None, "semi-autoregressive blocks of so many positions", at_least=1)
    eos_aware: bool = setting(False, "text tasks: rank predicted ends and padding behind all others")


def build_heuristic(config: HeuristicConfig, task: Task) -> Policy:
    """Decoding policy, in the wrappers asked for.

    Raises:
        UserError: an option that the policy does not have, or end tokens of a task without text.
    """
    names = ("ties", "tau", "factor", "gamma", "eps", "stable_steps")
    options: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.sizes is not None:
        options["sizes"] = build_sizes(config.sizes)
    policy = make_policy(config.policy, **options)
    if config.eos_aware:
        if task.tokenizer is None:
            raise UserError("eos_aware", f"{task.name} has no end token", "leave it out")
        policy = make_policy("eos_aware", policy=policy, token_ids=(task.tokenizer.eos_index, task.tokenizer.pad_index))
    return policy if config.block_size is None else make_policy("block", policy=policy, size=config.block_size)


# --------------------------------------------------------------------------------------------------------------- priors


@dataclass(frozen=True)
class UniformStepsConfig:
    """Every step is as likely for every position."""

    name: Literal["uniform_steps"] = "uniform_steps"


@dataclass(frozen=True)
class CosineStepsConfig:
    """Few positions early, many late."""

    name: Literal["cosine_steps"] = "cosine_steps"


@dataclass(frozen=True)
class LeftToRightConfig:
    """The leftmost masked positions first."""

    name: Literal["left_to_right"] = "left_to_right"
    temperature: float = setting(0.25, "smaller is closer to the fixed order", above=0)


@dataclass(frozen=True)
class EasyFirstConfig:
    """Confident positions first."""

    name: Literal["easy_first"] = "easy_first"
    threshold: float = setting(0.9, "confidence at which revealing has odds of one", above=0, below=1)
    temperature: float = setting(1.0, "towards 0 this is the threshold decoder", above=0)


@dataclass(frozen=True)
class LearnedPolicyConfig:
    """A network decides from what is visible."""

    name: Literal["learned_policy"] = "learned_policy"
    network: PolicyNetworkConfig = setting(PolicyNetworkConfig, "its network")
    non_empty: bool = setting(True, "reveal at least one position at every step")


@dataclass(frozen=True)
class ResidualPolicyConfig:
    """A heuristic and a learned correction to it, zero at the start."""

    name: Literal["residual_policy"] = "residual_policy"
    base: EasyFirstConfig | LearnedPolicyConfig = setting(EasyFirstConfig, "the heuristic")
    network: PolicyNetworkConfig = setting(PolicyNetworkConfig, "network of the correction")
    non_empty: bool = setting(True, "reveal at least one position at every step")


@dataclass(frozen=True)
class LearnedStepsConfig:
    """A learned plan of the whole order, from prompt and positions alone."""

    name: Literal["learned_steps"] = "learned_steps"
    network: SequenceConfig = setting(TableConfig, "network of the plan")


@dataclass(frozen=True)
class LearnedScheduleConfig:
    """A learned probability of each step, the same for all positions."""

    name: Literal["learned_schedule"] = "learned_schedule"


@dataclass(frozen=True)
class FixedSizesConfig:
    """Every ordered partition of given set sizes alike."""

    name: Literal["fixed_sizes"] = "fixed_sizes"
    sizes: SizesConfig = setting(UniformSizesConfig, "positions revealed at each step")


@dataclass(frozen=True)
class HeuristicPriorConfig(HeuristicConfig):
    """What a decoding policy selects, some decisions flipped."""

    name: Literal["heuristic"] = "heuristic"
    smoothing: float = setting(0.05, "probability of a flip", above=0, below=0.5)
    non_empty: bool = setting(True, "reveal at least one position at every step")


FreePriorConfig = (
    UniformStepsConfig
    | CosineStepsConfig
    | LearnedScheduleConfig
    | FixedSizesConfig
    | HeuristicPriorConfig
    | LeftToRightConfig
    | EasyFirstConfig
    | LearnedPolicyConfig
    | ResidualPolicyConfig
    | LearnedStepsConfig
)


@dataclass(frozen=True)
class StepPriceConfig:
    """Any prior with a price per executed step."""

    name: Literal["step_price"] = "step_price"
    prior: FreePriorConfig = setting(UniformStepsConfig, "what the price is put on")
    price: float = setting(1.0, "nats per executed step", at_least=0)


PriorConfig = FreePriorConfig | StepPriceConfig


def build_prior(config: PriorConfig, task: Task, num_steps: int) -> RevealPrior:
    """Make a reveal prior."""
    match config:
        case UniformStepsConfig():
            return models.UniformSteps()
        case CosineStepsConfig():
            return models.CosineSteps()
        case LearnedScheduleConfig():
            return models.LearnedSchedule(num_steps)
        case FixedSizesConfig():
            return models.FixedSizes(build_sizes(config.sizes))
        case HeuristicPriorConfig():
            return models.HeuristicPrior(build_heuristic(config, task), config.smoothing, config.non_empty)
        case LeftToRightConfig():
            return models.LeftToRight(config.temperature)
        case EasyFirstConfig():
            return models.EasyFirst(config.threshold, config.temperature)
        case LearnedPolicyConfig():
            return models.LearnedPolicy(build_policy_network(config.network, task), config.non_empty)
        case ResidualPolicyConfig():
            base = build_prior(config.base, task, num_steps)
            assert isinstance(base, models.LogitPrior)
            correction = build_policy_network(config.network, task, True)
            return models.ResidualPolicy(base, correction, config.non_empty)
        case LearnedStepsConfig():
            return models.LearnedSteps(build_sequence_network(config.network, task, num_steps))
        case StepPriceConfig():
            return models.StepPrice(build_prior(config.prior, task, num_steps), config.price)


# --------------------------------------------------------------------------------------------------------------- guides


@dataclass(frozen=True)
class RandomGuideConfig:
    """The control: nothing is learned."""

    name: Literal["random"] = "random"


@dataclass(frozen=True)
class HeuristicGuideConfig(HeuristicConfig):
    """What a decoding policy selects along the true tokens; nothing is learned."""

    name: Literal["heuristic"] = "heuristic"
    smoothing: float = setting(0.0, "probability of a flipped decision", at_least=0, below=0.5)
    non_empty: bool | None = setting(None, "reveal at least one position at every step; null: as the prior does")


@dataclass(frozen=True)
class MeanFieldConfig:
    """Independent steps per position; blind to the tokens it is a plan that a decoder can follow."""

    name: Literal["mean_field"] = "mean_field"
    network: SequenceConfig = setting(TableConfig, "its network")
    sees_tokens: bool = setting(False, "show the response tokens to the network")
    tied: bool = setting(False, "share the network of a learned_steps prior")


@dataclass(frozen=True)
class PlackettLuceConfig:
    """Scores ranked and cut into steps of fixed sizes; one position a step is LO-ARM."""

    name: Literal["plackett_luce"] = "plackett_luce"
    network: SequenceConfig = setting(EncoderConfig, "network of the scores")
    sizes: SizesConfig = setting(UniformSizesConfig, "positions revealed at each step")


@dataclass(frozen=True)
class PosteriorConfig:
    """Sets that depend on the tokens and on the state on the way."""

    name: Literal["posterior"] = "posterior"
    network: PosteriorNetworkConfig = setting(PosteriorNetworkConfig, "its network")
    non_empty: bool | None = setting(None, "reveal at least one position at every step; null: as the prior does")


@dataclass(frozen=True)
class RenormalisedScoreConfig:
    """The paper's posterior."""

    name: Literal["renormalised_score"] = "renormalised_score"
    network: SequenceConfig = setting(EncoderConfig, "network of the scores")
    temperature: float = setting(0.1, "of the reveal probabilities", above=0)


@dataclass(frozen=True)
class PolicyGuideConfig:
    """The prior is its own guide."""

    name: Literal["policy"] = "policy"


GuideConfig = (
    RandomGuideConfig
    | HeuristicGuideConfig
    | MeanFieldConfig
    | PlackettLuceConfig
    | PosteriorConfig
    | RenormalisedScoreConfig
    | PolicyGuideConfig
)


def is_table_plan(config: GuideConfig) -> bool:
    """Whether a guide is one plan for all sequences, in a table."""
    return isinstance(config, MeanFieldConfig) and isinstance(config.network, TableConfig) and not config.sees_tokens


def build_guide(
    config: GuideConfig, prior: RevealPrior, denoiser: nn.Module, task: Task, num_steps: int
) -> guides.RevealGuide:
    """Make a guide; `policy` and a tied `mean_field` use the parameters of the prior.

    Raises:
        UserError: a tied guide without a prior it can be tied to, or a guide outside the support of the prior.
    """
    guide = _make_guide(config, prior, denoiser, task, num_steps)
    if prior.sizes is not None and guide.sizes != prior.sizes:
        problem = f"{config.name} takes other set sizes than this prior's {prior.sizes}: the ELBO is -inf"
        remedy = "choose guide=plackett_luce with the sizes of the prior, guide=policy, or another prior"
        raise UserError("guide.name", problem, remedy)
    if prior.non_empty and not guide.non_empty:
        problem = f"{config.name} may reveal nothing at a step, which this prior gives probability 0: the ELBO is -inf"
        remedy = "choose a guide that never waits (policy, posterior, renormalised_score), or a prior that may wait"
        raise UserError("guide.name", problem, remedy)
    return guide


def _make_guide(
    config: GuideConfig, prior: RevealPrior, denoiser: nn.Module, task: Task, num_steps: int
) -> guides.RevealGuide:
    free = prior.prior if isinstance(prior, models.StepPrice) else prior  # a guide is a normalised law
    match config:
        case RandomGuideConfig():
            return guides.RandomGuide(num_steps)
        case HeuristicGuideConfig():
            policy = build_heuristic(config, task)
            non_empty = prior.non_empty if config.non_empty is None else config.non_empty
            return guides.HeuristicGuide(policy, _as_denoiser(denoiser), num_steps, config.smoothing, non_empty)
        case MeanFieldConfig():
            if not config.tied:
                network = build_sequence_network(config.network, task, num_steps)
                return guides.MeanFieldGuide(network, num_steps, sees_tokens=config.sees_tokens)
            if not isinstance(free, models.LearnedSteps) or config.sees_tokens:
                problem = "needs a prior it can share a network with"
                raise UserError("guide.tied", problem, "set prior=learned_steps and guide.sees_tokens=false")
            return guides.MeanFieldGuide(free.network, num_steps, sees_tokens=False)
        case PlackettLuceConfig():
            network = build_sequence_network(config.network, task, 1)
            return guides.PlackettLuceGuide(network, num_steps, build_sizes(config.sizes))
        case PosteriorConfig():
            network = build_policy_network(config.network, task)
            non_empty = prior.non_empty if config.non_empty is None else config.non_empty
            return guides.PosteriorGuide(network, _as_denoiser(denoiser), num_steps, non_empty)
        case RenormalisedScoreConfig():
            network = build_sequence_network(config.network, task, 1)
            return guides.RenormalisedScoreGuide(network, num_steps, config.temperature)
        case PolicyGuideConfig():
            return guides.PolicyGuide(free, _as_denoiser(denoiser), num_steps)


def _as_denoiser(module: nn.Module) -> Denoiser:
    if not isinstance(module, Denoiser):
        raise TypeError(f"{type(module).__name__} is not a denoiser")
    return module


# ---------------------------------------------------------------------------------------------- bound, optimiser, whole


@dataclass(frozen=True)
class ObjectiveConfig:
    """What all objectives can be told."""

    estimates: ClassVar[bool] = False  # whether an unbiased estimate of log p(x, r) is enough for it
    one_step: bool = setting(False, "one random step per sequence instead of all")

    def __post_init__(self) -> None:
        """Refuse estimates where densities are needed."""
        if self.one_step and not self.estimates:
            problem = f"{getattr(self, 'name', 'this objective')} needs log p(x, r) itself, one step only estimates it"
            raise UserError("one_step", problem, "set it to false, or choose elbo=reveal_trace_graph")


@dataclass(frozen=True)
class RevealTraceGraphConfig(ObjectiveConfig):
    """The bound, every reveal set credited with what it made easier."""

    estimates = True
    name: Literal["reveal_trace_graph"] = "reveal_trace_graph"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)
    kl_weight: float = setting(1.0, "weight of the KL term", at_least=0)
    leave_one_out: bool = setting(True, "mean of the other particles as baseline")
    credit: Literal["gain", "expected"] | None = setting(None, "what a reveal set is credited with; null: by program")


@dataclass(frozen=True)
class TraceGraphConfig(ObjectiveConfig):
    """The bound as Pyro estimates it, by the score function with costs downstream."""

    estimates = True
    name: Literal["trace_graph"] = "trace_graph"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)


@dataclass(frozen=True)
class TraceConfig(ObjectiveConfig):
    """The bound as Pyro estimates it, by the plain score function."""

    estimates = True
    name: Literal["trace"] = "trace"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)


@dataclass(frozen=True)
class ImportanceWeightedConfig(ObjectiveConfig):
    """The tighter bound of several orders at once."""

    name: Literal["importance_weighted"] = "importance_weighted"
    num_particles: int = setting(8, "orders per sequence in the bound", at_least=1)
    kl_weight: float = setting(1.0, "exponent of p(order) / q(order) in the weights", at_least=0)


@dataclass(frozen=True)
class WakeSleepConfig(ObjectiveConfig):
    """Reweighted wake-sleep."""

    name: Literal["wake_sleep"] = "wake_sleep"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=2)


@dataclass(frozen=True)
class EnumeratedConfig(ObjectiveConfig):
    """The bound as a sum over all orders."""

    name: Literal["enumerated"] = "enumerated"
    max_orders: int = setting(10_000, "most orders T^L that are enumerated", at_least=1)
    kl_weight: float = setting(1.0, "weight of the KL term", at_least=0)


@dataclass(frozen=True)
class RelaxedConfig(ObjectiveConfig):
    """The bound with a relaxed gradient, which is biased: for ablations."""

    name: Literal["relaxed"] = "relaxed"
    num_particles: int = setting(8, "orders drawn per sequence", at_least=1)
    kl_weight: float = setting(1.0, "weight of the KL term", at_least=0)
    temperature: float = setting(0.5, "of the Gumbel-softmax", above=0)


ElboConfig = (
    RevealTraceGraphConfig
    | TraceGraphConfig
    | TraceConfig
    | ImportanceWeightedConfig
    | WakeSleepConfig
    | EnumeratedConfig
    | RelaxedConfig
)


@dataclass(frozen=True)
class OptimizerConfig:
    """Any of three torch optimisers, with a learning-rate schedule."""

    algorithm: Literal["adam", "adamw", "sgd"] = setting("adam", "torch.optim class")
    lr: float = setting(0.01, "largest learning rate", above=0)
    weight_decay: float = setting(0.0, "decay of the weights", at_least=0)
    schedule: Literal["constant", "linear", "cosine"] = setting("constant", "after the warm-up")
    warmup: int = setting(0, "updates of the linear warm-up", at_least=0)


@dataclass(frozen=True)
class WarmStartConfig(HeuristicConfig):
    """A decoding policy to imitate before the bound is climbed."""

    policy: Policies = setting("threshold", "the teacher")
    smoothing: float = setting(0.05, "probability of a flipped decision of the teacher", at_least=0, below=0.5)
    updates: int = setting(200, "updates of the imitation", at_least=1)


@dataclass(frozen=True)
class FitConfig:
    """The training loop."""

    updates: int = setting(500, "updates", at_least=1)
    batch_size: int = setting(32, "sequences per update", at_least=1)
    group: int = setting(1, "batches sorted by length together, against padding; 1: rows stay unsorted", at_least=1)
    grad_clip: float | None = setting(None, "largest gradient norm", above=0)
    kl_weight: Anneal | None = setting(None, "annealed elbo.kl_weight")
    temperature: Anneal | None = setting(None, "annealed guide.temperature")
    step_price: Anneal | None = setting(None, "annealed price of a step_price prior")
    log_every: int = setting(10, "updates between two points of the log", at_least=1)
    validate_every: int | None = setting(100, "updates between two validations", at_least=1)
    patience: int | None = setting(None, "validations without progress before stopping", at_least=1)
    ema_decay: float | None = setting(None, "decay of averaged parameters", above=0, below=1)
    checkpoint_every: int | None = setting(100, "updates between two checkpoints", at_least=1)
    warm_start: WarmStartConfig | None = setting(None, "a policy to imitate first; null: none")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.patience is not None and self.validate_every is None:
            raise UserError("patience", "needs validations", "set validate_every")
        if self.temperature is not None and min(self.temperature.start, self.temperature.end) <= 0:
            raise UserError("temperature", "must stay above 0", "set start and end to positive numbers")


@dataclass(frozen=True)
class RefineConfig:
    """The local search that ends the learning of a plan; it climbs the likelihood alone. See `refine_plan`."""

    rows: int = setting(1000, "training sequences it looks at", at_least=1)
    screen: int = setting(128, "sequences of the first look at a change", at_least=1)
    max_evaluations: int | None = setting(None, "most plans to look at", at_least=1)


@dataclass(frozen=True)
class OrderConfig(RunConfig):
    """Everything that describes the learning of an order."""

    num_steps: int = setting(4, "step budget T", at_least=1, option="--steps")
    task: TaskConfig = setting(ChainTask, "data")
    denoiser: DenoiserConfig = setting(ChainDenoiserConfig, "what fills in the tokens")
    freeze_denoiser: bool = setting(True, "learn the order only")
    prior: PriorConfig = setting(UniformStepsConfig, "p(order)")
    guide: GuideConfig = setting(MeanFieldConfig, "q(order | sequence)")
    elbo: ElboConfig = setting(RevealTraceGraphConfig, "the objective", unnamed=True)
    optimizer: OptimizerConfig = setting(OptimizerConfig, "the optimiser")
    fit: FitConfig = setting(FitConfig, "the training loop")
    refine: RefineConfig | None = setting(None, "a local search on the plan after the fit; null: none")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.refine is not None and not is_table_plan(self.guide):
            problem = f"{self.guide.name} has no plan to search on"
            remedy = "choose guide=mean_field with a table that is blind to the tokens, or set refine=null"
            raise UserError("refine", problem, remedy)
        if self.refine is not None and isinstance(self.prior, StepPriceConfig):
            raise UserError("refine", "does not know the price of a step", "set refine=null, or another prior")
        if self.fit.temperature is not None and not isinstance(self.guide, RenormalisedScoreConfig):
            raise UserError("fit.temperature", f"{self.guide.name} has no temperature", "leave it out")
        if self.fit.step_price is not None and not isinstance(self.prior, StepPriceConfig):
            raise UserError("fit.step_price", f"{self.prior.name} has no price", "set prior.name=step_price")
        if self.fit.kl_weight is not None and not hasattr(self.elbo, "kl_weight"):
            remedy = "set it to null, or choose another objective"
            raise UserError("fit.kl_weight", f"{self.elbo.name} has no weight of a KL to anneal", remedy)


@dataclass
class OrderProblem:
    """The objects of one `OrderConfig`."""

    task: Task
    denoiser: nn.Module
    model: models.UnmaskingModel
    guide: guides.RevealGuide
    elbo: ELBO


def build_problem(config: OrderConfig, task: Task | None = None, denoiser: nn.Module | None = None) -> OrderProblem:
    """Make everything a fit needs.

    Args:
        config: the settings.
        task: data that is already there, in place of `config.task`.
        denoiser: one that is already there, in place of `config.denoiser`.
    """
    task = build_task(config.task, config.seed, saved_tokenizer(config.denoiser)) if task is None else task
    denoiser = build_denoiser(config.denoiser, task, config.task) if denoiser is None else denoiser
    denoiser.requires_grad_(not config.freeze_denoiser)
    prior = build_prior(config.prior, task, config.num_steps)
    with pyro.settings.context(module_local_params=True):  # as `fit` runs them; a program remembers how it was made
        model = models.UnmaskingModel(_as_denoiser(denoiser), prior, config.num_steps, one_step=config.elbo.one_step)
        guide = build_guide(config.guide, prior, denoiser, task, config.num_steps)
    return OrderProblem(task, denoiser, model, guide, build_elbo(config.elbo))


def build_elbo(config: ElboConfig) -> ELBO:
    """Make the objective."""
    match config:
        case RevealTraceGraphConfig():
            return RevealTraceGraph_ELBO(
                num_particles=config.num_particles,
                kl_weight=config.kl_weight,
                leave_one_out=config.leave_one_out,
                credit=config.credit,
            )
        case TraceGraphConfig():
            return TraceGraph_ELBO(config.num_particles, max_plate_nesting=1, vectorize_particles=True)
        case TraceConfig():
            return Trace_ELBO(config.num_particles, max_plate_nesting=1, vectorize_particles=True)
        case ImportanceWeightedConfig():
            return ImportanceWeightedELBO(config.num_particles, kl_weight=config.kl_weight)
        case WakeSleepConfig():
            return SequenceWakeSleep(config.num_particles)
        case EnumeratedConfig():
            return EnumeratedELBO(config.max_orders, kl_weight=config.kl_weight)
        case RelaxedConfig():
            return RelaxedELBO(config.num_particles, temperature=config.temperature, kl_weight=config.kl_weight)


def build_imitation(config: WarmStartConfig, problem: OrderProblem) -> Imitation:
    """Make the objective of a warm start; its teacher never waits where a student may not."""
    prior, guide = problem.model.prior, problem.guide
    assert isinstance(prior, RevealPrior)
    policy, denoiser = build_heuristic(config, problem.task), _as_denoiser(problem.denoiser)
    non_empty = prior.non_empty or guide.non_empty
    with pyro.settings.context(module_local_params=True):
        teacher = guides.HeuristicGuide(policy, denoiser, guide.num_steps, config.smoothing, non_empty)
    return Imitation(teacher)


def build_optimizer(config: OptimizerConfig) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """What makes the optimiser from the parameters."""
    kind: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.algorithm]
    return partial(kind, lr=config.lr, weight_decay=config.weight_decay)


def build_schedule(config: OptimizerConfig, updates: int) -> Callable[[Optimizer], LRScheduler] | None:
    """What makes the learning-rate schedule from the optimiser; None for a constant rate."""
    if config.schedule == "constant" and not config.warmup:
        return None

    def factor(update: int) -> float:
        if update < config.warmup:
            return (update + 1) / config.warmup
        part = min((update - config.warmup) / max(updates - config.warmup, 1), 1.0)
        return {"constant": 1.0, "linear": 1 - part, "cosine": (1 + math.cos(math.pi * part)) / 2}[config.schedule]

    return lambda optimizer: LambdaLR(optimizer, factor)


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """Dtype of autocast; float32 and float64 train in their own."""
    return torch.bfloat16 if config.dtype == "bfloat16" else None


def learned_policy(problem: OrderProblem, decision: Literal["mode", "sample", "rank"] = "mode") -> Policy:
    """What a fit learned, as a decoding policy: the plan of a guide that does not see the tokens, else the prior.

    Args:
        problem: the fitted objects.
        decision: how probabilities become reveal sets; `rank` is for plans, see `PlannedOrder`.
    """
    guide, prior = problem.guide, problem.model.prior
    if isinstance(guide, guides.MeanFieldGuide) and not guide.sees_tokens:
        network = guide.network

        def plan(canvas: Canvas) -> Tensor:
            logits: Tensor = network(None, canvas.attention_mask, canvas.context, canvas.context_mask)
            return logits  # [B, L, T]

        return PlannedOrder(plan, decision)
    assert isinstance(prior, RevealPrior)
    return StochasticDecision(prior, "sample") if decision == "sample" else prior
