"""Public masked models as denoisers: everything transformers can load as a masked language model, LLaDA and Dream."""

from __future__ import annotations

import inspect
import shutil
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

    def train(self, mode: bool = True) -> PretrainedDenoiser:
        """Keep the model in evaluation mode."""
        super().train(mode)
        self.network.eval()
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in the format it was loaded from, the code that came with it included."""
        self.network.save_pretrained(folder)  # type: ignore[operator]
        if type(self.network).__module__.startswith("transformers_modules"):
            for file in Path(inspect.getfile(type(self.network))).parent.glob("*.py"):
                shutil.copy(file, folder)

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.denoising.Denoiser`.

        Raises:
            UserError: the canvas is longer than the model's positions.
        """
        return self._read(state, attention_mask)

    def _read(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """What the network gives for every position, float [N, S, D]."""
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
        found = self._call(tokens, keys)
        return found.gather(1, column[..., None].expand(-1, -1, found.shape[-1]))

    def _call(self, tokens: Tensor, keys: Tensor) -> Tensor:
        """Read rows that stand at the left: float [N, S, D] from int64 and bool [N, S]."""
        options: dict[str, Any] = dict(self.options)
        if self.first_position is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device) + self.first_position
            options["position_ids"] = position.expand(tokens.shape)
        if self.padding == "lengths":
            return self._call_by_length(tokens, keys, options)
        if self.padding == "square":
            options["attention_mask"] = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
        else:
            options["attention_mask"] = keys.long()
        found: Tensor = self.network(input_ids=tokens, **options).logits
        return found

    def _call_by_length(self, tokens: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
        """Read the rows of one length after another; costs a synchronisation with the host."""
        counts = keys.sum(-1)
        found: Tensor | None = None
        for length in counts.unique().tolist():
            rows = (counts == length).nonzero()[:, 0]
            if "position_ids" in options:
                options["position_ids"] = options["position_ids"][: len(rows), :length]
            part = self.network(input_ids=tokens[rows, :length], **options).logits
            found = part.new_zeros((*tokens.shape, part.shape[-1])) if found is None else found
            found = found.index_put((rows[:, None], torch.arange(length, device=rows.device)), part)
        assert found is not None
        return found


class SplitPretrainedDenoiser(PretrainedDenoiser):
    """The same with the output head taken out of the model; see `orderppl.denoising.SplitDenoiser`.

    The head of these models has 30,000 to 150,000 classes: it is run where its output is needed only, and rows are put
    back into place before it, not behind it. `rejoin` gives the head back.
    """

    def __init__(self, network: nn.Module, mask_index: int, vocab_size: int, **options: Any) -> None:
        super().__init__(network, mask_index, vocab_size, **options)
        head = network.get_output_embeddings()  # type: ignore[operator]
        self.place = next(name for name, module in network.named_modules() if module is head)
        network.set_submodule(self.place, nn.Identity())
        self.head: nn.Module = head

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.denoising.Denoiser`.

        Raises:
            UserError: the canvas is longer than the model's positions.
        """
        return self.output_logits(self.hidden_states(state, attention_mask))

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head, float [N, S, W]."""
        return self._read(state, attention_mask)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head: float [.., W] -> [.., V]."""
        logits: Tensor = self.head(hidden)
        return logits

    def rejoin(self) -> nn.Module:
        """Give the model its output head back, and return it; the denoiser is of no use any more."""
        self.network.set_submodule(self.place, self.head)
        return self.network

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, head included, in the format it was loaded from."""
        self.rejoin()
        try:
            super().save_pretrained(folder)
        finally:
            self.network.set_submodule(self.place, nn.Identity())
