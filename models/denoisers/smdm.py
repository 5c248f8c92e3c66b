"""SMDM, the masked diffusion models of Nie et al. (arXiv 2410.18514), with the state-dict keys of their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.hub import fetch
from orderppl.inference.checkpoints import check_fingerprint, write_tensors, write_text
from orderppl.models.networks import attended_positions

MODEL_TYPE = "smdm"
WEIGHTS = "model.safetensors"
TOKENIZER = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"  # the one all published models were trained with


@dataclass(frozen=True)
class SmdmConfig:
    """Architecture; the names are those of the published configurations.

    Attributes:
        n_layer: blocks.
        n_head: attention heads.
        n_embd: size of the hidden vectors.
        intermediate_size: width of the gated feed-forward networks.
        vocab_size: token classes V of the output head. MASK is V: it is embedded, but no class.
        block_size: longest canvas.
        norm_eps: of the root-mean-square norms.
    """

    n_layer: int = 18
    n_head: int = 12
    n_embd: int = 768
    intermediate_size: int = 3072
    vocab_size: int = 32_000
    block_size: int = 2048
    norm_eps: float = 1e-5


SIZES = {"170M": SmdmConfig(), "1.1B": SmdmConfig(20, 14, 1792, 7168)}
"""The two sizes with published downstream models; 1.1B is `1028M` in its file names, which do not count embeddings."""


class _Attention(nn.Module):
    """Bidirectional attention; the rows of `attn` are query, key and value of head 0, then those of head 1, ..."""

    def __init__(self, config: SmdmConfig) -> None:
        super().__init__()
        self.heads = config.n_head
        self.attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, hidden: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        n, s, width = hidden.shape
        qkv = self.attn(hidden).view(n, s, self.heads, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [N, H, S, W/H] each
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return projected


class _SwiGLU(nn.Module):
    """Gated feed-forward network (Shazeer 2020): w3(silu(w1 x) * w2 x)."""

    def __init__(self, config: SmdmConfig) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(config.n_embd, config.intermediate_size, bias=False) for _ in range(2))
        self.w3 = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gated: Tensor = self.w3(F.silu(self.w1(hidden)) * self.w2(hidden))
        return gated


class _Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: SmdmConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.attn = _Attention(config)
        self.mlp = nn.ModuleDict({"swiglu": _SwiGLU(config)})

    def forward(self, hidden: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.attn(self.norm_1(hidden), keys, rotary)
        mixed: Tensor = hidden + self.mlp["swiglu"](self.norm_2(hidden))
        return mixed


class SmdmDenoiser(nn.Module):
    """A bidirectional LLaMA without biases; reads padding anywhere, positions count attended tokens.

    Args:
        config: the architecture, or the name of a published size ("170M", "1.1B").
    """

    def __init__(self, config: SmdmConfig | str = "170M") -> None:
        super().__init__()
        if isinstance(config, str):
            if config not in SIZES:
                raise UserError("config", f"unknown size {config!r}", f"use one of {', '.join(SIZES)}, or a SmdmConfig")
            config = SIZES[config]
        if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
            raise UserError(
                "n_head", f"{config.n_head} heads do not split width {config.n_embd} evenly", "use e.g. 12 for 768"
            )
        self.architecture = config
        self.config = {"model_type": MODEL_TYPE, **asdict(config)}
        self.vocab_size = self.mask_index = config.vocab_size
        self.max_length = config.block_size
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size + 1, config.n_embd),
                "h": nn.ModuleList(_Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.RMSNorm(config.n_embd, config.norm_eps),
            }
        )

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, dtype: torch.dtype = torch.float32
    ) -> SmdmDenoiser:
        """Load weights strictly, in evaluation mode.

        Args:
            name_or_path: a safetensors file, such as `nieshen/SMDM/mdm_safetensors/mdm-170M-100e18.safetensors` on the
                hub, whose size is recognised if it is in `SIZES`; or a folder of `config.json` and `model.safetensors`.
            revision: branch, tag or commit on the hub.
            dtype: of the parameters.

        Raises:
            UserError: the files are missing, damaged or of another architecture.
        """
        path = fetch(name_or_path, revision, field="denoiser")
        weights = path / WEIGHTS if path.is_dir() else path
        try:
            with safe_open(weights, framework="pt") as file:
                shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                beside = weights.with_name("config.json")
                config = _read_config(beside) if path.is_dir() and beside.is_file() else _recognise(shapes, weights)
                with torch.device("meta"):
                    denoiser = cls(config)
                check_fingerprint(shapes, denoiser, weights)
                tensors = {name: file.get_tensor(name).to(dtype) for name in shapes}
        except FileNotFoundError as error:
            raise UserError("denoiser", f"{weights} does not exist", "give the safetensors file of a model") from error
        except (SafetensorError, OSError) as error:
            problem = f"{weights} cannot be read ({error})"
            raise UserError("denoiser", problem, "give a complete safetensors file") from error
        denoiser.load_state_dict(tensors, assign=True)
        return denoiser.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self.state_dict())
        write_text(folder / "config.json", json.dumps(self.config, indent=2) + "\n")

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.denoising.Denoiser`.

        Raises:
            UserError: the canvas is longer than `block_size`.
        """
        return self.output_logits(self.hidden_states(state, attention_mask))

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head: float [.., W] -> [.., V]."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head, float [N, S, W]; see `orderppl.denoising.SplitDenoiser`."""
        if state.shape[-1] > self.max_length:
            problem = f"a canvas of {state.shape[-1]} tokens exceeds the model's {self.max_length}"
            raise UserError("max_length", problem, "shorten prompt or response")
        attended = attention_mask.bool()
        keys = attended | ~attended.any(-1, keepdim=True)  # a row of nothing but padding looks everywhere
        hidden = self.transformer["wte"](state)  # [N, S, W]
        rotary = _rotary(attended_positions(attended), self.architecture.n_embd // self.architecture.n_head)
        rotary = rotary[0].to(hidden.dtype), rotary[1].to(hidden.dtype)
        for block in self.transformer["h"].children():
            hidden = block(hidden, keys, rotary)
        normed: Tensor = self.transformer["ln_f"](hidden)
        return normed


def _rotary(position: Tensor, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines, bfloat16 [N, 1, S, size]: the models were trained with tables as coarse."""
    rate = base ** (-torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size)
    angle = position[..., None].float() * rate  # [N, S, size/2]
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos().bfloat16(), angle.sin().bfloat16()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _recognise(shapes: Mapping[str, list[int]], source: Path) -> SmdmConfig:
    """The published size that tensors of these shapes have; shapes do not tell the number of heads."""
    layers = sum(name.endswith(".attn.attn.weight") for name in shapes)
    for config in SIZES.values():
        if (config.n_layer, [config.vocab_size + 1, config.n_embd]) == (layers, shapes.get("transformer.wte.weight")):
            return config
    problem = f"{source} is no SMDM of a known size ({', '.join(SIZES)})"
    remedy = f"put it into a folder as {WEIGHTS}, beside a config.json with model_type {MODEL_TYPE} and its sizes"
    raise UserError("denoiser", problem, remedy)


def _read_config(path: Path) -> SmdmConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("model_type")
        return SmdmConfig(**content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        remedy = f"give model_type {MODEL_TYPE} and {', '.join(SmdmConfig.__dataclass_fields__)}"
        raise UserError("denoiser", f"{path} is no configuration of SMDM ({error})", remedy) from error
