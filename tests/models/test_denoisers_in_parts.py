"""Models that accelerate spreads: some parts on the CPU, others on the disk, as needs no second device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orderppl import Batch, fit, load_run
from orderppl.errors import UserError
from orderppl.guides import PolicyGuide
from orderppl.identity import weights_digest
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import load_denoiser
from orderppl.policies import Plan, RandomSteps

from tiny_models import write_model

PARTS: dict[str, dict[str, str | int]] = {
    "bert": {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk", "cls": "cpu"},
    "llada": {
        "model.transformer.wte": "cpu",
        "model.transformer.blocks.0": "cpu",
        "model.transformer.blocks.1": "disk",
        "model.transformer.ln_f": "cpu",
        "model.transformer.ff_out": "cpu",
    },
    "Dream": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    },
}


def rows() -> Batch:
    """Some rows of five to seven tokens between ends that are given."""
    tokens = torch.randint(5, 40, (12, 9))
    mask = torch.arange(9) < torch.randint(6, 10, (12, 1))
    return Batch(tokens, mask, (torch.arange(9) % 5 == 0).expand(12, 9) & mask)


@pytest.mark.parametrize("kind", PARTS)
def test_a_model_in_parts_is_the_same_model(kind: str, tmp_path: Path) -> None:
    """Its logits, what a fit on it learns, and its digest; the run folder loads it in parts again."""
    torch.manual_seed(0)
    folder = write_model(tmp_path / kind, kind)
    options: dict[str, Any] = {"trust_remote_code": kind != "bert"}
    whole: Any = load_denoiser(folder, **options)
    options |= {"device_map": PARTS[kind], "offload_folder": tmp_path / "offloaded"}
    spread: Any = load_denoiser(folder, **options)
    assert any(parameter.is_meta for parameter in spread.parameters())
    batch = rows()
    with torch.no_grad():
        torch.testing.assert_close(
            spread(batch.tokens, batch.attention_mask), whole(batch.tokens, batch.attention_mask), rtol=0, atol=0
        )
    assert weights_digest(spread) == weights_digest(whole)
    losses = {}
    for name, denoiser in (("whole", whole), ("spread", spread)):
        torch.manual_seed(1)
        plan = Plan(PositionTable(9, 2))
        model, guide = UnmaskingModel(denoiser, RandomSteps(), 2), PolicyGuide(plan, denoiser, 2)
        out = tmp_path / name
        losses[name] = fit(model, guide, batch, updates=3, batch_size=4, lr=0.1, out=out, progress=False).losses
    assert losses["spread"] == losses["whole"]
    run = load_run(tmp_path / "spread", trust=True)
    assert run.denoiser.network.hf_device_map == PARTS[kind]
    assert any(parameter.is_meta for parameter in run.denoiser.parameters())
    spread.to(torch.float64)
    assert next(spread.parameters()).dtype == torch.float32  # it stays where, and what, it is


def test_what_cannot_be_spread(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bert, smdm = write_model(tmp_path / "bert", "bert"), write_model(tmp_path / "smdm", "smdm")
    with pytest.raises(UserError, match="device_map: .* is no model of transformers"):
        load_denoiser(smdm, device_map="auto")
    with pytest.raises(UserError, match="frame: .* is no model of transformers"):
        load_denoiser(smdm, frame=True)
    apart = {"bert": "cpu", "cls": "disk"}  # the head has the weights of the embedding
    with pytest.raises(UserError, match="give weights that are tied, .* one place in device_map"):
        load_denoiser(bert, device_map=apart, offload_folder=tmp_path / "offloaded")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_denoiser(bert, device_map="nowhere")
    auto: Any = load_denoiser(bert, device_map="auto")
    assert not any(parameter.is_meta for parameter in auto.parameters())
