"""Named policies on one denoiser and one data set, as flat records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from orderppl.decoding import Policy, decode, describe_policy
from orderppl.decoding.policy import needs_noise
from orderppl.denoising import Denoiser
from orderppl.errors import UserError
from orderppl.evaluation.answers import exact_match
from orderppl.evaluation.intervals import Interval, bootstrap_mean, paired_difference
from orderppl.evaluation.path_likelihood import Batch, PathLikelihood, batch_canvas, batch_rows, path_likelihood

Scalar = str | int | float
Record = dict[str, Scalar]
Grade = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(decoded responses, references) -> float64 [N], 1 where a response is right."""
METRICS = ("accuracy", "path_nats", "nfe")


@dataclass
class DecodedAnswers:
    """Decoded responses of a data set, one entry per row, on the CPU.

    Attributes:
        texts: decoded responses.
        correct: float64 [N], 1 where the answer is right.
        tokens: int64 [N], response tokens up to the first end token, where one is known; without padding.
        canvas: int64 [N], response positions that were decoded, those behind the end token included.
        nfe: int64 [N], denoiser forwards.
        nfe_batch_max: int64 [batches], forwards of the slowest row of each batch.
        fallback: int64 [N], steps decided by the decoder's arg-max rule.
    """

    texts: list[str]
    correct: Tensor
    tokens: Tensor
    canvas: Tensor
    nfe: Tensor
    nfe_batch_max: Tensor
    fallback: Tensor


def decode_answers(
    denoiser: Denoiser,
    policy: Policy,
    batches: Sequence[Batch],
    num_steps: int,
    *,
    decode_text: Callable[[list[int]], str],
    references: Sequence[str],
    length: int | None = None,
    block_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    grade: Grade = exact_match,
    end_index: int | None = None,
) -> DecodedAnswers:
    """Decode every batch and compare the answers.

    Args:
        denoiser: see `Denoiser`.
        policy: decides the reveal sets.
        batches: dictionaries of tensors; only the prompts and the lengths of the responses are read, and `row_ids`
            (int64 [B]), the identities of the rows for the noise, their numbers in order when left out.
        num_steps: step budget T.
        decode_text: token ids of a response (no padding) -> text; it cuts at the end token where there is one.
        references: reference response or bare answer of every row, in order.
        length: canvas of the responses in tokens; each row's own length when left out, which tells every arm how long
            the answer is.
        block_size: semi-autoregressive blocks of this many positions.
        temperature: of token sampling.
        seed: of stochastic policies and token sampling.
        device: where to run; that of the batches when left out.
        grade: what is right; the same number after the last mark when left out.
        end_index: id of the end token, behind which nothing counts as a response token.

    Raises:
        UserError: when there are no rows, or not one reference per row.
    """
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    counts: list[tuple[Tensor, ...]] = []
    for batch in batches:
        canvas, tokens = batch_canvas(denoiser, batch, device)
        output = decode(
            denoiser,
            policy,
            canvas.context,
            canvas.context_mask,
            length=canvas.attention_mask.sum(-1) if length is None else length,
            max_steps=num_steps,
            block_size=block_size,
            temperature=temperature,
            generator=generator,
            row_ids=batch_rows(batch, len(texts)),
            device=tokens.device,
        )
        sizes = output.attention_mask.sum(-1)
        texts += [decode_text(row[:size]) for row, size in zip(output.sequences.tolist(), sizes.tolist(), strict=True)]
        written = sizes
        if end_index is not None:
            ended = ((output.sequences == end_index) & output.attention_mask).long().cumsum(-1) > 0  # [B, L]
            written = torch.minimum(sizes, (~ended).sum(-1) + 1)
        counts.append((written, sizes, output.nfe, output.nfe.amax(0, keepdim=True), output.fallback))
    if not texts:
        raise UserError("batches", "no rows", "give a split that is not empty")
    correct = grade(texts, references)
    return DecodedAnswers(texts, correct, *(torch.cat(parts).cpu() for parts in zip(*counts, strict=True)))


