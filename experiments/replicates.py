"""Tiny unmasking problems in which every row of a batch has parameters of its own.

One backward pass through R rows then gives R independent draws of an estimator's gradient, which is what a benchmark of
estimators needs by the ten thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orderppl.guides import MeanFieldGuide, PolicyGuide, RenormalisedScoreGuide, RevealGuide
from orderppl.models import LearnedPolicy, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.states import UnmaskingState


class RowDenoiser(nn.Module):
    """Arbitrary conditionals of short sequences: logits looked up by what else is hidden, one table per row.

    The rows of a batch hold the same sequence, so what is hidden tells the whole state.

    Args:
        table: float [R, 2**L, L, V].
    """

    reads_itself = False

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.vocab_size = self.mask_index = table.shape[-1]

    def _rows(self, like: Tensor) -> Tensor:
        """Tables of N sequences, int64 [N]; rows are the fastest part of N."""
        return torch.arange(len(like), device=like.device) % len(self.table)

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Look up float [N, L, V], every position as if it were hidden itself."""
        position = torch.arange(state.shape[-1], device=state.device)
        code = _code(state == self.mask_index).unsqueeze(-1) | 1 << position  # [N, L]
        return self.table[self._rows(state).unsqueeze(-1), code, position]

    def soft_logits(self, tokens: Tensor, visible: Tensor, attention_mask: Tensor) -> Tensor:
        """Expected logits if the other positions were visible with these probabilities, float [N, L, V]."""
        size = visible.shape[-1]
        position = torch.arange(size, device=visible.device)
        hidden = (torch.arange(2**size, device=visible.device).unsqueeze(-1) >> position & 1).bool()  # [2**L, L]
        by_position = torch.where(hidden, 1 - visible.unsqueeze(1), visible.unsqueeze(1))  # [N, 2**L, L]
        others = by_position.unsqueeze(2).masked_fill(torch.eye(size, device=visible.device).bool(), 1.0).prod(-1)
        return torch.einsum("nsl,nslv->nlv", others * hidden, self.table[self._rows(tokens)])


class RowPolicy(nn.Module):
    """Reveal logits looked up by what is hidden, one table per row.

    Args:
        table: float [R, 2**L, L].
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, state: UnmaskingState) -> Tensor:
        """Look up float [*, R, L]."""
        return self.table[torch.arange(len(self.table), device=state.masked.device), _code(state.masked)]


class RowTable(nn.Module):
    """Free numbers per row and position: a sequence network for `MeanFieldGuide` and `RenormalisedScoreGuide`.

    Args:
        table: float [R, L, out].
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens: Tensor | None, attention_mask: Tensor, *_: Tensor | None) -> Tensor:
        """Return the table."""
        return self.table


def _code(hidden: Tensor) -> Tensor:
    """Number whose binary digits say what is hidden: int64 [*] from bool [*, L]."""
    return (hidden.long() << torch.arange(hidden.shape[-1], device=hidden.device)).sum(-1)


@dataclass
class Replicates:
    """A pair whose rows are independent replicates of one problem.

    Attributes:
        model: the unmasking model.
        guide: its guide.
        batch: arguments of both.
    """

    model: UnmaskingModel
    guide: RevealGuide
    batch: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Trainable leaves [R, ..] of the `order` (guide and prior) and of the `denoiser`."""
        denoiser = [p for p in self.model.denoiser.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        every = dict.fromkeys([*self.guide.parameters(), *self.model.parameters()])
        order = [p for p in every if not any(p is other for other in denoiser)]
        return {"order": order, "denoiser": denoiser} if denoiser else {"order": order}

    def gradients(self) -> dict[str, Tensor]:
        """The draws that a backward pass left in each group: float64 [R, P]."""
        return {
            group: torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten(1).double() for p in leaves], 1
            )
            for group, leaves in self.parameters.items()
        }


Problem = Callable[[int, bool], Replicates]  # (rows, one_step) -> the pair


def tiny_problem(guide_name: str, num_steps: int = 3, length: int = 3, vocab_size: int = 4, seed: int = 0) -> Problem:
    """A random denoiser table, short enough to sum over all orders; guide, prior and denoiser are all trainable.

    Args:
        guide_name: `mean_field` (prior: uniform steps), `policy` (tied to a learned policy) or `renormalised`
            (prior: learned policy).
        num_steps: step budget T.
        length: positions L.
        vocab_size: tokens V.
        seed: of all numbers.
    """

    def make(rows: int, one_step: bool) -> Replicates:
        generator = torch.Generator().manual_seed(seed)

        def table(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).expand((rows,) + shape).clone()

        tokens = torch.randint(0, vocab_size, (length,), generator=generator).expand(rows, length).clone()
        denoiser = RowDenoiser(table(2**length, length, vocab_size))
        prior = UniformSteps() if guide_name == "mean_field" else LearnedPolicy(RowPolicy(table(2**length, length)))
        guide: RevealGuide
        if guide_name == "mean_field":
            guide = MeanFieldGuide(RowTable(table(length, num_steps)), num_steps)
        elif guide_name == "policy":
            guide = PolicyGuide(prior, denoiser, num_steps)
        else:
            guide = RenormalisedScoreGuide(RowTable(table(length, 1)), num_steps, temperature=1.0)
        return Replicates(UnmaskingModel(denoiser, prior, num_steps, one_step), guide, {"tokens": tokens})

    return make


class StepPolicy(nn.Module):
    """Reveal logits by step and position, one table per row.

    Args:
        table: float [R, T, L].
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, state: UnmaskingState) -> Tensor:
        """Look up float [*, R, L]."""
        return self.table[torch.arange(len(self.table), device=state.step.device), state.step]


def chain_policy_problem(tokens: Tensor, logits: Tensor) -> Problem:
    """A policy that is its own guide on one sequence of the exact Markov chain (4 states, stay 0.85).

    Args:
        tokens: int64 [L], the sequence.
        logits: float [T, L], reveal logits.
    """

    def make(rows: int, one_step: bool) -> Replicates:
        denoiser = MarkovChainDenoiser(num_states=4, stay=0.85, length=len(tokens))
        prior = LearnedPolicy(StepPolicy(logits.expand((rows,) + logits.shape).clone()))
        model = UnmaskingModel(denoiser, prior, len(logits), one_step)
        return Replicates(model, PolicyGuide(prior, denoiser, len(logits)), {"tokens": tokens.repeat(rows, 1)})

    return make


def chain_problem(tokens: Tensor, num_steps: int, logits: Tensor) -> Problem:
    """A mean-field plan on one sequence of the exact Markov chain (4 states, stay 0.85).

    Args:
        tokens: int64 [L], the sequence.
        num_steps: step budget T.
        logits: float [L, T], where the plan stands.
    """

    def make(rows: int, one_step: bool) -> Replicates:
        denoiser = MarkovChainDenoiser(num_states=4, stay=0.85, length=len(tokens))
        guide = MeanFieldGuide(RowTable(logits.expand((rows,) + logits.shape).clone()), num_steps, sees_tokens=False)
        model = UnmaskingModel(denoiser, UniformSteps(), num_steps, one_step)
        return Replicates(model, guide, {"tokens": tokens.repeat(rows, 1)})

    return make
