"""Which tokens of a canvas are its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from orderppl.config import Configurable
from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError

_SPACE = "[\\s\u2581\u0120]*"  # as sentencepiece and byte-level vocabularies write it, too
MARK, END = re.compile(f"{_SPACE}#+{_SPACE}"), re.compile(f"{_SPACE}(;|<<){_SPACE}")


class AnswerTokens(Configurable):
    """The mark `#` or `####` and what follows, up to the next equation or the end: what exact match reads.

    A response without a mark is its own answer. `# 5 ; 2 + 3 = 5` has two answer tokens, and so has `2 + 3 = 5 # 5`.
    Marks before the first position to reveal belong to the prompt and do not count.

    Args:
        tokenizer: whose marks and ends they are; a description keeps the ids alone.
        marks: ids of the marks, instead.
        ends: ids before which an answer ends, the end of a sequence among them.

    Raises:
        UserError: no token is a mark.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        marks: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
    ) -> None:
        if tokenizer is not None and marks is None:
            marks = [index for index, token in enumerate(tokenizer.tokens) if MARK.fullmatch(token)]
            ends = [index for index, token in enumerate(tokenizer.tokens) if END.fullmatch(token)]
            ends = [tokenizer.eos_index, *ends]
        if not marks:
            raise UserError("tokenizer", "no token of it is #, which marks an answer", "use one that has it")
        self.marks, self.ends = tuple(marks), tuple(ends or ())
        self._made_by = type(self), (), {"marks": self.marks, "ends": self.ends}

    def __call__(self, tokens: Tensor, latent: Tensor) -> Tensor:
        """Which positions are the answer: bool [*, S].

        Args:
            tokens: int64 [*, S], -1 at padding.
            latent: bool [*, S], the positions to reveal.
        """
        # What stands before the first and behind the last of them is prompt or padding.
        inside = (latent.cumsum(-1) > 0) & (latent.flip(-1).cumsum(-1).flip(-1) > 0)
        place = torch.arange(tokens.shape[-1], device=tokens.device)
        marked = is_any_of(tokens, self.marks) & inside
        mark = torch.where(marked, place, -1).cummax(-1).values  # [*, S], the last one so far
        end = torch.where(is_any_of(tokens, self.ends) & inside, place, -1).cummax(-1).values
        return ((mark > end) | ~marked.any(-1, keepdim=True)) & latent


def is_any_of(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """`torch.isin` without a tensor of ids, which would be copied to the device at every call."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for index in ids:
        found = found | (tokens == index)
    return found
