"""Recordings of decoding: what every arm revealed, when, and what else the denoiser might have written.

A recording is made twice per arm and row: `decode` writes the denoiser's own tokens, `follow` reveals the true tokens
of the row (teacher forcing), whose nats are those of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orderppl.data.answers import same_text
from orderppl.data.dataset import Examples
from orderppl.decoding.alternatives import alternatives_at_reveal
from orderppl.decoding.decode import DecodeOutput, decode, follow
from orderppl.errors import UserError
from orderppl.evaluation import Arm
from orderppl.inference.trainer import module_device
from orderppl.unmasking import Batch, Denoiser
from orderppl.unmasking.trajectory import VISIBLE

SCHEMA = 2  # of the document
DIGITS = 6  # decimals of its probabilities and nats


def record_replay(
    arms: Sequence[Arm],
    denoiser: Denoiser,
    examples: Examples | Batch,
    *,
    name: str = "",
    split: str = "test",
    alternatives: int = 5,
    seed: int = 0,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Record every arm on every example.

    Args:
        arms: what is shown side by side.
        denoiser: of all arms that have none of their own.
        examples: a few rows.
        name: of the task, in the page's choice.
        split: that the rows come from.
        alternatives: most probable tokens kept per revealed token.
        seed: of stochastic policies and of the tokens, as in `evaluate`.
        sources: files that arms come from, by name.

    Returns:
        JSON values. `problems[k].recordings[arm][kind]` has, per shown position, `tokens` (ids, spelt by `spelling`),
        `step` (-1 at given positions), `probability`, `nats` (minus its logarithm, null where infinite) and
        `alternatives` (pairs of id and probability), and in all `forwards`, `total_nats`, and `steps` with their number
        of tokens, mean probability and nats. Where all given positions come first, they are the text `prompt`; else all
        are shown in their places.

    Raises:
        UserError: no rows, nothing to reveal in them, or two arms of one name.
    """
    examples = examples if isinstance(examples, Examples) else Examples(examples)
    if not bool(examples.batch.latent.any()):
        problem = f"the {split} rows of {name or 'the data'} are none, or wholly given"
        raise UserError("examples", problem, "give rows with something to reveal")
    twice = [arm.name for arm in arms if [other.name for other in arms].count(arm.name) > 1]
    if twice:
        raise UserError("arms", f"{twice[0]} comes twice", "give every arm a name of its own")
    examples = replace(examples, batch=examples.batch.to("cpu").trimmed())
    shown = _shown(examples.batch)
    recordings: list[dict[str, dict[str, Any]]] = [{} for _ in range(len(examples))]
    for arm in arms:
        own = denoiser if arm.denoiser is None else arm.denoiser
        for kind, output in _played(arm, own, examples.batch, seed).items():
            described = _described(examples, own, output, shown, alternatives)
            if kind == "decode" and _is_graded(examples):
                right = examples.grade(examples.texts(output.sequences.cpu()), examples.references or [])
                for recording, is_right in zip(described, right.tolist(), strict=True):
                    recording["correct"] = bool(is_right)
            for row, recording in enumerate(described):
                recordings[row].setdefault(arm.name, {})[kind] = recording
    problems = [_problem(examples, row, shown[row], own) for row, own in enumerate(recordings)]
    used = {token for problem in problems for token in problem["truth"]}
    for recording in (one for row in recordings for kinds in row.values() for one in kinds.values()):
        used.update(recording["tokens"], (token for options in recording["alternatives"] for token, _ in options))
    return {
        "name": name,
        "split": split,
        "arms": [{"name": arm.name, "source": (sources or {}).get(arm.name)} for arm in arms],
        "spelling": {str(token): examples.spell(token) for token in sorted(used)},
        "problems": problems,
    }


