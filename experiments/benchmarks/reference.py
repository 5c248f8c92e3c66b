"""What decoding is compared on, and with: random denoisers, their bare forwards, and a plain loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orderppl import Batch, Policy
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.policies import Ranked, Threshold
from orderppl.policies.scores import confidence
from orderppl.randomness import uniform_noise
from orderppl.unmasking.trajectory import Path

from timing import random_batch


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


def make_policy(name: Any, batch: Batch, denoiser: Any, shape: Shape) -> Policy:
    """The policy of a case; a threshold between two confidences that the denoiser has at first."""
    if name != "threshold":
        return Ranked(name)
    sure = confidence(Path(batch, denoiser, shape.steps).opening())[batch.latent].sort().values
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


# ---- with what


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


def reference_loop(
    denoiser: Any, policy: Policy, batch: Batch, steps: int, row_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decode without any of the library: all rows at every step, all logits, one row after another.

    Returns:
        Sequences int64 [B, S], and the NFE of each row, int64 [B].
    """
    mask_index, lengths, start = denoiser.mask_index, batch.latent.sum(-1).tolist(), batch.prefix
    seed = torch.Generator().initial_seed()  # as decoding has it
    rows = torch.arange(len(batch), device=batch.device) if row_ids is None else row_ids
    x = torch.where(batch.latent, mask_index, batch.tokens)
    nfe = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    is_random = isinstance(policy, Ranked) and policy.score == "random"
    for step in range(steps):
        hidden = (x == mask_index)[:, start:]
        if not hidden.any():
            break
        logits = denoiser(x, batch.attention_mask)[:, start:].clone()
        logits[..., mask_index] = -torch.inf
        probs, best = logits.softmax(-1), logits.argmax(-1)
        noise = uniform_noise(seed, rows, step, hidden.shape[1]) if is_random else None
        for row, length in enumerate(lengths):
            places = hidden[row].nonzero()[:, 0]
            if len(places) == 0:
                continue
            nfe[row] += 1
            due = max(length * (step + 1) // min(steps, length) - (length - len(places)), 1)
            last = step == steps - 1
            drawn = None if noise is None else noise[row, places]
            chosen = places if last else places[_rule(policy, probs[row, places], drawn, due)]
            x[row, start + chosen] = best[row, chosen]
    return x, nfe


def _rule(policy: Policy, probs: Tensor, noise: Tensor | None, due: int) -> Tensor:
    """Which of n masked positions to reveal, from their token probabilities float [n, V]: int64 indices."""
    sure = probs.amax(-1)
    if isinstance(policy, Threshold):
        chosen = (sure >= policy.tau).nonzero()[:, 0]
        return chosen if len(chosen) else sure.argmax()[None]
    assert isinstance(policy, Ranked)
    score = -torch.special.entr(probs).sum(-1) if policy.score == "entropy" else sure if noise is None else noise
    return score.topk(min(due, len(score))).indices
