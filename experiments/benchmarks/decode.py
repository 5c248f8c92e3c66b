"""What decoding costs beside the denoiser forwards it cannot do without, and beside a plain loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Records, Rounds, command, finish, random_batch, ratio_figure, take_turns, torch_threads
from torch import Tensor, nn
from tqdm import tqdm

from orderppl import Batch, Policy, decode
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.policies import Ranked, Threshold
from orderppl.policies.scores import confidence
from orderppl.randomness import uniform_noise
from orderppl.unmasking.trajectory import Path as States

POLICIES = ("random", "top_prob", "entropy", "threshold")
DECODE, REFERENCE, REREAD = "decode", "reference loop", "prompt at every step"
FORWARDS, NEEDED = "forwards", "needed forwards"


@dataclass(frozen=True)
class Size:
    """A transformer denoiser.

    Args:
        width: size of the hidden vectors.
        layers: blocks.
        heads: attention heads.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4


@dataclass(frozen=True)
class Shape:
    """What is decoded.

    Args:
        batch_size: sequences B.
        length: most positions to reveal.
        prompt: most prompt tokens.
        steps: step budget T.
        sure: share of positions that the threshold policy is sure of at first.
        spread: standard deviation of the logits, nats.
    """

    batch_size: int = 8
    length: int = 32
    prompt: int = 16
    steps: int = 8
    sure: float = 0.25
    spread: float = 6.0


def main(
    out: Path | None = None,
    vocab_sizes: tuple[int, ...] = (128, 8192, 32000),
    small: Size = Size(),  # noqa: B008
    large: Size = Size(320, 8, 5),  # noqa: B008
    shape: Shape = Shape(),  # noqa: B008
    long_prompt: int = 96,
    rounds: Rounds = Rounds(least=5, seconds=20.0),  # noqa: B008
    device: str = "cpu",
) -> None:
    """Time `decode` beside the forwards it needs and beside a plain loop, on transformers with random weights.

    By one CPU thread, these take turns in one process, round by round: `decode`; `forwards`, the bare denoiser on the
    batches that decoding puts before it, all logits; `needed forwards`, the same with the output head at as many positions
    as decoding asks for; `reference loop`, a loop over steps and rows that keeps finished rows and computes all logits, whose
    sequences are compared with those of `decode`. For a denoiser whose prompt does not attend to the response, `prompt at
    every step` is decoding that does not make use of that.

    `time_ratio` is the median over rounds of decode / `of` by wall clock, with a 95% interval of that median;
    `cpu_time_ratio` the same of the process's CPU time, which other work on the machine disturbs less.
    `row_forward_ratio` is the sequences that pass through the denoiser over the sum of the rows' own NFE: 1 is the least.

    Args:
        out: folder for results.json and decode.png.
        vocab_sizes: token classes V, MASK included.
        small: the small denoiser, 0.6M parameters without the vocabulary.
        large: the large denoiser, 10M parameters without the vocabulary.
        shape: what is decoded.
        long_prompt: most prompt tokens where prompts are read once.
        rounds: how long variants take turns.
        device: of torch.
    """
    config = {key: value if key == "device" else str(value) for key, value in locals().items() if key != "out"}
    cases: list[tuple[dict[str, object], Size, Shape]] = []
    for name, size in (("0.6M", small), ("10M", large)):
        for classes in vocab_sizes:
            labels = {"denoiser": name, "vocab_size": classes, "prompt_once": False}
            cases += [(labels | {"policy": policy}, size, shape) for policy in POLICIES]
        once = {"denoiser": name, "vocab_size": min(vocab_sizes), "prompt_once": True, "policy": "top_prob"}
        cases.append((once, size, replace(shape, prompt=long_prompt)))
    records: Records = []
    with torch_threads(1), torch.no_grad():
        for labels, size, own in tqdm(cases, dynamic_ncols=True):
            records += [{**record, **labels, "device": device} for record in measure(labels, size, own, rounds, device)]
    by_case = {"rows": ("denoiser", "vocab_size", "policy"), "columns": ("of",), "prompt_once": False}
    counts = ("row_forward_ratio", "head_share", "same_rows", "nfe")
    computed = by_case | {"columns": ("metric", "variant"), "metrics": counts, "title": "What is computed"}
    tables = [by_case | {"metrics": (f"{m}time_ratio",), "title": f"decode / ..., {m}time"} for m in ("", "cpu_")]
    once = {"rows": ("denoiser", "prompt_once"), "columns": ("metric", "of"), "prompt_once": True}
    once |= {"metrics": ("time_ratio", "cpu_time_ratio"), "title": "Prompts read once"}
    finish(out, "decode", config, records, [*tables, computed, once])
    if out is not None:
        shown = [record | {"case": f"{record['denoiser']}\nV={record['vocab_size']}"} for record in records]
        ratio_figure(out / "decode.png", shown, x="case", lines=("policy",), prompt_once=False)


