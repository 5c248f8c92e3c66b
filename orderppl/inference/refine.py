"""Local search on a learned plan: what a fit of independent steps leaves undone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orderppl.errors import UserError
from orderppl.unmasking import Batch, Denoiser
from orderppl.unmasking.trajectory import VISIBLE, Path, same_step

STATES_AT_ONCE = 2048  # denoiser rows per call
CACHED_NUMBERS = 2**25  # float32, 128 MiB
SMALLEST_GAIN = 1e-6  # nats per sequence; less is rounding


@dataclass(frozen=True)
class Refinement:
    """What a search found.

    Attributes:
        steps: int64 [P], the plan.
        start: int64 [P], the plan it started from.
        before: path log-likelihood of the plan it started from, nats per sequence of the rows it used.
        after: the same of `steps`.
        accepted: number of changes that were made.
        evaluations: plans that were looked at.
        finished: False when `max_evaluations` ended the search before a whole neighbourhood had no improvement, or
            before all restarts.
    """

    steps: Tensor
    start: Tensor
    before: float
    after: float
    accepted: int
    evaluations: int
    finished: bool


def refine_plan(
    denoiser: Denoiser,
    batch: Batch,
    steps: Tensor,
    num_steps: int,
    *,
    index: Tensor | None = None,
    restarts: int = 0,
    restart_size: int = 4,
    screen: int = 128,
    finalists: int = 8,
    block: int = 128,
    max_evaluations: int | None = None,
    seed: int = 0,
) -> Refinement:
    """Improve one plan for all sequences by coordinate ascent on their path log-likelihood.

    With its KL weight at 0 the bound of a mean-field plan is linear in every factor, so its optima are plans without
    randomness, and the coordinate update of one factor (r_i <- argmax_t E_x log p(x | r)) is a change of one step.
    Gradients end where no such change helps; to get further the search also looks at changes that move several factors:

        set       r_i <- t
        exchange  r_i <-> r_j
        shift     take r_i out of the sequence and put a step t in at j: everything between moves by one place

    Changes are tried in random order, a block at a time: all of a block on the first `screen` rows, the best few of
    them on all rows, where the best one is made if it is an improvement. A climb ends when none of the whole
    neighbourhood is: a local optimum of the rows' likelihood under all three changes. A restart then gives a few places
    of the best plan so far random steps and climbs again (iterated local search, Lourenco et al. 2003): it gets out of
    local optima without any knowledge of how the positions hang together, which shifts take for granted.

    Args:
        denoiser: see `Denoiser`.
        batch: training rows.
        steps: int64 [P], step of every place of the plan.
        num_steps: step budget T.
        index: int64 [R, S], place of the plan that a position of a row looks up; counted over the positions to reveal
            when left out.
        restarts: climbs after the first one.
        restart_size: places that a restart moves.
        screen: rows of the first look.
        finalists: changes of a block that get the second look.
        block: changes looked at together.
        max_evaluations: most plans to look at, in all climbs.
        seed: of the random order and the restarts.

    Raises:
        UserError: a step outside the budget, too few of them, or no rows.
    """
    if not len(batch):
        raise UserError("batch", "no rows", "give training sequences")
    if steps.dim() != 1 or int(steps.min()) < 0 or int(steps.max()) >= num_steps:
        raise UserError("steps", f"a plan outside 0..{num_steps - 1}", f"give one row of steps below {num_steps}")
    generator = torch.Generator().manual_seed(seed)
    rows = _Rows(denoiser, batch, index, num_steps)
    places = int(rows.index.masked_fill(~batch.latent, -1).max()) + 1
    if places > len(steps):
        problem = f"{len(steps)} places for rows of up to {places} positions to reveal"
        raise UserError("steps", problem, "give a step for every place")
    limit = math.inf if max_evaluations is None else max_evaluations
    first = rows if screen >= len(batch) else rows.head(screen)
    search = _Search(rows, first, finalists, block, limit, generator)
    start = steps.detach().cpu()
    before = float(rows.log_likelihood(start[None]).mean())
    best, after = search.climb(start)
    for _ in range(restarts):
        if search.evaluations >= limit:
            search.finished = False
            break
        place = torch.randperm(len(start), generator=generator)[:restart_size]
        moved = best.index_copy(0, place, torch.randint(num_steps, (len(place),), generator=generator))
        found, value = search.climb(moved)
        if value > after + SMALLEST_GAIN:
            best, after = found, value
    return Refinement(best, start, before, after, search.accepted, search.evaluations, search.finished)


class _Search:
    """Climbs from plan to better plan, and what they have cost."""

    def __init__(
        self, rows: _Rows, first: _Rows, finalists: int, block: int, limit: float, generator: torch.Generator
    ) -> None:
        self.rows, self.first, self.finalists, self.block = rows, first, finalists, block
        self.limit, self.generator = limit, generator
        self.accepted, self.evaluations, self.finished = 0, 0, True

    def climb(self, plan: Tensor) -> tuple[Tensor, float]:
        """Go from a plan (int64 [P]) to a local optimum; return that and its mean log-likelihood, nats."""
        nats, nats_first = self.rows.log_likelihood(plan[None])[0], self.first.log_likelihood(plan[None])[0]
        self.evaluations += 1
        neighbourhood = _Neighbourhood(len(plan), self.rows.num_steps)
        order, begin = torch.randperm(len(neighbourhood), generator=self.generator), 0
        while begin < len(order) and self.evaluations < self.limit:
            plans = neighbourhood.plans(plan, order[begin : begin + self.block])
            begin += self.block
            if not len(plans):
                continue
            self.evaluations += len(plans)
            gain = (self.first.log_likelihood(plans) - nats_first).mean(-1)  # [C]
            plans = plans[gain.topk(min(self.finalists, len(plans))).indices.to(plans.device)]
            by_row = self.rows.log_likelihood(plans)  # [finalists, R]
            best = int(by_row.mean(-1).argmax())
            if float((by_row[best] - nats).mean()) > SMALLEST_GAIN:
                plan, nats = plans[best], by_row[best]
                nats_first = self.first.log_likelihood(plan[None])[0]
                self.accepted += 1
                order, begin = torch.randperm(len(neighbourhood), generator=self.generator), 0
        self.finished = self.finished and begin >= len(order)
        return plan, float(nats.mean())


class _Neighbourhood:
    """All changes of a plan of P places, numbered: P * P * T shifts (at i = j a `set`), then P * P exchanges."""

    def __init__(self, size: int, num_steps: int) -> None:
        self.size, self.num_steps = size, num_steps

    def __len__(self) -> int:
        return self.size * self.size * (self.num_steps + 1)

    def plans(self, steps: Tensor, numbers: Tensor) -> Tensor:
        """The different plans that changes (int64 [C]) make of `steps` (int64 [P]): int64 [<= C, P]."""
        kind, i = numbers // self.size**2, numbers // self.size % self.size
        j, place = numbers % self.size, torch.arange(self.size)
        i, j, kind = i[:, None], j[:, None], kind[:, None]
        # a shift from i to j: the places between take the step of their neighbour on the side of j
        towards = ((i <= place) & (place < j)).long() - ((j < place) & (place <= i)).long()
        shifted = torch.where(place == j, kind, steps[place + towards])
        exchanged = torch.where(place == i, steps[j], torch.where(place == j, steps[i], steps))
        plans = torch.where(kind < self.num_steps, shifted, exchanged)
        return plans[(plans != steps).any(-1)].unique(dim=0)


class _Rows:
    """Sequences under many plans; what the denoiser says about a set of hidden places is asked for once."""

    def __init__(self, denoiser: Denoiser, batch: Batch, index: Tensor | None, num_steps: int) -> None:
        self.batch, self.num_steps, self.denoiser = batch, num_steps, denoiser
        place = (batch.latent.long().cumsum(-1) - 1).clamp(min=0)
        self.index = place if index is None else index.to(batch.device)  # [R, S]
        self.path = Path(batch, denoiser, num_steps)
        self.known: dict[bytes, Tensor] = {}  # hidden places -> log p(x_i | the others), float [R, S]

    def head(self, rows: int) -> _Rows:
        """The first rows alone."""
        return _Rows(self.denoiser, self.batch.rows(slice(rows)), self.index[:rows], self.num_steps)

    def log_likelihood(self, plans: Tensor) -> Tensor:
        """log p(x | r) of every plan (int64 [C, P]) and row: float [C, R], nats."""
        hidden = plans[:, None] >= torch.arange(self.num_steps)[:, None]  # M_t, [C, T, P]
        keys = [[places.numpy().tobytes() for places in plan] for plan in hidden]
        new = dict(zip(itertools.chain(*keys), hidden.flatten(0, 1), strict=True))
        if (len(self.known) + len(new)) * self.index.numel() > CACHED_NUMBERS:
            self.known.clear()
        self._ask({key: places for key, places in new.items() if key not in self.known})
        total = []
        for line, plan in zip(keys, plans.to(self.index.device), strict=True):
            order = plan[self.index].masked_fill(~self.batch.latent, VISIBLE)  # [R, S]
            by_step = torch.stack([self.known[key] for key in line])  # [T, R, S]
            total.append(by_step.gather(0, order.clamp_min(0)[None])[0].masked_fill(order < 0, 0.0).sum(-1))
        return torch.stack(total)

    @torch.no_grad()
    def _ask(self, sets: Mapping[bytes, Tensor]) -> None:
        at_once = max(STATES_AT_ONCE // len(self.batch), 1)
        keys = list(sets)
        for begin in range(0, len(keys), at_once):
            chunk = keys[begin : begin + at_once]
            places = torch.stack([sets[key] for key in chunk]).to(self.index.device)
            masked = places[:, self.index] & self.batch.latent  # [N, R, S]
            found = self.path.state(masked, same_step(0, masked)).token_log_prob(self.batch.readable)
            self.known.update(zip(chunk, found.unbind(0), strict=True))
