"""Counter-based uniform noise: a pure function of its coordinates, so that batching cannot change it.

A generator that is advanced draw by draw gives a sequence other numbers when it stands in another batch, on another
process, or when a neighbour finishes early. Here every draw is a hash of its own coordinates instead: (seed, row, step,
position) when decoding, (seed, epoch, row, draw, particle, position) when fitting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

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
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014) on int64 with wrap-around, in place."""
    bits.bitwise_xor_(_shift(bits, 30)).mul_(_FIRST)
    bits.bitwise_xor_(_shift(bits, 27)).mul_(_SECOND)
    return bits.bitwise_xor_(_shift(bits, 31))


def _absorb(bits: Tensor | int, coordinate: Tensor) -> Tensor:
    """Hash one more coordinate (int64, broadcast) into `bits` (int64)."""
    # A tensor even for one number, because the product has to wrap around.
    return _mix(bits + _GOLDEN * (coordinate + 1))


def _hashed(*numbers: int) -> int:
    """Hash plain integers, on the host: int64."""
    bits = 0
    for number in numbers:
        bits = (bits + _GOLDEN * (number + 1)) % (1 << 64)
        for by, factor in ((30, _FIRST), (27, _SECOND)):
            bits = (bits ^ bits >> by) * factor % (1 << 64)
        bits ^= bits >> 31
    return _signed(bits)


def _unit(bits: Tensor) -> Tensor:
    """float64 strictly between 0 and 1, 52 random bits."""
    return _shift(bits, 12).double().add_(0.5).mul_(2.0**-52)


def uniform_noise(seed: int, row_ids: Tensor, step: int | Tensor, length: int, stream: int = SELECTION) -> Tensor:
    """Draw one uniform number per row and position of a decoding.

    Args:
        seed: any integer.
        row_ids: int64 [B], identity of each row in its data set.
        step: 0-based step, an integer or int64 [B].
        length: number of positions L.
        stream: `SELECTION` or `TOKENS`; independent draws at the same coordinates.

    Returns:
        float64 [B, L], strictly between 0 and 1 (52 random bits).
    """
    bits = _absorb(_mix(torch.full_like(row_ids, _signed(seed)) + _GOLDEN), row_ids)
    counter = torch.zeros((), dtype=torch.int64, device=row_ids.device) + step
    counter = counter * _STREAMS + stream
    position = torch.arange(length, device=row_ids.device)
    return _unit(_absorb(_absorb(bits, counter)[:, None], position))


def row_noise(seed: int, row_ids: Tensor, step: Tensor, latent: Tensor, stream: int) -> Tensor:
    """One uniform number per row and position to reveal, whatever stands before it: float64 [B, S].

    Args:
        seed: any integer.
        row_ids: int64 [B], identity of each row.
        step: int64 [B].
        latent: bool [B, S]; a position is known by its rank among these.
        stream: `SELECTION` or `TOKENS`.
    """
    place = (latent.cumsum(-1) - 1).clamp(min=0)
    return uniform_noise(seed, row_ids, step, latent.shape[-1], stream).gather(-1, place)


# -- draws of a fit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchKeys:
    """What makes the draws of a batch its own.

    Attributes:
        epoch: pass over the data set.
        rows: int64 [G], index of every sequence of the global batch in the data set; a row occurs once in an epoch.
        mine: int64 [B], places in `rows` of the sequences that this process has.
        places: int64 [B, S], of each position in its sequence, whatever stands before it in the batch; their columns
            when left out.
    """

    epoch: int
    rows: Tensor
    mine: Tensor
    places: Tensor | None = None


