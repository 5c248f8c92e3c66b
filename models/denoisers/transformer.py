"""A small bidirectional transformer that fills in masked tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError
from orderppl.models.backbone import Backbone, Layout, Positions, attended_positions


def number_features(values: Tensor, width: int) -> Tensor:
    """Fourier features of numbers and of their logarithms.

    Half of the features are sines and cosines of the value, with wavelengths from 2 to 200, and half of
    `sign * log(1 + |value|)`, with wavelengths from 1/2 to 16, so that both neighbours and magnitudes look alike.

    Args:
        values: float [V].
        width: number of features; divisible by 4.

    Returns:
        float [V, width], mean square about 1/2.
    """
    count = width // 4
    log_values = values.sign() * values.abs().log1p()
    columns = []
    for x, shortest, longest in ((values, 2.0, 200.0), (log_values, 0.5, 16.0)):
        wavelength = torch.logspace(math.log10(shortest), math.log10(longest), count)
        angle = 2 * math.pi * x[:, None] / wavelength  # [V, width/4]
        columns += [angle.sin(), angle.cos()]
    features = torch.cat(columns, -1)
    return F.pad(features, (0, width - features.shape[1]))


class TransformerDenoiser(Configurable, nn.Module):
    """Pre-norm bidirectional transformer from partially revealed sequences to token logits.

    Args:
        vocab_size: number of token classes V of the output head.
        mask_index: id of MASK; may lie inside the vocabulary or just behind it.
        width: size of the hidden vectors.
        layers: number of blocks.
        heads: attention heads.
        max_length: longest canvas, tokens; 256 when left out.
        positions: `rotary` or `learned`; counted over attended tokens.
        tokenizer: of the texts, if there is one.
        number_features: start the embeddings of number tokens as Fourier features of their values, so that arithmetic
            is learnt from few examples; the tokeniser knows the values.
        separator_index: id of a token that ends every prompt. What follows its first occurrence is marked as response
            and takes positions from `prompt_room` on, whatever the prompt's length, so that "the k-th number of the
            prompt" is always equally far away. None counts prompt and response as one sequence.
        prompt_room: positions kept for prompts, the separator included; 64 when left out; with a separator only.
        prompt_reads_response: False lets prompts attend to themselves only, so that decoding reads them once
            (`orderppl.unmasking.TailDenoiser`); with a separator only.

    Raises:
        UserError: heads that do not fit the width, a tokeniser of another vocabulary, or prompts that do not read
            their response and have no separator.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_index: int,
        width: int = 128,
        layers: int = 3,
        heads: int = 4,
        max_length: int | None = None,
        positions: Positions = "rotary",
        tokenizer: Tokenizer | None = None,
        number_features: bool = True,
        separator_index: int | None = None,
        prompt_room: int | None = None,
        prompt_reads_response: bool = True,
    ) -> None:
        super().__init__()
        if separator_index is None and not prompt_reads_response:
            problem = "without a separator no token is known to be of the prompt"
            raise UserError("prompt_reads_response", problem, "give separator_index, or leave it True")
        self.vocab_size, self.mask_index, self.tokenizer = vocab_size, mask_index, tokenizer
        self.separator_index, self.prompt_reads_response = separator_index, prompt_reads_response
        self.prompt_room, self.max_length = prompt_room or 64, max_length or 256
        self.embed = nn.Embedding(max(vocab_size, mask_index + 1), width)
        room = 0 if separator_index is None else self.prompt_room
        self.backbone = Backbone(width, layers, heads, positions=positions, max_length=self.max_length + room)
        self.response = None if separator_index is None else nn.Parameter(0.02 * torch.randn(width))
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.embed.weight, std=0.02)
        if tokenizer is not None and number_features:
            self._initialise_numbers(tokenizer.number_values())

    def read_up_to(self, max_length: int) -> None:
        """Set the longest canvas, tokens; rotary positions have no end of their own.

        Raises:
            UserError: learned positions.
        """
        if self.backbone.embed_position is not None:
            problem = f"its {self.max_length} positions are learned"
            raise UserError("max_length", problem, "leave it out, or train a denoiser with rotary positions")
        self.max_length = max_length

    @torch.no_grad()
    def _initialise_numbers(self, values: Tensor) -> None:
        if len(values) > len(self.embed.weight):
            problem = f"{len(values)} tokens for {len(self.embed.weight)} embeddings"
            raise UserError("tokenizer", problem, "make vocab_size that of the tokeniser")
        rows = values.isfinite().nonzero()[:, 0]
        features = number_features(values[rows].float(), self.embed.embedding_dim)
        features = 0.02 * features / features.pow(2).mean(-1, keepdim=True).sqrt()  # as large as the other rows
        self.embed.weight[rows] = features

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`.

        Raises:
            UserError: the canvas is longer than `max_length`.
        """
        return self.output_logits(self.hidden_states(state, attention_mask))

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head, float [N, S, W]; see `orderppl.unmasking.SplitDenoiser`."""
        return self.finish(self.mixed_states(state, attention_mask, 0))

    def mixed_states(self, state: Tensor, attention_mask: Tensor, start: int, layout: Layout | None = None) -> Tensor:
        """Everything up to the last attention, float [N, S - start, W]; see `orderppl.unmasking.TailDenoiser`."""
        self._check_length(state.shape[-1])
        if layout is None:
            layout = self._whole(state, attention_mask.bool())
        if layout.past is not None:
            state, start = state[:, start:], 0
        return self.backbone.mix(self.embed(state), layout, start)

    def finish(self, mixed: Tensor) -> Tensor:
        """What follows the last attention, position by position; see `orderppl.unmasking.TailDenoiser`."""
        return self.backbone.finish(mixed)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head, which shares the embedding: float [.., W] -> [.., V]."""
        return F.linear(hidden, self.embed.weight[: self.vocab_size], self.bias)

    def lay_out(self, state: Tensor, attention_mask: Tensor, start: int) -> Layout | None:
        """What does not change while responses are written; see `orderppl.unmasking.TailDenoiser`.

        Returns:
            Positions and attention; for prompts that do not read their response and end with their only separator
            their keys and values too. None where a row's first separator may be written yet.

        Raises:
            UserError: the canvas is longer than `max_length`.
        """
        self._check_length(state.shape[-1])
        attended = attention_mask.bool()
        if self.separator_index is None:
            return self._whole(state, attended)
        prompt, prompt_mask = state[:, :start], attended[:, :start]
        is_separator = (prompt == self.separator_index) & prompt_mask
        if not bool(is_separator.any(-1).all()):
            return None
        if not self.prompt_reads_response:
            position = attended_positions(prompt_mask)
            is_end = prompt_mask & (position == prompt_mask.sum(-1, keepdim=True) - 1)
            if bool((is_separator == is_end).all()):
                past = self.backbone.keys_values(self.embed(prompt), self.backbone.lay_out(prompt_mask, position))
                response = attended[:, start:]
                position = attended_positions(response) + self.prompt_room
                layout = self.backbone.lay_out_behind(past, prompt_mask, response, position)
                return self._marked(layout, torch.ones_like(response))
        return self._whole(state, attended)

    def _whole(self, state: Tensor, attended: Tensor) -> Layout:
        """Layout of whole rows, int64 and bool [N, S]; without a separator nothing is read of the tokens."""
        if self.separator_index is None:
            return self.backbone.lay_out(attended)
        position, is_response = self._segments(state, attended)
        is_prompt = None if self.prompt_reads_response else attended & ~is_response
        return self._marked(self.backbone.lay_out(attended, position, is_prompt), is_response)

    def _marked(self, layout: Layout, is_response: Tensor) -> Layout:
        """Add what marks the response, at bool [N, S]; there is a separator."""
        assert self.response is not None
        mark = is_response[..., None] * self.response
        layout.added = mark if layout.added is None else layout.added + mark
        return layout

    def _check_length(self, size: int) -> None:
        if size > self.max_length:
            raise UserError(
                "max_length",
                f"a canvas of {size} tokens exceeds {self.max_length}",
                "shorten prompt or response, or train a denoiser with a larger max_length",
            )

    def _segments(self, state: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Positions int64 [N, S], with responses from `prompt_room` on, and which tokens are responses, bool [N, S]."""
        position = attended_positions(attention_mask)
        separator = (state == self.separator_index) & attention_mask
        seen = separator.long().cumsum(-1)
        is_response = ((seen > 1) | ((seen == 1) & ~separator)) & attention_mask  # strictly after the first separator
        first = separator & (seen == 1)
        start = (position * first).sum(-1, keepdim=True) + 1  # [N, 1]
        return torch.where(is_response, position - start + self.prompt_room, position), is_response
