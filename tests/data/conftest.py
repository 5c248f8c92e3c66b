"""A tokeniser as that of a masked model: it puts [CLS] and [SEP] around every text, and cuts words into pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders
from tokenizers.models import WordPiece
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *"0123456789#.,+-=;abcdefghijklmnopqrstuvwxyz",
    "##s",
    *(f"##{digit}" for digit in range(10)),
    "tom",
    "has",
    "pen",
    "and",
    "buys",
    "more",
]
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


def save_tokenizer(folder: Path, pieces: list[str], lower: bool) -> Path:
    raw = RawTokenizer(WordPiece({piece: i for i, piece in enumerate([*SPECIAL, *pieces])}, unk_token="[UNK]"))
    if lower:
        raw.normalizer = Lowercase()
    raw.pre_tokenizer = BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokeniser of English."""
    return save_tokenizer(tmp_path_factory.mktemp("bert"), PIECES, lower=True)


@pytest.fixture(scope="session")
def protein_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokeniser that wants spaces between residues."""
    return save_tokenizer(tmp_path_factory.mktemp("protein"), list(RESIDUES), lower=False)
