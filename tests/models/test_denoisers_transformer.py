from pathlib import Path

import pytest
import torch

from orderppl.denoising import Canvas, Denoiser, SoftDenoiser
from orderppl.errors import UserError
from orderppl.inference.batches import BatchStream
from orderppl.inference.checkpoints import load_weights, read_config, save_weights
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.training import (
    MaskedDiffusionLoss,
    masked_diffusion_nelbo,
    random_masking,
    train_denoiser,
)
from orderppl.models.denoisers.transformer import TransformerDenoiser, number_features

V, MASK = 9, 9


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_padding_changes_nothing(tied: bool, positions: str) -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=2, heads=2, tied=tied, positions=positions, max_length=30)
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


@pytest.mark.parametrize("separator", [None, 3])
@pytest.mark.parametrize("mask", [MASK, 4])
def test_tokens_visible_in_part_are_between_mask_and_token(mask: int, separator: int | None) -> None:
    """At 0 and 1 the logits of the partially revealed sequence, with prompt and padding."""
    denoiser = TransformerDenoiser(
        V, mask, width=16, layers=2, heads=2, max_length=30, separator_index=separator, prompt_room=8
    )
    assert isinstance(denoiser, SoftDenoiser)
    context, tokens = torch.randint(0, 3, (5, 4)), torch.randint(0, 4, (2, 5, 6))
    context[:, -1] = 3
    attended, context_mask = torch.rand(5, 6) < 0.8, torch.ones(5, 4, dtype=torch.bool)
    context_mask[1, 0] = False
    canvas = Canvas(denoiser, attended, context, context_mask)
    hidden = (torch.rand(2, 5, 6) < 0.5) & attended
    hard = canvas.logits(torch.where(hidden, mask, tokens))
    visible = (~hidden).float().requires_grad_()
    soft = canvas.soft_logits(tokens, visible)
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)
    (slope,) = torch.autograd.grad(soft.log_softmax(-1)[..., 0][:, attended].sum(), visible)
    assert slope.isfinite().all()
    assert (slope[attended.expand(slope.shape)] != 0).all()
    assert (slope[~attended.expand(slope.shape)] == 0).all()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_gradient(tied: bool) -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=2, heads=2, tied=tied)
    batch = {"tokens": torch.randint(0, V, (8, 6)), "context": torch.randint(0, V, (8, 3))}
    MaskedDiffusionLoss(denoiser)(**batch).backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("qkv.bias"):  # a third of it, the key bias, cancels in the softmax
            assert parameter.grad.abs().sum() > 0, name


def test_a_mask_inside_the_vocabulary_is_never_predicted() -> None:
    denoiser = TransformerDenoiser(V, 3, width=16, layers=1, heads=2)
    canvas = Canvas(denoiser, torch.ones(2, 5, dtype=torch.bool))
    logits = canvas.logits(torch.full((2, 5), 3))
    assert (logits[..., 3] == -torch.inf).all()
    loss = MaskedDiffusionLoss(denoiser)(tokens=torch.tensor([[0, 1, 2, 4, 5]] * 4))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters())


def test_number_embeddings_start_close_for_close_numbers() -> None:
    values = [None, None, *range(100)]
    denoiser = TransformerDenoiser(102, 1, width=64, number_values=values)
    numbers = torch.nn.functional.normalize(denoiser.embed.weight[2:], dim=-1)
    similarity = numbers @ numbers.T
    assert similarity.diagonal(1)[10:].min() > similarity.diagonal(20).max()
    assert denoiser.embed.weight[2:].pow(2).mean(-1).tolist() == pytest.approx([0.02**2] * 100, rel=1e-3)
    features = number_features(torch.arange(100.0), 64)
    assert torch.pdist(features).min() > 0.1  # and no two numbers are alike
    with pytest.raises(UserError, match="101 values for 102 tokens"):
        TransformerDenoiser(102, 1, number_values=values[:-1])


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
    assert TransformerDenoiser(**denoiser.config).max_length == 6
    learned = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2, max_length=5, positions="learned")
    with pytest.raises(UserError, match="max_length: its 5 positions are learned"):
        learned.read_up_to(6)


@pytest.mark.parametrize("tied", [True, False])
def test_is_rebuilt_from_its_files(tmp_path: Path, tied: bool) -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2, tied=tied, number_values=range(9))
    path = save_weights(denoiser, tmp_path / "denoiser")
    rebuilt = TransformerDenoiser(**read_config(path))
    load_weights(rebuilt, path)
    state, mask = torch.randint(0, V, (2, 5)), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(denoiser(state, mask), rebuilt(state, mask))


