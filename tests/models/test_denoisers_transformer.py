from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orderppl.config import build, describe
from orderppl.data.tokenizers import LetterTokenizer, WordTokenizer
from orderppl.errors import UserError
from orderppl.files import load_weights, save_weights
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.models.denoisers.transformer import number_features
from orderppl.unmasking import Batch, Denoiser
from orderppl.unmasking.denoiser import Reader, TailDenoiser

V, MASK, SEPARATOR = 9, 9, 5


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_changes_nothing(positions: str) -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=2, heads=2, positions=positions, max_length=30)
    assert isinstance(denoiser, Denoiser)
    context, tokens = torch.randint(0, V, (1, 4)), torch.randint(0, V + 1, (1, 6))
    alone = denoiser(torch.cat([context, tokens], 1), torch.ones(1, 10, dtype=torch.bool))
    assert alone.shape == (1, 10, V)
    # prompt padded, response padded, prompt padded on the left, other rows in the batch
    fill = torch.full((1, 3), 2)
    canvas = torch.cat([fill, context, fill, tokens, fill], 1)
    mask = torch.tensor([[False] * 3 + [True] * 4 + [False] * 3 + [True] * 6 + [False] * 3])
    batch = torch.cat([torch.randint(0, V, (2, 19)), canvas])
    masks = torch.cat([torch.tensor([[True] * 19, [False] * 19]), mask])
    padded = denoiser(batch, masks)
    torch.testing.assert_close(padded[2][mask[0]], alone[0], atol=1e-5, rtol=0)
    assert padded.isfinite().all()


def test_every_parameter_gets_gradient() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=2, heads=2)
    tokens = torch.randint(0, V, (8, 9))
    state = torch.where(torch.rand(8, 9) < 0.5, MASK, tokens)
    logits = denoiser(state, torch.ones_like(tokens))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("qkv.bias"):  # a third of it, the key bias, cancels in the softmax
            assert parameter.grad.abs().sum() > 0, name


def test_a_mask_inside_the_vocabulary_is_never_predicted() -> None:
    denoiser = TransformerDenoiser(V, 3, width=16, layers=1, heads=2)
    state = torch.full((2, 5), 3)
    reader = Reader(denoiser, Batch(state))
    logits = reader.logits(reader.read(state))
    assert (logits[..., 3] == -torch.inf).all()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor([0, 1, 2, 4, 5] * 2))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


def words(largest: int) -> WordTokenizer:
    return WordTokenizer.build([f"{largest} apples"], max_number=largest)


def test_number_embeddings_start_close_for_close_numbers() -> None:
    tokenizer = words(99)
    denoiser = TransformerDenoiser(tokenizer.vocab_size, tokenizer.mask_index, 64, tokenizer=tokenizer)
    rows = [tokenizer.tokens.index(str(number)) for number in range(100)]
    weight = denoiser.embed.weight[rows]
    numbers = torch.nn.functional.normalize(weight, dim=-1)
    similarity = numbers @ numbers.T
    assert similarity.diagonal(1)[10:].min() > similarity.diagonal(20).max()
    assert weight.pow(2).mean(-1).tolist() == pytest.approx([0.02**2] * 100, rel=1e-3)
    features = number_features(torch.arange(100.0), 64)
    assert torch.pdist(features).min() > 0.1  # and no two numbers are alike
    without = TransformerDenoiser(
        tokenizer.vocab_size, tokenizer.mask_index, 64, tokenizer=tokenizer, number_features=False
    )
    similarity = torch.nn.functional.normalize(without.embed.weight[rows], dim=-1)
    assert (similarity @ similarity.T).diagonal(1).max() < 0.9
    letters = LetterTokenizer("ABC")  # which has no numbers
    assert TransformerDenoiser(letters.vocab_size, letters.mask_index, 16, tokenizer=letters).tokenizer is letters
    with pytest.raises(UserError, match=r"tokenizer: 10\d tokens for 103 embeddings"):
        TransformerDenoiser(102, 102, tokenizer=tokenizer)


def test_refuses_a_longer_canvas() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2, max_length=5)
    with pytest.raises(UserError, match="max_length: a canvas of 6 tokens exceeds 5"):
        denoiser(torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.bool))


def test_rotary_positions_can_be_told_to_go_on() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2, max_length=5)
    state, attended = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
    before = denoiser(state, attended)
    denoiser.read_up_to(6)
    torch.testing.assert_close(denoiser(state, attended), before)
    assert denoiser(torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.bool)).shape == (1, 6, V)
    learned = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2, max_length=5, positions="learned")
    with pytest.raises(UserError, match="max_length: its 5 positions are learned"):
        learned.read_up_to(6)


