"""One unmasking loop, for decoding (tokens from the denoiser) and for teacher-forced paths (tokens given)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.decoding.step import Write, keep_rows, token_writer, unmask
from orderppl.errors import UserError
from orderppl.policies import Blocks, Policy
from orderppl.randomness import SELECTION, generator_seed, row_noise
from orderppl.unmasking import Batch, Denoiser, State
from orderppl.unmasking.denoiser import Reader
from orderppl.unmasking.predictions import MaskedOnly
from orderppl.unmasking.trajectory import VISIBLE


@dataclass
class DecodeOutput:
    """Result of `decode`; rows in the order of the input.

    Attributes:
        sequences: int64 [B, S], the canvas with every latent position written; given tokens and padding as they were.
        latent: bool [B, S], the positions that were revealed.
        nfe: int64 [B], denoiser forwards made while the row still had masks (realised, not requested).
        steps: the requested budget.
        reveal_step: int64 [B, S], forward at which each position was revealed; -1 where it was visible.
        token_log_prob: float64 [B, S], log-probability of the emitted token at its reveal and temperature 1; 0 where
            nothing was revealed.
        fallback: int64 [B], steps at which the policy selected nothing and its first position was revealed.
        history: int64 [N + 1, B, S], the states from all masked to finished, MASK where hidden; None unless asked for.
    """

    sequences: Tensor
    latent: Tensor
    nfe: Tensor
    steps: int
    reveal_step: Tensor
    token_log_prob: Tensor
    fallback: Tensor
    history: Tensor | None = None

    @property
    def tokens_per_forward(self) -> Tensor:
        """Revealed tokens per denoiser forward: float [B]; 0 for a row without any."""
        return self.latent.sum(-1) / self.nfe.clamp(min=1)

    @property
    def nats(self) -> Tensor:
        """Negative log-likelihood of each row's revealed tokens along its path: float64 [B]."""
        return -self.token_log_prob.sum(-1)


class PathOutput(DecodeOutput):
    """Result of `follow`; fields as in `DecodeOutput`, with the log-likelihood of the true tokens, nats."""


