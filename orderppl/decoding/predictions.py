"""The denoiser's view of a decoding step, worked out at the masked positions and no further than it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from orderppl.denoising import Canvas
from orderppl.states import UnmaskingState

_CHUNK = 2**19  # logits that a CPU works on at a time: they stay in its cache, and no temporary is as large as all


def true_places(mask: Tensor, count: int) -> Tensor:
    """Indices of the `count` true entries of a bool [N]: int64 [count]; `nonzero` without waiting for the device."""
    if mask.device.type == "cpu":
        return mask.nonzero()[:, 0]
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count]


class Predictions:
    """What the denoiser says of the masked positions of a batch; one denoiser call, made at once.

    The output head runs on the positions that somebody asks for. All views of one state share the answers.

    Args:
        canvas: prompt, padding and denoiser.
        tokens: int64 [B, L], MASK where hidden.
        masked: bool [B, L].
        count: number of masked positions M.
    """

    def __init__(self, canvas: Canvas, tokens: Tensor, masked: Tensor, count: int) -> None:
        self.canvas = canvas
        self.shape = masked.shape
        self.masked = masked
        self.count = count
        self.hidden = canvas.hidden(tokens)  # [B, L, W]

    @cached_property
    def places(self) -> Tensor:
        """Masked positions, numbered through the batch: int64 [M]."""
        return true_places(self.masked.flatten(), self.count)

    def _scores(self, places: Tensor) -> Tensor:
        """Logits at places int64 [N], float [N, V]: a new tensor."""
        length = self.shape[-1]
        return self.canvas.scores(self.hidden[places // length, places % length])

    @cached_property
    def masked_logits(self) -> Tensor:
        """float [M, V]."""
        return self._scores(self.places)

    @cached_property
    def logits(self) -> Tensor:
        """At every position, float [B, L, V]; for policies that look at visible ones, too."""
        return self.canvas.scores(self.hidden.clone())

    @cached_property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [B, L, V]."""
        return self.logits.log_softmax(-1)

    def at(self, places: Tensor) -> Tensor:
        """Logits at some masked places int64 [N]: float [N, V]."""
        known = self.__dict__
        if "masked_logits" in known:
            if len(places) == self.count:
                return self.masked_logits
            return self.masked_logits[(self.masked.flatten().cumsum(0) - 1)[places]]
        return self.logits.flatten(0, 1)[places] if "logits" in known else self._scores(places)

    def chunks(self) -> tuple[Tensor, ...]:
        """The rows of `masked_logits`, a few at a time on a CPU."""
        logits = self.masked_logits
        return logits.split(max(1, _CHUNK // logits.shape[-1])) if logits.device.type == "cpu" else (logits,)


class DecodingState(UnmaskingState):
    """The state of a decoding step; `pack` keeps the masked positions, in one dimension.

    Args:
        predictions: of the denoiser for these tokens.
        tokens: see `UnmaskingState`.
        step: 0-based step, the same for all rows.
        num_steps: see `UnmaskingState`.
        noise: see `UnmaskingState`.
        memory: see `UnmaskingState`.
    """

    def __init__(
        self,
        predictions: Predictions,
        tokens: Tensor,
        step: int,
        num_steps: int,
        noise: Tensor | None,
        memory: dict[str, Tensor],
    ) -> None:
        masked = predictions.masked
        now = torch.full(masked.shape[:1], step, device=masked.device)
        super().__init__(tokens, masked, now, num_steps, predictions.canvas, noise, memory)
        self.predictions = predictions

    @property
    def hidden(self) -> Tensor:
        """What the output head reads at every position, float [B, L, W]."""
        return self.predictions.hidden

    @property
    def logits(self) -> Tensor:
        """Denoiser logits at every position, float [B, L, V]; `per_position` is cheaper."""
        return self.predictions.logits

    @property
    def log_probs(self) -> Tensor:
        """Normalised `logits`, float [B, L, V]; `per_position` is cheaper."""
        return self.predictions.log_probs

    def pack(self, values: Tensor) -> Tensor:
        """Values of the masked positions: [B, L, ..] -> [M, ..]."""
        return values.flatten(0, 1)[self.predictions.places]

    def unpack(self, values: Tensor) -> Tensor:
        """Undo `pack`, with 0 at the other positions: [M, ..] -> [B, L, ..]."""
        shape = self.predictions.shape
        whole = values.new_zeros(shape.numel(), *values.shape[1:])
        whole[self.predictions.places] = values
        return whole.unflatten(0, shape)

    @property
    def packed_log_probs(self) -> Tensor:
        """float [M, V]."""
        return torch.cat([logits.log_softmax(-1) for logits in self.predictions.chunks()])

    def per_position(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """See `UnmaskingState.per_position`: [B, L], 0 where nothing is masked."""
        found = [function(logits.log_softmax(-1)) for logits in self.predictions.chunks()]
        return self.unpack(torch.cat(found) if len(found) > 1 else found[0])

    def token_log_prob(self, tokens: Tensor, temperature: float = 1.0) -> Tensor:
        """See `UnmaskingState.token_log_prob`."""
        log_probs = self.packed_log_probs
        if temperature != 1:
            log_probs = (log_probs / temperature).log_softmax(-1)
        chosen = log_probs.gather(-1, self.pack(tokens)[:, None])[:, 0]
        return self.unpack(chosen)
