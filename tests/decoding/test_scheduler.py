"""The scheduler and `generate` by hand; that they decode as `decode` does, over every policy, is in test_invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from written_denoisers import Confident

from orderppl import State, UserError, generate
from orderppl.decoding import RevealScheduler
from orderppl.decoding.generate import with_response
from orderppl.policies import Blocks, Klass, Plan, Ranked


def test_what_is_given_in_the_sample_stays():
    """Two tokens before four masks in row 0, one mask in row 1; confidences rise to the right."""
    denoiser = Confident([0.5, 0.5, 0.6, 0.7, 0.8, 0.9])
    scheduler = RevealScheduler(Ranked(), mask_token_id=2)
    scheduler.set_timesteps(2, device="cpu")
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


def test_blocks_count_what_is_to_be_written():
    """Here 0, 2, 3, 5; position 1 and 4 are given."""
    denoiser = Confident([0.6, 0.5, 0.7, 0.8, 0.5, 0.9])
    scheduler = RevealScheduler(Ranked(), mask_token_id=2, block_size=2)
    scheduler.set_timesteps(4)
    sample, order = torch.tensor([[2, 1, 2, 2, 1, 2]]), []
    for t in scheduler.timesteps:
        output = scheduler.step(denoiser(sample, sample >= 0), t, sample)
        sample = output.prev_sample
        order += output.reveal[0].nonzero()[:, 0].tolist()
    assert order == [2, 0, 5, 3]
    assert sample.tolist() == [[0, 1, 0, 0, 1, 0]]


def test_set_timesteps_starts_over():
    denoiser, sample = Confident([0.6, 0.7, 0.8]), torch.tensor([[2, 2, 2]])
    scheduler = RevealScheduler(Klass(0.1, eps=1.0), mask_token_id=2)
    first = []
    for _ in range(2):
        scheduler.set_timesteps(3)
        output = scheduler.step(denoiser(sample, sample >= 0), 2, sample)
        first.append(output.reveal.tolist())
        scheduler.step(denoiser(sample, sample >= 0), 1, output.prev_sample)
    assert first == [[[False, False, True]]] * 2  # nothing is known of an earlier prediction either time


def test_forms_that_callers_of_diffusers_expect():
    denoiser, sample = Confident([0.6, 0.7, 0.8]), torch.tensor([[2, 2, 2]])
    scheduler = RevealScheduler(Blocks(Ranked("margin"), 2), mask_token_id=2, temperature=0.5)
    scheduler.set_timesteps(3, device=None)
    (written,) = scheduler.step(denoiser(sample, sample >= 0), torch.tensor(2), sample, return_dict=False)
    assert written.tolist()[0][2] == 2 and (written == 2).sum() == 1  # the first block has one step of three
    assert scheduler.config["policy"]["class_path"].endswith("Blocks")
    assert scheduler.config["policy"]["init_args"]["size"] == 2
    assert scheduler.config["temperature"] == 0.5 and scheduler.config["mask_token_id"] == 2


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda s, x, logits: RevealScheduler(Ranked("random"), 2, temperature=-1.0), "temperature"),
        (lambda s, x, logits: s.set_timesteps(0), "num_inference_steps"),
        (lambda s, x, logits: s.step(logits, 0, x), "timestep"),
        (lambda s, x, logits: (s.set_timesteps(3), s.step(logits, 3, x)), "timestep"),
        (lambda s, x, logits: (s.set_timesteps(3), s.step(logits[:, :2], 2, x)), "model_output"),
    ],
)
def test_bad_arguments(call, field):
    sample = torch.tensor([[2, 2, 2]])
    with pytest.raises(UserError, match=f"^{field}: "):
        call(RevealScheduler(Ranked("random"), 2), sample, Confident([0.6, 0.7, 0.8])(sample, sample >= 0))


def test_a_plan_that_needs_the_denoiser_elsewhere_is_refused():
    class Curious(nn.Module):
        def forward(self, opening: State) -> Tensor:
            return opening.denoiser(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1).bool())

    scheduler, sample = RevealScheduler(Plan(Curious()), 2), torch.tensor([[2, 2, 2]])
    scheduler.set_timesteps(3)
    with pytest.raises(UserError, match="another state"):
        scheduler.step(Confident([0.6, 0.7, 0.8])(sample, sample >= 0), 2, sample)


def test_a_plan_that_reads_the_opening_has_it():
    class Reading(nn.Module):
        def forward(self, opening: State) -> Tensor:
            return opening.per_position(lambda log_probs: 9 * log_probs)

    scheduler, sample = RevealScheduler(Plan(Reading()), 2, mode=True), torch.tensor([[2, 2, 2]])
    scheduler.set_timesteps(3)
    output = scheduler.step(Confident([0.6, 0.3, 0.8])(sample, sample >= 0), 2, sample)
    assert output.reveal.tolist() == [[True, False, True]]


def test_generate():
    """Left-padded prompts; the best position first, two steps, blocks of two."""
    denoiser = Confident([0.5, 0.5, 0.6, 0.7, 0.8, 0.9])
    prompt, mask = torch.tensor([[9, 1], [1, 0]]), torch.tensor([[0, 1], [1, 1]]).bool()
    options = {"max_new_tokens": torch.tensor([4, 3]), "steps": 4, "block_size": 2, "pad_token_id": 7}
    out = generate(denoiser, prompt, mask, policy="top_prob", record_history=True, **options)
    assert out.sequences.tolist() == [[9, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 7]]
    assert out.attention_mask.tolist() == [[False] + [True] * 5, [True] * 5 + [False]]
    assert out.decoded.reveal_step.tolist() == [[-1, -1, 1, 0, 3, 2], [-1, -1, 1, 0, 2, -1]]
    assert out.decoded.history.shape == (5, 2, 6)
    with pytest.raises(UserError, match="score: unknown score 'low_confidence'"):
        generate(denoiser, prompt, policy="low_confidence")


def test_generate_fills_holes_of_the_prompt_as_well():
    denoiser = Confident([0.9, 0.5, 0.6, 0.7, 0.8])
    out = generate(denoiser, torch.tensor([[2, 1, 2]]), max_new_tokens=2, steps=4, policy=Ranked("left_to_right"))
    assert out.sequences.tolist() == [[0, 1, 0, 0, 0]]
    assert out.decoded.reveal_step.tolist() == [[0, -1, 1, 2, 3]]
    nothing = generate(denoiser, torch.tensor([[2, 1, 2]]), max_new_tokens=0, steps=4)
    assert nothing.sequences.tolist() == [[0, 1, 0]]


def test_the_canvas_of_a_response():
    batch = with_response(torch.tensor([[5, 2], [7, 8]]), torch.tensor([[1, 1], [1, 0]]), torch.tensor([1, 3]), 2, 9)
    assert batch.tokens.tolist() == [[5, 2, 2, 9, 9], [7, 8, 2, 2, 2]]
    assert batch.attention_mask.long().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]
    assert batch.latent.long().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    for length, problem in (
        (torch.tensor([1, 2, 3]), "shape"),
        (-1, "a response of -1"),
        (torch.tensor([1, -2]), "-2"),
    ):
        with pytest.raises(UserError, match=f"^length: .*{problem}"):
            with_response(torch.tensor([[5, 2], [7, 8]]), None, length, 2)


def test_a_budget_begins_with_its_first_timestep():
    scheduler = RevealScheduler(Ranked("top_prob"), mask_token_id=2)
    canvas, logits = torch.full((1, 3), 2), torch.zeros(1, 3, 2)
    for _ in range(2):
        scheduler.set_timesteps(3)
        with pytest.raises(UserError, match=r"timestep: 0 before the first one, 2; go through"):
            scheduler.step(logits, 0, canvas)
        scheduler.step(logits, 2, canvas)
