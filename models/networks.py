"""Small bidirectional networks: a transformer, a table over positions, and what guides and policies put around them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor, nn

from orderppl.decoding.scores import entropy, entropy_before
from orderppl.denoising import distinct_rows
from orderppl.errors import UserError
from orderppl.models.price import PriceRange
from orderppl.states import UnmaskingState

Positions = Literal["rotary", "learned"]


def attended_positions(attention_mask: Tensor) -> Tensor:
    """Index of every position among the attended ones: int64 [*, S] from bool [*, S]; 0 at leading padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _rotary(position: Tensor, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables of rotary embeddings (Su et al. 2021, eq. 34): float [N, 1, S, size]."""
    rate = base ** (-torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size)
    angle = position[..., None].float() * rate  # [N, S, size/2]
    angle = torch.cat([angle, angle], -1)[:, None]  # [N, 1, S, size]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


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

    def project(self, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of float [N, S, W]: float [N, H, S, W/H] each."""
        n, s, _ = hidden.shape
        qkv = self.qkv(self.norm_attention(hidden)).view(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [N, H, S, W/H]
        if rotary is not None:
            q, k = _rotate(q, *rotary).to(v.dtype), _rotate(k, *rotary).to(v.dtype)
        return q, k, v

    def mix(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Transform float [N, S, W] by its queries to K keys and values, under an attention bias float [N, 1, S, K]."""
        n, s, width = hidden.shape
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # [N, H, S, W/H]
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(n, s, width))
        return hidden + self.mlp(self.norm_mlp(hidden))

    def forward(self, hidden: Tensor, bias: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Transform float [N, S, W] under an additive attention bias float [N, 1, S, S]."""
        return self.mix(hidden, *self.project(hidden, rotary), bias)


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
        """Mix embedded tokens.

        Args:
            hidden: float [N, S, W].
            attention_mask: bool [N, S].
            position: int64 [N, S]; the index among attended tokens when left out.
            is_prompt: bool [N, S], attended tokens that attend to one another only.
            before: `keys_values` float [N, layers, 2, H, C, W/H] of tokens that stand before these, and which of them
                are attended, bool [N, C].
            start: the last block leaves out the positions before this one.

        Returns:
            float [N, S - start, W], normalised; finite but meaningless at padding.
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
            if start and layer == len(self.blocks) - 1:
                hidden, q, bias = hidden[:, start:], q[:, :, start:], bias[:, :, start:]
            hidden = block.mix(hidden, q, k, v, bias)
        normed: Tensor = self.norm(hidden)
        return normed

    def keys_values(self, hidden: Tensor, attention_mask: Tensor, position: Tensor | None = None) -> Tensor:
        """Keys and values of every block, for tokens that come after: float [N, layers, 2, H, S, W/H]."""
        hidden, rotary = self._enter(hidden, attention_mask, position)
        bias = self._bias(hidden, attention_mask)
        kept = []
        for block in self._blocks():
            q, k, v = block.project(hidden, rotary)
            kept.append(torch.stack([k, v], 1))
            hidden = block.mix(hidden, q, k, v, bias)
        return torch.stack(kept, 1)

    def _blocks(self) -> Iterator[Block]:
        return (cast(Block, block) for block in self.blocks)

    def _enter(
        self, hidden: Tensor, attention_mask: Tensor, position: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
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
            rotary = _rotary(position, self.width // self.heads)
        return self.norm_input(hidden), rotary

    @staticmethod
    def _bias(hidden: Tensor, keys: Tensor) -> Tensor:
        """Attention bias of S queries to K keys, float [N, 1, S, K] from which keys are attended, bool [N, K]."""
        # A row without any attended key would give a softmax over nothing; let it look everywhere instead.
        keys = keys | ~keys.any(-1, keepdim=True)
        bias = torch.zeros_like(keys, dtype=hidden.dtype).masked_fill(~keys, -torch.inf)[:, None, None]
        return bias.expand(-1, 1, hidden.shape[1], -1)


def _join(
    tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Put the prompt, if any, before the response: ids int64 [N, C + L] and attention bool [N, C + L]."""
    if context is None:
        return tokens, attention_mask
    if context_mask is None:
        context_mask = torch.ones_like(context, dtype=torch.bool)
    return torch.cat([context, tokens], -1), torch.cat([context_mask.bool(), attention_mask], -1)


def _places(attention_mask: Tensor, size: int) -> Tensor:
    """Sinusoids of the distance to the left and to the right end of the row: float [B, L, size], size even."""
    left = attended_positions(attention_mask)  # [B, L]
    right = (attention_mask.sum(-1, keepdim=True) - 1 - left).clamp(min=0)
    rate = 0.5 ** torch.arange(size // 4 + 1, device=left.device) * math.pi  # wavelengths 2, 4, 8, ...
    halves = []
    for distance in (left, right):
        angle = distance[..., None] * rate
        halves.append(torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)[..., : size // 2])
    return torch.cat(halves, -1)


class SequenceEncoder(nn.Module):
    """Transformer over prompt and response that gives every response position a vector.

    Args:
        vocab_size: number of token ids, specials and MASK included.
        out: numbers per position, e.g. T for a mean-field guide and 1 for scores.
        width: size of the hidden vectors.
        layers: number of blocks.
        heads: attention heads.
        positions: kind of position information.
        max_length: longest prompt plus response; needed for learned positions.
        zero_init: start with all outputs 0.
    """

    def __init__(
        self,
        vocab_size: int,
        out: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        positions: Positions = "rotary",
        max_length: int | None = None,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.config = {
            "vocab_size": vocab_size,
            "out": out,
            "width": width,
            "layers": layers,
            "heads": heads,
            "positions": positions,
            "max_length": max_length,
        }
        self.placeholder = vocab_size  # stands at response positions that may not be seen
        self.embed = nn.Embedding(vocab_size + 1, width)
        # Tells response tokens from prompt tokens, which use the same ids, and from each other: rotary attention alone
        # cannot tell equal placeholders apart.
        self.place = nn.Linear(2 * (width // 2), width)
        self.backbone = Backbone(width, layers, heads, positions=positions, max_length=max_length)
        self.head = nn.Linear(width, out)
        nn.init.zeros_(self.head.bias)
        if zero_init:
            nn.init.zeros_(self.head.weight)

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode the response positions.

        Args:
            tokens: int64 [B, L], or None when the response may not be seen.
            attention_mask: bool [B, L].
            context: int64 [B, C], prompt.
            context_mask: bool [B, C].

        Returns:
            float [B, L, out].
        """
        attention_mask = attention_mask.bool()
        if tokens is None:
            tokens = torch.full_like(attention_mask, self.placeholder, dtype=torch.long)
        length = tokens.shape[-1]
        ids, attention = _join(tokens, attention_mask, context, context_mask)
        hidden = self.embed(ids)  # [B, C + L, W]
        place = self.place(_places(attention_mask, self.place.in_features).to(hidden.dtype))  # [B, L, W]
        split = ids.shape[1] - length
        hidden = torch.cat([hidden[:, :split], hidden[:, split:] + place], 1)
        encoded: Tensor = self.head(self.backbone(hidden, attention)[:, -length:])
        return encoded


class PositionTable(nn.Module):
    """Free numbers per position: the simplest plan of a whole order, blind to tokens and prompt.

    Args:
        length: longest response.
        out: numbers per position.
        split: the first `split` positions of a row are indexed from its left end and the others from its right end,
            so that rows of different lengths are aligned at both ends (variable domains of antibodies). None
            indexes everything from the left.
        noise: standard deviation of the initial numbers.
        periodic: repeat the table, for rows of any length: a pattern over the positions.

    Raises:
        UserError: a split outside the table, or of a periodic one.
    """

    def __init__(
        self, length: int, out: int, split: int | None = None, noise: float = 0.0, periodic: bool = False
    ) -> None:
        super().__init__()
        if split is not None and not 0 <= split <= length:
            raise UserError("split", f"{split} is outside a table of {length} positions", "use 0 to the length")
        if split is not None and periodic:
            raise UserError("split", "a repeated table has no right end", "leave out split or period")
        self.length, self.split, self.periodic = length, split, periodic
        self.config = {"length": length, "out": out, "split": split, "periodic": periodic}
        self.logits = nn.Parameter(noise * torch.randn(length, out))

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Look the positions up; only `attention_mask` (bool [B, L]) is read.

        Returns:
            float [B, L, out].

        Raises:
            UserError: a row is longer than the table.
        """
        return self.logits[self.index(attention_mask)]

    def index(self, attention_mask: Tensor) -> Tensor:
        """Row of the table that every position looks up, int64 [B, L]; errors as in `forward`."""
        attention_mask = attention_mask.bool()
        if self.periodic:
            return attended_positions(attention_mask) % self.length
        # Whether the longest row fits is only worth a look at the values when the padded width does not.
        if attention_mask.shape[-1] > self.length and int(attention_mask.sum(-1).max()) > self.length:
            raise UserError(
                "length",
                f"a row of {int(attention_mask.sum(-1).max())} tokens exceeds the table of {self.length} positions",
                "build the table for the longest sequence of every split",
            )
        index = attended_positions(attention_mask)  # [B, L]
        if self.split is not None:
            size = attention_mask.sum(-1, keepdim=True)
            index = torch.where(index < self.split, index, self.length - size + index)
        return index.clamp(0, self.length - 1)

    @torch.no_grad()
    def set_steps(self, steps: Tensor, margin: float = 10.0) -> None:
        """Make the table a plan without much randomness.

        Args:
            steps: int64 [length], the step of every place.
            margin: log-odds of the planned step against any other one.
        """
        self.logits.copy_(margin * F.one_hot(steps.to(self.logits.device), self.logits.shape[-1]))


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

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Mix float [N, L, W]; padding (not in `attended`, bool [N, L]) is zero, as what lies beyond the ends is."""
        keep = attended[..., None]
        for conv in self:
            hidden = F.gelu(hidden) * keep
            hidden = hidden + conv(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden


FEATURES = ("confidence", "margin", "entropy")
POLICY_FEATURES = (*FEATURES, "before", "chance", "prediction", "hidden", "price")
TRUTH_FEATURES = (*FEATURES, "likelihood")


class PolicyNetwork(nn.Module):
    """Reads a partially revealed sequence and the denoiser's view of it; gives a reveal logit per position.

    With `sees_truth` it is the network of a posterior: it is also given all true tokens, as embeddings and, by the
    feature `likelihood`, through what the denoiser thinks of them.

    Per position it sees the denoiser features asked for, whether the position is masked, the share of steps left, the
    log number of masked positions and the relative position; with `reads_tokens` also the revealed tokens and the
    prompt. Otherwise it never sees hidden tokens. Gradients reach the denoiser through the features if it is trained.

    Args:
        vocab_size: number of token ids, MASK included.
        width: size of the hidden vectors.
        layers: number of blocks.
        heads: attention heads.
        features: any of `confidence` (log odds of the top token), `margin` (top minus second probability), `entropy`
            (share of the largest possible), `before` (entropy of the masked positions that are more certain; tells
            equally uncertain ones apart), `chance` (the same for all positions: sum of log c_i over the masked ones,
            the log-probability that all top tokens are right if they do not depend on each other), `prediction` (the
            expected embedding of the token, needs `reads_tokens`), `hidden` (what the output head reads, needs its
            size), `price` (that of a step, needs `prices`) and, with `sees_truth`, `likelihood` (log-probability of the
            true token). Without any of those that read the denoiser it is not called.
        reads_tokens: False leaves revealed tokens and prompt out.
        zero_init: start with all logits 0, as a correction on top of a heuristic does.
        bias: initial logit otherwise; the default reveals about one position in eight.
        sees_truth: take the true tokens as a second argument.
        prices: the range of the feature `price`, shared with the `StepPrice` that charges it.
        hidden: size of the denoiser's hidden states, for the feature `hidden`.
        places: longest response, to give every position an embedding of its own, for canvases on which it has a
            meaning of its own (the cells of a grid). None tells positions apart by distance only.
        kernel: positions that convolutions before the attention see, odd: which neighbours are hidden, and how certain
            they are. None leaves them out.

    Raises:
        UserError: an unknown feature, or one without what it needs.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        features: Sequence[str] = FEATURES,
        reads_tokens: bool = True,
        zero_init: bool = False,
        bias: float = -2.0,
        sees_truth: bool = False,
        prices: PriceRange | None = None,
        places: int | None = None,
        hidden: int | None = None,
        kernel: int | None = None,
    ) -> None:
        super().__init__()
        known = (*POLICY_FEATURES, "likelihood") if sees_truth else POLICY_FEATURES
        unknown = [name for name in features if name not in known]
        if unknown:
            raise UserError("features", f"unknown feature {unknown[0]!r}", f"use any of {', '.join(known)}")
        if "prediction" in features and not reads_tokens:
            raise UserError("features", "prediction needs the embedding of the tokens", "set reads_tokens")
        if ("price" in features) != (prices is not None):
            remedy = "put a step_price with a range on the policy, or leave the feature out"
            raise UserError("features", "price and a range of prices need each other", remedy)
        if ("hidden" in features) != (hidden is not None):
            problem = "hidden and the size of the denoiser's hidden states need each other"
            raise UserError("features", problem, "give hidden=128 for a denoiser of width 128, or leave it out")
        self.prices = prices
        self.config = {
            "vocab_size": vocab_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "features": list(features),
            "reads_tokens": reads_tokens,
            "sees_truth": sees_truth,
            "prices": prices,
            "places": places,
            "hidden": hidden,
            "kernel": kernel,
        }
        self.features, self.reads_tokens = tuple(features), reads_tokens
        self.embed = nn.Embedding(vocab_size, width) if reads_tokens else None
        self.embed_truth = nn.Embedding(vocab_size, width) if sees_truth else None
        self.embed_place = None if places is None else nn.Embedding(places, width)
        self.read_hidden = None if hidden is None else nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        numbers = [name for name in self.features if name not in ("prediction", "hidden")]
        self.project = nn.Linear(len(numbers) + 4, width)
        self.near = None if kernel is None else Neighbours(width, kernel)
        self.backbone = Backbone(width, layers, heads)
        self.head = nn.Linear(width, 1)
        if zero_init:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        else:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.constant_(self.head.bias, bias)

    @property
    def _reads_denoiser(self) -> bool:
        return any(name not in ("hidden", "price") for name in self.features)

    def _describe(
        self, masked: Tensor, steps_left: Tensor, num_steps: int, log_probs: Tensor | None, truth: Tensor | None
    ) -> Tensor:
        """Features of every position: float [*, L, F]."""
        columns = []
        if log_probs is not None:
            # -inf (impossible tokens) must not meet an infinite gradient
            log_probs = log_probs.clamp(min=-30.0)
            top = log_probs.topk(2, -1).values  # [*, L, 2]
            if "confidence" in self.features:
                rest = torch.log(-torch.expm1(top[..., 0].clamp(max=-1e-4)))
                columns.append((top[..., 0] - rest).clamp(-10, 10) / 4)
            if "margin" in self.features:
                columns.append(top[..., 0].exp() - top[..., 1].exp())
            if "entropy" in self.features:
                columns.append(entropy(log_probs) / math.log(log_probs.shape[-1]))
            if "before" in self.features:
                columns.append(entropy_before(entropy(log_probs), masked).clamp(max=32) / 8)
            if "chance" in self.features:
                chance = torch.where(masked, top[..., 0], 0.0).sum(-1, keepdim=True)  # [*, 1]
                columns.append(chance.clamp(min=-32).expand_as(top[..., 0]) / 8)
            if "likelihood" in self.features and truth is not None:
                hidden_truth = torch.where(masked, truth, 0)  # what is not hidden may be no class of the denoiser
                columns.append(log_probs.gather(-1, hidden_truth[..., None])[..., 0].clamp(min=-10) / 4)
        masked_here = masked.to(columns[0].dtype if columns else self.project.weight.dtype)  # [*, L]
        if self.prices is not None:
            places = self.prices.places(masked.shape[-2], masked.device)[:, None]  # [B, 1]
            columns.append(places.to(masked_here.dtype).expand_as(masked_here))
        left = (steps_left.to(masked_here.dtype) / num_steps)[..., None].expand_as(masked_here)
        count = masked_here.sum(-1, keepdim=True).log1p().expand_as(masked_here) / 4
        return torch.stack([*columns, masked_here, left, count], -1)

    def _project_hidden(self, inside: Tensor) -> Tensor:
        """The denoiser's hidden states, float [*, L, hidden], as part of those of this network, float [*, L, W]."""
        assert self.read_hidden is not None
        if inside.shape[-1] != self.config["hidden"]:
            problem = (
                f"the hidden states have {inside.shape[-1]} numbers, the network was made for {self.config['hidden']}"
            )
            raise UserError("hidden", problem, f"set it to {inside.shape[-1]}")
        projected: Tensor = self.read_hidden(inside.to(self.project.weight.dtype))
        return projected

    def forward(self, state: UnmaskingState, tokens: Tensor | None = None) -> Tensor:
        """Reveal logits.

        Args:
            state: stacked states with leading shape `*`, the batch last.
            tokens: int64 [B, L], true tokens; given exactly when the network `sees_truth`.

        Returns:
            float [*, L]; meaningless where nothing is masked.

        Raises:
            ValueError: true tokens for a network that may not see them, or none for one that must.
        """
        if (tokens is None) == (self.embed_truth is not None):
            raise ValueError("tokens: a network sees the true tokens if sees_truth=True; build it for its place")
        truth = None if tokens is None else tokens.masked_fill(~state.canvas.attention_mask, 0).expand_as(state.tokens)
        inside = None if self.read_hidden is None else state.hidden  # first: the logits then cost no further call
        log_probs = state.log_probs if self._reads_denoiser else None
        inputs = [state.tokens, state.masked, state.steps_left, inside, log_probs]
        provenance = get_provenance(inputs)
        seen, masked, steps_left, inside, log_probs = detach_provenance(inputs)  # plain tensors, as for a denoiser
        lead, length = masked.shape[:-1], masked.shape[-1]
        attention = state.attention_mask.expand(masked.shape)  # [*, L]
        described = self._describe(masked, steps_left.expand(lead), state.num_steps, log_probs, truth)  # [*, L, F]
        position = attended_positions(attention) / (attention.sum(-1, keepdim=True) - 1).clamp(min=1)
        described = torch.cat([described, position.to(described.dtype)[..., None]], -1)
        hidden = self.project(described.reshape(-1, length, described.shape[-1]).to(self.project.weight.dtype))
        if "prediction" in self.features and self.embed is not None and log_probs is not None:
            probs = torch.where(masked.unsqueeze(-1), log_probs, -torch.inf).exp()  # [*, L, V], 0 where visible
            expected = probs @ self.embed.weight[: probs.shape[-1]].to(probs.dtype)
            hidden = hidden + expected.reshape(hidden.shape).to(hidden.dtype)
        if self.read_hidden is not None and inside is not None:
            hidden = hidden + self._project_hidden(inside).reshape(hidden.shape)
        if self.embed_truth is not None and truth is not None:
            hidden = hidden + self.embed_truth(truth.reshape(-1, length))
        if self.embed_place is not None:
            hidden = hidden + self.embed_place(attended_positions(attention).reshape(-1, length))
        ids, attention = seen.reshape(-1, length), attention.reshape(-1, length)
        if self.near is not None:
            hidden = self.near(hidden, attention)
        distinct = distinct_rows(torch.cat([steps_left.expand(lead).reshape(-1, 1), ids], -1), lead[-1])
        if self.embed is not None:
            context, context_mask = state.canvas.context, state.canvas.context_mask
            if context is not None:
                context = context.expand(*lead, -1).reshape(len(ids), -1)
                context_mask = None if context_mask is None else context_mask.expand(*lead, -1).reshape(len(ids), -1)
            ids, attention = _join(ids, attention, context, context_mask)
            embedded = self.embed(ids)  # [N, C + L, W]
            split = embedded.shape[1] - length
            hidden = torch.cat([embedded[:, :split], embedded[:, split:] + hidden], 1)
        if distinct is not None:
            places, kind = distinct
            hidden, attention = hidden[places], attention[places]
        logits = self.head(self.backbone(hidden, attention)[:, -length:]).squeeze(-1)
        logits = logits.reshape(*lead, length) if distinct is None else logits[kind].reshape(*lead, length)
        return track_provenance(logits, provenance)
