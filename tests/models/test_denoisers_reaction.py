import csv
import importlib.metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orderppl.data.smiles import SmilesTokenizer
from orderppl.denoising import Canvas, Denoiser
from orderppl.errors import UserError
from orderppl.models.denoisers import ReactionDenoiser
from orderppl.models.denoisers.framing import frame

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
    return ReactionDenoiser.from_wheel().requires_grad_(False)


def padded(rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) if width is None else width
    tokens, mask = torch.full((len(rows), width), 0), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), True
    return tokens, mask


def test_frame_closes_gaps() -> None:
    state = torch.tensor([[9, 5, 9, 6], [7, 9, 9, 9], [9, 9, 9, 9]])
    framed = frame(state, torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]), start=1, end=2, padding=0)
    assert framed.tokens.tolist() == [[1, 5, 6, 2], [1, 7, 2, 0], [1, 2, 0, 0]]
    assert framed.keys.long().sum(-1).tolist() == [4, 3, 2]
    moved = framed.unframe(framed.tokens[..., None].float())[..., 0]
    assert (moved[0, 1], moved[0, 3], moved[1, 0]) == (5, 6, 7)


@needs_weights
@torch.no_grad()
def test_parity_with_the_published_model(denoiser: ReactionDenoiser) -> None:
    """Against transformers' own forward on a framed sequence; only special tokens and the arrow become impossible."""
    assert isinstance(denoiser, Denoiser)
    tokenizer = SmilesTokenizer(denoiser.vocabulary)
    assert [tokenizer.tokens[i] for i in denoiser.frame_tokens] == ["[CLS]", "[SEP]", "[PAD]"]
    ids = tokenizer.encode("".join(REACTION))
    ids[-6:-2] = [denoiser.mask_index] * 4
    start, end, _ = denoiser.frame_tokens
    published = denoiser.albert(torch.tensor([[start, *ids, end]])).logits[0, 1:-1]
    ours = denoiser(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))[0]
    possible = ~denoiser.impossible
    torch.testing.assert_close(ours[:, possible], published[:, possible])
    assert ours[:, ~possible].eq(-torch.inf).all()
    assert {tokenizer.tokens[i] for i in denoiser.impossible.nonzero()[:, 0]} >= {"[MASK]", "[PAD]", "[UNK]", ">>"}
    assert (~possible).sum() == 16 and possible[tokenizer.encode("cC(=O)[C@H]")].all()


@needs_weights
@torch.no_grad()
def test_known_outputs(denoiser: ReactionDenoiser) -> None:
    assert sum(p.numel() for p in denoiser.parameters()) == 735_567
    tokenizer = SmilesTokenizer(denoiser.vocabulary)
    prompt, product = map(tokenizer.encode, REACTION)
    canvas = Canvas(denoiser, torch.ones(1, len(product), dtype=torch.bool), torch.tensor([prompt]))
    hidden = torch.arange(len(product)) % 2 == 1
    state = torch.where(hidden, denoiser.mask_index, torch.tensor([product]))
    written = torch.where(hidden, canvas.logits(state).argmax(-1), state)[0]
    assert tokenizer.decode(written.tolist()) == REACTION[1]  # the amide


@needs_weights
@torch.no_grad()
@pytest.mark.skipif(not DATA.exists(), reason="no reactions beside the project")
def test_restores_real_products(denoiser: ReactionDenoiser) -> None:
    """15% masked, as in training: a wrong layer, position or frame token falls far below this."""
    tokenizer = SmilesTokenizer(denoiser.vocabulary)
    with DATA.open() as file:
        rows = [row["rxn"].split(">>") for row in csv.DictReader(file)][:12]
    tokens, mask = padded([tokenizer.encode(product) for _, product in rows])
    context, context_mask = padded([tokenizer.encode(reactants + ">>") for reactants, _ in rows])
    hidden = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.15) & mask
    canvas = Canvas(denoiser, mask, context, context_mask)
    log_probs = canvas.logits(torch.where(hidden, denoiser.mask_index, tokens)).log_softmax(-1)
    assert (log_probs.argmax(-1) == tokens)[hidden].double().mean() > 0.9
    assert -log_probs.gather(-1, tokens[..., None])[hidden].mean() < 0.4


def small() -> ReactionDenoiser:
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ">>", "C", "N", "O", "(", ")"]
    return ReactionDenoiser({**SMALL, "max_position_embeddings": 40}, vocabulary).eval()


@torch.no_grad()
def test_padding_and_other_rows_change_nothing() -> None:
    model = small()
    tokens, mask = padded([[7, 8, 5, 9], [7, 5], [9]])
    context, context_mask = padded([[8, 6], [7, 8, 9, 6], [6]])
    together = Canvas(model, mask, context, context_mask).logits(tokens)
    for row in range(3):
        alone = Canvas(model, mask[row][mask[row]][None], context[row][context_mask[row]][None])
        logits = alone.logits(tokens[row][mask[row]][None])[0]
        torch.testing.assert_close(together[row][mask[row]], logits, atol=1e-5, rtol=1e-5)
    left = Canvas(
        model, mask, context.flip(-1), context_mask.flip(-1)
    )  # padding before the prompt, its tokens reversed
    same = Canvas(model, mask[2:], context[2:, :1])
    torch.testing.assert_close(left.logits(tokens)[2][mask[2]], same.logits(tokens[2:])[0][mask[2]])
    assert together[..., 7:].isfinite().all() and (together[..., :7] == -torch.inf).all()


def test_every_parameter_gets_gradient() -> None:
    model = small()
    tokens = torch.randint(7, 12, (3, 10), generator=torch.Generator().manual_seed(0))
    logits = model(torch.where(tokens < 10, model.mask_index, tokens), torch.ones(3, 10, dtype=torch.bool))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        if "full_embedding_layer" in name or not name.endswith(("key.bias", "k_proj.bias")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_refuses_long_reactions_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"a reaction of 39 tokens exceeds the model's 38"):
        small()(torch.full((1, 39), 7), torch.ones(1, 39, dtype=torch.bool))

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"is missing; run: pip install --no-deps rxnmapper==0\.4\.3"):
        ReactionDenoiser.from_wheel()
