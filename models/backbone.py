"""A bidirectional transformer, and convolutions over neighbouring positions: what every network here is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.errors import UserError

MOST_LAYERS, LARGEST = 10_000, 10**11  # what is refused before memory is asked for it

Positions = Literal["rotary", "learned"]
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of rotary embeddings, float [N, 1, S, size] each."""


def attended_positions(attention_mask: Tensor) -> Tensor:
    """Index of every position among the attended ones: int64 [*, S] from bool [*, S]; 0 at leading padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def rotary_tables(position: Tensor, rate: Tensor) -> Rotary:
    """Tables of rotary embeddings (Su et al. 2021, eq. 34) from positions [N, S] and frequencies [size / 2]."""
    angle = position[..., None].float() * rate  # [N, S, size/2]
    angle = torch.cat([angle, angle], -1)[:, None]  # [N, 1, S, size]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn queries or keys, float [N, H, S, size], by their positions."""
    left, right = x.chunk(2, -1)
    return x * rotary[0] + torch.cat([-right, left], -1) * rotary[1]


class Block(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020): attention, then a GELU network, each added to its input."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def project(self, hidden: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of float [N, S, W]: float [N, H, S, W/H] each."""
        n, s, _ = hidden.shape
        qkv = self.qkv(self.norm_attention(hidden)).view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [N, H, S, W/H]
        if rotary is not None:
            q, k = rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype)
        return q, k, v

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Add to float [N, S, W] what its queries find in K keys and values, under a bias float [N, 1, S, K]."""
        n, s, width = hidden.shape
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # [N, H, S, W/H]
        return hidden + self.out(mixed.transpose(1, 2).reshape(n, s, width))

    def transform(self, hidden: Tensor) -> Tensor:
        """Add the GELU network, which works at each position by itself: float [.., W] -> [.., W]."""
        return hidden + self.mlp(self.norm_mlp(hidden))


class Backbone(nn.Module):
    """Bidirectional pre-norm transformer over embedded sequences.

    Args:
        width: size of the hidden vectors.
        layers: number of blocks.
        heads: attention heads; divides `width`.
        mlp: width of the feed-forward networks; 4 x `width` when left out.
        positions: `rotary`, or `learned` embeddings. Both count attended tokens, so padding anywhere changes nothing.
        max_length: number of learned positions.

    Raises:
        UserError: heads do not divide the width, or learned positions without a length.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp: int | None = None,
        positions: Positions = "rotary",
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if layers > MOST_LAYERS or layers * width**2 > LARGEST:
            problem = f"{layers} layers of width {width} are too many numbers"
            raise UserError("width", problem, "use e.g. 3 layers of width 128")
        if width % heads or (width // heads) % 2:
            raise UserError("heads", f"{heads} heads do not split width {width} evenly", "use e.g. width 128, heads 4")
        if positions not in ("rotary", "learned"):
            raise UserError("positions", f"unknown kind {positions!r}", "use rotary or learned")
        self.width, self.heads = width, heads
        self.embed_position: nn.Embedding | None = None
        if positions == "learned":
            if max_length is None:
                raise UserError("max_length", "learned positions need a length", "give it or use rotary positions")
            self.embed_position = nn.Embedding(max_length, width)
            nn.init.normal_(self.embed_position.weight, std=0.02)
        # Embeddings of any scale start the residual stream at scale 1, as large as what the blocks add to it.
        self.norm_input = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp or 4 * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("out.weight", "mlp.2.weight")):  # GPT-2: residual paths keep their variance
                parameter.data.div_(math.sqrt(2 * layers))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor,
        position: Tensor | None = None,
        is_prompt: Tensor | None = None,
        before: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Mix embedded tokens: `finish` after `mix`, which has the arguments.

        Returns:
            float [N, S - start, W], normalised; finite but meaningless at padding.
        """
        return self.finish(self.mix(hidden, attention_mask, position, is_prompt, before, start))

    def finish(self, mixed: Tensor) -> Tensor:
        """All that follows the last attention, at each position by itself: float [.., W] -> [.., W], normalised."""
        if len(self.blocks):
            mixed = cast(Block, self.blocks[-1]).transform(mixed)
        normed: Tensor = self.norm(mixed)
        return normed

    def mix(
        self,
        hidden: Tensor,
        attention_mask: Tensor,
        position: Tensor | None = None,
        is_prompt: Tensor | None = None,
        before: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """All in which positions read one another.

        Args:
            hidden: float [N, S, W].
            attention_mask: bool [N, S].
            position: int64 [N, S]; the index among attended tokens when left out.
            is_prompt: bool [N, S], attended tokens that attend to one another only.
            before: `keys_values` float [N, layers, 2, H, C, W/H] of tokens that stand before these, and which of them
                are attended, bool [N, C].
            start: the last block leaves out the positions before this one.

        Returns:
            float [N, S - start, W], the residual stream behind the last attention.
        """
        hidden, rotary = self._enter(hidden, attention_mask, position)
        past, keys = None, attention_mask
        if before is not None:
            past, keys = before[0], torch.cat([before[1], attention_mask], -1)  # [N, K]
        bias = self._bias(hidden, keys)
        if is_prompt is not None:
            bias = bias.masked_fill((is_prompt[:, :, None] & ~is_prompt[:, None])[:, None], -torch.inf)
        for layer, block in enumerate(self._blocks()):
            q, k, v = block.project(hidden, rotary)
            if past is not None:
                k, v = torch.cat([past[:, layer, 0], k], 2), torch.cat([past[:, layer, 1], v], 2)
            is_last = layer == len(self.blocks) - 1
            if start and is_last:
                hidden, q, bias = hidden[:, start:], q[:, :, start:], bias[:, :, start:]
            hidden = block.attend(hidden, q, k, v, bias)
            if not is_last:
                hidden = block.transform(hidden)
        return hidden

    def keys_values(self, hidden: Tensor, attention_mask: Tensor, position: Tensor | None = None) -> Tensor:
        """Keys and values of every block, for tokens that come after: float [N, layers, 2, H, S, W/H]."""
        hidden, rotary = self._enter(hidden, attention_mask, position)
        bias = self._bias(hidden, attention_mask)
        kept = []
        for block in self._blocks():
            q, k, v = block.project(hidden, rotary)
            kept.append(torch.stack([k, v], 1))
            hidden = block.transform(block.attend(hidden, q, k, v, bias))
        return torch.stack(kept, 1)

    def _blocks(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.blocks)

    def _enter(self, hidden: Tensor, attention_mask: Tensor, position: Tensor | None) -> tuple[Tensor, Rotary | None]:
        """Start of the residual stream, and the tables of rotary positions if these are used."""
        if position is None:
            position = attended_positions(attention_mask)  # [N, S]
        rotary = None
        if self.embed_position is not None:
            if hidden.shape[1] > self.embed_position.num_embeddings:
                raise UserError(
                    "max_length",
                    f"a canvas of {hidden.shape[1]} exceeds the {self.embed_position.num_embeddings} learned positions",
                    "shorten the sequences or build the network with a larger max_length",
                )
            hidden = hidden + self.embed_position(position)
        else:
            size = self.width // self.heads
            exponent = -torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size
            rotary = rotary_tables(position, 10_000.0**exponent)
        return self.norm_input(hidden), rotary

    @staticmethod
    def _bias(hidden: Tensor, keys: Tensor) -> Tensor:
        """Attention bias of S queries to K keys, float [N, 1, S, K] from which keys are attended, bool [N, K]."""
        # A row without any attended key would give a softmax over nothing; let it look everywhere instead.
        keys = keys | ~keys.any(-1, keepdim=True)
        bias = torch.zeros_like(keys, dtype=hidden.dtype).masked_fill(~keys, -torch.inf)[:, None, None]
        return bias.expand(-1, 1, hidden.shape[1], -1)


class Neighbours(nn.ModuleList):
    """Residual convolutions over the positions: what stands beside a position, and beside that.

        h <- gelu(h);  h <- h + conv(h),   once per layer

    Args:
        width: size of the hidden vectors.
        kernel: positions that a convolution sees, odd.
        layers: number of convolutions.
    """

    def __init__(self, width: int, kernel: int, layers: int = 2) -> None:
        super().__init__(nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in range(layers))

    def forward(self, hidden: Tensor, seen: Tensor, attended: Tensor) -> Tensor:
        """Mix float [N, S, W]; what is not seen (bool [N, S]) is zero, as what lies beyond the ends is.

        Padding (not in `attended`, bool [N, S]) takes no place: what stands on both sides of it are neighbours.
        """
        order = attended.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., None]  # padding last
        hidden, keep = hidden.gather(1, order.expand_as(hidden)), seen[..., None].gather(1, order)
        for conv in self:
            hidden = F.gelu(hidden) * keep
            hidden = hidden + conv(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden.gather(1, order.argsort(1).expand_as(hidden))