def measure(labels: dict[str, Any], size: Size, shape: Shape, rounds: Rounds, device: str) -> Records:
    """All numbers of one case."""
    classes, once = labels["vocab_size"], labels["prompt_once"]
    batch, denoiser = make_problem(classes, size, shape, once)
    batch, denoiser = batch.to(device), denoiser.to(device)
    policy = make_policy(labels["policy"], batch, denoiser, shape)
    decoded = partial(decode, policy=policy, batch=batch, max_steps=shape.steps, generator=torch.Generator())
    if once:
        variants = {DECODE: partial(decoded, denoiser), REREAD: partial(decoded, Split(denoiser))}
        return compare(variants, rounds, device)
    counted, plain = Counted(denoiser), Counted(denoiser)
    output = decoded(counted)
    sequences, nfe = reference_loop(plain, policy, batch, shape.steps, torch.Generator().initial_seed())
    own = int(output.nfe.sum())
    same = (torch.where(batch.latent, output.sequences == sequences, True).all(-1) & (output.nfe == nfe)).double().mean()
    share = sum(counted.positions) / (batch.tokens.shape[1] * counted.rows)
    variants = {
        DECODE: partial(decoded, denoiser),
        FORWARDS: partial(forwards, denoiser, counted.batches),
        NEEDED: partial(needed_forwards, denoiser, counted.batches, counted.positions),
        REFERENCE: partial(reference_loop, denoiser, policy, batch, shape.steps, torch.Generator().initial_seed()),
    }
    return [
        {"metric": "row_forward_ratio", "value": counted.rows / own, "variant": DECODE},
        {"metric": "row_forward_ratio", "value": plain.rows / own, "variant": REFERENCE},
        {"metric": "head_share", "value": share, "variant": DECODE},
        {"metric": "same_rows", "value": same, "variant": REFERENCE},
        {"metric": "nfe", "value": own / len(batch), "variant": DECODE},
        *compare(variants, rounds, device),
    ]


def compare(variants: dict[str, Any], rounds: Rounds, device: str) -> Records:
    """Ratios of decoding to everything else, and seconds."""
    for variant in variants.values():
        variant()
    timing = take_turns(variants, rounds, torch.device(device))
    ratios = [record for other in list(variants)[1:] for record in timing.ratios(DECODE, other)]
    return ratios + timing.seconds()


# ---- the problem


def make_problem(classes: int, size: Size, shape: Shape, once: bool) -> tuple[Batch, TransformerDenoiser]:
    """Prompts that end with a separator, and a denoiser that is sure at some positions and not at others."""
    batch = random_batch(shape.batch_size, shape.prompt, shape.length, classes - 1, seed=0)
    assert batch.given is not None
    tokens = batch.tokens.scatter(1, batch.given.sum(-1, keepdim=True) - 1, classes - 2)
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(
        classes,
        classes - 1,
        width=size.width,
        layers=size.layers,
        heads=size.heads,
        max_length=shape.prompt + shape.length,
        separator_index=classes - 2,
        prompt_room=shape.prompt,
        prompt_reads_response=not once,
    )
    nn.init.normal_(denoiser.embed.weight, std=shape.spread / math.sqrt(size.width))
    denoiser = denoiser.eval().requires_grad_(False)
    for name, parameter in denoiser.backbone.blocks.named_parameters():
        if name.endswith(("out.weight", "mlp.2.weight")):
            parameter.mul_(4)  # so that what a position reads changes what it predicts
    return Batch(tokens, batch.attention_mask, batch.given), denoiser