def test_is_rebuilt_from_its_description_and_weights(tmp_path: Path) -> None:
    tokenizer = words(9)
    denoiser = TransformerDenoiser(
        tokenizer.vocab_size, tokenizer.mask_index, width=16, layers=1, heads=2, tokenizer=tokenizer
    )
    torch.nn.init.normal_(denoiser.embed.weight)
    save_weights(denoiser, tmp_path / "weights.safetensors")
    rebuilt = build(describe(denoiser))
    load_weights(rebuilt, tmp_path / "weights.safetensors")
    state, mask = torch.randint(0, denoiser.vocab_size, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(denoiser(state, mask), rebuilt(state, mask))
    assert rebuilt.tokenizer.tokens == tokenizer.tokens


# ---- prompts


def separated(**settings: object) -> TransformerDenoiser:
    torch.manual_seed(0)
    options = {"width": 16, "layers": 2, "heads": 2, "max_length": 20, "separator_index": SEPARATOR, "prompt_room": 8}
    return TransformerDenoiser(V, MASK, **(options | settings))  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_separator_puts_responses_at_a_fixed_place(positions: str) -> None:
    denoiser = separated(layers=1, positions=positions)
    # prompts of 2 and 4 tokens, a response that repeats the separator, padding everywhere
    state = torch.tensor(
        [[1, 2, 5, 0, 0, 3, MASK, 5, 4, 0], [1, 2, 3, 4, 5, 3, MASK, 5, 4, 0], [3, MASK, 4, 0, 0, 0, 0, 0, 0, 0]]
    )
    mask = torch.tensor(
        [[True] * 3 + [False] * 2 + [True] * 4 + [False], [True] * 9 + [False], [True] * 3 + [False] * 7]
    )
    position, is_response = denoiser._segments(state, mask)
    assert position[0][mask[0]].tolist() == [0, 1, 2, 8, 9, 10, 11]
    assert position[1][mask[1]].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert position[2, :3].tolist() == [0, 1, 2]  # no prompt, no separator
    assert is_response.sum(-1).tolist() == [4, 4, 0]
    together = denoiser(state, mask)
    alone = denoiser(state[0][mask[0]][None], torch.ones(1, 7, dtype=torch.bool))
    close(together[0][mask[0]], alone[0])
    rebuilt = build(describe(denoiser))
    rebuilt.load_state_dict(denoiser.state_dict())
    assert torch.equal(rebuilt(state, mask), together)
    together.sum().backward()
    assert denoiser.response is not None
    assert denoiser.response.grad is not None
    assert denoiser.response.grad.abs().sum() > 0


CANVASES = {
    "a prompt": (([1, 2, 5], [1, 2, 3, 4, 5]), ([7, MASK, 3], [MASK, MASK]), True),
    "a separator given in the response": (([1, 2, 5], [4, 5]), ([MASK, 5, MASK, 2], [5, MASK, 5]), True),
    "given tokens behind the prompt": (([1, 2, 5, 7], [4, 5, 3]), ([MASK, 6, MASK], [MASK, 5, MASK]), False),
    "two separators in the prompt": (([1, 5, 2, 5], [4, 5]), ([MASK, 3], [MASK, 1]), False),
    "no separator at all": (([1, 2], [3, 4, 6]), ([MASK, 7], [2, MASK]), False),
    "a separator given inside a text with holes": (([1], [4]), ([MASK, 5, 2, MASK], [MASK, 3, 5, MASK]), False),
    "rows without a prompt among others": (([1, 5], []), ([MASK, 3], [MASK, 5, 1]), False),
}
"""What stands before the first hole of any row, what stands behind, and whether the former can be read by itself."""


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("case", CANVASES)
@torch.no_grad()
def test_given_tokens_anywhere(case: str, reads: bool) -> None:
    """Alone, in a batch, from the first hole on, or behind a prompt that was read before: the same logits."""
    denoiser = separated(prompt_reads_response=reads)
    assert isinstance(denoiser, TailDenoiser)
    before, behind, by_itself = CANVASES[case]
    width, size = max(map(len, before)), max(map(len, behind))
    rows = [(width - len(left), left + right) for left, right in zip(before, behind, strict=True)]
    tokens = torch.zeros(2, width + size, dtype=torch.long)
    attended = torch.zeros(2, width + size, dtype=torch.bool)
    for row, (start, ids) in enumerate(rows):
        columns = slice(start, start + len(ids))
        tokens[row, columns], attended[row, columns] = torch.tensor(ids), True
    together = denoiser(tokens, attended)
    for row, mask in enumerate(attended):
        close(together[row][mask], denoiser(tokens[row][mask][None], torch.ones(1, int(mask.sum())))[0])
    latent = torch.cat([torch.zeros_like(attended[:, :width]), attended[:, width:]], 1)
    reader = Reader(denoiser, Batch(tokens, attended, attended & ~latent))
    assert reader.start == width
    close(reader.read(tokens)[latent[:, width:]], denoiser.hidden_states(tokens, attended)[latent])
    reader.lay_out()
    ends = all(SEPARATOR in left for left in before)
    assert (reader._layout is not None) == ends
    assert (ends and reader._layout.past is not None) == (by_itself and not reads)
    written = torch.where(latent & (tokens == MASK), SEPARATOR, tokens)  # what marks the response must not move
    for state in (tokens, written, torch.where(latent, 3, tokens)):
        close(reader.read(state)[latent[:, width:]], denoiser.hidden_states(state, attended)[latent])
    one = reader.rows(torch.tensor([1]))
    close(one.read(written[1:])[latent[1:, width:]], denoiser.hidden_states(written, attended)[1:][latent[1:]])


def test_prompts_need_a_separator() -> None:
    with pytest.raises(UserError, match="prompt_reads_response: without a separator"):
        TransformerDenoiser(V, MASK, prompt_reads_response=False)
