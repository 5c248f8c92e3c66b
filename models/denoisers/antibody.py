"""A pretrained masked model of human antibody variable domains, read from a package that ships its weights."""

from __future__ import annotations

import argparse
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.models.denoisers.framing import frame
from orderppl.models.denoisers.wheels import wheel_file

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
START, PADDING, END, UNKNOWN, FIRST_RESIDUE, MASK = 0, 1, 2, 3, 4, 24
PACKAGE, VERSION = "sapiens", "1.0.5"


class _Layer(nn.Module):
    """Post-norm transformer layer, as in BERT."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, hidden: Tensor, keys: Tensor) -> Tensor:
        n, s, _ = hidden.shape
        q, k, v = (
            project(hidden).view(n, s, self.heads, -1).transpose(1, 2)  # [N, H, S, W/H]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None])
        hidden = self.norm_attention(hidden + self.out_proj(mixed.transpose(1, 2).flatten(-2)))
        normed: Tensor = self.norm_mlp(hidden + self.fc2(F.gelu(self.fc1(hidden))))
        return normed


class AntibodyDenoiser(nn.Module):
    """Sapiens (Prihoda et al., mAbs 2022): RoBERTa with 4 layers x 128, trained on human antibody domains.

    The canvas holds residues only, as ids 4 to 23 of `RESIDUES`, MASK 24 and any padding; the start and end tokens of
    the pretrained model are put around the attended residues here. Tokens that are not residues get -inf.

    Args:
        max_residues: longest domain the position table covers.
        width: size of the hidden vectors.
        layers: number of layers.
        heads: attention heads.
        mlp: width of the feed-forward networks.
    """

    def __init__(
        self, max_residues: int = 142, width: int = 128, layers: int = 4, heads: int = 8, mlp: int = 256
    ) -> None:
        super().__init__()
        self.vocab_size, self.mask_index, self.max_residues = MASK + 1, MASK, max_residues
        self.config = {"max_residues": max_residues, "width": width, "layers": layers, "heads": heads, "mlp": mlp}
        self.embed_tokens = nn.Embedding(MASK + 1, width)
        self.embed_positions = nn.Embedding(max_residues + 4, width)  # <s>, </s>, and fairseq's offset of 2
        self.norm_embedding = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, heads, mlp) for _ in range(layers))
        self.dense, self.norm_head = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(MASK + 1))

    @classmethod
    def from_wheel(cls, chain: Literal["H", "L"] = "H") -> AntibodyDenoiser:
        """The published weights for heavy (`H`) or light (`L`) chains, trainable, in evaluation mode.

        The package is only searched for its files; its code is not imported.

        Raises:
            UserError: the package is missing or has other contents.
        """
        if chain not in ("H", "L"):
            raise UserError("chain", f"unknown antibody chain {chain!r}", "use H or L")
        path = wheel_file(PACKAGE, VERSION, f"checkpoint_v{chain.lower()}.pt", "the antibody weights")
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        return cls._from_fairseq(weights)

    @classmethod
    def _from_fairseq(cls, weights: dict[str, Tensor]) -> AntibodyDenoiser:
        """Rename the tensors of a fairseq RoBERTa checkpoint."""
        encoder = "decoder.sentence_encoder."
        names = {
            f"{encoder}embed_tokens.weight": "embed_tokens.weight",
            f"{encoder}embed_positions.weight": "embed_positions.weight",
            f"{encoder}emb_layer_norm.": "norm_embedding.",
            f"{encoder}layers.": "layers.",
            ".self_attn_layer_norm.": ".norm_attention.",
            ".final_layer_norm.": ".norm_mlp.",
            ".self_attn.": ".",
            "decoder.lm_head.dense.": "dense.",
            "decoder.lm_head.layer_norm.": "norm_head.",
            "decoder.lm_head.bias": "bias",
        }
        renamed = {}
        for name, tensor in weights.items():
            if name == "decoder.lm_head.weight":  # tied to the embedding
                continue
            for old, new in names.items():
                name = name.replace(old, new)
            renamed[name] = tensor
        denoiser = cls(max_residues=len(renamed["embed_positions.weight"]) - 4)
        try:
            denoiser.load_state_dict(renamed)
        except RuntimeError as error:
            raise UserError(
                "denoiser", f"the antibody weights have other tensors ({error})", f"install {PACKAGE}=={VERSION}"
            ) from error
        return denoiser.eval()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.denoising.Denoiser`.

        Raises:
            UserError: the canvas is longer than the position table.
        """
        size = state.shape[-1]
        if size > self.max_residues:
            raise UserError(
                "tokens",
                f"a canvas of {size} residues exceeds the antibody model's {self.max_residues}",
                "use variable domains only",
            )
        framed = frame(state, attention_mask, START, END, PADDING)
        keys = framed.keys  # [N, F]
        position = torch.where(keys, torch.arange(2, keys.shape[-1] + 2, device=state.device), PADDING)

        hidden = self.norm_embedding(self.embed_tokens(framed.tokens) + self.embed_positions(position))
        for layer in self.layers:
            hidden = layer(hidden, keys)
        hidden = framed.unframe(hidden)  # [N, S, W]
        hidden = self.norm_head(F.gelu(self.dense(hidden)))
        logits = F.linear(hidden, self.embed_tokens.weight, self.bias)
        token = torch.arange(self.vocab_size, device=state.device)
        return logits.masked_fill((token < FIRST_RESIDUE) | (token >= MASK), -torch.inf)

    @staticmethod
    def encode(sequence: str) -> list[int]:
        """Token ids of a sequence of one-letter residues.

        Raises:
            UserError: a letter that is not one of the 20 residues.
        """
        for place, letter in enumerate(sequence, 1):
            if letter not in RESIDUES:
                raise UserError(
                    "sequence", f"{letter!r} at position {place} is no residue", f"use letters of {RESIDUES}"
                )
        return [FIRST_RESIDUE + RESIDUES.index(letter) for letter in sequence]

    @staticmethod
    def decode(tokens: Tensor, attention_mask: Tensor | None = None) -> str:
        """One-letter sequence of token ids int64 [L], `-` where not a residue."""
        kept = tokens if attention_mask is None else tokens[attention_mask.bool()]
        return "".join(
            RESIDUES[token - FIRST_RESIDUE] if FIRST_RESIDUE <= token < MASK else "-" for token in kept.tolist()
        )
