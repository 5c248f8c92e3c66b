"""A protein model as users have it: the slow tokeniser of ESM, and the start and end tokens it was trained with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

from orderppl.cli.main import main
from orderppl.data import Fasta
from orderppl.data.tokenizers import PretrainedTokenizer
from orderppl.errors import UserError
from orderppl.models.denoisers import load_denoiser
from orderppl.models.denoisers.framing import framing_advice

TOKENS = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
CLS, PAD, EOS, MASK = 0, 1, 2, 32


def proteins(count: int) -> list[str]:
    """The first and the last residue are always the same ones: only ends that are told say where they are."""
    draw = random.Random(0)
    return ["M" + "".join(draw.choices("AGILV", k=draw.randint(4, 8))) + "W" for _ in range(count)]


def write_esm(folder: Path, framed: bool, updates: int) -> Path:
    """A tiny ESM that was trained on these proteins, framed or not."""
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(TOKENS))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    network = EsmForMaskedLM(
        EsmConfig(
            vocab_size=len(TOKENS),
            mask_token_id=MASK,
            pad_token_id=PAD,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            position_embedding_type="rotary",
            token_dropout=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    ids = [[TOKENS.index(letter) for letter in row] for row in proteins(256)]
    rows = [torch.tensor([CLS, *row, EOS] if framed else row) for row in ids]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(updates):
        part = tokens[torch.randint(len(tokens), (32,))]
        hidden = (torch.rand(part.shape) < 0.2) & (part > EOS)
        state = part.masked_fill(hidden, MASK)
        loss = network(state, (part != PAD).long(), labels=part.masked_fill(~hidden, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("esm")
    return {framed: write_esm(root / str(framed), framed, updates=400) for framed in (True, False)}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("proteins") / "some.fasta"
    path.write_text("".join(f">{number}\n{row}\n" for number, row in enumerate(proteins(60))))
    return str(path)


def rows_of(file: str, denoiser: Any) -> Any:
    return Fasta(file, test_share=0.0).splits(denoiser.tokenizer)["train"]


def test_proteins_stand_between_the_tokens_that_the_model_knows(folders: dict[bool, Path], file: str) -> None:
    denoiser: Any = load_denoiser(folders[True])
    assert not denoiser.tokenizer.tokenizer.is_fast
    batch = rows_of(file, denoiser).batch
    for ids, kept, given, residues in zip(batch.tokens, batch.attention_mask, batch.given, proteins(60), strict=True):
        assert ids[kept].tolist() == [CLS, *(TOKENS.index(letter) for letter in residues), EOS]
        assert given[kept].tolist() == [True, *[False] * len(residues), True]
    assert denoiser(batch.tokens.masked_fill(batch.latent, MASK), batch.attention_mask).isfinite().all()


@pytest.mark.parametrize("trained_framed", [True, False])
def test_the_likelihood_says_how_it_was_trained(folders: dict[bool, Path], file: str, trained_framed: bool) -> None:
    """Of both ways to read 60 proteins one is clearly worse, and only that one is spoken of."""
    advice = {}
    for frame in (True, False):
        denoiser: Any = load_denoiser(folders[trained_framed], frame=frame)
        advice[frame] = framing_advice(denoiser, rows_of(file, denoiser))
    assert advice[trained_framed] is None
    assert f"load it with frame: {str(trained_framed).lower()}" in str(advice[not trained_framed])
    usual: Any = load_denoiser(folders[trained_framed])
    assert usual.tokenizer.frame == ((CLS,), (EOS,))  # as its tokeniser does, which says nothing of the training


def test_a_fit_says_it(
    folders: dict[bool, Path], file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit-order", "--data", "Fasta", "--data.train", file, "--num_steps", "2", "--guide", "PolicyGuide"]
    words += ["--policy", "Plan", "--policy.network", "PositionTable", "--fit.updates", "2", "--denoiser"]
    words += ["load_denoiser", "--denoiser.name_or_path"]
    assert main([*words, str(folders[True]), "--out", str(tmp_path / "right")]) in (0, None)
    assert "note:" not in capsys.readouterr().out
    assert main([*words, str(folders[False]), "--out", str(tmp_path / "wrong")]) in (0, None)
    assert "without <cls> and <eos> around it; load it with frame: false" in capsys.readouterr().out


def test_holes_in_a_text_of_a_slow_tokeniser(folders: dict[bool, Path], tmp_path: Path) -> None:
    """Its tokens are looked up in the text; where they are not there, it is refused."""
    denoiser: Any = load_denoiser(folders[True])
    tokenizer = denoiser.tokenizer
    assert tokenizer.encode_with_spans("MA W") == ([20, 5, 22], [(0, 1), (1, 2), (3, 4)])
    with pytest.raises(UserError, match="which characters '<unk>' stands for"):
        tokenizer.encode_with_spans("MAé")


def test_a_frame_needs_its_tokens() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"a": 0, "<mask>": 1, "<eos>": 2}, "a"))
    theirs = PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="<mask>", eos_token="<eos>")
    with pytest.raises(UserError, match="frame: the tokeniser has no start or no end token"):
        PretrainedTokenizer(theirs, frame=True)
