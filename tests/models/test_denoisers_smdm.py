from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orderppl.config import build, describe
from orderppl.errors import UserError
from orderppl.models.denoisers import load_denoiser
from orderppl.models.denoisers.smdm import SIZES, SmdmDenoiser

from tiny_models import loud

TINY = {"n_layer": 2, "n_head": 4, "n_embd": 32, "intermediate_size": 48, "vocab_size": 50, "block_size": 64}


@pytest.mark.parametrize(("size", "parameters"), [("170M", 219_050_496), ("1.1B", 1_142_367_744)])
def test_published_sizes(size: str, parameters: int) -> None:
    """1,142,367,744 is what users of the published weights of the larger model count."""
    with torch.device("meta"):
        denoiser = SmdmDenoiser(**SIZES[size])
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters
    assert (denoiser.vocab_size, denoiser.mask_index, denoiser.max_length) == (32_000, 32_000, 2048)


def test_published_keys() -> None:
    """Names and shapes of the published checkpoints, all of them."""
    shapes = {name: list(tensor.shape) for name, tensor in SmdmDenoiser(**TINY).state_dict().items()}
    expected = {"lm_head.weight": [50, 32], "transformer.wte.weight": [51, 32], "transformer.ln_f.weight": [32]}
    for layer in range(2):
        block = f"transformer.h.{layer}"
        expected |= {
            f"{block}.norm_1.weight": [32],
            f"{block}.norm_2.weight": [32],
            f"{block}.attn.attn.weight": [96, 32],
            f"{block}.attn.proj.weight": [32, 32],
            f"{block}.mlp.swiglu.w1.weight": [48, 32],
            f"{block}.mlp.swiglu.w2.weight": [48, 32],
            f"{block}.mlp.swiglu.w3.weight": [32, 48],
        }
    assert shapes == expected


