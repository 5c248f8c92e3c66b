"""SMDM, the masked diffusion models of Nie et al. (arXiv 2410.18514), with the state-dict keys of their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer
from orderppl.errors import UserError, first_line
from orderppl.files import check_shapes, read_tensors, shapes_of, write_tensors, write_text
from orderppl.models.backbone import Rotary, attended_positions, rotary_tables, rotate

MODEL_TYPE = "smdm"
WEIGHTS = "model.safetensors"
TOKENIZER = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"  # the one all published models were trained with
SIZES: dict[str, dict[str, Any]] = {
    "170M": {"n_layer": 18, "n_head": 12, "n_embd": 768, "intermediate_size": 3072},
    "1.1B": {"n_layer": 20, "n_head": 14, "n_embd": 1792, "intermediate_size": 7168},
}
"""Arguments of the two sizes with published downstream models; 1.1B is `1028M` in its file names."""


class _Attention(nn.Module):
    """Bidirectional attention; the rows of `attn` are query, key and value of head 0, then those of head 1, ..."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, keys: Tensor, rotary: Rotary) -> Tensor:
        n, s, width = hidden.shape
        qkv = self.attn(hidden).view(n, s, self.heads, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [N, H, S, W/H] each
        q, k = rotate(q, rotary), rotate(k, rotary)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return projected


class _SwiGLU(nn.Module):
    """Gated feed-forward network (Shazeer 2020): w3(silu(w1 x) * w2 x)."""

    def __init__(self, width: int, mlp: int) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(width, mlp, bias=False) for _ in range(2))
        self.w3 = nn.Linear(mlp, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gated: Tensor = self.w3(F.silu(self.w1(hidden)) * self.w2(hidden))
        return gated


class _Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, mlp: int, eps: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(width, eps) for _ in range(2))
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"swiglu": _SwiGLU(width, mlp)})

    def forward(self, hidden: Tensor, keys: Tensor, rotary: Rotary) -> Tensor:
        hidden = hidden + self.attn(self.norm_1(hidden), keys, rotary)
        mixed: Tensor = hidden + self.mlp["swiglu"](self.norm_2(hidden))
        return mixed


class SmdmDenoiser(Configurable, nn.Module):
    """A bidirectional LLaMA without biases; reads padding anywhere, positions count attended tokens.

    Arguments have the names and defaults of the published configurations.

    Args:
        n_layer: blocks.
        n_head: attention heads.
        n_embd: size of the hidden vectors.
        intermediate_size: width of the gated feed-forward networks.
        vocab_size: token classes V of the output head. MASK is V: it is embedded, but no class.
        block_size: longest canvas.
        norm_eps: of the root-mean-square norms.
        tokenizer: of its texts.

    Raises:
        UserError: heads that do not fit the width.
    """

    def __init__(
        self,
        n_layer: int = 18,
        n_head: int = 12,
        n_embd: int = 768,
        intermediate_size: int = 3072,
        vocab_size: int = 32_000,
        block_size: int = 2048,
        norm_eps: float = 1e-5,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        if n_embd % n_head or n_embd // n_head % 2:
            raise UserError("n_head", f"{n_head} heads do not split width {n_embd} evenly", "use e.g. 12 for 768")
        self.config: dict[str, Any] = {
            "model_type": MODEL_TYPE,
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": n_embd,
            "intermediate_size": intermediate_size,
            "vocab_size": vocab_size,
            "block_size": block_size,
            "norm_eps": norm_eps,
        }
        self.vocab_size = self.mask_index = vocab_size
        self.max_length, self.tokenizer = block_size, tokenizer
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size + 1, n_embd),
                "h": nn.ModuleList(_Block(n_embd, n_head, intermediate_size, norm_eps) for _ in range(n_layer)),
                "ln_f": nn.RMSNorm(n_embd, norm_eps),
            }
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors` and the tokeniser into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_text(folder / "config.json", json.dumps(self.config, indent=2) + "\n")
        if isinstance(self.tokenizer, PretrainedTokenizer):
            self.tokenizer.tokenizer.save_pretrained(str(folder))

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`.

        Raises:
            UserError: the canvas is longer than `block_size`.
        """
        return self.output_logits(self.hidden_states(state, attention_mask))

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head: float [.., W] -> [.., V]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head, float [N, S, W]; see `orderppl.unmasking.SplitDenoiser`."""
        if state.shape[-1] > self.max_length:
            problem = f"a canvas of {state.shape[-1]} tokens exceeds the model's {self.max_length}"
            raise UserError("max_length", problem, "shorten prompt or response")
        attended = attention_mask.bool()
        keys = attended | ~attended.any(-1, keepdim=True)  # a row of nothing but padding looks everywhere
        hidden = self.transformer["wte"](state)  # [N, S, W]
        rotary = _rotary(attended_positions(attended), self.config["n_embd"] // self.config["n_head"], hidden.dtype)
        for block in self.transformer["h"].children():
            hidden = block(hidden, keys, rotary)
        normed: Tensor = self.transformer["ln_f"](hidden)
        return normed


def _rotary(position: Tensor, size: int, dtype: torch.dtype) -> Rotary:
    """Tables rounded to bfloat16, from frequencies in their form: the models were trained with both."""
    rate = 1.0 / 10_000.0 ** (torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size)
    cos, sin = rotary_tables(position, rate)
    return cos.bfloat16().to(dtype), sin.bfloat16().to(dtype)


def load_smdm(path: Path, dtype: torch.dtype = torch.float32) -> SmdmDenoiser:
    """Load weights strictly.

    Args:
        path: a safetensors file, whose size is recognised if it is in `SIZES`, or a folder of `config.json` and
            `model.safetensors`.
        dtype: of the parameters.

    Raises:
        UserError: the files are missing, damaged or of another architecture.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    tensors = read_tensors(weights)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    layers = sum(name.endswith(".attn.attn.weight") for name in tensors)
    arguments = _read_config(path / "config.json") if path.is_dir() else _recognise(shapes, layers, weights)
    if arguments.get("n_layer", SIZES["170M"]["n_layer"]) != layers:
        problem = f"{weights} has {layers} layers, its config.json says otherwise"
        raise UserError("denoiser", problem, "give weights and configuration of one model")
    try:
        with torch.device("meta"):
            denoiser = SmdmDenoiser(**arguments)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        problem = f"{path} has no configuration of SMDM ({first_line(error)})"
        raise UserError("denoiser", problem, "give the arguments of SmdmDenoiser") from error
    check_shapes(shapes, shapes_of(denoiser), weights)
    denoiser.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return denoiser


def _recognise(shapes: Mapping[str, list[int]], layers: int, source: Path) -> dict[str, Any]:
    """The published size that tensors of these shapes have; shapes do not tell the number of heads."""
    for size in SIZES.values():
        embedding = [size.get("vocab_size", 32_000) + 1, size["n_embd"]]
        if (layers, embedding) == (size["n_layer"], shapes.get("transformer.wte.weight")):
            return size
    problem = f"{source} is no SMDM of a known size ({', '.join(SIZES)})"
    remedy = f"put it into a folder as {WEIGHTS}, beside a config.json with model_type {MODEL_TYPE} and its sizes"
    raise UserError("denoiser", problem, remedy)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        return {key: value for key, value in content.items() if key != "model_type"}
    except (OSError, ValueError, TypeError) as error:
        remedy = f"give model_type {MODEL_TYPE} and the arguments of SmdmDenoiser"
        raise UserError("denoiser", f"{path} is no configuration of SMDM ({first_line(error)})", remedy) from error
