"""The token distributions at the reveal, against the log-probabilities that the decoding itself recorded."""

from __future__ import annotations

import pytest
import torch

from orderppl.decoding import alternatives_at_reveal, decode, follow, make_policy
from orderppl.denoising import Canvas
from orderppl.errors import UserError


@pytest.mark.parametrize("name", ["random", "entropy"])
def test_alternatives_are_those_of_the_reveal(denoiser, name):
    """8 rows of unequal length and a prompt: the revealed token has the log-probability that decoding recorded."""
    prompt = torch.randint(0, 6, (8, 3), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(2, 10)
    generator = torch.Generator().manual_seed(5)
    output = decode(
        denoiser, make_policy(name), prompt, length=lengths, max_steps=4, temperature=1.0, generator=generator
    )
    canvas = Canvas(denoiser, output.attention_mask, prompt)
    found = alternatives_at_reveal(canvas, output.sequences, output.reveal_step, count=99)
    torch.testing.assert_close(found.log_prob.double(), output.token_log_prob, atol=1e-5, rtol=0)
    shown = output.attention_mask
    assert found.tokens.shape[-1] == 7  # all classes, MASK last with probability 0
    torch.testing.assert_close(found.token_log_prob.exp().sum(-1)[shown], torch.ones(int(shown.sum())).double())
    assert bool((found.token_log_prob.diff(dim=-1) <= 0).all())
    assert bool((found.tokens[shown][:, -1] == denoiser.mask_index).all())
    own = found.tokens == output.sequences[..., None]
    picked = found.token_log_prob.where(own, torch.zeros(()).double()).sum(-1)
    torch.testing.assert_close(picked[shown], found.log_prob[shown])
    assert bool((found.log_prob[~shown] == 0).all())

    path = follow(make_policy(name), canvas, output.sequences, 4, generator=generator)
    followed = alternatives_at_reveal(canvas, output.sequences, path.reveal_step, count=1)
    torch.testing.assert_close(followed.log_prob.double(), path.token_log_prob, atol=1e-5, rtol=0)
    assert bool((followed.log_prob <= followed.token_log_prob[..., 0]).all())


def test_bad_input_is_named(denoiser):
    canvas = Canvas(denoiser, torch.ones(2, 3, dtype=torch.bool))
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="reveal_step"):
        alternatives_at_reveal(canvas, tokens, tokens[:1])
    with pytest.raises(UserError, match="count"):
        alternatives_at_reveal(canvas, tokens, tokens, count=0)
