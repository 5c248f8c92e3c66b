"""One unmasking loop, for decoding (tokens from the denoiser) and for teacher-forced paths (tokens given)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orderppl.decoding.memory import first_memory
from orderppl.decoding.policy import Policy, needs_noise
from orderppl.decoding.predictions import DecodingState, Predictions, true_places
from orderppl.decoding.step import Write, token_writer, unmask
from orderppl.decoding.wrappers import Block
from orderppl.denoising import Canvas, Denoiser
from orderppl.errors import UserError
from orderppl.randomness import SELECTION, generator_seed, uniform_noise
from orderppl.states import VISIBLE, partial_state


@dataclass
class DecodeOutput:
    """Result of `decode`; rows in the order of the input.

    Attributes:
        sequences: int64 [B, L], decoded responses, `pad_token_id` at padding.
        attention_mask: bool [B, L], False at padding.
        nfe: int64 [B], denoiser forwards made while the row still had masks (realised, not requested).
        steps: the requested budget.
        reveal_step: int64 [B, L], forward at which each position was revealed; -1 at padding.
        token_log_prob: float64 [B, L], log-probability of the emitted token at its reveal and temperature 1; 0 at
            padding.
        fallback: int64 [B], steps at which the policy selected nothing and its arg-max was revealed.
        history: int64 [S + 1, B, L], the states from all masked to finished, MASK where hidden; None unless asked for.
    """

    sequences: Tensor
    attention_mask: Tensor
    nfe: Tensor
    steps: int
    reveal_step: Tensor
    token_log_prob: Tensor
    fallback: Tensor
    history: Tensor | None = None

    @property
    def tokens_per_forward(self) -> Tensor:
        """Response tokens per denoiser forward, padding not counted: float [B]; 0 for an empty row."""
        return self.attention_mask.sum(-1) / self.nfe.clamp(min=1)


@dataclass
class PathOutput:
    """Result of `follow`; fields as in `DecodeOutput`, with the log-likelihood of the true tokens, nats."""

    attention_mask: Tensor
    nfe: Tensor
    steps: int
    reveal_step: Tensor
    token_log_prob: Tensor
    fallback: Tensor

    @property
    def nats(self) -> Tensor:
        """Negative log-likelihood of each row along its path: float64 [B]."""
        return -self.token_log_prob.sum(-1)


@contextlib.contextmanager
def evaluation_mode(*objects: object) -> Iterator[None]:
    """Switch modules (also those held by a policy) to evaluation, so that dropout cannot change a result."""
    modules: list[nn.Module] = []
    pending = list(objects)
    while pending:
        item = pending.pop()
        if isinstance(item, nn.Module):
            modules += [module for module in item.modules() if module.training]
        elif hasattr(item, "__dict__") and (hasattr(item, "select") or dataclasses.is_dataclass(item)):
            pending += vars(item).values()
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def _unmask(
    policy: Policy,
    canvas: Canvas,
    num_steps: int,
    seed: int,
    row_ids: Tensor,
    write: Callable[[Tensor], Write],
    truth: Tensor | None,
    pad_token_id: int = 0,
) -> DecodeOutput:
    """Unmask all rows; `write` says what to write to the rows of an index int64 [b], those still in the batch.

    Every executed forward reveals at least one token of each row in it. Rows leave when they are finished. The host
    waits for the device once per step, see `unmask`.
    """
    attention = canvas.attention_mask
    device, (batch, length) = attention.device, attention.shape
    cost = int(getattr(canvas.denoiser, "forwards_per_call", 1))  # guidance makes two forwards per call
    noisy = needs_noise(policy)
    output = DecodeOutput(
        sequences=torch.where(attention, canvas.mask_index, pad_token_id),
        attention_mask=attention,
        nfe=torch.zeros(batch, dtype=torch.int64, device=device),
        steps=num_steps,
        reveal_step=torch.full((batch, length), VISIBLE, device=device),
        token_log_prob=torch.zeros(batch, length, dtype=torch.float64, device=device),
        fallback=torch.zeros(batch, dtype=torch.int64, device=device),
    )
    index, tokens, masked = torch.arange(batch, device=device), output.sequences, attention
    reveal_step, log_prob, fallback = output.reveal_step, output.token_log_prob, output.fallback.clone()
    memory = first_memory(policy, index, truth)
    rows_left, masks_left = torch.stack([masked.any(-1).sum(), masked.sum()]).tolist()
    for step in range(num_steps):
        if rows_left < len(index):
            keep = true_places(masked.any(-1), rows_left)
            index, tokens, masked, reveal_step, log_prob, fallback = (
                values[keep] for values in (index, tokens, masked, reveal_step, log_prob, fallback)
            )
            canvas = canvas.rows(keep)
            memory = {key: value[keep] for key, value in memory.items()}
        if rows_left == 0:
            break
        if step == 0:
            canvas.encode_prompt()
        noise = uniform_noise(seed, row_ids[index], step, length, SELECTION) if noisy else None
        predictions = Predictions(canvas, tokens, masked, masks_left)  # the one forward of this step
        state = DecodingState(predictions, tokens, step, num_steps, noise, memory)
        done = unmask(policy, state, write(index), is_last=step == num_steps - 1)
        tokens, masked, rows_left, masks_left = done.tokens, done.masked, done.rows_left, done.masks_left
        reveal_step = torch.where(done.reveal, step, reveal_step)
        log_prob = log_prob.flatten().index_copy(0, done.places, done.log_prob).view_as(masked)
        fallback = fallback if done.fallback is None else fallback + done.fallback
        if rows_left < len(index):  # some leave; what is written of the others is written over
            output.sequences[index], output.reveal_step[index] = tokens, reveal_step
            output.token_log_prob[index], output.fallback[index] = log_prob, fallback
            output.nfe[index] = (step + 1) * cost
    return output


def _check_budget(num_steps: int, field: str) -> None:
    if num_steps < 1:
        raise UserError(field, f"a budget of {num_steps} steps", "allow at least 1")


def _blocks(policy: Policy, block_size: int | None, longest: int, num_steps: int) -> Policy:
    """Wrap a policy into blocks; every block needs a step of its own."""
    if block_size is None:
        return policy
    wrapped = Block(policy, block_size)
    blocks = -(-longest // block_size)
    if blocks > num_steps:
        problem = f"{blocks} blocks of {block_size} in {num_steps} steps"
        raise UserError("block_size", problem, "use larger blocks or more steps")
    return wrapped


def _row_ids(row_ids: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if row_ids is None:
        return torch.arange(batch, device=device)
    if row_ids.shape != (batch,):
        raise UserError("row_ids", f"shape {tuple(row_ids.shape)} for {batch} rows", "give one id per row")
    return row_ids.to(device, torch.int64)


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    policy: Policy,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
    *,
    length: int | Tensor,
    max_steps: int,
    block_size: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    row_ids: Tensor | None = None,
    record_history: bool = False,
    device: torch.device | str | None = None,
    pad_token_id: int = 0,
) -> DecodeOutput:
    """Generate responses by revealing the sets that `policy` selects.

    A row's result depends on its prompt, its length, its id and the seed only: not on the other rows, their order or
    the padding. A step costs one denoiser call on the rows that are not finished, whatever the policy reads. The last
    budgeted step reveals everything that is left.

    Args:
        denoiser: see `Denoiser`. An attribute `forwards_per_call` (2 under guidance) multiplies the NFE.
        policy: decides the reveal sets.
        context: int64 [B, C], prompts.
        context_mask: bool [B, C], False at padding, left or right; all True when left out.
        length: response length, one number or int64 [B].
        max_steps: step budget per row.
        block_size: semi-autoregressive blocks of this many positions (see `Block`).
        temperature: of token sampling; 0 takes the most likely token. Sampling inverts the cumulative distribution in
            float64.
        generator: only its seed is used (see `generator_seed`); the seed of `torch.manual_seed` when left out.
        row_ids: int64 [B], identity of each row for the noise, e.g. its index in the data set; 0..B-1 when left out.
        record_history: keep all intermediate states.
        device: where to decode; that of `context`, or of `length`, when left out.
        pad_token_id: written behind the end of shorter responses.

    Raises:
        UserError: for a budget below 1, a negative temperature or length, sizes that do not match, or more blocks than
            steps.
    """
    _check_budget(max_steps, "max_steps")
    if not temperature >= 0:
        raise UserError("temperature", f"{temperature} is negative", "give 0 for the most likely token, or more")
    if device is None:
        given = context if context is not None else length if isinstance(length, Tensor) else None
        device = "cpu" if given is None else given.device
    where = torch.device(device)
    sizes = [len(item) for item in (context, row_ids, length) if isinstance(item, Tensor) and item.dim() > 0]
    batch = sizes[0] if sizes else 1
    if any(size != batch for size in sizes):
        raise UserError("length", f"{sizes} rows in context, row_ids and length", "give one row per sequence")
    lengths = torch.as_tensor(length, dtype=torch.int64, device=where).expand(batch)
    longest, shortest = (int(lengths.max()), int(lengths.min())) if batch else (0, 0)
    if shortest < 0:
        raise UserError("length", f"a response of {shortest} tokens", "give 0 or more")
    attention = torch.arange(longest, device=where) < lengths[:, None]  # [B, L]
    if context is not None:
        context = context.to(where)
        context_mask = None if context_mask is None else context_mask.to(where)
    canvas = Canvas(denoiser, attention, context, context_mask)
    policy = _blocks(policy, block_size, longest, max_steps)
    seed, ids = generator_seed(generator), _row_ids(row_ids, batch, where)

    def write(index: Tensor) -> Write:
        return token_writer(temperature, seed, ids[index])

    with evaluation_mode(denoiser, policy):
        output = _unmask(policy, canvas, max_steps, seed, ids, write, None, pad_token_id)
    if record_history:
        # Revealed tokens never change, so the states follow from the result.
        executed = int(output.reveal_step.max()) + 1 if output.reveal_step.numel() else 0
        hidden = output.reveal_step >= torch.arange(executed + 1, device=where)[:, None, None]
        output.history = partial_state(output.sequences, hidden, denoiser.mask_index)
    return output


@torch.no_grad()
def follow(
    policy: Policy,
    canvas: Canvas,
    tokens: Tensor,
    num_steps: int,
    *,
    block_size: int | None = None,
    generator: torch.Generator | None = None,
    row_ids: Tensor | None = None,
) -> PathOutput:
    """Reveal the true tokens along the policy's own order (teacher forcing).

    Only policies that declare `needs_truth` find the truth in `state.memory["truth"]`.

    Args:
        policy: decides the reveal sets from the partially revealed truth.
        canvas: prompt, padding and denoiser.
        tokens: int64 [B, L], the truth.
        num_steps: step budget T; the last step reveals everything that is left.
        block_size: see `decode`.
        generator: see `decode`.
        row_ids: see `decode`.

    Returns:
        `PathOutput`: `token_log_prob` is the log-likelihood of the true token at the state that revealed it.

    Raises:
        UserError: for a budget below 1, tokens of another shape than the canvas, a MASK among the tokens, or more
            blocks than steps.
    """
    _check_budget(num_steps, "num_steps")
    attention = canvas.attention_mask
    if tokens.shape != attention.shape:
        problem = f"shape {tuple(tokens.shape)} on a canvas of {tuple(attention.shape)}"
        raise UserError("tokens", problem, "give one token per response position")
    if bool(((tokens == canvas.mask_index) & attention).any()):
        raise UserError("tokens", "the MASK token among the true tokens", "give clean sequences")
    ids = _row_ids(row_ids, len(tokens), tokens.device)
    longest = int(attention.sum(-1).max()) if attention.numel() else 0
    policy = _blocks(policy, block_size, longest, num_steps)
    # Padding may hold any id, also one the denoiser has no class for.
    readable = tokens.masked_fill(~attention, 0)

    def write(index: Tensor) -> Write:
        return lambda logits, state, places: readable[index].flatten()[places]

    with evaluation_mode(canvas.denoiser, policy):
        seed = generator_seed(generator)
        output = _unmask(policy, canvas, num_steps, seed, ids, write, readable)
    return PathOutput(attention, output.nfe, num_steps, output.reveal_step, output.token_log_prob, output.fallback)