def evaluate_policies(
    denoiser: Denoiser,
    policies: Mapping[str, Policy],
    batches: Sequence[Batch],
    num_steps: int,
    *,
    metrics: Sequence[str] = ("path_nats", "nfe"),
    decode_text: Callable[[list[int]], str] | None = None,
    references: Sequence[str] | None = None,
    length: int | None = None,
    block_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    draws: int = 1,
    device: torch.device | str | None = None,
    grade: Grade = exact_match,
    baseline: str | None = None,
    labels: Mapping[str, Scalar] | None = None,
    rows: dict[tuple[str, str], tuple[Tensor, Tensor]] | None = None,
) -> list[Record]:
    """Evaluate policies with the same weights, canvas, parser and rows.

    Args:
        denoiser: see `Denoiser`.
        policies: arm name -> policy.
        batches: dictionaries of tensors (`tokens`, `attention_mask`, `context`, `context_mask`), read once per arm.
        num_steps: requested step budget T.
        metrics: of "accuracy" (share of right decoded answers), "path_nats" (teacher-forced nats per revealed token),
            "nfe" (realised forwards: of decoding when accuracy is asked for, else of the teacher-forced path).
        decode_text: see `decode_answers`; needed for accuracy.
        references: see `decode_answers`; needed for accuracy.
        length: see `decode_answers`.
        block_size: semi-autoregressive blocks of this many positions.
        temperature: of token sampling.
        seed: of stochastic policies, token sampling and bootstrap.
        draws: times that an arm which needs noise is run, with seeds from `seed` on; a row has the mean over them.
        device: where to run; that of the batches when left out.
        grade: see `decode_answers`.
        baseline: an arm; every other arm then also gets `<metric>_difference` records, paired by row.
        labels: added to every record, e.g. the task.
        rows: filled with (metric, arm) -> values and weights of every row, float64 [N] each, for further comparisons.

    Returns:
        Records with `metric`, `value`, `low`, `high` (95%), `n`, `seed`, `arm`, `policy` and its parameters, `steps`
        (requested), `nfe`, `nfe_min`, `nfe_max`, `nfe_batch_max` (mean over batches of the slowest row),
        `tokens_per_forward`, `fallback` (mean per row).

    Raises:
        UserError: for an unknown metric or baseline, or accuracy without texts.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise UserError("metrics", f"unknown metric {metric!r}", f"use {', '.join(METRICS)}")
    if "accuracy" in metrics and (decode_text is None or references is None):
        raise UserError("metrics", "accuracy without texts", "give decode_text and references")
    if baseline is not None and baseline not in policies:
        raise UserError("baseline", f"no arm {baseline!r}", f"use one of {', '.join(policies)}")
    records: list[Record] = []
    rows = {} if rows is None else rows
    heads: dict[tuple[str, str], Record] = {}
    for arm, policy in policies.items():
        common: Record = {"arm": arm, **describe_policy(policy), "steps": num_steps, "seed": seed, **(labels or {})}
        if block_size is not None:
            common["block_size"] = block_size
        results: dict[str, tuple[Tensor, Tensor, Record]] = {}
        seeds = range(seed, seed + (draws if needs_noise(policy) else 1))
        if draws > 1:
            common["draws"] = len(seeds)
        if "accuracy" in metrics and decode_text is not None and references is not None:
            play = partial(
                decode_answers,
                denoiser,
                policy,
                batches,
                num_steps,
                decode_text=decode_text,
                references=references,
                length=length,
                block_size=block_size,
                temperature=temperature,
                device=device,
                grade=grade,
            )
            answers = _mean_of_draws([play(seed=draw) for draw in seeds])
            cost = {**_cost(answers.nfe, answers.nfe_batch_max, answers.tokens, answers.fallback), "run": "decoding"}
            cost["temperature"] = temperature
            results["accuracy"] = (answers.correct, torch.ones_like(answers.correct), cost)
            results["nfe"] = (answers.nfe.double(), torch.ones_like(answers.correct), cost)
        if "path_nats" in metrics or "accuracy" not in metrics:
            walk = partial(path_likelihood, denoiser, policy, batches, num_steps, block_size=block_size, device=device)
            path = _mean_of_draws([walk(seed=draw) for draw in seeds])
            cost = {**_cost(path.nfe, path.nfe_batch_max, path.tokens, path.fallback), "run": "teacher_forced"}
            results["path_nats"] = (path.nats / path.tokens.clamp(min=1), path.tokens.double(), cost)
            results.setdefault("nfe", (path.nfe.double(), torch.ones_like(path.nats), cost))
        for metric in metrics:
            values, weights, cost = results[metric]
            rows[metric, arm], heads[metric, arm] = (values, weights), {**common, **cost, "n": len(values)}
            interval = bootstrap_mean(values, weights, seed=seed)
            records.append(_record(metric, interval, heads[metric, arm]))
    if baseline is not None:
        for metric, arm in heads:
            if arm != baseline:
                values, weights = rows[metric, arm]
                interval = paired_difference(values, rows[metric, baseline][0], weights, seed=seed)
                records.append(_record(f"{metric}_difference", interval, heads[metric, arm] | {"baseline": baseline}))
    return records


D = TypeVar("D", DecodedAnswers, PathLikelihood)


def _mean_of_draws(results: Sequence[D]) -> D:
    """The same rows with the mean over several runs in every number, float64; of one run, that run."""
    if len(results) == 1:
        return results[0]
    numbers: dict[str, Any] = {
        item.name: torch.stack([getattr(result, item.name).double() for result in results]).mean(0)
        for item in fields(results[0])
        if isinstance(getattr(results[0], item.name), Tensor)
    }
    return replace(results[0], **numbers)


def _record(metric: str, interval: Interval, labels: Record) -> Record:
    return {"metric": metric, "value": interval.value, "low": interval.low, "high": interval.high, **labels}


def _cost(nfe: Tensor, batch_max: Tensor, tokens: Tensor, fallback: Tensor) -> Record:
    """What a run cost per row; `tokens_per_forward` is the ratio of totals, padding not counted."""
    return {
        "nfe": float(nfe.double().mean()),
        "nfe_min": nfe.min().item(),
        "nfe_max": nfe.max().item(),
        "nfe_batch_max": float(batch_max.double().mean()),
        "tokens_per_forward": float(tokens.sum() / nfe.sum().clamp(min=1)),
        "fallback": float(fallback.double().mean()),
    }
