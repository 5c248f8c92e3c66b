import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import PreTrainedTokenizerFast

from orderppl.config import build, describe
from orderppl.data.tokenizers import (
    LetterTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)
from orderppl.errors import UserError

PROGRAMS = ["3 * 20 ; r1 - 15", "3 * 20 = 60 ; 60 - 15 = 45 # 45", "( 4 + 5 ) * 2 = 18 # 18"]
CHAINS = ["<<600*30/100=180>> <<180+7.5=187.5>> #### 1234", "<<3-10=-7>> #### -7"]
TEXTS = ["Mia has  3 pens.\nShe's 1.5 m tall, isn't she? $1,234 #### 1234", "Mia has 3 pens . 3 , 4 pens."]


@pytest.mark.parametrize("number_mode", ["digits", "numbers"])
@pytest.mark.parametrize("texts", [PROGRAMS, CHAINS, TEXTS])
def test_round_trip(texts: list[str], number_mode: str) -> None:
    tokenizer = WordTokenizer.build(texts, number_mode)
    assert isinstance(tokenizer, Tokenizer)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_index not in ids
        assert tokenizer.decode(ids) == text


@settings(deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["3", "20", "100", "007", " ", "\n", "+", "<<", ">>", "#", "r1", "pens", "."]), max_size=12
    )
)
def test_any_text_over_the_vocabulary_survives(pieces: list[str]) -> None:
    text = "".join(pieces)
    for number_mode in ("digits", "numbers"):
        # the text itself is added because pieces that run together (`r1pens`) are words of their own
        tokenizer = WordTokenizer.build(["3 + 4 = 7 ; r1 . pens\n << >> # ##", text], number_mode)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids, spans = tokenizer.encode_with_spans(text)
        assert ids == tokenizer.encode(text)
        assert "".join(text[start:end] for start, end in spans) == "".join(
            text[start:end] for start, end in sorted(spans)
        )  # in order, none twice
        for index, (start, end) in zip(ids, spans, strict=True):
            assert tokenizer.tokens[index] in (text[start:end], "<join>", "<unk>") and 0 <= start <= end <= len(text)


def test_special_ids_and_number_tokens() -> None:
    tokenizer = WordTokenizer.build(PROGRAMS, "numbers", max_number=50)
    assert (tokenizer.pad_index, tokenizer.mask_index, tokenizer.eos_index, tokenizer.unk_index) == (0, 1, 2, 3)
    assert tokenizer.tokens[:4] == ["<pad>", "<mask>", "<eos>", "<unk>"]
    assert len(tokenizer.tokens) == tokenizer.vocab_size == len(set(tokenizer.tokens))
    spelt = [tokenizer.tokens[i] for i in tokenizer.encode("3 * 20 = 60")]
    assert spelt == ["3", "*", "20", "=", "6", "0"]  # 60 is above the limit
    assert [tokenizer.tokens[i] for i in tokenizer.encode("r1 - 07")] == ["r1", "-", "0", "7"]
    digits = WordTokenizer.build(PROGRAMS, "digits")
    assert [digits.tokens[i] for i in digits.encode("3 * 20")] == ["3", "*", "2", "0"]
    assert digits.encode("zebra") == [digits.unk_index]


def test_number_values() -> None:
    for number_mode, highest in (("digits", 9), ("numbers", 99)):
        tokenizer = WordTokenizer.build(PROGRAMS, number_mode)
        values = tokenizer.number_values()
        assert values.dtype == torch.float32
        assert values.shape == (tokenizer.vocab_size,)
        for token, value in zip(tokenizer.tokens, values.tolist(), strict=True):
            assert value == float(token) if token.isdecimal() else math.isnan(value)
        assert values.nan_to_num(-1).max() == highest


def test_decode_stops_at_eos_and_skips_pad_and_mask() -> None:
    tokenizer = WordTokenizer.build(PROGRAMS)
    ids = tokenizer.encode("3 * 20")
    assert tokenizer.decode([0, ids[0], 1, *ids[1:], 2, *ids]) == "3 * 20"


def test_malformed_numbers_are_not_joined() -> None:
    tokenizer = WordTokenizer.build(PROGRAMS, "numbers", max_number=99)
    two, zero, twelve = (tokenizer.tokens.index(t) for t in ("2", "0", "12"))
    hash_sign = tokenizer.tokens.index("#")
    assert tokenizer.decode([hash_sign, two, zero]) == "# 2 0"  # 20 has a token: this is no way to write it
    assert tokenizer.decode([hash_sign, twelve, two]) == "# 12 2"
    assert tokenizer.decode(tokenizer.encode("# 120")) == "# 120"


