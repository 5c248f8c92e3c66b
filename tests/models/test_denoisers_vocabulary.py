"""Pretrained masked models with fewer tokens: the same texts, the same logits, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from orderppl.errors import UserError
from orderppl.models.denoisers import MarkovChainDenoiser, PretrainedDenoiser, load_denoiser
from orderppl.models.denoisers.vocabulary import cut_vocabulary

TEXTS = [
    "tom has three pens and buys two more .",
    "a farmer sells 12 eggs for 3 dollars each ?",
    "how many apples are left ?",
]
OTHER = "the quick brown fox jumps over lazy dogs while seventeen wizards vex"
NAMES = {"cls_token": "<cls>", "pad_token": "<pad>", "sep_token": "<sep>", "unk_token": "<unk>", "mask_token": "<mask>"}
SPECIAL = list(NAMES.values())


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """A real tokeniser of some kind, learned from a few sentences, with <cls> and <sep> around every text."""
    options: dict[str, Any] = {"special_tokens": SPECIAL, "vocab_size": 200}
    if kind == "WordPiece":
        made, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(**options)
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    elif kind == "BPE":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            **options | {"vocab_size": 420, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        made, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", **options)
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([*TEXTS, OTHER] * 20, trainer)
    ends = [(name, made.token_to_id(name)) for name in ("<sep>", "<cls>")]
    if kind == "BPE":
        made.post_processor = processors.RobertaProcessing(*ends)
    else:
        made.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, **NAMES)


def model_folder(folder: Path, architecture: str, kind: str) -> PretrainedDenoiser:
    tokenizer = tokenizer_of(kind)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    extra = {"albert": {"embedding_size": 8}, "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 16}}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer) + 3,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
        **extra.get(architecture, {}),
    )
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    denoiser = load_denoiser(folder)
    assert isinstance(denoiser, PretrainedDenoiser)
    return denoiser


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "albert", "modernbert"])
@torch.no_grad()
def test_same_texts_and_logits_with_fewer_tokens(tmp_path: Path, kind: str, architecture: str) -> None:
    whole = model_folder(tmp_path / "whole", architecture, kind)
    tokenizer = whole.tokenizer
    assert tokenizer is not None
    used = {token for text in TEXTS for token in tokenizer.encode(text)}
    cut_vocabulary(whole, used, tmp_path / "cut")
    cut = load_denoiser(tmp_path / "cut")
    fewer = cut.tokenizer
    assert fewer is not None
    assert cut.vocab_size == fewer.vocab_size < whole.vocab_size - 5
    own = [fewer.tokens.index(name) for name in ("<cls>", "<sep>", "<mask>")]
    assert [*fewer.frame[0], *fewer.frame[1], fewer.mask_index] == own
    place = torch.tensor([tokenizer.tokens.index(token) for token in fewer.tokens])  # of every token left, before
    for text in TEXTS:
        before, after = tokenizer.encode(text), fewer.encode(text)
        assert place[after].tolist() == before
        assert fewer.decode(after) == tokenizer.decode(before)
        seen = torch.ones(1, len(before), dtype=torch.bool)
        state, other = torch.tensor([before]), torch.tensor([after])
        state[:, ::2], other[:, ::2] = whole.mask_index, cut.mask_index
        torch.testing.assert_close(cut(other, seen), whole(state, seen)[..., place], atol=1e-5, rtol=1e-4)
    pieces = fewer.encode(OTHER)  # of words that are left out
    assert len(pieces) >= len(tokenizer.encode(OTHER))
    assert fewer.decode(pieces).replace(" ", "") == tokenizer.decode(tokenizer.encode(OTHER)).replace(" ", "")


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^vocabulary: MarkovChainDenoiser is no pretrained masked model"):
        cut_vocabulary(MarkovChainDenoiser(num_states=3, stay=0.5, length=4), [0], tmp_path / "cut")
    denoiser = model_folder(tmp_path / "mobile", "mobilebert", "WordPiece")  # its head has the tokens in columns, too
    with pytest.raises(UserError, match=r"^vocabulary: .* fewer tokens"):
        cut_vocabulary(denoiser, [5], tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
