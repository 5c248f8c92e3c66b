"""Texts that the denoiser has written itself."""

from __future__ import annotations

from dataclasses import replace

from orderppl.data.dataset import DataSet, Examples, at_least
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import Tokenizer
from orderppl.decoding.decode import decode
from orderppl.policies import Ranked
from orderppl.unmasking import Denoiser


class OwnOutput(DataSet):
    """Other data, whose responses to learn from are what the denoiser itself writes, one token at a time, surest first.

    For models that have no ground truth in a style of their own: an order is then learned for texts that they write.
    Training and validation rows are rewritten, test rows are not. What a text is compared with stays.

    Args:
        data: the other data.
        denoiser: the one that writes; frozen.
        rows: how many of the training rows, from the first; all when left out.
        batch_size: rows that it reads at a time.

    Raises:
        UserError: a number below 1.
    """

    def __init__(self, data: DataSet, denoiser: Denoiser, rows: int | None = None, batch_size: int = 64) -> None:
        at_least(1, rows=rows, batch_size=batch_size)
        self.data, self.denoiser, self.rows, self.batch_size = data, denoiser, rows, batch_size

    def make_splits(self, tokenizer: Tokenizer | None, report: LoadReport) -> dict[str, Examples]:
        """See `DataSet`."""
        own = getattr(self.denoiser, "tokenizer", None)
        splits = dict(self.data.splits(tokenizer if own is None else own))
        if self.rows is not None:
            splits["train"] = splits["train"].take(self.rows)
        return {name: part if name == "test" else self._rewritten(part) for name, part in splits.items()}

    def _rewritten(self, examples: Examples) -> Examples:
        """The same rows with responses of the denoiser's own."""
        batch = examples.batch
        tokens, given = batch.tokens.clone(), batch.attention_mask & ~batch.latent
        for begin in range(0, len(batch), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            canvas = replace(batch.rows(part), given=given[part])
            longest = max(int(canvas.latent.sum(-1).max()), 1)
            tokens[part] = decode(self.denoiser, Ranked("top_prob", 1.0), canvas, max_steps=longest).sequences
        return replace(examples, batch=replace(batch, tokens=tokens), answers=examples.references)