def make_policy(name: str, batch: Batch, denoiser: Any, shape: Shape) -> Policy:
    """The policy of a case; a threshold between two confidences that the denoiser has at first."""
    if name != "threshold":
        return Ranked(name)
    sure = confidence(States(batch, denoiser, shape.steps).opening())[batch.latent].sort().values
    place = min(max(round(len(sure) * (1 - shape.sure)), 1), len(sure) - 1)
    return Threshold(sure[place - 1 : place + 1].mean().item())


class Split(nn.Module):
    """A denoiser that offers its output head, but does not let prompts be read once."""

    def __init__(self, denoiser: TransformerDenoiser) -> None:
        super().__init__()
        self.denoiser, self.mask_index, self.vocab_size = denoiser, denoiser.mask_index, denoiser.vocab_size

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position."""
        return self.output_logits(self.hidden_states(state, attention_mask))

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head."""
        return self.denoiser.hidden_states(state, attention_mask)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head."""
        return self.denoiser.output_logits(hidden)


class Counted(Split):
    """The same, remembering what passes through it: the batches, and the positions through the head, by call."""

    def __init__(self, denoiser: TransformerDenoiser) -> None:
        super().__init__(denoiser)
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.positions: list[int] = []

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Everything before the output head."""
        self.batches.append((state, attention_mask))
        self.positions.append(0)
        return super().hidden_states(state, attention_mask)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """The output head."""
        self.positions[-1] += hidden[..., 0].numel()
        return super().output_logits(hidden)

    @property
    def rows(self) -> int:
        """Sequences that have passed through the denoiser."""
        return sum(len(state) for state, _ in self.batches)


# ---- what decoding is compared with


def forwards(denoiser: TransformerDenoiser, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The denoiser calls of a decoding, and nothing else."""
    for state, attention_mask in batches:
        denoiser(state, attention_mask)


def needed_forwards(
    denoiser: TransformerDenoiser, batches: Sequence[tuple[Tensor, Tensor]], positions: Sequence[int]
) -> None:
    """The same with the output head at so many positions of each call."""
    for (state, attention_mask), count in zip(batches, positions, strict=True):
        denoiser.output_logits(denoiser.hidden_states(state, attention_mask).flatten(0, 1)[:count])


def reference_loop(denoiser: Any, policy: Policy, batch: Batch, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Decode without any of the library: all rows at every step, all logits, one row after another.

    Returns:
        Sequences int64 [B, S], and the NFE of each row, int64 [B].
    """
    mask_index, lengths, start = denoiser.mask_index, batch.latent.sum(-1).tolist(), batch.prefix
    x = torch.where(batch.latent, mask_index, batch.tokens)
    nfe = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for step in range(steps):
        hidden = (x == mask_index)[:, start:]
        if not hidden.any():
            break
        logits = denoiser(x, batch.attention_mask)[:, start:].clone()
        logits[..., mask_index] = -torch.inf
        probs, best = logits.softmax(-1), logits.argmax(-1)
        noise = uniform_noise(seed, torch.arange(len(x), device=x.device), step, hidden.shape[1])
        for row, length in enumerate(lengths):
            places = hidden[row].nonzero()[:, 0]
            if len(places) == 0:
                continue
            nfe[row] += 1
            due = max(length * (step + 1) // min(steps, length) - (length - len(places)), 1)
            last = step == steps - 1
            chosen = places if last else places[_rule(policy, probs[row, places], noise[row, places], due)]
            x[row, start + chosen] = best[row, chosen]
    return x, nfe


def _rule(policy: Policy, probs: Tensor, noise: Tensor, due: int) -> Tensor:
    """Which of n masked positions to reveal, from their token probabilities float [n, V]: int64 indices."""
    sure = probs.amax(-1)
    if isinstance(policy, Threshold):
        chosen = (sure >= policy.tau).nonzero()[:, 0]
        return chosen if len(chosen) else sure.argmax()[None]
    assert isinstance(policy, Ranked)
    score = {"random": noise, "entropy": -torch.special.entr(probs).sum(-1)}.get(str(policy.score), sure)
    return score.topk(min(due, len(score))).indices


if __name__ == "__main__":
    command(main)