def _played(arm: Arm, denoiser: Denoiser, batch: Batch, seed: int) -> dict[str, DecodeOutput]:
    """What the arm does with the rows: as it decodes, unless it has to know the truth, and along the true tokens."""
    batch = batch.to(module_device(denoiser) if isinstance(denoiser, torch.nn.Module) else "cpu")
    steps = arm.steps or int(batch.latent.sum(-1).max())
    told = Batch(batch.tokens, batch.attention_mask, batch.attention_mask & ~batch.latent)
    options: dict[str, Any] = {"mode": arm.mode, "block_size": arm.block_size}
    options["generator"] = torch.Generator().manual_seed(seed)
    found: dict[str, DecodeOutput] = {}
    if arm.kind != "oracle":
        written = decode(denoiser, arm.policy, told, max_steps=steps, temperature=arm.temperature, **options)
        found["decode"] = written
    return found | {"follow": follow(arm.policy, denoiser, told, steps, **options)}


def _shown(batch: Batch) -> Tensor:
    """Positions that are shown one by one: all, or those from the first to reveal on, if what is given comes first."""
    latent = batch.latent
    begun = latent.cumsum(-1) > 0
    ahead = latent.flip(-1).cumsum(-1).flip(-1) > 0
    has_holes = (begun & ahead & ~latent & batch.attention_mask).any(-1, keepdim=True)
    return batch.attention_mask & (begun | has_holes | ~latent.any(-1, keepdim=True))


def _is_graded(examples: Examples) -> bool:
    """Whether there is a right and wrong besides the true tokens themselves."""
    return examples.references is not None and (examples.answers is not None or examples.grade is not same_text)


def _problem(examples: Examples, row: int, shown: Tensor, recordings: dict[str, Any]) -> dict[str, Any]:
    batch = examples.batch
    before = batch.tokens[row][batch.attention_mask[row] & ~shown].tolist()
    tokenizer = examples.tokenizer
    text = " ".join(map(str, before)) if tokenizer is None else tokenizer.decode(before)
    return {
        "row": row,
        "prompt": text or None,
        "truth": batch.tokens[row][shown].tolist(),
        "size": int(batch.latent[row].sum()),
        "recordings": recordings,
    }


def _described(
    examples: Examples, denoiser: Denoiser, output: DecodeOutput, shown: Tensor, count: int
) -> list[dict[str, Any]]:
    """One recording per row."""
    batch = examples.batch
    given = batch.attention_mask & ~batch.latent
    finished = Batch(output.sequences, batch.attention_mask.to(output.latent), given.to(output.latent))
    options = alternatives_at_reveal(denoiser, finished, output.reveal_step, count)
    return [
        _recording(
            output.sequences[row].cpu()[kept],
            output.reveal_step[row].cpu()[kept],
            output.token_log_prob[row].cpu()[kept],
            (options.tokens[row].cpu()[kept], options.token_log_prob[row].cpu()[kept].exp()),
            int(output.nfe[row]),
        )
        for row, kept in enumerate(shown)
    ]


def _recording(
    tokens: Tensor, step: Tensor, log_prob: Tensor, options: tuple[Tensor, Tensor], forwards: int
) -> dict[str, Any]:
    latent = (step != VISIBLE).tolist()
    pairs = zip(*(values.tolist() for values in options), latent, strict=True)
    return {
        "tokens": tokens.tolist(),
        "step": step.tolist(),
        "probability": _rounded(log_prob.exp()),
        "nats": [_nats(one) for one in log_prob],
        "alternatives": [
            [[token, round(share, DIGITS)] for token, share in zip(ids, shares, strict=True)] if is_revealed else []
            for ids, shares, is_revealed in pairs
        ],
        "forwards": forwards,
        "total_nats": _nats(log_prob),
        "steps": [
            {
                "tokens": int((step == t).sum()),
                "probability": round(float(log_prob[step == t].exp().mean()), DIGITS),
                "nats": _nats(log_prob[step == t]),
            }
            for t in range(int(step.max()) + 1 if len(step) else 0)
        ],
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]


def _nats(log_prob: Tensor) -> float | None:
    """Minus the sum of log-probabilities; None where it is infinite, which JSON cannot write."""
    total = -float(log_prob.sum())
    return round(total, DIGITS) if math.isfinite(total) else None
