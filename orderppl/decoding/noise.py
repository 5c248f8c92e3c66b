"""Counter-based uniform noise: a pure function of (seed, row, step, position), so batching cannot change it.

A generator that is advanced draw by draw gives a row other numbers when it is decoded with other rows, or when a
neighbour finishes early. Here every draw is a hash of its own coordinates instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

SELECTION, TOKENS = 0, 1  # streams: which positions to reveal, and what to write there
_STREAMS = 2


def _signed(value: int) -> int:
    """Two's complement reading of an unsigned 64-bit constant."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift; int64 `>>` would copy the sign bit."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014) on int64 with wrap-around."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def uniform_noise(seed: int, row_ids: Tensor, step: int | Tensor, length: int, stream: int = SELECTION) -> Tensor:
    """Draw one uniform number per row and position.

    Args:
        seed: any integer.
        row_ids: int64 [B], identity of each row in its data set.
        step: 0-based step, an integer or int64 [B].
        length: number of positions L.
        stream: `SELECTION` or `TOKENS`; independent draws at the same coordinates.

    Returns:
        float64 [B, L], strictly between 0 and 1 (52 random bits).
    """
    position = torch.arange(length, device=row_ids.device)
    bits = _mix(torch.full_like(row_ids, _signed(seed)) + _GOLDEN)
    bits = _mix(bits + _GOLDEN * (row_ids + 1))
    # A tensor, because the product has to wrap around as the others do.
    counter = torch.as_tensor(step, dtype=torch.int64, device=row_ids.device) * _STREAMS + stream + 1
    bits = _mix(bits + _GOLDEN * counter)
    bits = _mix(bits[:, None] + _GOLDEN * (position + 1))  # [B, L]
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def sample_categorical(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Sample classes by inverting the cumulative distribution in float64.

    Args:
        log_weights: float [*, V], unnormalised; a class at -inf is never returned.
        noise: float64 [*] in (0, 1).

    Returns:
        int64 [*].
    """
    probs = log_weights.double().softmax(-1)
    cumulative = probs.cumsum(-1)
    # A parallel cumulative sum may rise by rounding at a class of probability zero: such classes are left out.
    total = cumulative.masked_fill(probs == 0, 0.0).amax(-1)
    reached = (cumulative >= (noise * total)[..., None]) & (probs > 0)
    return reached.to(torch.uint8).argmax(-1)


def generator_seed(generator: torch.Generator | None) -> int:
    """Seed of the counter-based noise.

    The generator is read, never advanced: its draws would depend on how the data were cut into batches. Without one,
    the seed of `torch.manual_seed` counts.
    """
    return torch.initial_seed() if generator is None else generator.initial_seed()
