"""Data of a task, chosen by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.data.arithmetic import generate_arithmetic
from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors, tokenize
from orderppl.data.gsm8k import augment_programs, load_gsm8k
from orderppl.data.reactions import load_reactions
from orderppl.data.report import LoadReport
from orderppl.data.sequences import load_sequences
from orderppl.data.smiles import SmilesTokenizer
from orderppl.data.sudoku import CELLS, generate_sudoku, solved
from orderppl.data.tokenizers import Tokenizer, WordTokenizer, load_tokenizer
from orderppl.data.trees import sample_trees
from orderppl.errors import UserError
from orderppl.evaluation import Grade, exact_match
from orderppl.experiments.config import setting
from orderppl.inference.batches import BatchStream
from orderppl.models.denoisers import AntibodyDenoiser, reaction_vocabulary


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
    canvas: int | None = setting(None, "positions of a response, filled up with ends; null: one end", at_least=1)
    separator: bool = setting(False, "end prompts by a separator, from which a new denoiser counts response positions")


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
    canvas: int | None = setting(None, "positions of a response, filled up with ends; null: one end", at_least=1)
    separator: bool = setting(True, "end prompts by a separator, from which a new denoiser counts response positions")


@dataclass(frozen=True)
class SudokuTask:
    """Sudoku of four by four cells: the clues are the prompt, the whole grid is the response."""

    max_context: ClassVar[int] = CELLS
    max_length: ClassVar[int] = CELLS
    name: Literal["sudoku"] = "sudoku"
    train: int = setting(10_000, "training puzzles", at_least=1)
    validation: int = setting(500, "validation puzzles", at_least=1)
    test: int = setting(1000, "test puzzles", at_least=1)
    min_clues: int = setting(2, "fewest clues", at_least=0, at_most=16)
    max_clues: int = setting(6, "most clues", at_least=0, at_most=16)
    solutions: Literal["any", "unique"] = setting("any", "completions of a puzzle: any number, or one")


@dataclass(frozen=True)
class AntibodyTask:
    """Variable domains of antibodies from FASTA or CSV files."""

    name: Literal["antibodies"] = "antibodies"
    train: str | None = setting(None, "FASTA or CSV file of training sequences", file=True)
    test: str | None = setting(None, "FASTA or CSV file of held-out sequences", file=True)
    column: str | None = setting(None, "CSV column of the sequences")
    names: str | None = setting(None, "regular expression of the names to use; '(?<!z)umab$': fully human ones")
    held_out: float = setting(0.3, "share of the training file held out without a test file", above=0, below=1)
    validation: float = setting(0.0, "share of the training file for validation; 0: none", at_least=0, below=1)
    max_length: int = setting(142, "longest sequence, residues", at_least=1)


@dataclass(frozen=True)
class ReactionTask:
    """Chemical reactions from CSV files: the product, given the reactants."""

    name: Literal["reactions"] = "reactions"
    train: str | None = setting(None, "CSV file of training reactions", file=True)
    test: str | None = setting(None, "CSV file of held-out reactions", file=True)
    column: str = setting("rxn", "CSV column of the reactions, reactants>>product")
    held_out: float = setting(0.3, "share of the training file held out without a test file", above=0, below=1)
    validation: float = setting(0.15, "share of the training file for validation; 0: none", at_least=0, below=1)
    max_context: int = setting(96, "longest reactants, tokens with the arrow", at_least=2)
    max_length: int = setting(64, "longest product, tokens", at_least=1)


TaskConfig = ChainTask | TreeTask | ArithmeticTask | Gsm8kTask | SudokuTask | AntibodyTask | ReactionTask


@dataclass
class Task:
    """Data of a task, ready for batches.

    Attributes:
        name: of the task.
        splits: `train`, `validation` (where there is one) and `test`, each a dictionary of padded tensors.
        vocab_size: number of token ids, MASK included.
        mask_index: id of MASK.
        tokenizer: of text tasks.
        references: text tasks with answers to check: reference answers of every split.
        grade: text tasks: (decoded responses, references) -> float64 [N], 1 where a response is right.
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
    grade: Grade = exact_match

    def stream(self, split: str, batch_size: int, **options: Any) -> BatchStream:
        """Batches of a split; see `BatchStream`."""
        return BatchStream(self.held(split), batch_size, **options)

    def held(self, split: str) -> dict[str, Tensor]:
        """Tensors of a split; the test split stands in for a validation split that the task does not have."""
        if split not in self.splits and split != "validation":
            raise UserError("split", f"{self.name} has no split {split!r}", f"use one of {', '.join(self.splits)}")
        return self.splits.get(split, self.splits["test"])

    def answer_tokens(self, setting: str) -> AnswerTokens:
        """Which tokens of a response are its answer.

        Args:
            setting: what asks for it, for messages.

        Raises:
            UserError: the responses have no marked answer.
        """
        if self.tokenizer is None or self.grade is not exact_match:
            raise UserError(setting, f"the responses of {self.name} have no answer of their own", "leave it out")
        return AnswerTokens.of(self.tokenizer)

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
            validation=config.validation,
            seed=seed,
            max_length=config.max_length,
            names=config.names,
        )
        return antibody_task({split: list(rows[split]["sequence"]) for split in rows}, report)
    if isinstance(config, ReactionTask):
        if config.train is None:
            raise UserError("task.train", "no reactions", "give a CSV file")
        smiles = SmilesTokenizer(reaction_vocabulary())
        texts, report = load_reactions(
            config.train,
            config.test,
            column=config.column,
            tokenizer=smiles,
            held_out=config.held_out,
            validation=config.validation,
            seed=seed,
        )
        return _text_task(config, texts, smiles, report)
    if isinstance(config, SudokuTask):
        texts = generate_sudoku(
            train=config.train,
            validation=config.validation,
            test=config.test,
            min_clues=config.min_clues,
            max_clues=config.max_clues,
            solutions=config.solutions,
            seed=seed,
        )
        largest, mode, min_count = 9, "digits", 1
        report = LoadReport(config.name)
    elif isinstance(config, ArithmeticTask):
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
    config: ArithmeticTask | Gsm8kTask | ReactionTask | SudokuTask,
    texts: DatasetDict,
    tokenizer: Tokenizer,
    report: LoadReport,
) -> Task:
    separate = isinstance(config, ArithmeticTask | Gsm8kTask) and config.separator
    tokenized = {
        split: tokenize(
            rows,
            tokenizer,
            config.max_context,
            config.max_length,
            eos=not isinstance(config, ReactionTask | SudokuTask),  # the model knows how long these are
            canvas=config.canvas if isinstance(config, ArithmeticTask | Gsm8kTask) else None,
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
        {split: list(map(str, rows["answer"])) for split, rows in tokenized.items() if "answer" in rows.column_names},
        report,
        tokenizer.eos_index if separate else None,
        solved if isinstance(config, SudokuTask) else exact_match,
    )


def antibody_task(sequences: Mapping[str, Iterable[str]], report: LoadReport | None = None) -> Task:
    """Residue sequences as a task of the antibody denoiser.

    Args:
        sequences: residues of every split, one letter each.
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
