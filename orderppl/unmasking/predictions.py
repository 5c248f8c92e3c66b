"""What the denoiser says of states: one denoiser call, worked out where and as far as somebody asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from orderppl.unmasking.denoiser import Reader

_CHUNK = 2**19  # logits that a CPU works on at a time: they stay in its cache, and no temporary is as large as all
_AT_ONCE = 2**27  # logits that are held for tokens to be looked up in, 512 MiB in float32

Function = Callable[[Tensor], Tensor]
"""Of the token log-probabilities of positions: float [.., V] -> [.., ..]."""


class Predictions(ABC):
    """The denoiser's view of states with leading shape `*`, the batch last. Whoever asks shares one denoiser call."""

    was_read = True  # whether somebody has asked yet
    masked: Tensor | None = None  # bool [*, S], where they are worked out alone; None: not only there

    @abstractmethod
    def per_position(self, function: Function) -> Tensor:
        """A function of the token log-probabilities of every position: [*, S, ..], 0 where they were not worked out."""

    @abstractmethod
    def hidden(self, function: Function) -> Tensor:
        """A function of what the output head reads, float [.., W] -> [.., ..], at every position: [*, S, ..]."""

    @abstractmethod
    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """log p of given tokens (int64 [*, S] or [B, S], ids of classes) at every position: float [*, S]."""

    def forget(self) -> None:  # noqa: B027  (not everybody keeps something)
        """Let go of what is kept for others who ask: nobody will."""


