"""Masked models of transformers as denoisers, found out by a look at what they do with a few tokens."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer
from orderppl.errors import UserError, first_line, is_out_of_memory

Padding = Literal["mask", "square", "lengths"]
PROBE = 6  # tokens


class PretrainedDenoiser(nn.Module):
    """A masked model of transformers behind `orderppl.unmasking.Denoiser`, frozen and in evaluation mode.

    Every row is read as its attended tokens followed by padding, the one layout that all these models agree on, so
    that padding may stand anywhere on the canvas. The tokens that a model expects at both ends of a row are given
    tokens of the canvas like any other (`PretrainedTokenizer.frame`).

    What differs between models is found out by a look at a few tokens: how to tell them of padding, how they count
    positions, and which part of them is the output head, so that it runs only where it is needed
    (`orderppl.unmasking.SplitDenoiser`). It stays in evaluation mode, also when it is trained: dropout would make the
    likelihood of a sequence another one at each look.

    Args:
        network: called as `network(input_ids=..., attention_mask=...)`, returns an object with `logits`.
        mask_index: id of MASK.
        tokenizer: of its texts, if it has one.
        pad_index: token at padding.
        logit_shift: 1 where the logits of a position stand at the position before it.
        padding: how the model is told of padding: by an attention `mask` [N, S], by a `square` one [N, 1, S, S], or not
            at all, and rows of different `lengths` are read separately; the first that works when left out.
        frame: start and end token of a model whose canvas holds none: they are put around every row.
        impossible: ids that are never predicted.

    Raises:
        UserError: it does not read tokens, or gives other logits at another look.
    """

    impossible: Tensor

    def __init__(
        self,
        network: nn.Module,
        mask_index: int,
        *,
        tokenizer: Tokenizer | None = None,
        pad_index: int = 0,
        logit_shift: int = 0,
        padding: Padding | None = None,
        frame: tuple[int, int] | None = None,
        impossible: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.network, self.head = network.requires_grad_(False), nn.Identity()
        self.mask_index, self.tokenizer, self.pad_index = mask_index, tokenizer, pad_index
        self.logit_shift, self.frame = logit_shift, frame
        known = inspect.signature(network.forward).parameters
        self.options = {key: value for key, value in {"use_cache": False, "return_dict": True}.items() if key in known}
        self.eval()
        self.takes_mask = True  # [N, S]; some look for padding themselves where there is none
        self.first_position: int | None = None  # must be given to models that would leave out tokens equal to padding
        self.max_length: int | None = None
        self._look(padding)
        self.register_buffer("impossible", torch.tensor(sorted(impossible), dtype=torch.long), persistent=False)

    def train(self, mode: bool = True) -> PretrainedDenoiser:
        """Keep the model in evaluation mode."""
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PretrainedDenoiser:
        """Move and convert; a model in parts stays where accelerate has put them."""
        return self if self.in_parts else super()._apply(fn, recurse)

    @property
    def in_parts(self) -> bool:
        """Whether accelerate has spread the model over devices, or put some of it on the disk."""
        return bool(getattr(self.network, "hf_device_map", None))

    @property
    def device(self) -> torch.device:
        """Where rows are read; parts that lie on the disk have no device."""
        devices = (parameter.device for parameter in self.network.parameters())
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`.

        Raises:
            UserError: the canvas is longer than the model's positions.
        """
        return self.output_logits(self.hidden_states(state, attention_mask))

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head: float [.., W] -> [.., V]."""
        logits: Tensor = hidden.clone() if isinstance(self.head, nn.Identity) else self.head(hidden)
        logits = logits.to(hidden.device)  # of a model in parts, the head may be on a device of its own
        return logits.index_fill(-1, self.impossible, -torch.inf) if len(self.impossible) else logits

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head, float [N, S, W]; its logits where the head is no part by itself."""
        if self.max_length is not None and state.shape[-1] > self.max_length:
            problem = f"a canvas of {state.shape[-1]} tokens exceeds the model's {self.max_length}"
            raise UserError("max_length", problem, "shorten the rows, or use a model that reads longer ones")
        attended = attention_mask.bool()
        column = attended.long().cumsum(-1) - (1 if self.frame is None else 0)  # [N, S], where each token goes
        tokens, keys = self._gather(state, attended, column)
        if not (self.reads_mask_alone or tokens.is_meta) and bool(((tokens == self.mask_index) | ~keys).all(-1).any()):
            problem = f"{type(self.network).__name__} reads no row of nothing but MASK"
            raise UserError("tokens", problem, "load it with frame true, or give every row its start and end tokens")
        found = self._call(tokens, keys)
        column = (column - self.logit_shift).clamp(0, tokens.shape[-1] - 1)
        return found.gather(1, column[..., None].expand(-1, -1, found.shape[-1]))

    def _gather(self, state: Tensor, attended: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Rows from the left without gaps, framed where the model needs it: int64 [N, F], and bool, False at padding.

        F is the width of the canvas, with its frame; on a CPU that of the longest row.
        """
        count = attended.sum(-1, keepdim=True)  # [N, 1]
        # looking at the values would make another device wait
        width = int(count.max()) if state.device.type == "cpu" and len(state) else state.shape[-1]
        width = max(width, 1) if self.frame is None else width + 2
        tokens = state.new_full((len(state), width + 1), self.pad_index)  # padding goes to a last column, cut off again
        tokens = tokens.scatter(1, torch.where(attended, column, width), state)
        if self.frame is not None:
            tokens = tokens.scatter(1, count + 1, self.frame[1])
            tokens[:, 0] = self.frame[0]
            count = count + 2
        keys = torch.arange(width, device=state.device) < count.clamp(min=1)  # no softmax over nothing
        return tokens[:, :width], keys

    def _call(self, tokens: Tensor, keys: Tensor, **options: Any) -> Tensor:
        """What the network gives for rows that stand at the left: float [N, F, D] from int64 and bool [N, F]."""
        options |= self.options
        if self.first_position is not None:
            position = torch.arange(tokens.shape[1], device=tokens.device) + self.first_position
            options["position_ids"] = position.expand(tokens.shape)
        if self.padding == "lengths":
            return self._call_by_length(tokens, keys, options)
        square = self.padding == "square"
        options["attention_mask"] = keys[:, None, None].expand(-1, 1, keys.shape[1], -1) if square else keys.long()
        found: Tensor = self.network(input_ids=tokens, **options).logits[:, : tokens.shape[1]]
        return found

    def _call_by_length(self, tokens: Tensor, keys: Tensor, options: dict[str, Any]) -> Tensor:
        """Read the rows of one length after another; costs a synchronisation with the host."""
        counts, position = keys.sum(-1), options.pop("position_ids", None)
        found: Tensor | None = None
        for length in [tokens.shape[1]] if tokens.is_meta else counts.unique().tolist():  # shapes: all are the longest
            rows = counts if tokens.is_meta else (counts == length).nonzero()[:, 0]
            if position is not None:
                options["position_ids"] = position[: len(rows), :length]
            part = tokens[rows, :length]
            if self.takes_mask:
                options["attention_mask"] = torch.ones_like(part)
            part = self.network(input_ids=part, **options).logits[:, :length]
            found = part.new_zeros((*tokens.shape, part.shape[-1])) if found is None else found
            found = found.index_put((rows[:, None], torch.arange(length, device=rows.device)), part)
        assert found is not None
        return found

    # ---- what is found out when it is made

    @torch.no_grad()
    def probe(self) -> Tensor:
        """Logits of one row of some tokens and MASK, float [1, S, V]."""
        return self.output_logits(self._call(*self._probe_row())).float().cpu()

    def _probe_row(self) -> tuple[Tensor, Tensor]:
        """Tokens from all over the vocabulary, every other one MASK; none that looks like padding."""
        classes = int(getattr(self.network.config, "vocab_size", None) or self.mask_index + 1)
        tokens = torch.linspace(0, classes - 1, PROBE, device=self.device).long()[None]
        tokens[tokens == self.pad_index] += 2 * (self.pad_index == 0) - 1  # its neighbour
        tokens[:, 1::2] = self.mask_index
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    @torch.no_grad()
    def _look(self, padding: Padding | None) -> None:
        """Find out how the model wants to be read."""
        tokens, keys = self._probe_row()
        self.padding, self.reads_mask_alone = padding or "lengths", True
        self.takes_mask = _succeeds(lambda: self._call(tokens, keys) is not None)
        try:
            alone, again = (self._call(tokens, keys).float() for _ in range(2))
        except Exception as error:  # foreign code
            if is_out_of_memory(error):
                raise
            problem = f"the model does not read a row of tokens ({first_line(error)})"
            remedy = "use the transformers_version of its config.json"
            if self.in_parts:
                remedy = "give weights that are tied, such as those of head and embedding, one place in device_map"
            raise UserError("denoiser", problem, remedy) from error
        if not torch.equal(alone, again) or not bool(alone.isfinite().all()):
            problem = "the model gives other logits at each look, or none that are finite"
            raise UserError("denoiser", problem, "use a model whose logits follow from the tokens")
        other = tokens.clone()
        other[:, 0] = tokens[:, -2]
        if torch.equal(self._call(other, keys)[:, 1:].float(), alone[:, 1:]):
            problem = "the logits of a position do not depend on the tokens at the others"
            raise UserError("denoiser", problem, "use a model that needs no kernel of its own")
        self.vocab_size = alone.shape[-1]
        coarse = next(self.network.parameters()).dtype not in (torch.float32, torch.float64)
        close = float(alone.abs().max()) * (3e-2 if coarse else 1e-4)

        def is_same(**options: Any) -> bool:
            return _succeeds(lambda: bool((self._call(tokens, keys, **options).float() - alone).abs().max() <= close))

        self._count_positions(is_same)
        self.padding = padding or self._way_to_pad(tokens, alone, close)
        masks = torch.full_like(tokens, self.mask_index)
        self.reads_mask_alone = bool(self._call(masks, keys).isfinite().all())
        self._take_head_out()

    def _count_positions(self, is_same: Callable[..., bool]) -> None:
        """RoBERTa and its like count from behind the id of padding, and leave out tokens that equal it."""
        config: Any = self.network.config
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "max_sequence_length", None)
        if "position_ids" in inspect.signature(self.network.forward).parameters:
            for first in (0, (getattr(config, "pad_token_id", None) or 0) + 1):
                position = torch.arange(PROBE, device=self.device) + first
                if is_same(position_ids=position[None]):
                    self.first_position = first
                    break
        ends = 0 if self.frame is None else 2
        self.max_length = None if longest is None else int(longest) - (self.first_position or 0) - ends

    def _way_to_pad(self, tokens: Tensor, alone: Tensor, close: float) -> Padding:
        """The first way to tell the model of padding under which padding changes nothing."""
        rows = torch.cat([tokens, tokens], -1).expand(2, -1)  # [2, 2 S], the second row has no padding
        keys = torch.stack([torch.arange(2 * PROBE) < PROBE, torch.ones(2 * PROBE, dtype=torch.bool)]).to(tokens.device)
        rows = rows.masked_fill(~keys, self.pad_index)
        ways: tuple[Padding, ...] = ("mask", "square")
        for self.padding in ways:
            if _succeeds(lambda: bool((self._call(rows, keys)[:1, :PROBE].float() - alone).abs().max() <= close)):
                return self.padding
        return "lengths"

    def _take_head_out(self) -> None:
        """Take the smallest part out of the model that the logits come from directly, its output embedding or more.

        Its 30,000 to 150,000 classes are worked out where they are needed only.
        """
        network: Any = self.network
        row = self._probe_row()
        logits, embedding = self._call(*row), network.get_output_embeddings()
        names = [name for name, module in network.named_modules() if embedding is not None and module is embedding]
        place = names[0] if names else ""
        while place:
            self.place, self.head = place, network.get_submodule(place)
            network.set_submodule(place, nn.Identity())
            if _succeeds(lambda: torch.equal(self.head(self._call(*row)), logits)):
                return
            network.set_submodule(place, self.head)
            place = place.rpartition(".")[0]
        self.place, self.head = "", nn.Identity()

    # ---- saving

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model as transformers made it, its head in place, for a while."""
        if self.place:
            self.network.set_submodule(self.place, self.head)
        try:
            yield self.network
        finally:
            if self.place:
                self.network.set_submodule(self.place, nn.Identity())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokeniser in the format they were loaded from, the code that came with them included."""
        with self.whole() as network:
            network.save_pretrained(folder)
        if isinstance(self.tokenizer, PretrainedTokenizer):
            self.tokenizer.tokenizer.save_pretrained(str(folder))
        if type(self.network).__module__.startswith("transformers_modules"):
            for file in Path(inspect.getfile(type(self.network))).parent.glob("*.py"):
                shutil.copy(file, folder)


def _succeeds(look: Callable[[], bool]) -> bool:
    """Whether foreign code runs through and says yes."""
    try:
        return look()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