def test_min_count_and_order_of_texts() -> None:
    texts = ["a b 1", "a c 2", "a+b"]
    assert "c" not in WordTokenizer.build(texts, min_count=2).tokens
    first, second = WordTokenizer.build(texts), WordTokenizer.build(texts[::-1])
    assert first.tokens == second.tokens
    assert first.gaps == second.gaps


def test_a_tokeniser_in_a_config() -> None:
    tokenizer = WordTokenizer.build(TEXTS, "numbers", max_number=30)
    loaded = build(describe(tokenizer), trust=False)
    assert isinstance(loaded, WordTokenizer)
    assert loaded.tokens == tokenizer.tokens
    assert (loaded.number_mode, loaded.max_number, loaded.gaps) == ("numbers", 30, tokenizer.gaps)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    for text in TEXTS:
        assert loaded.encode(text) == tokenizer.encode(text)


def test_letters() -> None:
    tokenizer = LetterTokenizer("ACGT")
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.tokens == ["<s>", "<pad>", "</s>", "<unk>", "A", "C", "G", "T", "<mask>"]
    assert (tokenizer.pad_index, tokenizer.eos_index, tokenizer.mask_index, tokenizer.vocab_size) == (1, 2, 8, 9)
    assert tokenizer.encode_with_spans("GAT") == ([6, 4, 7], [(0, 1), (1, 2), (2, 3)])
    assert tokenizer.decode([6, 1, 4, 8, 7, 2, 7]) == "GAT"
    assert build(describe(tokenizer)).tokens == tokenizer.tokens
    with pytest.raises(UserError, match="text: a is not in the vocabulary: GaT"):
        tokenizer.encode("GaT")
    with pytest.raises(UserError, match="a token occurs twice"):
        LetterTokenizer("AA")


def test_arguments_that_make_no_tokeniser() -> None:
    with pytest.raises(UserError, match="number_mode"):
        WordTokenizer.build(PROGRAMS, "words")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_number: 8 is below 9"):
        WordTokenizer.build(PROGRAMS, max_number=8)
    with pytest.raises(UserError, match="a token occurs twice"):
        WordTokenizer(["a", "a"], "numbers", 9, [])


def _pretrained(folder: Path, **special: str) -> Path:
    words = ["[PAD]", "[MASK]", "[SEP]", "[UNK]", "3", "20", "+", "pens"]
    raw = RawTokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **special).save_pretrained(folder)
    return folder


def test_hugging_face_tokeniser(tmp_path: Path) -> None:
    folder = _pretrained(tmp_path, pad_token="[PAD]", mask_token="[MASK]", sep_token="[SEP]")
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, PretrainedTokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.pad_index, tokenizer.mask_index, tokenizer.eos_index, tokenizer.vocab_size) == (0, 1, 2, 8)
    assert tokenizer.encode("3 + 20 pens") == [4, 6, 5, 7]
    assert tokenizer.decode([4, 6, 1, 5, 7, 2, 4]) == "3 + 20 pens"
    assert tokenizer.tokens[7] == "pens"
    assert tokenizer.number_values()[[4, 5]].tolist() == [3.0, 20.0]
    assert int(tokenizer.number_values().isnan().sum()) == 6


def test_the_frame_and_the_spans_of_a_masked_model(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    assert tokenizer.frame == ((2,), (3,))
    text = "Tom has 20  pens."
    ids, spans = tokenizer.encode_with_spans(text)
    assert ids == tokenizer.encode(text)
    assert [text[start:end] for start, end in spans] == ["Tom", "has", "2", "0", "pen", "s", "."]
    assert load_tokenizer(bert).tokens == tokenizer.tokens
    assert describe(tokenizer) == {
        "class_path": "orderppl.data.tokenizers.load_tokenizer",
        "init_args": {"name_or_path": str(bert), **describe(tokenizer)["init_args"]},
    }


def test_spans_of_a_byte_level_tokeniser(tmp_path: Path) -> None:
    """Its tokens hold the space before a word, which is no part of a hole."""
    raw = RawTokenizer(BPE({letter: i for i, letter in enumerate(["<m>", "<e>", *ByteLevel.alphabet()])}, []))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="<m>", eos_token="<e>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.frame == ((), ())
    ids, spans = tokenizer.encode_with_spans("a bé")
    assert tokenizer.decode(ids) == "a bé" and len(ids) == len(spans) == 5
    assert spans[0] == (0, 1) and spans[2] == (2, 3) and spans[3] == spans[4] == (3, 4)


def test_hugging_face_tokeniser_without_mask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no mask token; .*add_special_tokens"):
        load_tokenizer(_pretrained(tmp_path, pad_token="[PAD]", sep_token="[SEP]"))


def test_unreachable_tokeniser(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer: .* cannot be loaded"):
        load_tokenizer(tmp_path)