def test_masking_hides_every_number_of_positions_equally_often() -> None:
    torch.manual_seed(0)
    rows, n = 20_000, 5
    mask = torch.ones(rows, n + 2, dtype=torch.bool)
    mask[:, n:] = False  # padding
    mask[0] = False  # an empty row
    masked, weight = random_masking(mask)
    assert not (masked & ~mask).any()
    assert weight[0] == 0
    count = masked.sum(-1)[1:]
    torch.testing.assert_close(weight[1:] * count, torch.full((rows - 1,), float(n)))
    # counts are stratified, so their deviation is below the binomial one (20,000 rows, z bound 5)
    share = torch.bincount(count, minlength=n + 1)[1:] / rows
    assert (share - 1 / n).abs().max() < 5 * (0.2 * 0.8 / rows) ** 0.5
    where = masked[:, :n].double().mean(0)
    assert (where - (n + 1) / (2 * n)).abs().max() < 5 * (0.25 / rows) ** 0.5


def test_nelbo_of_an_exact_denoiser_is_the_evidence_and_never_less() -> None:
    """All orders of exact conditionals give the evidence, so the mean over maskings is exact (n = 4,000, z bound 5)."""
    denoiser = MarkovChainDenoiser(3, 0.8, 5)
    tokens = torch.tensor([[0, 0, 1, 1, 2]])
    torch.manual_seed(0)
    draws = MaskedDiffusionLoss(denoiser).nelbo(tokens.expand(4000, 5))
    error = draws.std().item() / 4000**0.5
    # The bound's mean over maskings is the mean over orders of the path's nats, which is constant here.
    assert draws.mean().item() == pytest.approx(-denoiser.log_evidence(tokens).item(), abs=5 * error)


def test_loss_counts_response_tokens_only() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2)
    loss = MaskedDiffusionLoss(denoiser)
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])
    tokens = torch.randint(0, V, (3, 6))
    torch.manual_seed(0)
    value = loss(tokens=tokens, attention_mask=mask)
    torch.manual_seed(0)
    other = loss(tokens=torch.where(mask, tokens, 5), attention_mask=mask)
    torch.testing.assert_close(value, other, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    per_row = loss.nelbo(tokens, mask)
    torch.testing.assert_close(value, per_row.sum() / 11, atol=1e-5, rtol=0)
    assert loss.metrics["nelbo"].item() == pytest.approx(per_row.mean().item(), rel=1e-5)


def copies(rows: int, seed: int) -> BatchStream:
    """The response repeats the prompt: learnable in seconds."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(0, V, (rows, 3), generator=generator)
    ones = torch.ones(rows, 3, dtype=torch.bool)
    tensors = {"tokens": context.clone(), "attention_mask": ones, "context": context, "context_mask": ones.clone()}
    return BatchStream(tensors, 32, seed=0)


def test_learns_and_resumes(tmp_path: Path) -> None:
    def train(updates: int, out: Path, resume: bool = False):
        torch.manual_seed(0)
        denoiser = TransformerDenoiser(V, MASK, width=32, layers=2, heads=2)
        result = train_denoiser(
            denoiser,
            copies(500, 0),
            updates=updates,
            validation=copies(64, 1),
            validate_every=60,
            lr=3e-3,
            warmup=20,
            ema_decay=0.95,
            out=out,
            checkpoint_every=50,
            resume=resume,
            progress=False,
        )
        return denoiser, result

    denoiser, result = train(180, tmp_path / "whole")
    scores = [record["nats_per_token"] for record in result.validations]
    assert len(scores) == 3
    assert scores[-1] < 0.5 * scores[0]
    assert masked_diffusion_nelbo(denoiser, copies(64, 1), draws=4)["nats_per_token"] < 0.5
    assert masked_diffusion_nelbo(denoiser, copies(64, 1))["nelbo"] < 1.5

    class StopError(Exception):
        pass

    hooks = []

    def stop(module, arguments, keywords) -> None:
        hooks.append(1)
        if len(hooks) > 130:
            raise StopError

    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, arguments: stop(module, arguments, None) if isinstance(module, MaskedDiffusionLoss) else None
    )
    try:
        with pytest.raises(StopError):
            train(180, tmp_path / "parts")
    finally:
        handle.remove()
    resumed, again = train(180, tmp_path / "parts", resume=True)
    assert again.losses == result.losses
    assert again.validations == result.validations
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_separator_puts_responses_at_a_fixed_place(positions: str) -> None:
    torch.manual_seed(0)
    separator = 5
    denoiser = TransformerDenoiser(
        V,
        MASK,
        width=16,
        layers=1,
        heads=2,
        max_length=20,
        positions=positions,
        separator_index=separator,
        prompt_room=8,
    )
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
    torch.testing.assert_close(together[0][mask[0]], alone[0], atol=1e-5, rtol=0)
    rebuilt = TransformerDenoiser(**denoiser.config)
    rebuilt.load_state_dict(denoiser.state_dict())
    assert torch.equal(rebuilt(state, mask), together)
    together.sum().backward()
    assert denoiser.response is not None
    assert denoiser.response.grad is not None
    assert denoiser.response.grad.abs().sum() > 0
