"""A bidirectional transformer, and convolutions over neighbouring positions: what every network here is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    """Turn queries, keys or both, float [*, N, H, S, size], by their positions."""
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
        turned = qkv[:2] if rotary is None else rotate(qkv[:2], rotary).to(qkv.dtype)
        return turned[0], turned[1], qkv[2]  # [N, H, S, W/H]

    def attend(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Add to float [N, S, W] what its queries find in K keys and values, under a bias float [N, 1, S, K]."""
        n, s, width = hidden.shape
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # [N, H, S, W/H]
        return hidden + self.out(mixed.transpose(1, 2).reshape(n, s, width))

    def transform(self, hidden: Tensor) -> Tensor:
        """Add the GELU network, which works at each position by itself: float [.., W] -> [.., W]."""
        return hidden + self.mlp(self.norm_mlp(hidden))


@dataclass
class Layout:
    """What a backbone has to know of N rows beside their embedded tokens.

    Attributes:
        added: float [N, S, W], what is added to the embeddings; None where nothing is.
        rotary: tables of the positions; None with learned positions.
        bias: float [N, 1, 1 or S, K], of queries to keys.
        past: float [N, layers, 2, H, C, W/H], keys and values of tokens that stand before the rows, which are the first
            C of the K keys; None without such.
    """

    added: Tensor | None
    rotary: Rotary | None
    bias: Tensor
    past: Tensor | None = None

    def rows(self, index: Tensor) -> Layout:
        """That of the rows in `index`, int64 or bool."""
        added = None if self.added is None else self.added[index]
        rotary = None if self.rotary is None else (self.rotary[0][index], self.rotary[1][index])
        return Layout(added, rotary, self.bias[index], None if self.past is None else self.past[index])


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

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Mix embedded tokens.

        Args:
            hidden: float [N, S, W].
            attention_mask: bool [N, S].

        Returns:
            float [N, S, W], normalised; finite but meaningless at padding.
        """
        return self.finish(self.mix(hidden, self.lay_out(attention_mask)))

    def lay_out(
        self, attention_mask: Tensor, position: Tensor | None = None, is_prompt: Tensor | None = None
    ) -> Layout:
        """Prepare for rows, whatever their tokens.

        Args:
            attention_mask: bool [N, S].
            position: int64 [N, S]; the index among attended tokens when left out.
            is_prompt: bool [N, S], attended tokens that attend to one another only.
        """
        if position is None:
            position = attended_positions(attention_mask)  # [N, S]
        bias = self._bias(attention_mask)
        if is_prompt is not None:
            bias = bias.masked_fill((is_prompt[:, :, None] & ~is_prompt[:, None])[:, None], -torch.inf)
        return Layout(*self._place(position), bias)

    def lay_out_behind(self, past: Tensor, past_mask: Tensor, attention_mask: Tensor, position: Tensor) -> Layout:
        """Prepare for rows behind others, of which `keys_values` (with their mask, bool [N, C]) are known."""
        return Layout(*self._place(position), self._bias(torch.cat([past_mask, attention_mask], -1)), past)

    def mix(self, hidden: Tensor, layout: Layout, start: int = 0) -> Tensor:
        """Do all in which positions read one another.

        Args:
            hidden: float [N, S, W], embedded tokens.
            layout: of the rows.
            start: the last block leaves out the positions before this one.

        Returns:
            float [N, S - start, W], the residual stream behind the last attention.
        """
        hidden, bias = self._enter(hidden, layout)
        for layer, block in enumerate(self._blocks()):
            q, k, v = block.project(hidden, layout.rotary)
            if layout.past is not None:
                k, v = torch.cat([layout.past[:, layer, 0], k], 2), torch.cat([layout.past[:, layer, 1], v], 2)
            is_last = layer == len(self.blocks) - 1
            if start and is_last:
                hidden, q, bias = hidden[:, start:], q[:, :, start:], bias[:, :, start:]
            hidden = block.attend(hidden, q, k, v, bias)
            if not is_last:
                hidden = block.transform(hidden)
        return hidden

    def finish(self, mixed: Tensor) -> Tensor:
        """Do what follows the last attention, at each position by itself: float [.., W] -> [.., W], normalised."""
        if len(self.blocks):
            mixed = cast(Block, self.blocks[-1]).transform(mixed)
        normed: Tensor = self.norm(mixed)
        return normed

    def keys_values(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Keys and values of every block, for tokens that come after: float [N, layers, 2, H, S, W/H]."""
        hidden, bias = self._enter(hidden, layout)
        kept = []
        for block in self._blocks():
            q, k, v = block.project(hidden, layout.rotary)
            kept.append(torch.stack([k, v], 1))
            hidden = block.transform(block.attend(hidden, q, k, v, bias))
        return torch.stack(kept, 1)

    def _blocks(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.blocks)

    def _enter(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Start of the residual stream, float [N, S, W], and the bias of its queries, float [N, 1, S, K]."""
        if layout.added is not None:
            hidden = hidden + layout.added
        return self.norm_input(hidden), layout.bias.expand(-1, -1, hidden.shape[1], -1)

    def _place(self, position: Tensor) -> tuple[Tensor | None, Rotary | None]:
        """What positions (int64 [N, S]) add to embeddings, and the tables of rotary ones: one of the two."""
        if self.embed_position is None:
            size = self.width // self.heads
            exponent = -torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size
            return None, rotary_tables(position, 10_000.0**exponent)
        if position.shape[1] > self.embed_position.num_embeddings:
            raise UserError(
                "max_length",
                f"a canvas of {position.shape[1]} exceeds the {self.embed_position.num_embeddings} learned positions",
                "shorten the sequences or build the network with a larger max_length",
            )
        return self.embed_position(position), None

    def _bias(self, keys: Tensor) -> Tensor:
        """Attention bias of queries to K keys, float [N, 1, 1, K], from which keys are attended, bool [N, K]."""
        # A row without any attended key would give a softmax over nothing; let it look everywhere instead.
        keys = keys | ~keys.any(-1, keepdim=True)
        bias = torch.zeros_like(keys, dtype=self.norm.weight.dtype)
        return bias.masked_fill(~keys, -torch.inf)[:, None, None]


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
