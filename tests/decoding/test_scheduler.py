"""The scheduler and `generate` by hand; that they decode as `decode` does, over every policy, is in test_invariants."""

from __future__ import annotations

import pytest
import torch

from orderppl.decoding import PlannedOrder, RevealScheduler, generate, make_policy
from orderppl.errors import UserError


def test_a_prompt_in_the_sample_stays(confident):
    """Two prompt tokens before four masks in row 0, one mask in row 1; confidences rise to the right."""
    denoiser = confident([0.5, 0.5, 0.6, 0.7, 0.8, 0.9])
    scheduler = RevealScheduler(make_policy("top_prob"), mask_token_id=2)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [1, 0]
    sample = torch.tensor([[1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 2, 1]])
    seen = []
    for t in scheduler.timesteps:
        output = scheduler.step(denoiser(sample, sample >= 0), t, sample)
        sample = output.prev_sample
        seen.append(output.reveal.long().tolist())
        assert not output.fallback.any()
    assert seen == [[[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0]], [[0, 0, 1, 1, 0, 0], [0] * 6]]
    assert sample.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 1]]
    finished = scheduler.step(denoiser(sample, sample >= 0), 0, sample)
    assert torch.equal(finished.prev_sample, sample)


def test_blocks_and_what_is_given_inside_a_response(confident):
    """Blocks count the positions to be written, here 0, 2, 3, 5; position 1 and 4 are given."""
    denoiser = confident([0.6, 0.5, 0.7, 0.8, 0.5, 0.9])
    scheduler = RevealScheduler(make_policy("top_prob"), mask_token_id=2, block_size=2)
    scheduler.set_timesteps(4)
    sample, order = torch.tensor([[2, 1, 2, 2, 1, 2]]), []
    for t in scheduler.timesteps:
        output = scheduler.step(denoiser(sample, sample >= 0), t, sample)
        sample = output.prev_sample
        order += output.reveal[0].nonzero()[:, 0].tolist()
    assert order == [2, 0, 5, 3]
    assert sample.tolist() == [[0, 1, 0, 0, 1, 0]]


def test_set_timesteps_starts_over(confident):
    denoiser, sample = confident([0.6, 0.7, 0.8]), torch.tensor([[2, 2, 2]])
    scheduler = RevealScheduler(make_policy("klass", tau=0.1, eps=1.0), mask_token_id=2)
    first = []
    for _ in range(2):
        scheduler.set_timesteps(3)
        output = scheduler.step(denoiser(sample, sample >= 0), 2, sample)
        first.append(output.reveal.tolist())
        scheduler.step(denoiser(sample, sample >= 0), 1, output.prev_sample)
    assert first == [[[False, False, True]]] * 2  # nothing is known of an earlier prediction either time


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda s, x, logits: RevealScheduler(make_policy("random"), 2, temperature=-1.0), "temperature"),
        (lambda s, x, logits: s.set_timesteps(0), "num_inference_steps"),
        (lambda s, x, logits: s.step(logits, 0, x), "timestep"),
        (lambda s, x, logits: (s.set_timesteps(3), s.step(logits, 3, x)), "timestep"),
        (lambda s, x, logits: (s.set_timesteps(3), s.step(logits[:, :2], 2, x)), "model_output"),
    ],
)
def test_bad_arguments(call, field, confident):
    sample = torch.tensor([[2, 2, 2]])
    with pytest.raises(UserError, match=field):
        call(RevealScheduler(make_policy("random"), 2), sample, confident([0.6, 0.7, 0.8])(sample, sample >= 0))


def test_a_plan_that_needs_the_denoiser_is_refused(confident):
    scheduler = RevealScheduler(PlannedOrder(lambda canvas: canvas.logits(torch.zeros(2, 1, 3).long())), 2)
    scheduler.set_timesteps(3)
    sample = torch.tensor([[2, 2, 2]])
    with pytest.raises(UserError, match="another state"):
        scheduler.step(confident([0.6, 0.7, 0.8])(sample, sample >= 0), 2, sample)


def test_generate(confident):
    """Left-padded prompts; the best position first, two steps, blocks of two."""
    denoiser = confident([0.5, 0.5, 0.6, 0.7, 0.8, 0.9])
    prompt, mask = torch.tensor([[9, 1], [1, 0]]), torch.tensor([[0, 1], [1, 1]]).bool()
    options = {"max_new_tokens": torch.tensor([4, 3]), "steps": 4, "block_size": 2, "pad_token_id": 7}
    out = generate(denoiser, prompt, mask, policy="top_prob", record_history=True, **options)
    assert out.sequences.tolist() == [[9, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 7]]
    assert out.attention_mask.tolist() == [[False] + [True] * 5, [True] * 5 + [False]]
    assert out.decoded.reveal_step.tolist() == [[1, 0, 3, 2], [1, 0, 2, -1]]
    assert out.decoded.history.shape == (5, 2, 4)
    with pytest.raises(UserError, match="policy"):
        generate(denoiser, prompt, policy="low_confidence")
