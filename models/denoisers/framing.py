"""Whether a masked model wants a start and an end token around every row, by what it says of the user's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from orderppl.data import Examples
from orderppl.data.dataset import padded
from orderppl.data.tokenizers import PretrainedTokenizer
from orderppl.errors import UserError
from orderppl.models.denoisers.pretrained import PretrainedDenoiser
from orderppl.unmasking import Batch
from orderppl.unmasking.trajectory import Path, same_step

ROWS, EVERY, SURE = 64, 5, 4.0  # rows that are looked at; of their tokens one in so many is masked; z of a verdict


def framing_advice(denoiser: Any, examples: Examples) -> str | None:
    """What to change where rows are clearly more likely with, or without, a start and an end token around them.

    One in five tokens of some rows is masked, and the nats of these are compared in pairs, row by row.

    Args:
        denoiser: that reads the rows.
        examples: as it will read them.

    Returns:
        One line; None where they are right as they are, or nothing can be told.
    """
    tokenizer = examples.tokenizer
    if not (isinstance(denoiser, PretrainedDenoiser) and isinstance(tokenizer, PretrainedTokenizer)):
        return None
    try:
        begin, close = tokenizer.both_ends()
    except UserError:
        return None
    batch, inner = examples.batch, list[list[int]]()
    for ids, kept in zip(batch.tokens[:ROWS], batch.attention_mask[:ROWS], strict=True):
        row = ids[kept].tolist()
        row = row[tuple(row[:1]) == begin :]
        inner.append(row[: len(row) - (tuple(row[-1:]) == close)])
    longest = denoiser.max_length or max(map(len, inner)) + 2
    inner = [row for row in inner if 4 <= len(row) <= longest - 2]
    if len(inner) < 8:  # too few for an interval
        return None
    gain = row_nats(denoiser, inner) - row_nats(denoiser, inner, begin, close)  # of the frame, float [N]
    z = float(gain.mean() / (gain.std() / len(gain) ** 0.5).clamp(min=1e-12))
    framed = tokenizer.frame != ((), ())
    if (z < SURE and not framed) or (z > -SURE and framed):
        return None
    start, end = (tokenizer.tokens[ids[0]] for ids in (begin, close))
    less, word = f"{abs(float(gain.mean())):.2g} nats a token less", "without" if framed else "with"
    return f"a row takes {less} {word} {start} and {end} around it; load it with frame: {str(not framed).lower()}"


@torch.no_grad()
def row_nats(
    denoiser: PretrainedDenoiser, rows: Sequence[list[int]], begin: tuple[int, ...] = (), close: tuple[int, ...] = ()
) -> torch.Tensor:
    """Nats of one masked token in five, given the others of its row and a frame around it.

    Args:
        denoiser: of these tokens.
        rows: token ids, without a frame.
        begin: ids put before every row.
        close: ids put behind it.

    Returns:
        float [N], the mean over the masked tokens of a row.
    """
    tokens, attended = padded([[*begin, *row, *close] for row in rows], denoiser.pad_index)
    chosen = torch.tensor([number % min(EVERY, len(row)) for number, row in enumerate(rows)])[:, None]
    place = torch.arange(tokens.shape[1]) - len(begin)
    inside = (place >= 0) & (place < torch.tensor([len(row) for row in rows])[:, None])
    masked = (inside & (place % EVERY == chosen)).to(denoiser.device)
    path = Path(Batch(tokens, attended).to(denoiser.device), denoiser, 1)
    said = path.state(masked, same_step(0, masked)).token_log_prob(path.batch.readable)  # [N, S]
    return (-said.sum(-1) / masked.sum(-1)).cpu()
