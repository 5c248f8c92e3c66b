"""Data sets: every one has `splits(tokenizer)`, dictionaries of `Examples`, and says what of a text is right."""

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.data.answers import answers_match, exact_match, flexible_match, parse_answer, same_text
from orderppl.data.arithmetic import Arithmetic
from orderppl.data.dataset import DataSet, Examples, Row, RowData, TextData
from orderppl.data.exact import Chains, Trees
from orderppl.data.gsm8k import Gsm8k
from orderppl.data.prompts import prompt_batch, template_batch
from orderppl.data.reactions import Reactions
from orderppl.data.report import BadRow, LoadReport
from orderppl.data.sequences import Antibodies, Fasta
from orderppl.data.sudoku import Sudoku
from orderppl.data.tables import CsvFile, HubDataset, JsonLines
from orderppl.data.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "AnswerTokens",
    "Antibodies",
    "Arithmetic",
    "BadRow",
    "Chains",
    "CsvFile",
    "DataSet",
    "Examples",
    "Fasta",
    "Gsm8k",
    "HubDataset",
    "JsonLines",
    "LoadReport",
    "Reactions",
    "Row",
    "RowData",
    "Sudoku",
    "TextData",
    "Tokenizer",
    "Trees",
    "answers_match",
    "exact_match",
    "flexible_match",
    "load_tokenizer",
    "parse_answer",
    "prompt_batch",
    "same_text",
    "template_batch",
]
