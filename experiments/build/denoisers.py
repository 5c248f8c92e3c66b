"""Denoisers, chosen by their name or loaded from a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer, WordTokenizer, load_tokenizer
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.experiments.build.tasks import AntibodyTask, ChainTask, ReactionTask, Task, TaskConfig, TreeTask
from orderppl.experiments.config import setting
from orderppl.inference.checkpoints import load_weights, read_config
from orderppl.models.denoisers import (
    AntibodyDenoiser,
    MarkovChainDenoiser,
    ReactionDenoiser,
    TransformerDenoiser,
    TreeFieldDenoiser,
)

DENOISER_FILE = "denoiser.safetensors"
TOKENIZER_FILE, TOKENIZER_FOLDER = "tokenizer.json", "tokenizer"


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
class ReactionDenoiserConfig:
    """The pretrained reaction model."""

    name: Literal["reaction"] = "reaction"


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
    ChainDenoiserConfig
    | TreeDenoiserConfig
    | AntibodyDenoiserConfig
    | ReactionDenoiserConfig
    | SavedDenoiserConfig
    | TransformerConfig
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
    elif isinstance(config, ReactionDenoiserConfig):
        if not isinstance(task_config, ReactionTask):
            raise UserError("denoiser.name", f"reaction cannot read {task.name}", "choose another denoiser")
        denoiser = ReactionDenoiser.from_wheel()
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


def as_denoiser(module: nn.Module) -> Denoiser:
    """Hold a module to the protocol that the programs ask for."""
    if not isinstance(module, Denoiser):
        raise TypeError(f"{type(module).__name__} is not a denoiser")
    return module