@contextlib.contextmanager
def evaluation_mode(*objects: object) -> Iterator[None]:
    """Switch modules to evaluation, so that dropout cannot change a result."""
    modules = [module for one in objects if isinstance(one, nn.Module) for module in one.modules() if module.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@dataclass
class _Rows:
    """What is known of the rows still in the batch."""

    index: Tensor  # int64 [b], their places in the batch
    tokens: Tensor
    masked: Tensor
    reveal_step: Tensor
    log_prob: Tensor
    fallback: Tensor
    carry: Any
    reader: Reader

    def keep(self, keep: Tensor) -> _Rows:
        """Those in `keep`, int64."""
        tensors = (self.index, self.tokens, self.masked, self.reveal_step, self.log_prob, self.fallback)
        index, tokens, masked, reveal_step, log_prob, fallback = (values[keep] for values in tensors)
        carry, reader = keep_rows(self.carry, keep), self.reader.rows(keep)
        return _Rows(index, tokens, masked, reveal_step, log_prob, fallback, carry, reader)


def _unmask(
    denoiser: Denoiser,
    policy: Policy,
    batch: Batch,
    num_steps: int,
    write: Callable[[Tensor], Write],
    noise: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    truth: Tensor | None,
) -> DecodeOutput:
    """Unmask all rows.

    Every executed forward reveals at least one token of each row in it. Rows leave when they are finished. The host
    waits for the device once per step, see `unmask`.

    Args:
        denoiser: see `Denoiser`.
        policy: decides the reveal sets.
        batch: the canvas.
        num_steps: step budget T.
        write: index int64 [b] of the rows still in the batch -> what is written to them.
        noise: (index, step int64 [b], latent bool [b, S]) -> float64 [b, S]; None takes modes.
        truth: int64 [B, S], for oracles.
    """
    latent = batch.latent
    device, (count, _) = latent.device, latent.shape
    cost = int(getattr(denoiser, "forwards_per_call", 1)) * policy.forwards_per_step  # guidance makes two per call
    start = torch.where(latent, denoiser.mask_index, batch.readable)
    output = DecodeOutput(
        sequences=batch.tokens.clone(),
        latent=latent,
        nfe=torch.zeros(count, dtype=torch.int64, device=device),
        steps=num_steps,
        reveal_step=torch.full(latent.shape, VISIBLE, device=device),
        token_log_prob=torch.zeros(latent.shape, dtype=torch.float64, device=device),
        fallback=torch.zeros(count, dtype=torch.int64, device=device),
    )
    index = torch.arange(count, device=device)
    own = output.reveal_step.clone(), output.token_log_prob.clone(), output.fallback.clone()
    rows = _Rows(index, start, latent, *own, None, Reader(denoiser, batch))
    left = batch.num_latent.tolist()  # masks of every row, known on the host
    for step in range(num_steps):
        if not any(left):
            break
        if 0 in left:
            keep = [row for row, masks in enumerate(left) if masks]
            rows = rows.keep(torch.tensor(keep, dtype=torch.int64, device=device))
            left = [left[row] for row in keep]
        if step == 0:
            rows.reader.lay_out()
        predictions = MaskedOnly(rows.reader, rows.tokens, rows.masked, sum(left))  # the one forward of this step
        now = torch.full(rows.index.shape, step, device=device)
        canvas = rows.reader.batch
        draw = None if noise is None else partial(noise, rows.index, now, canvas.latent)
        own_truth = None if truth is None else truth[rows.index]
        state = State(
            rows.tokens, rows.masked, now, num_steps, canvas, denoiser, predictions, draw, rows.carry, own_truth
        )
        done = unmask(policy, state, left, write(rows.index), is_last=step == num_steps - 1)
        rows.tokens, rows.masked, rows.carry = done.tokens, done.masked, done.carry
        left = done.left
        rows.reveal_step.masked_fill_(done.reveal, step)
        rows.log_prob.view(-1).index_copy_(0, done.places, done.log_prob)
        rows.fallback = rows.fallback if done.fallback is None else rows.fallback + done.fallback
        if 0 in left:  # some leave; what is written of the others is written over
            _store(output, rows, (step + 1) * cost)
    if bool(output.token_log_prob.isnan().any()):
        raise UserError("denoiser", "gives NaN as a log-probability", "check its weights, dtype and inputs")
    return output


def _store(output: DecodeOutput, rows: _Rows, nfe: int) -> None:
    canvas = rows.reader.batch
    output.sequences[rows.index] = torch.where(canvas.latent, rows.tokens, canvas.tokens)
    output.reveal_step[rows.index] = rows.reveal_step
    output.token_log_prob[rows.index], output.fallback[rows.index] = rows.log_prob, rows.fallback
    output.nfe[rows.index] = nfe


def _check_budget(num_steps: int, field: str) -> None:
    if num_steps < 1:
        raise UserError(field, f"a budget of {num_steps} steps", "allow at least 1")


def in_blocks(policy: Policy, block_size: int | None, batch: Batch, num_steps: int) -> Policy:
    """Wrap a policy into blocks; every block needs a step of its own."""
    if block_size is None:
        return policy
    wrapped = Blocks(policy, block_size)
    longest = int(batch.num_latent.max()) if batch.latent.numel() else 0
    blocks = -(-longest // block_size)
    if blocks > num_steps:
        problem = f"{blocks} blocks of {block_size} in {num_steps} steps"
        raise UserError("block_size", problem, "use larger blocks or more steps")
    return wrapped


def _row_ids(row_ids: Tensor | None, batch: Batch) -> Tensor:
    if row_ids is None:
        return torch.arange(len(batch), device=batch.device)
    if row_ids.shape != (len(batch),):
        raise UserError("row_ids", f"shape {tuple(row_ids.shape)} for {len(batch)} rows", "give one id per row")
    return row_ids.to(batch.device, torch.int64)


def _noise(seed: int, ids: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda index, step, latent: row_noise(seed, ids[index], step, latent, SELECTION)


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    policy: Policy,
    batch: Batch | Tensor | Mapping[str, Any],
    *,
    max_steps: int,
    mode: bool = False,
    block_size: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    row_ids: Tensor | None = None,
    record_history: bool = False,
) -> DecodeOutput:
    """Write the positions to reveal, in the sets that `policy` selects.

    A row's result depends on its own tokens, its id and the seed only: not on the other rows, their order or the
    padding; in low precision only as far as the denoiser's kernels round alike in batches of another shape. A step
    costs one denoiser call on the rows that are not finished, whatever the policy reads. The last budgeted step reveals
    everything that is left.

    Args:
        denoiser: see `Denoiser`. An attribute `forwards_per_call` (2 under guidance) multiplies the NFE.
        policy: decides the reveal sets.
        batch: the canvas. What it says is given stays; where it says nothing of that (`given=None`), all that is not
            MASK is given, so that a text with holes is filled.
        max_steps: step budget per row.
        mode: take the most probable set of the policy instead of a draw; no difference for hard rules.
        block_size: semi-autoregressive blocks of so many positions to reveal (see `Blocks`).
        temperature: of token sampling; 0 takes the most likely token. Sampling inverts the cumulative distribution in
            float64.
        generator: only its seed is used (see `generator_seed`); the seed of `torch.manual_seed` when left out.
        row_ids: int64 [B], identity of each row for the noise, e.g. its index in the data set; 0..B-1 when left out.
        record_history: keep all intermediate states.

    Raises:
        UserError: for a budget below 1, a negative temperature, sizes that do not match, nothing to reveal, more blocks
            than steps, or a denoiser that gives NaN.
    """
    _check_budget(max_steps, "max_steps")
    if not temperature >= 0:
        raise UserError("temperature", f"{temperature} is negative", "give 0 for the most likely token, or more")
    batch = Batch.of(batch)
    if batch.given is None:
        batch = replace(batch, given=batch.tokens != denoiser.mask_index)
        if not bool(batch.latent.any()) and len(batch):
            problem = "no MASK among the tokens, so there is nothing to reveal"
            raise UserError("batch", problem, "put MASK where tokens are wanted, or say what is given")
    policy = in_blocks(policy, block_size, batch, max_steps)
    seed, ids = generator_seed(generator), _row_ids(row_ids, batch)

    def write(index: Tensor) -> Write:
        return token_writer(temperature, seed, ids, index)

    with evaluation_mode(denoiser, policy):
        noise = None if mode else _noise(seed, ids)
        output = _unmask(denoiser, policy, batch, max_steps, write, noise, None)
    if record_history:
        # Revealed tokens never change, so the states follow from the result.
        executed = int(output.reveal_step.max()) + 1 if output.reveal_step.numel() else 0
        hidden = output.reveal_step >= torch.arange(executed + 1, device=batch.device)[:, None, None]
        output.history = torch.where(hidden, denoiser.mask_index, output.sequences)
    return output


@torch.no_grad()
def follow(
    policy: Policy,
    denoiser: Denoiser,
    batch: Batch | Tensor | Mapping[str, Any],
    num_steps: int,
    *,
    mode: bool = False,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    row_ids: Tensor | None = None,
) -> PathOutput:
    """Reveal the true tokens along the policy's own order (teacher forcing).

    Args:
        policy: decides the reveal sets from the partially revealed truth.
        denoiser: see `Denoiser`.
        batch: clean sequences; everything that is not given is revealed.
        num_steps: step budget T; the last step reveals everything that is left.
        mode: see `decode`.
        block_size: see `decode`.
        generator: see `decode`.
        row_ids: see `decode`.

    Returns:
        `PathOutput`: `token_log_prob` is the log-likelihood of the true token at the state that revealed it.

    Raises:
        UserError: for a budget below 1, a MASK among the tokens to reveal, more blocks than steps, or a denoiser that
            gives NaN.
    """
    _check_budget(num_steps, "num_steps")
    batch = Batch.of(batch)
    if bool(((batch.tokens == denoiser.mask_index) & batch.latent).any()):
        raise UserError("tokens", "the MASK token among the true tokens", "give clean sequences")
    policy = in_blocks(policy, block_size, batch, num_steps)
    readable, seed, ids = batch.readable, generator_seed(generator), _row_ids(row_ids, batch)

    def write(index: Tensor) -> Write:
        return lambda logits, state, places: readable[index].flatten()[places]

    with evaluation_mode(denoiser, policy):
        noise = None if mode else _noise(seed, ids)
        output = _unmask(denoiser, policy, batch, num_steps, write, noise, readable)
    return PathOutput(**vars(output))