class Window(Predictions):
    """At every position from the first column on that somebody has to reveal; differentiable.

    Args:
        reader: of the batch.
        tokens: int64 [*, B, S], MASK where hidden.
    """

    def __init__(self, reader: Reader, tokens: Tensor) -> None:
        self.reader, self.tokens = reader, tokens

    @property
    def was_read(self) -> bool:  # type: ignore[override]
        """Whether the denoiser has been called."""
        return "states" in self.__dict__

    @cached_property
    def states(self) -> Tensor:
        """What the output head reads, float [*, B, S - start, W]."""
        return self.reader.read(self.tokens)

    @cached_property
    def logits(self) -> Tensor:
        """float [*, B, S - start, V]."""
        return self.reader.logits(self.states)

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [*, B, S - start, V], which then take their place: one such tensor is enough."""
        self.__dict__["logits"] = normalised = self.logits.log_softmax(-1)
        return normalised

    def forget(self) -> None:
        """See `Predictions`."""
        for kept in ("states", "logits", "log_probs"):
            self.__dict__.pop(kept, None)

    def _whole(self, values: Tensor) -> Tensor:
        """Put zeros before the window: [*, B, S - start, ..] -> [*, B, S, ..]."""
        start = self.reader.start
        if not start:
            return values
        extra = values.dim() - self.tokens.dim()
        return F.pad(values, (0, 0) * extra + (start, 0))

    def per_position(self, function: Function) -> Tensor:
        """See `Predictions`."""
        return self._whole(function(self.log_probs))

    def hidden(self, function: Function) -> Tensor:
        """See `Predictions`."""
        return self._whole(function(self.states))

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Predictions`."""
        index = tokens[..., self.reader.start :].expand(self.tokens.shape[:-1] + (-1,)).unsqueeze(-1)
        if temperature == 1 and "log_probs" in self.__dict__:
            return self._whole(self.log_probs.gather(-1, index).squeeze(-1))
        if "logits" not in self.__dict__ and self._is_large():
            return self._whole(self._said_in_parts(index.flatten(), temperature).reshape(index.shape[:-1]))
        logits = self.logits if temperature == 1 else self.logits / temperature
        return self._whole(logits.gather(-1, index).squeeze(-1) - logits.logsumexp(-1))

    def _is_large(self) -> bool:
        """Whether the logits of all positions are more than should be held, and nothing is learned through them."""
        states, classes = self.states, self.reader.denoiser.vocab_size
        few = states.reshape(-1, states.shape[-1])[:1]
        return states[..., 0].numel() * classes > _AT_ONCE and not self.reader.logits(few).requires_grad

    def _said_in_parts(self, index: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of the tokens int64 [N], of some positions after others: float [N]."""
        states = self.states.reshape(len(index), -1)
        size = max(1, _AT_ONCE // self.reader.denoiser.vocab_size)
        found = []
        for part, tokens in zip(states.split(size), index.split(size), strict=True):
            logits = self.reader.logits(part) / temperature
            found.append(logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(found)


class MaskedOnly(Predictions):
    """At the masked positions only, for decoding; the call is made at once.

    What follows the last attention, the output head included, runs where it is asked for.

    Args:
        reader: of the rows still in the batch.
        tokens: int64 [B, S], MASK where hidden.
        masked: bool [B, S].
        count: number of masked positions M.
    """

    masked: Tensor

    def __init__(self, reader: Reader, tokens: Tensor, masked: Tensor, count: int) -> None:
        self.reader, self.masked, self.count = reader, masked, count
        self.mixed = reader.mix(tokens)  # [B, S - start, W]

    @cached_property
    def places(self) -> Tensor:
        """Masked positions, numbered through the batch: int64 [M]."""
        return true_places(self.masked.flatten(), self.count)

    def _at(self, places: Tensor) -> Tensor:
        """What the head reads at places int64 [N], which are in the window: float [N, W]."""
        start = self.reader.start
        if start:  # numbered through the windows
            row = places.div(self.masked.shape[-1], rounding_mode="floor") if len(self.masked) > 1 else 0
            places = places - (row + 1) * start
        return self.reader.finish(self.mixed.flatten(0, 1).index_select(0, places))

    @cached_property
    def states(self) -> Tensor:
        """What the head reads at the masked positions, float [M, W]."""
        return self._at(self.places)

    @cached_property
    def logits(self) -> Tensor:
        """At the masked positions, float [M, V]."""
        return self.reader.logits(self.states)

    def logits_of(self, some: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """At `count` masked positions, bool [B, S]: their places int64 [N] and logits float [N, V]."""
        if "logits" not in self.__dict__:
            places = true_places(some.flatten(), count)
            return places, self.reader.logits(self._at(places))
        if count == self.count:
            return self.places, self.logits
        chosen = true_places(some.flatten().index_select(0, self.places), count)
        return self.places.index_select(0, chosen), self.logits.index_select(0, chosen)

    def _unpack(self, values: Tensor) -> Tensor:
        """[M, ..] -> [B, S, ..], 0 elsewhere."""
        whole = values.new_zeros(self.masked.numel(), *values.shape[1:])
        return whole.index_copy_(0, self.places, values).view(self.masked.shape + values.shape[1:])

    def per_position(self, function: Function) -> Tensor:
        """See `Predictions`."""
        logits, size = self.logits, max(1, _CHUNK // self.logits.shape[-1])
        if len(logits) <= size or logits.device.type != "cpu":
            return self._unpack(function(logits.log_softmax(-1)))
        return self._unpack(torch.cat([function(chunk.log_softmax(-1)) for chunk in logits.split(size)]))

    def hidden(self, function: Function) -> Tensor:
        """See `Predictions`."""
        return self._unpack(function(self.states))

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Predictions`."""
        index = tokens.expand(self.masked.shape).flatten()[self.places]
        log_probs = (self.logits / temperature).log_softmax(-1) if temperature != 1 else self.logits.log_softmax(-1)
        return self._unpack(log_probs.gather(-1, index[:, None])[:, 0])


class Views(Predictions):
    """States put together from others, whose denoiser calls they share.

    Args:
        parts: the others.
        join: what they give, one tensor each with the leading shape of its states, as one tensor [*, ..].
    """

    def __init__(self, parts: Sequence[Predictions], join: Callable[[list[Tensor]], Tensor]) -> None:
        self.parts, self.join = parts, join

    @property
    def was_read(self) -> bool:  # type: ignore[override]
        """Whether the first of the others has called the denoiser."""
        return self.parts[0].was_read

    def per_position(self, function: Function) -> Tensor:
        """See `Predictions`."""
        return self.join([part.per_position(function) for part in self.parts])

    def hidden(self, function: Function) -> Tensor:
        """See `Predictions`."""
        return self.join([part.hidden(function) for part in self.parts])

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """See `Predictions`."""
        return self.join([part.token_log_prob(tokens, temperature) for part in self.parts])


def true_places(mask: Tensor, count: int) -> Tensor:
    """Indices of the `count` true entries of a bool [N]: int64 [count]; `nonzero` without waiting for the device."""
    if mask.device.type == "cpu":
        return mask.nonzero().flatten()
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count]
