"""A plan of the whole order that reads the prompt: from what the denoiser expects while everything is hidden."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.denoising import Canvas, Denoiser
from orderppl.errors import UserError
from orderppl.models.networks import Neighbours, PositionTable, attended_positions

PERIODS = (2, 3, 4, 6, 8, 12)


class OpeningPlan(nn.Module):
    """Step logits of every position from the opening: the fully hidden response behind its prompt.

        logits_i = pattern_{i mod P} + W place_i + conv(conv(place_i, view_i))

    pattern: a repeated table, which `refine_plan` can search on; it is there where a period P is given.
    place_i: waves of the position, counted from the left, and the distances to both ends. Neighbours depend on each
    other, so a good plan spaces out what a step reveals: a wave of period 2 keeps every other position for the end.
    view_i: log odds, margin and entropy of the denoiser's prediction and the expected embedding of the token. These
    come from the forward that the first step makes anyway: a decoder that follows the plan makes no further one.

    Args:
        denoiser: whose predictions are read, never trained from here; None for a plan that only decodes, which is
            handed the denoiser's view (`plan_from`).
        out: steps T.
        width: size of the hidden vectors.
        kernel: positions that a convolution sees, odd.
        periods: of the waves, at least 2.
        reads_opening: False leaves the view out: a plan blind to the prompt.
        noise: standard deviation of the initial W, which tells steps apart.
        vocab_size: token classes V of the denoiser, where none is given.
        period: length P of the pattern; None for a plan without one.

    Raises:
        ValueError: neither a denoiser nor its number of classes.
    """

    periods: Tensor

    def __init__(
        self,
        denoiser: Denoiser | None,
        out: int,
        width: int = 32,
        kernel: int = 5,
        periods: Sequence[int] = PERIODS,
        reads_opening: bool = True,
        noise: float = 0.1,
        vocab_size: int | None = None,
        period: int | None = None,
    ) -> None:
        super().__init__()
        if denoiser is not None:
            vocab_size = denoiser.vocab_size
        elif vocab_size is None:
            raise ValueError("vocab_size: neither a denoiser nor its number of classes; give one of them")
        self.config = {
            "denoiser": None,
            "out": out,
            "width": width,
            "kernel": kernel,
            "periods": list(periods),
            "reads_opening": reads_opening,
            "vocab_size": vocab_size,
            "period": period,
        }
        self._denoiser = (denoiser,)  # no submodule: its weights belong to the model
        self.reads_opening = reads_opening
        self.register_buffer("periods", torch.tensor(list(periods)), persistent=False)
        self.pattern = None if period is None else PositionTable(period, out, periodic=True)
        places = 2 * len(periods) + 4
        self.place = nn.Linear(places, out)
        nn.init.normal_(self.place.weight, std=noise)
        nn.init.zeros_(self.place.bias)
        self.project = nn.Linear(places + 3 * reads_opening, width)
        self.embed = nn.Embedding(vocab_size, width) if reads_opening else None
        self.mix = Neighbours(width, kernel)
        self.head = nn.Linear(width, out)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Plan the rows; `tokens` is not read.

        Args:
            tokens: None.
            attention_mask: bool [B, L].
            context: int64 [B, C], prompt.
            context_mask: bool [B, C].

        Returns:
            float [B, L, T].

        Raises:
            UserError: a plan without a denoiser.
        """
        attention_mask = attention_mask.bool()
        if not self.reads_opening:
            return self.plan_from(None, attention_mask)
        if self._denoiser[0] is None:
            raise UserError("denoiser", "this plan has none to read", "decode with it, or build it with one")
        canvas = Canvas(self._denoiser[0], attention_mask, context, context_mask)
        hidden = torch.full(attention_mask.shape, canvas.mask_index, device=attention_mask.device)
        with torch.no_grad():
            log_probs = canvas.logits(hidden).log_softmax(-1)
        return self.plan_from(log_probs, attention_mask)

    def plan_from(self, log_probs: Tensor | None, attention_mask: Tensor) -> Tensor:
        """The plan when the opening has been read already.

        Args:
            log_probs: float [B, L, V], of the fully hidden response.
            attention_mask: bool [B, L].

        Returns:
            float [B, L, T].
        """
        attended = attention_mask.bool()
        place = _waves(attended, self.periods).to(self.place.weight.dtype)  # [B, L, P]
        seen = [place]
        if self.reads_opening and log_probs is not None:
            seen.append(_view(log_probs).to(place.dtype))
        hidden = self.project(torch.cat(seen, -1))  # [B, L, W]
        if self.embed is not None and log_probs is not None:
            hidden = hidden + log_probs.exp().to(place.dtype) @ self.embed.weight
        logits: Tensor = self.place(place) + self.head(F.gelu(self.mix(hidden, attended)))
        return logits if self.pattern is None else logits + self.pattern(None, attended)


def _waves(attended: Tensor, periods: Tensor) -> Tensor:
    """Cosine and sine of the position in every period, and how near the two ends are: float [B, L, 2 P + 4]."""
    left = attended_positions(attended)  # [B, L]
    right = (attended.sum(-1, keepdim=True) - 1 - left).clamp(min=0)
    angle = 2 * math.pi * (left[..., None] % periods) / periods
    ends = [1 / (1 + left), (-left / 4).exp(), 1 / (1 + right), (-right / 4).exp()]
    return torch.cat([angle.cos(), angle.sin(), torch.stack(ends, -1)], -1)


def _view(log_probs: Tensor) -> Tensor:
    """Log odds, margin and entropy of predictions, of about unit size: float [B, L, 3]."""
    clamped = log_probs.clamp(min=-30.0)
    first, second = clamped.topk(2, -1).values.unbind(-1)  # [B, L]
    odds = (first - torch.log(-torch.expm1(first.clamp(max=-1e-4)))).clamp(-10, 10)
    entropy = -(clamped.exp() * clamped).sum(-1) / math.log(log_probs.shape[-1])
    return torch.stack([odds / 4, first.exp() - second.exp(), entropy], -1)