@torch.no_grad()
def test_equals_a_bidirectional_llama() -> None:
    """The same weights in transformers' Llama, whose queries, keys and values are not interleaved by head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    denoiser = SmdmDenoiser(**TINY)
    loud(denoiser)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=51,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            attn_implementation="sdpa",
        )
    ).eval()
    state = denoiser.state_dict()
    renamed = {"model.embed_tokens.weight": state["transformer.wte.weight"]}
    renamed["model.norm.weight"] = state["transformer.ln_f.weight"]
    renamed["lm_head.weight"] = torch.cat([state["lm_head.weight"], torch.zeros(1, 32)])
    for layer in range(2):
        ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
        query, key, value = state[f"{ours}.attn.attn.weight"].view(4, 3, 8, 32).unbind(1)
        renamed |= {
            f"{theirs}.self_attn.q_proj.weight": query.reshape(32, 32),
            f"{theirs}.self_attn.k_proj.weight": key.reshape(32, 32),
            f"{theirs}.self_attn.v_proj.weight": value.reshape(32, 32),
            f"{theirs}.self_attn.o_proj.weight": state[f"{ours}.attn.proj.weight"],
            f"{theirs}.mlp.gate_proj.weight": state[f"{ours}.mlp.swiglu.w1.weight"],
            f"{theirs}.mlp.up_proj.weight": state[f"{ours}.mlp.swiglu.w2.weight"],
            f"{theirs}.mlp.down_proj.weight": state[f"{ours}.mlp.swiglu.w3.weight"],
            f"{theirs}.input_layernorm.weight": state[f"{ours}.norm_1.weight"],
            f"{theirs}.post_attention_layernorm.weight": state[f"{ours}.norm_2.weight"],
        }
    llama.load_state_dict(renamed)
    llama.model.rotary_emb.register_forward_hook(lambda m, i, tables: tuple(t.bfloat16().float() for t in tables))
    tokens = torch.randint(0, 51, (3, 12))
    bidirectional = torch.zeros(3, 1, 12, 12)
    expected = llama(tokens, attention_mask=bidirectional).logits[..., :50]
    got = denoiser(tokens, torch.ones_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    causal = llama(tokens).logits[..., :50]
    assert (causal - expected).abs().max() > 0.1  # the comparison can fail


def test_load_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare file of a known size, as published; its number of heads is not in its shapes."""
    from orderppl.models.denoisers import smdm

    torch.manual_seed(0)
    denoiser = SmdmDenoiser(**TINY)
    save_file(denoiser.state_dict(), tmp_path / "mdm-tiny.safetensors")
    with pytest.raises(UserError, match=r"no SMDM of a known size \(170M, 1.1B\); put it into a folder"):
        load_denoiser(tmp_path / "mdm-tiny.safetensors")
    monkeypatch.setitem(smdm.SIZES, "tiny", TINY)
    loaded = load_denoiser(tmp_path / "mdm-tiny.safetensors")
    assert isinstance(loaded, SmdmDenoiser)
    assert loaded.config == denoiser.config
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    state = denoiser.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_loads_strictly(tmp_path: Path) -> None:
    SmdmDenoiser(**TINY).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    complete = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # not mapped from the file
    state = dict(complete)
    del state["transformer.h.1.attn.proj.weight"]
    save_file(state, weights)
    with pytest.raises(UserError, match=r"has no tensor 'transformer.h.1.attn.proj.weight'"):
        load_denoiser(tmp_path)
    save_file({**complete, "transformer.h.0.attn.bias": torch.zeros(2)}, weights)
    with pytest.raises(UserError, match=r"a tensor 'transformer.h.0.attn.bias' that this model lacks"):
        load_denoiser(tmp_path)
    save_file(complete, weights)
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "intermediate_size": 64}))
    with pytest.raises(UserError, match=r"swiglu.w1.weight' has shape \[48, 32\]"):
        load_denoiser(tmp_path)
    for wrong in ({"depth": 64}, {"n_head": 0}, {"n_embd": "32"}, {"intermediate_size": -1}):
        config.write_text(json.dumps({**content, **wrong}))
        with pytest.raises(UserError, match="no configuration of SMDM"):
            load_denoiser(tmp_path)
    config.write_text(json.dumps({**content, "n_layer": 10**12}))
    with pytest.raises(UserError, match="has 2 layers, its config.json says otherwise"):
        load_denoiser(tmp_path)
    config.write_text(json.dumps(content))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_denoiser(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_denoiser(tmp_path)


def test_bad_architectures() -> None:
    with pytest.raises(UserError, match="3 heads do not split"):
        SmdmDenoiser(n_head=3, n_embd=32)
    denoiser = SmdmDenoiser(**TINY)
    with pytest.raises(UserError, match="a canvas of 65 tokens exceeds the model's 64"):
        denoiser(torch.zeros(1, 65, dtype=torch.long), torch.ones(1, 65, dtype=torch.bool))


def test_rotary_tables_are_bit_equal_to_theirs() -> None:
    """1 / base ** (k / n), rounded to bfloat16: the other way to write it gives other tables beyond position 104."""
    from orderppl.models.denoisers.smdm import _rotary

    k, size, positions = torch.arange(0, 64, 2).float(), 64, torch.arange(2048)
    theirs = torch.outer(positions.float(), 1.0 / (10_000 ** (k / size)))
    cos, sin = _rotary(positions[None], size, torch.float32)
    assert torch.equal(cos[0, 0, :, :32], theirs.cos().bfloat16().float())
    assert torch.equal(sin[0, 0, :, 32:], theirs.sin().bfloat16().float())
    other = torch.outer(positions.float(), 10_000.0 ** (-k / size)).cos().bfloat16().float()
    assert not torch.equal(cos[0, 0, :, :32], other)


def test_is_described_by_its_arguments() -> None:
    denoiser = SmdmDenoiser(**TINY)
    spec = describe(denoiser)
    assert spec["class_path"] == "orderppl.models.denoisers.smdm.SmdmDenoiser"
    assert spec["init_args"].items() >= TINY.items()
    assert build(describe(denoiser)).config == denoiser.config
