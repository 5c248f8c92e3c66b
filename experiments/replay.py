"""Recordings of decoding: what every policy of a run revealed, when, and what else the denoiser might have written.

A recording is made twice per policy and problem: `decode` writes the denoiser's own tokens, `follow` reveals the true
tokens of the row (teacher forcing), whose nats are those of the tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orderppl.decoding import DecodeOutput, PathOutput, PlannedOrder, Policy, alternatives_at_reveal, decode, follow
from orderppl.denoising import Canvas, Denoiser
from orderppl.errors import UserError
from orderppl.evaluation.answers import exact_match
from orderppl.evaluation.path_likelihood import batch_canvas
from orderppl.experiments.build import Gsm8kTask, OrderConfig, OrderProblem, Task, learned_policy
from orderppl.experiments.chain import reference_arms
from orderppl.experiments.config import config_dict
from orderppl.experiments.evaluate import heuristics, load_order, load_settings
from orderppl.experiments.fit_order import ORDER_FILE
from orderppl.models.denoisers import ExactDenoiser

SCHEMA = 1  # of the document that `record_replays` makes
DIGITS = 6  # decimals of its probabilities and nats


@dataclass
class Arm:
    """A policy to replay, the denoiser it reads, and the file it comes from (None: nothing was learned)."""

    policy: Policy
    denoiser: Denoiser
    source: str | None = None


@dataclass
class Part:
    """Arms that can be shown side by side: the same data, denoiser and step budget."""

    name: str
    settings: OrderConfig
    task: Task
    arms: dict[str, Arm] = field(default_factory=dict)


def find_orders(run: Path) -> list[Path]:
    """Folders of a run that hold a learned order; below such a folder lie only what it was chosen from.

    Raises:
        UserError: there is none.
    """

    def below(folder: Path) -> Iterator[Path]:
        if (folder / ORDER_FILE).is_file():
            yield folder
        else:
            for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
                yield from below(inner)

    found = list(below(run))
    if not found:
        raise UserError("run", f"no {ORDER_FILE} in {run}", "give the folder of a run that fits an order, made anew")
    return found


def load_parts(run: Path, device: str, threshold: float) -> list[Part]:
    """Rebuild every learned order of a run, and put the heuristics beside it.

    Args:
        run: its folder.
        device: where the programs go.
        threshold: confidence of the threshold policy.
    """
    tasks: dict[str, Task] = {}
    members: dict[str, list[tuple[Path, OrderProblem]]] = {}
    parts: dict[str, Part] = {}
    for folder in find_orders(run):
        config = load_settings(folder)
        data = repr((config_dict(config.task), config_dict(config.denoiser), config.seed))
        _, problem = load_order(folder, device, tasks.get(data))
        tasks[data] = problem.task
        key = repr(
            (data, config.num_steps, None if config.freeze_denoiser else folder)
        )  # a trained denoiser is its own
        members.setdefault(key, []).append((folder, problem))
        parts.setdefault(key, Part(_part_name(config), config, problem.task))
    names = Counter(part.name for part in parts.values())
    for key, part in parts.items():
        first, problem = members[key][0]
        if names[part.name] > 1:
            part.name = f"{part.name} ({first.relative_to(run)})"
        for folder, fitted in members[key]:
            name = "learned" if len(members[key]) == 1 else f"learned ({folder.name})"
            for arm, policy in _decisions(name, fitted).items():
                part.arms[arm] = Arm(policy, fitted.model.denoiser, str((folder / ORDER_FILE).relative_to(run)))
        fixed: Mapping[str, Policy]
        if isinstance(problem.denoiser, ExactDenoiser):
            fixed, _ = reference_arms(problem.denoiser, part.settings.num_steps)
        else:
            fixed = heuristics(("uniform",), threshold)
        part.arms |= {arm: Arm(policy, problem.model.denoiser) for arm, policy in fixed.items()}
    return list(parts.values())


def _decisions(name: str, problem: OrderProblem) -> dict[str, Policy]:
    """What was learned, by every decision it allows."""
    policy = learned_policy(problem, "mode")
    found = {name: policy, f"{name}, sampled": learned_policy(problem, "sample")}
    return found | ({f"{name}, ranked": learned_policy(problem, "rank")} if isinstance(policy, PlannedOrder) else {})


def _part_name(config: OrderConfig) -> str:
    form = f" {config.task.form}" if isinstance(config.task, Gsm8kTask) else ""
    return f"{config.task.name}{form}, {config.num_steps} step{'s' if config.num_steps != 1 else ''}"


def record_replays(
    parts: Sequence[Part],
    *,
    problems: int,
    count: int,
    temperature: float | None,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Record every arm of every part on the first rows of its test split.

    Args:
        parts: see `load_parts`.
        problems: rows.
        count: alternatives per token.
        temperature: of the tokens of `decode`; None: 0 where there is a prompt, else 1 (without a prompt, the most
            likely tokens are the same for every row).
        seed: of stochastic policies and of the tokens, as in `evaluate_policies`.
        device: where to run.

    Returns:
        A JSON document. `parts[p].problems[k].recordings[arm][kind]` has, per response position, `tokens` (ids, spelt
        by `parts[p].spelling`), `step`, `probability`, `nats` (minus its logarithm) and `alternatives` (pairs of id and
        probability), and in all `forwards`, `total_nats`, and `steps` with their number of tokens, mean probability
        and nats.

    Raises:
        UserError: a test split has no rows.
    """
    return {
        "schema": SCHEMA,
        "seed": seed,
        "alternatives": count,
        "parts": [_record_part(part, problems, count, temperature, seed, device) for part in parts],
    }