class _KeyedDraws:
    """Numbers the draws made for one batch and hashes them."""

    def __init__(self, seed: int, keys: BatchKeys) -> None:
        self.rows = _absorb(_hashed(seed, keys.epoch, 0), keys.rows)  # [G]
        self.mine = self.rows[keys.mine]  # [B]
        # Of draws that no sequence has for itself: the same on all processes, whose batches have the same first row.
        self.shared = _hashed(seed, keys.epoch, 1), keys.rows[:1]
        self.keys, self.draws = keys, 0

    def _next(self, bits: Tensor, particles: int = 1) -> Tensor:
        """Hash the number of the draw, and those of its particles, into int64 [B]: int64 [particles, B]."""
        self.draws += 1
        return _absorb(bits, torch.arange(particles, device=bits.device)[:, None] + (self.draws << 32))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """float64 [*, B, L]; see `uniform`."""
        own = len(shape) > 1 and shape[-2] == len(self.mine)
        particles = torch.Size(shape[:-2] if own else shape[:-1]).numel()
        bits = self._next(self.mine if own else _absorb(*self.shared), particles)  # [particles, B] or [particles, 1]
        position = self.keys.places if own else None
        if position is None or position.shape[-1] != shape[-1]:
            position = torch.arange(shape[-1], device=bits.device)
        return _unit(_absorb(bits.unsqueeze(-1), position)).reshape(tuple(shape))  # [particles, B, L]

    def stratified(self) -> Tensor:
        """float64 [B]; see `stratified_uniform`."""
        slot = self._next(self.rows)[0].argsort()  # a permutation of the global batch, the same on all processes
        return (slot[self.keys.mine] + _unit(self._next(self.mine)[0])) / len(self.rows)

    def even(self) -> Tensor:
        """float64 [B]; see `even_spread`. The number 0 belongs to no draw."""
        slot = _absorb(self.rows, torch.zeros_like(self.rows)).argsort()
        return (slot.double()[self.keys.mine] + 0.5) / len(self.rows)


_DRAWS: ContextVar[_KeyedDraws | None] = ContextVar("orderppl_draws", default=None)


@contextmanager
def keyed_draws(seed: int, keys: BatchKeys) -> Iterator[None]:
    """Let `uniform` and `stratified_uniform` depend on (seed, epoch, row, draw, particle, position) only.

    Not on torch's generators, nor on which other sequences share the batch or the process.

    Args:
        seed: any integer.
        keys: the sequences of the batch.
    """
    token = _DRAWS.set(_KeyedDraws(seed, keys))
    try:
        yield
    finally:
        _DRAWS.reset(token)


def _keyed(num_sequences: int) -> _KeyedDraws | None:
    """The draws of the batch that is being fitted, if it has so many sequences here."""
    draws = _DRAWS.get()
    return draws if draws is not None and num_sequences == len(draws.mine) else None


def uniform(shape: Sequence[int], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Draw one uniform number per element; the source of every sampler of an order.

    By torch's generator; under `keyed_draws` by hashing, each sequence of the batch for itself. A shape without the
    batch is a draw that all its sequences share.

    Args:
        shape: [*, B, L]: particles, sequences, positions.
        device: where the numbers are needed.
        dtype: of torch's numbers; torch's default when left out.

    Returns:
        float [*, B, L] in [0, 1); float64 in (0, 1) under `keyed_draws`.
    """
    draws = _DRAWS.get()
    return torch.rand(tuple(shape), device=device, dtype=dtype) if draws is None else draws.uniform(shape)


def stratified_uniform(num_sequences: int, device: torch.device) -> Tensor:
    """Draw one uniform number per sequence such that those of the (global) batch spread evenly over the unit interval.

    The b-th of B sequences gets (slot_b + u_b) / B with a random permutation of the slots: uniform for each sequence.

    Args:
        num_sequences: B, sequences of the batch on this process.
        device: where the numbers are needed.

    Returns:
        float [B] in [0, 1); float64 under `keyed_draws`.
    """
    if draws := _keyed(num_sequences):
        return draws.stratified()
    slot = uniform((num_sequences,), device).argsort()
    return (slot + uniform((num_sequences,), device)) / num_sequences


def sample_categorical(log_weights: Tensor, noise: Tensor) -> Tensor:
    """Sample classes by inverting the cumulative distribution in float64.

    Args:
        log_weights: float [*, V], unnormalised; a class at -inf is never returned.
        noise: float [*] in [0, 1).

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


def even_spread(num_sequences: int, device: torch.device) -> Tensor:
    """Give every sequence of the (global) batch a place of its own on an even grid, and the same one again if asked.

    Nothing is drawn: all programs that look at one batch find the same places. Under `keyed_draws` the order of the
    places changes from epoch to epoch; otherwise it is that of the sequences.

    Args:
        num_sequences: B, sequences of the batch on this process.
        device: where the numbers are needed.

    Returns:
        float64 [B], a permutation of (b + 1/2) / B for b = 0..B-1.
    """
    if draws := _keyed(num_sequences):
        return draws.even()
    return (torch.arange(num_sequences, dtype=torch.float64, device=device) + 0.5) / num_sequences
