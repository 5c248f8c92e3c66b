import csv
import importlib.metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orderppl.config import build, describe
from orderppl.data.smiles import SmilesTokenizer
from orderppl.errors import UserError
from orderppl.models.denoisers import PretrainedDenoiser, ReactionDenoiser
from orderppl.unmasking import Denoiser

DATA = Path(__file__).parents[3] / "shared" / "data" / "reactions" / "reactions.csv"
SMALL = {
    "embedding_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
}
REACTION = "CC(=O)Cl.NCc1ccccc1>>", "CC(=O)NCc1ccccc1"

try:
    importlib.metadata.version("rxnmapper")
    installed = True
except importlib.metadata.PackageNotFoundError:
    installed = False
needs_weights = pytest.mark.skipif(not installed, reason="the package with the reaction weights is not installed")


@pytest.fixture(scope="module")
def denoiser() -> ReactionDenoiser:
    return ReactionDenoiser()


def smiles(denoiser: PretrainedDenoiser) -> SmilesTokenizer:
    assert isinstance(denoiser.tokenizer, SmilesTokenizer)
    return denoiser.tokenizer


def padded(rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) if width is None else width
    tokens, mask = torch.full((len(rows), width), 0), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), True
    return tokens, mask


@needs_weights
@torch.no_grad()
def test_parity_with_the_published_model(denoiser: ReactionDenoiser) -> None:
    """Against transformers' own forward on a framed sequence; only special tokens and the arrow become impossible."""
    assert isinstance(denoiser, Denoiser)
    tokenizer = smiles(denoiser)
    assert denoiser.frame is not None
    assert [tokenizer.tokens[i] for i in (*denoiser.frame, denoiser.pad_index)] == ["[CLS]", "[SEP]", "[PAD]"]
    ids = tokenizer.encode("".join(REACTION))
    ids[-6:-2] = [denoiser.mask_index] * 4
    start, end = denoiser.frame
    with denoiser.whole() as albert:
        published = albert(torch.tensor([[start, *ids, end]])).logits[0, 1:-1]
    ours = denoiser(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]
    possible = torch.ones(denoiser.vocab_size, dtype=torch.bool).index_fill(0, denoiser.impossible, False)
    torch.testing.assert_close(ours[:, possible], published[:, possible])
    assert ours[:, ~possible].eq(-torch.inf).all()
    assert {tokenizer.tokens[i] for i in denoiser.impossible} >= {"[MASK]", "[PAD]", "[UNK]", ">>"}
    assert (~possible).sum() == 16
    assert possible[tokenizer.encode("cC(=O)[C@H]")].all()


@needs_weights
@torch.no_grad()
def test_known_outputs(denoiser: ReactionDenoiser) -> None:
    assert sum(p.numel() for p in denoiser.parameters()) == 735_567
    tokenizer = smiles(denoiser)
    prompt, product = map(tokenizer.encode, REACTION)
    tokens = torch.tensor([prompt + product])
    place = torch.arange(tokens.shape[1])
    hidden = (place >= len(prompt)) & ((place - len(prompt)) % 2 == 1)
    state = torch.where(hidden, denoiser.mask_index, tokens)
    written = torch.where(hidden, denoiser(state, torch.ones_like(tokens)).argmax(-1), state)[0]
    assert tokenizer.decode(written[len(prompt) :].tolist()) == REACTION[1]  # the amide


@needs_weights
@torch.no_grad()
@pytest.mark.skipif(not DATA.exists(), reason="no reactions beside the project")
def test_restores_real_products(denoiser: ReactionDenoiser) -> None:
    """15% masked, as in training: a wrong layer, position or frame token falls far below this."""
    tokenizer = smiles(denoiser)
    with DATA.open() as file:
        rows = [row["rxn"].split(">>") for row in csv.DictReader(file)][:12]
    products, has_product = padded([tokenizer.encode(product) for _, product in rows])
    prompts, has_prompt = padded([tokenizer.encode(reactants + ">>") for reactants, _ in rows])
    hidden = (torch.rand(products.shape, generator=torch.Generator().manual_seed(0)) < 0.15) & has_product
    hidden = torch.cat([torch.zeros_like(has_prompt), hidden], 1)
    tokens, mask = torch.cat([prompts, products], 1), torch.cat([has_prompt, has_product], 1)
    log_probs = denoiser(torch.where(hidden, denoiser.mask_index, tokens), mask).log_softmax(-1)
    assert (log_probs.argmax(-1) == tokens)[hidden].double().mean() > 0.9
    assert -log_probs.gather(-1, tokens[..., None])[hidden].mean() < 0.4


def small() -> PretrainedDenoiser:
    """An untrained model of the same kind."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ">>", "C", "N", "O", "(", ")"]
    albert = AlbertForMaskedLM(AlbertConfig(**SMALL, vocab_size=12, max_position_embeddings=40))
    tokenizer = SmilesTokenizer(vocabulary)
    return PretrainedDenoiser(albert, 5, tokenizer=tokenizer, padding="square", frame=(3, 4), impossible=range(7))


@torch.no_grad()
def test_padding_and_other_rows_change_nothing() -> None:
    model = small()
    prompts, has_prompt = padded([[8, 6], [7, 8, 9, 6], [6]])
    products, has_product = padded([[7, 8, 5, 9], [7, 5], [9]])
    tokens, mask = torch.cat([prompts, products], 1), torch.cat([has_prompt, has_product], 1)
    together = model(tokens, mask)
    for row in range(3):
        alone = model(tokens[row][mask[row]][None], torch.ones(1, int(mask[row].sum())))[0]
        torch.testing.assert_close(together[row][mask[row]], alone, atol=1e-5, rtol=1e-5)
    left = torch.cat([prompts.flip(-1), products], 1)  # padding before the prompt, its tokens reversed
    moved = model(left, torch.cat([has_prompt.flip(-1), has_product], 1))
    torch.testing.assert_close(moved[2, [3, 4]], together[2, [0, 4]])
    assert together[..., 7:].isfinite().all()
    assert (together[..., :7] == -torch.inf).all()


def test_every_parameter_gets_gradient() -> None:
    model = small().requires_grad_(True)
    tokens = torch.randint(7, 12, (3, 10), generator=torch.Generator().manual_seed(0))
    logits = model(torch.where(tokens < 10, model.mask_index, tokens), torch.ones(3, 10, dtype=torch.bool))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        if "full_embedding_layer" in name or not name.endswith(("key.bias", "k_proj.bias")):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@needs_weights
def test_is_described_by_its_name(denoiser: ReactionDenoiser) -> None:
    assert describe(denoiser) == {"class_path": "orderppl.models.denoisers.ReactionDenoiser"}
    assert build(describe(denoiser)).vocab_size == denoiser.vocab_size
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert not denoiser.training


def test_refuses_long_reactions_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"a canvas of 39 tokens exceeds the model's 38"):
        small()(torch.full((1, 39), 7), torch.ones(1, 39, dtype=torch.bool))

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"is missing; run: pip install --no-deps rxnmapper==0\.4\.3"):
        ReactionDenoiser()