def _record_part(
    part: Part, problems: int, count: int, temperature: float | None, seed: int, device: str
) -> dict[str, Any]:
    task, num_steps = part.task, part.settings.num_steps
    if len(task.held("test")["tokens"]) == 0:
        raise UserError("test", f"the test split of {part.name} has no rows", "give a test split with rows")
    batch = next(iter(task.stream("test", problems, shuffle=False, device=device).once()))
    lengths = batch["attention_mask"].sum(-1)
    if temperature is None:
        temperature = 0.0 if "context" in batch else 1.0
    recordings: list[dict[str, dict[str, Any]]] = [{} for _ in lengths]
    for name, arm in part.arms.items():
        canvas, tokens = batch_canvas(arm.denoiser, batch, device)
        generator = torch.Generator().manual_seed(seed)
        path = follow(arm.policy, canvas, tokens, num_steps, generator=generator)
        kinds = {"follow": _described(canvas, tokens, path, count)}
        if not getattr(arm.policy, "needs_truth", False):
            output = decode(
                arm.denoiser,
                arm.policy,
                canvas.context,
                canvas.context_mask,
                length=lengths,
                max_steps=num_steps,
                temperature=temperature,
                generator=generator,
                device=device,
            )
            kinds = {"decode": _described(canvas, output.sequences, output, count), **kinds}
        for row, own in enumerate(recordings):
            own[name] = {kind: described[row] for kind, described in kinds.items()}
    shown = [_problem(task, batch, row, own) for row, own in enumerate(recordings)]
    used = {token for problem in shown for token in problem["truth"]}
    for problem in shown:
        for recording in (one for kinds in problem["recordings"].values() for one in kinds.values()):
            used.update(recording["tokens"])
            used.update(token for options in recording["alternatives"] for token, _ in options)
    return {
        "name": part.name,
        "task": task.name,
        "split": "test",
        "num_steps": num_steps,
        "temperature": temperature,
        "arms": [{"name": name, "source": arm.source} for name, arm in part.arms.items()],
        "spelling": {str(token): task.spell(token) for token in sorted(used)},
        "problems": shown,
    }


def _problem(task: Task, batch: Mapping[str, Tensor], row: int, recordings: dict[str, Any]) -> dict[str, Any]:
    """A row of the test split with its recordings; text tasks say which decoded answers are right."""
    attended = batch["attention_mask"][row].bool()
    found: dict[str, Any] = {"row": row, "prompt": None, "truth": batch["tokens"][row][attended].tolist()}
    if task.tokenizer is not None:
        if "context" in batch:
            found["prompt"] = task.tokenizer.decode(batch["context"][row][batch["context_mask"][row].bool()].tolist())
        reference = task.references["test"][row] if task.references else ""
        for recording in (kinds["decode"] for kinds in recordings.values() if "decode" in kinds):
            answer = task.tokenizer.decode(recording["tokens"])
            if reference:
                recording["correct"] = bool(exact_match([answer], [reference])[0])
    return found | {"recordings": recordings}


def _described(canvas: Canvas, tokens: Tensor, output: DecodeOutput | PathOutput, count: int) -> list[dict[str, Any]]:
    """One recording per row, padding left out."""
    found = alternatives_at_reveal(canvas, tokens, output.reveal_step, count)
    return [
        _recording(tokens[row], output, found.tokens[row], found.token_log_prob[row], row) for row in range(len(tokens))
    ]


def _recording(
    tokens: Tensor, output: DecodeOutput | PathOutput, options: Tensor, option_log_prob: Tensor, row: int
) -> dict[str, Any]:
    kept = output.attention_mask[row]
    step, log_prob = output.reveal_step[row][kept], output.token_log_prob[row][kept]
    pairs = zip(options[kept].tolist(), option_log_prob[kept].exp().tolist(), strict=True)
    return {
        "tokens": tokens[kept].tolist(),
        "step": step.tolist(),
        "probability": _rounded(log_prob.exp()),
        "nats": _rounded(-log_prob),
        "alternatives": [
            [[token, round(probability, DIGITS)] for token, probability in zip(ids, probabilities, strict=True)]
            for ids, probabilities in pairs
        ],
        "forwards": int(output.nfe[row]),
        "total_nats": round(float(-log_prob.sum()), DIGITS),
        "steps": [
            {
                "tokens": int((step == t).sum()),
                "probability": round(float(log_prob[step == t].exp().mean()), DIGITS),
                "nats": round(float(-log_prob[step == t].sum()), DIGITS),
            }
            for t in range(int(step.max()) + 1 if len(step) else 0)
        ],
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in values.tolist()]
