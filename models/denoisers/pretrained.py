"""Public masked models as denoisers: everything transformers can load as a masked language model, LLaDA and Dream."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orderppl.errors import UserError

Padding = Literal["mask", "square", "lengths"]


class PretrainedDenoiser(nn.Module):
    """A masked model of transformers behind `orderppl.denoising.Denoiser`.

    Every row is read as its attended tokens followed by padding, the one layout that all these models agree on, so
    that padding may stand anywhere on the canvas. The model stays in evaluation mode, also when it is trained: dropout
    would make the likelihood of a sequence another one at each look.

    Args:
        network: called as `network(input_ids=..., attention_mask=...)`, returns an object with `logits`.
        mask_index: id of MASK.
        vocab_size: number of token classes V of the output head.
        begin_index: token that the model expects before every row, if any; it is put there.
        pad_index: token at padding.
        logit_shift: 1 where the logits of a position stand at the position before it.
        padding: how the model is told of padding: by an attention `mask` [N, S], by a `square` one [N, 1, S, S], or not
            at all, and rows of different `lengths` are read separately.
        first_position: index of the first position, where it must be given to the model; None leaves it to the model.
        max_length: longest canvas; None where the model does not say.
    """

    def __init__(
        self,
        network: nn.Module,
        mask_index: int,
        vocab_size: int,
        *,
        begin_index: int | None = None,
        pad_index: int = 0,
        logit_shift: int = 0,
        padding: Padding = "mask",
        first_position: int | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.mask_index, self.vocab_size, self.max_length = mask_index, vocab_size, max_length
        self.begin_index, self.pad_index, self.logit_shift = begin_index, pad_index, logit_shift
        self.padding, self.first_position = padding, first_position
        known = inspect.signature(network.forward).parameters
        self.options = {key: value for key, value in {"use_cache": False, "return_dict": True}.items() if key in known}
        self.eval()

    @property
    def hidden_size(self) -> int:
        """Size W of the hidden vectors."""
        return int(self.network.get_input_embeddings().weight.shape[-1])  # type: ignore[operator]

    def train(self, mode: bool = True) -> PretrainedDenoiser:
        """Keep the model in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in the format it was loaded from."""
        self.network.save_pretrained(folder)  # type: ignore[operator]

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.denoising.Denoiser`.

        Raises:
            UserError: the canvas is longer than the model's positions.
        """
        return self._read(state, attention_mask)[0]

    def logits_and_hidden(self, state: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the last hidden vectors, float [N, S, W], shifted as the logits are."""
        logits, hidden = self._read(state, attention_mask, with_hidden=True)
        assert hidden is not None
        return logits, hidden

    def _read(self, state: Tensor, attention_mask: Tensor, with_hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        attended = attention_mask.bool()
        begin = 0 if self.begin_index is None else 1
        if self.max_length is not None and state.shape[-1] + begin > self.max_length:
            problem = f"a canvas of {state.shape[-1]} tokens exceeds the model's {self.max_length - begin}"
            raise UserError("max_length", problem, "shorten prompt or response, or use a model that reads longer ones")
        order = (~attended).to(torch.uint8).argsort(dim=-1, stable=True)  # [N, S], attended tokens first
        keys = attended.gather(1, order)
        tokens = state.gather(1, order).masked_fill(~keys, self.pad_index)
        if self.begin_index is not None:
            tokens = torch.cat([torch.full_like(tokens[:, :1], self.begin_index), tokens], 1)  # [N, 1 + S]
            keys = torch.cat([torch.ones_like(keys[:, :1]), keys], 1)
        else:
            keys = torch.cat([torch.ones_like(keys[:, :1]), keys[:, 1:]], 1)  # no softmax over nothing
        column = (attended.long().cumsum(-1) - 1).clamp(min=0) + begin  # [N, S], where each token stands now
        column = (column - self.logit_shift).clamp(min=0)
        outputs = [_take(output, column) for output in self._call(tokens, keys, with_hidden)]
        return outputs[0], outputs[1] if with_hidden else None

    def _call(self, tokens: Tensor, keys: Tensor, with_hidden: bool) -> tuple[Tensor, ...]:
        """Logits and, if asked for, hidden vectors of rows that stand at the left, float [N, S, V] and [N, S, W]."""
        options: dict[str, Any] = dict(self.options)
        if with_hidden:
            options["output_hidden_states"] = True
        if self.first_position is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device) + self.first_position
            options["position_ids"] = position.expand(tokens.shape)
        if self.padding == "lengths":
            return self._call_by_length(tokens, keys, options)
        if self.padding == "square":
            options["attention_mask"] = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
        else:
            options["attention_mask"] = keys.long()
        return _tensors(self.network(input_ids=tokens, **options), with_hidden)

    def _call_by_length(self, tokens: Tensor, keys: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
        """Read the rows of one length after another; costs a synchronisation with the host."""
        with_hidden = "output_hidden_states" in options
        counts = keys.sum(-1)
        found: list[Tensor] = []
        for length in counts.unique().tolist():
            rows = (counts == length).nonzero()[:, 0]
            part = _tensors(self.network(input_ids=tokens[rows, :length], **options), with_hidden)
            if not found:
                found = [output.new_zeros((*tokens.shape, output.shape[-1])) for output in part]
            here = rows[:, None], torch.arange(length, device=rows.device)
            found = [whole.index_put(here, output) for whole, output in zip(found, part, strict=True)]
        return tuple(found)


def _tensors(output: Any, with_hidden: bool) -> tuple[Tensor, ...]:
    return (output.logits, output.hidden_states[-1]) if with_hidden else (output.logits,)


def _take(values: Tensor, column: Tensor) -> Tensor:
    """Columns int64 [N, S] of values float [N, *, D]: float [N, S, D]."""
    return values.gather(1, column[..., None].expand(-1, -1, values.shape[-1]))
