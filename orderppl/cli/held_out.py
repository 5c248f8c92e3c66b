"""What evaluate, frontier, diagnose and report have in common: runs, the rows they are measured on, heuristics."""

from __future__ import annotations

from typing import Any

import torch

from orderppl.cli.assemble import Known, Spec, make_data, make_denoiser
from orderppl.config import Builder, build
from orderppl.data import AnswerTokens
from orderppl.data.dataset import Examples
from orderppl.errors import UserError
from orderppl.runs import Run, load_order


def open_run(
    name: str,
    denoiser: Spec | None = None,
    device: str = "cpu",
    *,
    policy: Spec | None = None,
    needs_order: bool = False,
) -> Run:
    """Load a run folder or a shared order, with its own denoiser or another one, its policy or a wrapper of it.

    Raises:
        UserError: it has no order where one is needed, or see `load_order`.
    """
    other = None if denoiser is None else make_denoiser(Builder(Known()), denoiser, None)
    run = load_order(name, other, device=device)
    if needs_order and run.policy is None:
        raise UserError("run", f"{name} holds a {run.kind}, no order", "give a run of fit-order, or a shared order")
    if policy is not None:
        run.policy = build(policy, {"policy": run.policy}, field="policy")
    return run


def read_examples(run: Run, data: Spec | None, split: str, rows: int | None = None) -> Examples:
    """Rows of the run's own data, or of others.

    Args:
        run: whose data and tokeniser.
        data: other data.
        split: one of them; the test split stands in for a validation split that is not there.
        rows: how many, from the first; all when left out.

    Raises:
        UserError: there are no data, or no such split.
    """
    held = run.data if data is None else make_data(Builder(Known()), data)
    if held is None:
        raise UserError("data", f"{run.name} was fitted to data that no config describes", "give --data")
    splits = held.splits(run.tokenizer)
    if split not in splits and split != "validation":
        raise UserError("split", f"the data have no split {split!r}", f"use one of {', '.join(splits)}")
    examples: Examples = splits.get(split, splits["test"])
    return examples if rows is None else examples.take(rows)


def known_of(examples: Examples) -> dict[str, Any]:
    """What wrappers of policies are told of the texts: ids of ends and padding, and which tokens are the answer."""
    tokenizer = examples.tokenizer
    if tokenizer is None:
        return {}
    known: dict[str, Any] = {"token_ids": sorted({tokenizer.eos_index, tokenizer.pad_index})}
    try:
        return {**known, "answer": AnswerTokens(tokenizer)}
    except UserError:  # its texts mark no answer
        return known


def log_evidence(denoiser: Any, examples: Examples) -> torch.Tensor | None:
    """Exact log probability of every row, float64 [N], of a denoiser that knows it; nats."""
    if not hasattr(denoiser, "log_evidence"):
        return None
    found: torch.Tensor = denoiser.log_evidence(examples.batch.tokens, examples.batch.attention_mask)
    return found.double().cpu()
