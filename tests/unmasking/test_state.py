"""What a policy sees before a step, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orderppl import Batch, State, UserError
from orderppl.unmasking.predictions import Window
from orderppl.unmasking.trajectory import Path, same_step

from programs import VOCAB, TableDenoiser

ATTENDED = torch.tensor([[True, True, True], [True, True, False], [False, True, True]])
GIVEN = torch.tensor([[False, True, False], [False, False, False], [False, False, True]])
TOKENS = torch.tensor([[1, 2, 3], [0, 1, 99], [99, 2, 0]])


class Counting(TableDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(tuple(state.shape))
        return super().forward(state, attention_mask)


def make_path(num_steps: int = 3) -> Path:
    return Path(Batch(TOKENS, ATTENDED, GIVEN), Counting(), num_steps)


def test_a_state_by_hand():
    path = make_path()
    masked = torch.tensor([[True, False, False], [True, True, False], [False, True, False]])
    state = path.state(masked, torch.tensor([0, 1, 2]))
    assert state.tokens.tolist() == [[4, 2, 3], [4, 4, 0], [0, 4, 0]]  # MASK where hidden, 0 at padding
    assert state.steps_left.tolist() == [3, 2, 1]
    assert state.is_last.tolist() == [False, False, True]
    assert torch.equal(state.latent, ATTENDED & ~GIVEN)
    assert torch.equal(state.attention_mask, ATTENDED)
    assert state.num_hidden.tolist() == [1, 2, 1]
    assert state.shape == (3, 3)
    assert path.denoiser.calls == []  # lazy
    logits = path.denoiser(state.tokens, ATTENDED).log_softmax(-1)
    path.denoiser.calls.clear()
    everything = state.per_position(lambda log_probs: log_probs)
    torch.testing.assert_close(everything[masked], logits[masked])
    assert (everything[~masked] == 0).all()
    assert state.per_position(lambda log_probs: log_probs.argmax(-1)).shape == (3, 3)
    own = state.token_log_prob(TOKENS)
    torch.testing.assert_close(own[masked], logits[masked].gather(-1, TOKENS[masked][:, None])[:, 0])
    assert (own[~masked] == 0).all()
    hot = state.token_log_prob(TOKENS, temperature=2.0)
    torch.testing.assert_close(
        hot[masked], (logits[masked] / 2).log_softmax(-1).gather(-1, TOKENS[masked][:, None])[:, 0]
    )
    assert path.denoiser.calls == [(3, 3)]  # one call for all who ask
    assert state.hidden(lambda inside: inside).shape == (3, 3, VOCAB)
    assert (state.hidden(lambda inside: inside)[~masked] == 0).all()


def test_stacked_states():
    path = make_path()
    masked = (ATTENDED & ~GIVEN).expand(2, 5, 3, 3)
    state = path.state(masked, same_step(1, masked))
    assert state.attention_mask.shape == state.latent.shape == masked.shape
    assert state.step.shape == state.num_hidden.shape == (2, 5, 3)
    assert state.per_position(lambda log_probs: log_probs.amax(-1)).shape == (2, 5, 3, 3)
    assert state.token_log_prob(TOKENS).shape == (2, 5, 3, 3)


def test_the_opening_hides_everything_that_is_not_given():
    opening = make_path().opening()
    assert opening.tokens.tolist() == [[4, 2, 4], [4, 4, 0], [0, 4, 0]]
    assert torch.equal(opening.masked, ATTENDED & ~GIVEN)
    assert opening.step.tolist() == [0, 0, 0]


def test_views_share_what_the_denoiser_says():
    path = make_path()
    state = path.opening()
    seen = state.per_position(lambda log_probs: log_probs)
    view = state.replace(carry="kept", price=0.5)
    assert (view.carry, view.price, state.carry, state.price) == ("kept", 0.5, None, None)
    fewer = state.masked & (torch.arange(3) < 2)
    part = view.restricted(fewer)
    assert torch.equal(part.masked, fewer) and torch.equal(part.latent, state.latent)
    assert torch.equal(part.num_hidden, state.num_hidden)  # held back, but not revealed
    assert part.carry == "kept"
    torch.testing.assert_close(part.per_position(lambda log_probs: log_probs)[fewer], seen[fewer])
    block = state.restricted(fewer, fewer, step=torch.ones(3), num_steps=torch.full((3,), 2))
    assert torch.equal(block.latent, fewer) and torch.equal(block.num_hidden, fewer.sum(-1))
    assert block.is_last.all()
    assert block.restricted(fewer & False).whole is state  # the one before any restriction
    assert state.whole is state
    assert path.denoiser.calls == [(3, 3)]


def test_noise():
    path = make_path()
    opening = path.opening()
    assert not opening.takes_mode
    with pytest.raises(UserError, match="policy: draws on the way"):
        _ = opening.noise  # a density is being worked out
    noise, asked = torch.rand(3, 3), []
    arguments = (opening.tokens, opening.masked, opening.step, 3, path.batch, path.denoiser)
    predictions = Window(path.reader, opening.tokens)
    state = State(*arguments, predictions, lambda: asked.append(1) or noise)
    assert not asked
    assert torch.equal(state.noise, noise) and torch.equal(state.noise, noise)
    assert len(asked) == 1
    modes = State(*arguments, predictions)
    assert modes.takes_mode
    with pytest.raises(ValueError, match="takes_mode"):
        _ = modes.noise
