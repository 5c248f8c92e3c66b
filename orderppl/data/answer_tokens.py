"""Which tokens of a response are its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError

NO_TOKEN = -1  # stands at padding, where there may be any id
_SPACE = "[\\s\u2581\u0120]*"  # as sentencepiece and byte-level vocabularies write it, too
MARK, END = re.compile(f"{_SPACE}#+{_SPACE}"), re.compile(f"{_SPACE}(;|<<){_SPACE}")


class AnswerTokens:
    """The mark `#` or `####` and what follows, up to the next equation or the end: what exact match reads.

    A response without a mark is its own answer. `# 5 ; 2 + 3 = 5` has two answer tokens, and so has `2 + 3 = 5 # 5`.

    Args:
        marks: ids of the marks.
        ends: ids before which an answer ends, the end of a sequence among them.
    """

    def __init__(self, marks: Sequence[int], ends: Sequence[int]) -> None:
        self.marks, self.ends = tuple(marks), tuple(ends)
        self.config = {"marks": self.marks, "ends": self.ends}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> AnswerTokens:
        """Those of a tokeniser.

        Raises:
            UserError: no token of it is a mark.
        """
        marks = [index for index, token in enumerate(tokenizer.tokens) if MARK.fullmatch(token)]
        if not marks:
            raise UserError("tokenizer", "no token of it is #, which marks an answer", "use one that has it")
        ends = [index for index, token in enumerate(tokenizer.tokens) if END.fullmatch(token)]
        return cls(marks, [tokenizer.eos_index, NO_TOKEN, *ends])

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return bool [*, L] for tokens, int64 [*, L], `NO_TOKEN` at padding."""
        place = torch.arange(tokens.shape[-1], device=tokens.device)
        marked, ended = is_any_of(tokens, self.marks), is_any_of(tokens, self.ends)
        mark = torch.where(marked, place, -1).cummax(-1).values  # [*, L], the last one so far
        end = torch.where(ended, place, -1).cummax(-1).values
        return (mark > end) | ~marked.any(-1, keepdim=True)


def is_any_of(tokens: Tensor, ids: Sequence[int]) -> Tensor:
    """`torch.isin` without a tensor of ids, which would be copied to the device at every call."""
    found = torch.zeros_like(tokens, dtype=torch.bool)
    for index in ids:
        found = found | (tokens == index)
    return found
