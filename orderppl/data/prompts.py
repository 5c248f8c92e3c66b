"""Canvases to decode from what a user types: prompts, and texts with holes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orderppl.data.dataset import padded
from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError
from orderppl.unmasking import Batch

# as BERT, RoBERTa, Dream, LLaDA and XLM write it
HOLE = re.compile(r"\[MASK\]|<mask>|<\|mask\|>|<\|mdm_mask\|>|<special1>")


def prompt_batch(prompts: Sequence[str], tokenizer: Tokenizer, length: int, separator: bool = False) -> Batch:
    """Prompts, given, each before a response of MASKs, as `TextData` lays them out.

    Args:
        prompts: texts; an empty one is no prompt.
        tokenizer: of the denoiser.
        length: of the responses, tokens.
        separator: end every prompt with an end token.

    Raises:
        UserError: there are none, or no length.
    """
    if not prompts or length < 1:
        raise UserError("prompt", f"{len(prompts)} prompts with responses of {length} tokens", "give at least one")
    left = [[*tokenizer.frame[0], *tokenizer.encode(text)] for text in prompts]
    if separator:
        left = [[*ids, tokenizer.eos_index] if text else ids for ids, text in zip(left, prompts, strict=True)]
    tokens, given = padded(left, tokenizer.pad_index, max(map(len, left)))
    masks = torch.full((len(left), length), tokenizer.mask_index)
    attended = torch.cat([given, torch.ones_like(masks, dtype=torch.bool)], 1)
    return Batch(torch.cat([tokens, masks], 1), attended, torch.cat([given, torch.zeros_like(masks).bool()], 1))


def template_batch(templates: Sequence[str], tokenizer: Tokenizer) -> Batch:
    """Texts whose holes, `[MASK]` or the tokeniser's own MASK, are one token each; all the rest is given.

    Raises:
        UserError: there are none, or one has no hole.
    """
    begin, close = tokenizer.frame
    rows = [[*begin, *_with_holes(text, tokenizer), *close] for text in templates]
    for text, ids in zip(templates, rows, strict=True):
        if tokenizer.mask_index not in ids:
            raise UserError("template", f"{text[:60]!r} has no hole", "write [MASK] where a token is to be filled in")
    if not rows:
        raise UserError("template", "there is none", "give at least one")
    tokens, attended = padded(rows, tokenizer.pad_index)
    holes: Tensor = (tokens == tokenizer.mask_index) & attended
    return Batch(tokens, attended, attended & ~holes)


def _with_holes(text: str, tokenizer: Tokenizer) -> list[int]:
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if getattr(inner, "mask_token_id", None) == tokenizer.mask_index:
        return tokenizer.encode(HOLE.sub(lambda _: str(inner.mask_token), text))  # it knows what to do about spaces
    ids: list[int] = []
    for index, piece in enumerate(HOLE.split(text)):
        ids += [tokenizer.mask_index] if index else []
        ids += tokenizer.encode(piece.strip())
    return ids
