"""From texts to padded batches: `tokens`, `attention_mask`, `context`, `context_mask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError

CARRIED = ("answer", "line")  # columns that evaluation needs beside the tokens


def tokenize(
    dataset: Dataset,
    tokenizer: Tokenizer,
    max_context: int,
    max_length: int,
    *,
    eos: bool = True,
    canvas: int | None = None,
    separate: bool = False,
    on_long: Literal["error", "report"] = "error",
    report: LoadReport | None = None,
    name: str = "data",
) -> Dataset:
    """Turn the columns `prompt` and `response` into `context` and `tokens` (lists of ids); `answer`, `line` are kept.

    Args:
        dataset: rows with `response` and, optionally, `prompt`.
        tokenizer: see `Tokenizer`.
        max_context: longest prompt, in tokens, the separator included.
        max_length: longest response, in tokens, eos included.
        eos: append one end-of-sequence token to each response.
        canvas: append as many of them as fill so many positions, at least one; None: one.
        separate: append one to each prompt too, which tells a denoiser where the response begins.
        on_long: a longer row stops the run ("error"), or is left out and counted in `report` ("report").
        report: receives the rows left out; needed with on_long="report".
        name: file or split named in messages.

    Raises:
        UserError: a row is too long or empty (with its line), or nothing is left.
    """
    if on_long not in ("error", "report"):
        raise UserError("on_long", f"{on_long!r} is unknown", "use 'error' or 'report'")
    if on_long == "report" and report is None:
        raise UserError(
            "report", "on_long='report' was asked for without a report", "pass the LoadReport of the loader"
        )
    if "response" not in dataset.column_names:
        raise UserError(
            "response", f"no such column in {name} ({', '.join(dataset.column_names)})", "rename the column"
        )
    with_prompt = "prompt" in dataset.column_names
    carried = [column for column in CARRIED if column in dataset.column_names]
    rows: list[dict[str, Any]] = []
    columns = {column: dataset[column][:] for column in ["response", *(["prompt"] if with_prompt else []), *carried]}
    for index in range(len(dataset)):
        row = {column: values[index] for column, values in columns.items()}
        line = int(row["line"]) if "line" in carried else index + 1
        new: dict[str, Any] = {"tokens": tokenizer.encode(row["response"])}
        new["tokens"] += [tokenizer.eos_index] * (max((canvas or 0) - len(new["tokens"]), 1) if eos else 0)
        checks = [("response", "tokens", max_length)]
        if with_prompt:
            new["context"] = tokenizer.encode(row["prompt"])
            if new["context"] and separate:
                new["context"].append(tokenizer.eos_index)
            checks.append(("prompt", "context", max_context))
        bad = None
        for column, key, limit in checks:
            if len(new[key]) > limit:
                bad = f"{column} is longer than the canvas", f"{len(new[key])} tokens, limit {limit}: {row[column]}"
                option = "max_length" if key == "tokens" else "max_context"
                remedy = f"raise {option}, or use on_long='report' to leave such rows out"
            elif not new[key]:
                bad, remedy = (f"{column} is empty", repr(row[column])), "remove the row"
            if bad is not None:
                break
        if bad is None:
            rows.append(new | {column: row[column] for column in carried})
        elif on_long == "error" or report is None:
            raise UserError(f"{name}:{line}", ": ".join(bad), remedy)
        else:
            report.reject(name, line, *bad)
    if not rows:
        raise UserError(name, "no row is left", "raise max_length or max_context")
    return Dataset.from_list(rows)


def _pad(lists: Sequence[Sequence[int]], pad_index: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-pad lists of ids: int64 [B, W] and the mask bool [B, W]."""
    sizes = torch.tensor([len(ids) for ids in lists])  # [B]
    longest = int(sizes.max())
    width = longest if width is None else width
    if longest > width:
        raise UserError("length", f"{width} is shorter than the longest row ({longest})", "raise it")
    mask = torch.arange(width) < sizes[:, None]  # bool [B, W]
    values = torch.full(mask.shape, pad_index, dtype=torch.int64)  # [B, W]
    # row-major order of the mask is the order of the ids: one copy instead of one per row
    values[mask] = torch.tensor(list(chain.from_iterable(lists)), dtype=torch.int64)
    return values, mask


def collate(
    rows: Sequence[Mapping[str, Any]], pad_index: int, *, length: int | None = None, context_length: int | None = None
) -> dict[str, Tensor]:
    """Pad rows into one batch, as models, guides and the ELBO take it.

    Args:
        rows: each with `tokens` and, all or none, `context` (lists of ids).
        pad_index: id put at padding.
        length: width L of the responses; None: the longest of these rows.
        context_length: width C of the prompts; None: the longest of these rows.

    Returns:
        `tokens` int64 [B, L], `attention_mask` bool [B, L] (False at padding) and, with prompts, `context` int64
        [B, C], `context_mask` bool [B, C]. Everything is left-aligned.

    Raises:
        UserError: there are no rows, only some have a prompt, or a row is longer than the given width.
    """
    if not rows:
        raise UserError("rows", "the batch is empty", "give at least one row")
    tokens, attention_mask = _pad([row["tokens"] for row in rows], pad_index, length)
    batch = {"tokens": tokens, "attention_mask": attention_mask}
    with_context = ["context" in row for row in rows]
    if all(with_context):
        batch["context"], batch["context_mask"] = _pad([row["context"] for row in rows], pad_index, context_length)
    elif any(with_context):
        raise UserError("context", "only some rows of the batch have a prompt", "give a prompt to all rows or to none")
    return batch


def tensors(
    dataset: Dataset, pad_index: int = 0, *, length: int | None = None, context_length: int | None = None
) -> dict[str, Tensor]:
    """Pad a whole tokenised set once, for batches drawn in memory; see `collate`."""
    columns = [column for column in ("tokens", "context") if column in dataset.column_names]
    if "tokens" not in columns:
        raise UserError("tokens", f"no such column ({', '.join(dataset.column_names)})", "call tokenize() first")
    lists = [dataset[column][:] for column in columns]
    return collate(
        [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)],
        pad_index,
        length=length,
        context_length=context_length,
    )
