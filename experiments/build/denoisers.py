"""Denoisers, chosen by their name or loaded from a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer, WordTokenizer
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.experiments.build.tasks import AntibodyTask, ChainTask, ReactionTask, Task, TaskConfig, TreeTask
from orderppl.experiments.config import setting
from orderppl.models.denoisers import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    TRAINED,
    AntibodyDenoiser,
    MarkovChainDenoiser,
    ReactionDenoiser,
    TransformerDenoiser,
    TreeFieldDenoiser,
    denoiser_tokenizer,
    load_denoiser,
    load_trained,
    trained_tokenizer,
)

DENOISER_FILE = TRAINED


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
    max_length: int | None = setting(
        None, "longest prompt plus response, tokens, of one with rotary positions; null: as it was trained", at_least=1
    )


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
    prompt_reads_response: bool = setting(
        True, "prompts attend to responses too; false: they are read once per decoding (needs a separator)"
    )


@dataclass(frozen=True)
class PretrainedDenoiserConfig:
    """A public masked model: any AutoModelForMaskedLM, SMDM, LLaDA or Dream; see `load_denoiser`."""

    name: Literal["pretrained"] = "pretrained"
    model: str = setting(
        "nieshen/SMDM/mdm_safetensors/mdm-170M-100e18.safetensors", "folder, safetensors file of SMDM, or hub name"
    )
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = setting(False, "run the code that comes with LLaDA or Dream")
    dtype: Literal["float32", "float64", "bfloat16"] = setting("float32", "dtype of its weights")
    tokenizer: str | None = setting(None, "folder or hub name of another tokeniser than its own")


DenoiserConfig = (
    ChainDenoiserConfig
    | TreeDenoiserConfig
    | AntibodyDenoiserConfig
    | ReactionDenoiserConfig
    | SavedDenoiserConfig
    | PretrainedDenoiserConfig
    | TransformerConfig
)


def saved_tokenizer(config: DenoiserConfig) -> Tokenizer | None:
    """Tokeniser that a trained or public denoiser comes with, if it has one."""
    if isinstance(config, PretrainedDenoiserConfig):
        return denoiser_tokenizer(
            config.model,
            tokenizer=config.tokenizer,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    if not isinstance(config, SavedDenoiserConfig):
        return None
    run = Path(config.run)
    return trained_tokenizer(run) if any((run / name).exists() for name in (TOKENIZER_FILE, TOKENIZER_FOLDER)) else None


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
        denoiser = load_trained(config.run)
        if config.max_length is not None:
            if not isinstance(denoiser, TransformerDenoiser):
                raise UserError("denoiser.max_length", "an SMDM keeps its own", "leave it out")
            denoiser.read_up_to(config.max_length)
        _check_vocabulary(denoiser, config.run, task, "denoiser.run", "use a denoiser trained on this task")
        _check_length(denoiser.max_length, config.run, task)
    elif isinstance(config, PretrainedDenoiserConfig):
        denoiser = _public_denoiser(config, task)
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
            prompt_reads_response=config.prompt_reads_response,
            prompt_room=max(
                (batch["context"].shape[1] for batch in task.splits.values() if "context" in batch), default=1
            ),
        )
    return denoiser


def _public_denoiser(config: PretrainedDenoiserConfig, task: Task) -> nn.Module:
    if task.tokenizer is None:
        raise UserError("denoiser.name", f"pretrained reads text, {task.name} has none", "choose another denoiser")
    denoiser = load_denoiser(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        dtype=getattr(torch, config.dtype),
    )
    _check_vocabulary(denoiser, config.model, task, "denoiser.model", "read the task with the tokeniser of the model")
    _check_length(getattr(denoiser, "max_length", None), config.model, task)
    assert isinstance(denoiser, nn.Module)
    return denoiser


def _check_vocabulary(denoiser: Denoiser, source: str, task: Task, field: str, remedy: str) -> None:
    known = max(denoiser.vocab_size, denoiser.mask_index + 1)  # MASK may be no class of the output head
    if (known, denoiser.mask_index) != (task.vocab_size, task.mask_index):
        problem = f"{source} knows {known} tokens and MASK {denoiser.mask_index}, "
        problem += f"{task.name} was read with {task.vocab_size} and {task.mask_index}"
        raise UserError(field, problem, remedy)


def _check_length(longest: int | None, source: str, task: Task) -> None:
    if longest is not None and task.canvas_length > longest:
        problem = f"{source} reads {longest} tokens, the longest row has {task.canvas_length}"
        raise UserError("task.max_length", problem, "lower it, or use a denoiser that reads longer rows")


def as_denoiser(module: nn.Module) -> Denoiser:
    """Hold a module to the protocol that the programs ask for."""
    if not isinstance(module, Denoiser):
        raise TypeError(f"{type(module).__name__} is not a denoiser")
    return module
