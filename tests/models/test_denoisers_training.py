"""The masked-diffusion bound against exact evidence, and the training by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orderppl.config import describe
from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError
from orderppl.inference.trainer import FitResult
from orderppl.models.denoisers import (
    MarkovChainDenoiser,
    TransformerDenoiser,
    load_denoiser,
    train_denoiser,
)
from orderppl.models.denoisers.smdm import SmdmDenoiser
from orderppl.models.denoisers.training import (
    DenoiserSettings,
    MaskedDiffusionLoss,
    masked_diffusion_nelbo,
    random_masking,
)
from orderppl.runs import load_run
from orderppl.unmasking import Batch

from tiny_models import write_model

V, MASK = 9, 9


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
    draws = MaskedDiffusionLoss(denoiser).nelbo(Batch(tokens.expand(4000, 5)))
    error = draws.std().item() / 4000**0.5
    # The bound's mean over maskings is the mean over orders of the path's nats, which is constant here.
    assert draws.mean().item() == pytest.approx(-denoiser.log_evidence(tokens).item(), abs=5 * error)


def test_nelbo_of_what_is_not_given() -> None:
    """log p(given, rest) - log p(given) of an exact denoiser (n = 4,000, z bound 5)."""
    denoiser = MarkovChainDenoiser(3, 0.8, 5)
    tokens, given = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[True, False, False, True, False]])
    torch.manual_seed(0)
    draws = MaskedDiffusionLoss(denoiser).nelbo(Batch(tokens.expand(4000, 5), given=given.expand(4000, 5)))
    every = torch.cartesian_prod(*[torch.arange(3)] * 5)
    agree = (every == tokens)[:, given[0]].all(-1)
    evidence = denoiser.log_evidence(tokens) - denoiser.log_evidence(every[agree]).logsumexp(0)
    assert draws.mean().item() == pytest.approx(-evidence.item(), abs=5 * draws.std().item() / 4000**0.5)


def test_loss_counts_what_is_to_be_revealed_only() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1, heads=2)
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])
    given = torch.arange(6) < 1
    tokens = torch.randint(0, V, (3, 6))
    batch = Batch(tokens, mask, mask & given)
    assert batch.latent.sum() == 8
    loss = MaskedDiffusionLoss(denoiser)
    torch.manual_seed(0)
    value = loss(batch)
    torch.manual_seed(0)
    other = loss(Batch(torch.where(mask, tokens, 5), mask, mask & given))
    torch.testing.assert_close(value, other, atol=1e-5, rtol=0)
    torch.manual_seed(0)
    per_row = loss.nelbo(batch)
    torch.testing.assert_close(value, per_row.sum() / 8, atol=1e-5, rtol=0)


def copies(rows: int, seed: int, first: int = 0) -> Batch:
    """The response repeats the prompt, of ids from `first` on: learnable in seconds."""
    prompt = torch.randint(first, first + V, (rows, 3), generator=torch.Generator().manual_seed(seed))
    return Batch(torch.cat([prompt, prompt], 1), given=(torch.arange(6) < 3).expand(rows, 6))


def test_learns_and_resumes(tmp_path: Path) -> None:
    def train(updates: int, out: Path, resume: bool = False) -> tuple[TransformerDenoiser, FitResult]:
        torch.manual_seed(0)
        denoiser = TransformerDenoiser(V, MASK, width=32, layers=2, heads=2)
        result = train_denoiser(
            denoiser,
            copies(500, 0),
            validation=copies(64, 1),
            out=out,
            resume=resume,
            updates=updates,
            batch_size=32,
            validate_every=60,
            lr=3e-3,
            warmup=20,
            ema_decay=0.95,
            checkpoint_every=50,
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

    hooks: list[int] = []

    def stop(module: torch.nn.Module, arguments: object) -> None:
        if isinstance(module, MaskedDiffusionLoss):
            hooks.append(1)
            if len(hooks) > 130:
                raise StopError

    handle = torch.nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(StopError):
            train(180, tmp_path / "parts")
    finally:
        handle.remove()
    resumed, again = train(180, tmp_path / "parts", resume=True)
    assert again.losses == result.losses
    assert again.validations == result.validations
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), resumed.parameters(), strict=True))


def test_a_trained_transformer_is_loaded_from_its_run_folder(tmp_path: Path) -> None:
    tokenizer = WordTokenizer.build(["1 2 3"], max_number=9)
    denoiser = TransformerDenoiser(tokenizer.vocab_size, 1, width=16, heads=2, tokenizer=tokenizer, max_length=12)
    train_denoiser(denoiser, copies(20, 0, 5), out=tmp_path / "run", updates=3, batch_size=5, progress=False)
    loaded = load_denoiser(tmp_path / "run")
    assert isinstance(loaded, TransformerDenoiser)
    state = torch.randint(0, V, (3, 6))
    assert torch.equal(loaded(state, state >= 0), denoiser(state, state >= 0))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.tokens == tokenizer.tokens
    spec = describe(loaded)
    assert spec["class_path"] == "orderppl.models.denoisers.load_denoiser"
    assert spec["init_args"]["name_or_path"] == str(tmp_path / "run")
    longer = load_denoiser(tmp_path / "run", read_up_to=20, dtype="float64")
    assert longer(torch.zeros(1, 20).long(), torch.ones(1, 20)).dtype == torch.float64
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is not the file that run.json was written for"):
        load_denoiser(tmp_path / "run")


@pytest.mark.parametrize("kind", ["bert", "smdm", "Dream"])
def test_a_public_model_is_trained_on(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    folder = write_model(tmp_path / "model", kind)
    denoiser = load_denoiser(folder, trust_remote_code=True)
    batch = copies(20, 0, 10)
    state = torch.where(batch.latent, denoiser.mask_index, batch.tokens)
    before = denoiser(state, batch.attention_mask).detach()
    train_denoiser(denoiser, batch, out=tmp_path / "run", updates=3, batch_size=5, progress=False, warmup=0)
    after = denoiser(state, batch.attention_mask)
    assert not torch.allclose(after, before, atol=1e-3)
    loaded = load_denoiser(tmp_path / "run", trust_remote_code=True)
    assert type(loaded) is type(denoiser)
    assert torch.equal(loaded(state, batch.attention_mask), after)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "saved")  # type: ignore[union-attr, operator]
    saved = load_denoiser(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(saved(state, batch.attention_mask), after)
    assert isinstance(saved, SmdmDenoiser) == (kind == "smdm")


def test_trains_what_comes_frozen_and_makes_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    denoiser = TransformerDenoiser(V + 1, MASK, width=8, layers=1, heads=2).requires_grad_(False).eval()
    before = [p.clone() for p in denoiser.parameters()]
    result = train_denoiser(denoiser, copies(40, 0), updates=4, batch_size=64, warmup=1, out=str(tmp_path / "run"))
    assert len(result.losses) == 4
    assert not all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), before, strict=True))
    assert not denoiser.training and not any(p.requires_grad for p in denoiser.parameters())
    assert capsys.readouterr().err.count("denoiser: training denoiser (") == 1
    found = load_run(tmp_path / "run").denoiser
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), found.parameters(), strict=True))


def test_refuses_mask_among_the_tokens_and_a_denoiser_that_gives_nan() -> None:
    data = copies(40, 0)
    data.tokens[7, 4] = MASK
    denoiser = TransformerDenoiser(V + 1, MASK, width=8, layers=1, heads=2)
    with pytest.raises(UserError, match="data: row 7 has MASK"):
        train_denoiser(denoiser, data, updates=2, progress=False)
    with torch.no_grad():
        next(denoiser.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match=r"the loss is nan at update 1: row \d+ of the data: the denoiser gives NaN"):
        train_denoiser(denoiser, copies(40, 0), updates=2, progress=False)


def test_defaults_are_those_of_the_settings() -> None:
    settings = DenoiserSettings()
    assert (settings.lr, settings.schedule, settings.warmup, settings.ema_decay) == (1e-3, "cosine", 100, 0.999)
    with pytest.raises(TypeError, match="epochs"):
        train_denoiser(torch.nn.Linear(1, 1), copies(4, 0), epochs=3)
