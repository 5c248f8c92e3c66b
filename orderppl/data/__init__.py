"""Data sets: every one has `splits(tokenizer)`, dictionaries of `Examples`, and says what of a text is right."""

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.data.answers import exact_match
from orderppl.data.arithmetic import Arithmetic
from orderppl.data.dataset import DataSet, Examples
from orderppl.data.exact import Chains, Trees
from orderppl.data.gsm8k import Gsm8k
from orderppl.data.lists import Lists
from orderppl.data.pronunciations import Pronunciations
from orderppl.data.reactions import Reactions
from orderppl.data.sequences import Antibodies, Fasta
from orderppl.data.sudoku import Sudoku
from orderppl.data.tables import CsvFile, HubDataset, JsonLines

__all__ = [
    "AnswerTokens",
    "Antibodies",
    "Arithmetic",
    "Chains",
    "CsvFile",
    "DataSet",
    "Examples",
    "Fasta",
    "Gsm8k",
    "HubDataset",
    "JsonLines",
    "Lists",
    "Pronunciations",
    "Reactions",
    "Sudoku",
    "Trees",
    "exact_match",
]
