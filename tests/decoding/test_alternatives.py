"""The token distributions at the reveal, against the log-probabilities that the decoding itself recorded."""

from __future__ import annotations

import pytest
import torch
from written_denoisers import MASK, RandomTransformer

from orderppl import Batch, UserError, decode, follow
from orderppl.decoding.alternatives import alternatives_at_reveal
from orderppl.policies import Ranked

DENOISER = RandomTransformer()


def problem(kind: str) -> Batch:
    """8 rows of unequal length: behind a prompt, or with given positions in between."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randint(0, 6, (8, 12), generator=generator)
    attended = torch.arange(12) < torch.arange(5, 13)[:, None]
    behind, scattered = torch.arange(12) >= 3, torch.rand(8, 12, generator=generator) < 0.6
    hidden = behind if kind == "prompt" else scattered
    return Batch(torch.where(hidden & attended, MASK, given), attended)


@pytest.mark.parametrize("kind", ["prompt", "scattered"])
@pytest.mark.parametrize("name", ["random", "entropy"])
def test_alternatives_are_those_of_the_reveal(name: str, kind: str):
    """The revealed token has the log-probability that decoding recorded."""
    batch, generator = problem(kind), torch.Generator().manual_seed(5)
    output = decode(DENOISER, Ranked(name), batch, max_steps=4, temperature=1.0, generator=generator)
    finished = Batch(output.sequences, batch.attention_mask, ~output.latent)
    found = alternatives_at_reveal(DENOISER, finished, output.reveal_step, count=99)
    torch.testing.assert_close(found.log_prob.double(), output.token_log_prob, atol=1e-5, rtol=0)
    shown = output.latent
    assert found.tokens.shape[-1] == 7  # all classes, MASK last with probability 0
    total = found.token_log_prob.double().exp().sum(-1)[shown]
    torch.testing.assert_close(total, torch.ones(int(shown.sum())).double(), atol=1e-5, rtol=0)
    assert bool((found.token_log_prob.diff(dim=-1) <= 0).all())
    assert bool((found.tokens[shown][:, -1] == MASK).all())
    own = found.tokens == output.sequences[..., None]
    picked = found.token_log_prob.where(own, torch.zeros(())).sum(-1)
    torch.testing.assert_close(picked[shown].double(), found.log_prob[shown].double(), atol=1e-5, rtol=0)
    assert bool((found.log_prob[~shown] == 0).all())
    assert not found.tokens[~shown].any()

    path = follow(Ranked(name), DENOISER, finished, 4, generator=generator)
    followed = alternatives_at_reveal(DENOISER, finished, path.reveal_step, count=1)
    torch.testing.assert_close(followed.log_prob.double(), path.token_log_prob, atol=1e-5, rtol=0)
    assert bool((followed.log_prob <= followed.token_log_prob[..., 0] + 1e-6).all())


def test_bad_input_is_named():
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="^reveal_step: "):
        alternatives_at_reveal(DENOISER, Batch(tokens), tokens[:1])
    with pytest.raises(UserError, match="^count: "):
        alternatives_at_reveal(DENOISER, Batch(tokens), tokens, count=0)
