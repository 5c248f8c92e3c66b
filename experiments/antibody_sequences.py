"""Antibody domains as sequences of residues: drawn from the model itself, and read from a batch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orderppl import Batch, decode
from orderppl.data import Examples
from orderppl.data.tokenizers import Tokenizer
from orderppl.models.denoisers import AntibodyDenoiser
from orderppl.policies import Ranked

SHORTEST, LONGEST = 112, 128  # residues of a drawn heavy domain, the bulk of human ones
# of adalimumab, a public sequence
LIGHT = "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK"


def draw_sequences(denoiser: AntibodyDenoiser, path: Path, is_light: bool) -> Path:
    """Draw domains from the denoiser and keep them in a FASTA file.

    Heavy ones are written one residue a step in random order. Light ones would not fall into place so: of a natural one
    a quarter of the residues is drawn anew, twelve times.
    """
    if path.is_file():
        return path
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (90, 1), generator=generator)
    attended = hidden = torch.arange(LONGEST) < lengths
    tokens, rounds, steps, temperature = torch.full(attended.shape, denoiser.mask_index), 1, LONGEST, 0.25
    if is_light:
        tokens, rounds, steps, temperature = torch.tensor([denoiser.tokenizer.encode(LIGHT)] * 200), 12, 2, 0.7
        attended = torch.ones_like(tokens, dtype=torch.bool)
    for _ in range(rounds):
        hidden = torch.rand(tokens.shape, generator=generator) < 0.25 if is_light else hidden
        canvas = Batch(tokens.masked_fill(hidden, denoiser.mask_index), attended, attended & ~hidden)
        drawing: dict[str, Any] = {"max_steps": steps, "temperature": temperature, "generator": generator}
        tokens = decode(denoiser, Ranked("random"), canvas, **drawing).sequences
    drawn = _residues(tokens, attended, denoiser.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f">drawn-{i}\n{domain}\n" for i, domain in enumerate(drawn)), "utf-8")
    return path


def domains(examples: Examples, written: Tensor | None = None) -> list[str]:
    """The sequences of the rows, or what was written in their place; given residues included."""
    batch, tokenizer = examples.batch, examples.tokenizer
    assert tokenizer is not None
    return _residues(batch.tokens if written is None else written, batch.attention_mask, tokenizer)


def _residues(tokens: Tensor, attended: Tensor, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(row[seen].tolist()) for row, seen in zip(tokens, attended, strict=True)]
