"""Small networks that guides and policies are made of: free tables, transformers, and what is put around them.

A sequence network reads a canvas, a `Batch` or a `State` alike: `network(canvas) -> float [*, S, out]`. Whoever may not
see the tokens is given a canvas without them. A policy network reads a state: `network(state) -> float [*, S]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.errors import UserError
from orderppl.models.backbone import Backbone, Neighbours, Positions, attended_positions
from orderppl.policies import PriceRange
from orderppl.policies.scores import entropy, entropy_before
from orderppl.randomness import sample_categorical
from orderppl.unmasking import Batch, State
from orderppl.unmasking.denoiser import distinct_rows

Canvas = Batch | State


class SequenceEncoder(Configurable, nn.Module):
    """Transformer over the whole canvas that gives every position a vector.

    Args:
        num_tokens: number of token ids, specials and MASK included.
        out: numbers per position, e.g. T for a mean-field guide and 1 for scores.
        width: size of the hidden vectors.
        layers: number of blocks.
        heads: attention heads.
        positions: kind of position information.
        max_length: longest canvas; needed for learned positions.
        zero_init: start with all outputs 0.
        sees_truth: read the true tokens, where a state hides them: the correction of a posterior.
    """

    def __init__(
        self,
        num_tokens: int,
        out: int = 1,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        positions: Positions = "rotary",
        max_length: int | None = None,
        zero_init: bool = False,
        sees_truth: bool = False,
    ) -> None:
        super().__init__()
        self.out, self.sees_truth = out, sees_truth
        self.embed = nn.Embedding(num_tokens, width)
        # Tells latent positions from given ones, which use the same ids, and from each other: rotary attention alone
        # cannot tell equal tokens apart.
        self.place = nn.Linear(2 * (width // 2), width)
        self.backbone = Backbone(width, layers, heads, positions=positions, max_length=max_length)
        self.head = nn.Linear(width, out)
        nn.init.zeros_(self.head.bias)
        if zero_init:
            nn.init.zeros_(self.head.weight)

    def forward(self, canvas: Canvas) -> Tensor:
        """Encode: float [*, S, out].

        Raises:
            UserError: a network that sees the truth where it is not known.
        """
        attention, latent = canvas.attention_mask, canvas.latent
        tokens = _truth_of(canvas) if self.sees_truth and isinstance(canvas, State) else canvas.tokens
        hidden = self.embed(tokens.masked_fill(~attention, 0))  # [*, S, W]
        place = self.place(_places(latent, self.place.in_features).to(hidden.dtype))
        hidden = hidden + torch.where(latent[..., None], place, 0.0)
        lead, (size, width) = hidden.shape[:-2], hidden.shape[-2:]
        mixed = self.backbone(hidden.reshape(-1, size, width), attention.reshape(-1, size))
        encoded: Tensor = self.head(mixed).reshape(*lead, size, -1)
        return encoded


def _places(latent: Tensor, size: int) -> Tensor:
    """Sinusoids of the distance to the first and to the last latent position: float [*, S, size], size even."""
    left = attended_positions(latent)  # [*, S]
    right = (latent.sum(-1, keepdim=True) - 1 - left).clamp(min=0)
    rate = 0.5 ** torch.arange(size // 4 + 1, device=left.device) * math.pi  # wavelengths 2, 4, 8, ...
    halves = []
    for distance in (left, right):
        angle = distance[..., None] * rate
        halves.append(torch.stack([angle.cos(), angle.sin()], -1).flatten(-2)[..., : size // 2])
    return torch.cat(halves, -1)


class PositionTable(Configurable, nn.Module):
    """Free numbers per position, such as step logits: the simplest plan of a whole order, blind to all tokens.

    Args:
        length: places of the table; the longest row's positions, unless it is periodic.
        out: numbers per position, T for a plan.
        split: the first `split` positions of a row are indexed from its left end and the others from its right end,
            so that rows of different lengths are aligned at both ends (variable domains of antibodies). None
            indexes everything from the left.
        noise: standard deviation of the initial numbers.
        periodic: repeat the table, for rows of any length: a pattern over the positions.
        counts: which positions have a place: those to reveal ("latent"), or all that are attended, so that a place
            means the same whatever is given ("attended").

    Raises:
        UserError: a split outside the table, or of a periodic one; when called, a row longer than the table.
    """

    def __init__(
        self,
        length: int,
        out: int,
        split: int | None = None,
        noise: float = 0.0,
        periodic: bool = False,
        counts: Literal["latent", "attended"] = "latent",
    ) -> None:
        super().__init__()
        if split is not None and not 0 <= split <= length:
            raise UserError("split", f"{split} is outside a table of {length} positions", "use 0 to the length")
        if split is not None and periodic:
            raise UserError("split", "a repeated table has no right end", "leave out split or periodic")
        if counts not in ("latent", "attended"):
            raise UserError("counts", f"{counts!r} positions", "use latent or attended")
        self.length, self.split, self.periodic, self.counts = length, split, periodic, counts
        self.out = out
        self.logits = nn.Parameter(noise * torch.randn(length, out))

    def forward(self, canvas: Canvas) -> Tensor:
        """Look the positions up: float [*, S, out]."""
        return self.logits[self.index(canvas)]

    def index(self, canvas: Canvas) -> Tensor:
        """Row of the table that every position looks up, int64 [*, S]."""
        counted = canvas.latent if self.counts == "latent" else canvas.attention_mask
        place = attended_positions(counted)  # [*, S]
        if self.periodic:
            return place % self.length
        # Whether the longest row fits is only worth a look at the values when the width does not.
        if counted.shape[-1] > self.length and int(counted.sum(-1).max()) > self.length:
            longest = int(counted.sum(-1).max())
            problem = f"a row of {longest} positions exceeds the table of {self.length}"
            raise UserError("length", problem, "build the table for the longest sequence of every split")
        if self.split is not None:
            size = counted.sum(-1, keepdim=True)
            place = torch.where(place < self.split, place, self.length - size + place)
        return place.clamp(0, self.length - 1)

    @torch.no_grad()
    def set_steps(self, steps: Tensor, margin: float = 10.0) -> None:
        """Make the table a plan without much randomness.

        Args:
            steps: int64 [length], the step of every place.
            margin: log-odds of the planned step against any other one.
        """
        self.logits.copy_(margin * F.one_hot(steps.to(self.logits.device), self.logits.shape[-1]))


PERIODS = (2, 3, 4, 6, 8, 12)


class OpeningPlan(Configurable, nn.Module):
    """Step logits of every position from the opening: everything hidden, behind what is given.

        logits_i = pattern_{i mod P} + W place_i + conv(conv(place_i, view_i))

    pattern: a repeated table, which `refine_plan` can search on; it is there where a period P is given.
    place_i: waves of the position, counted from the left, and the distances to both ends. Neighbours depend on each
    other, so a good plan spaces out what a step reveals: a wave of period 2 keeps every other position for the end.
    view_i: log odds, margin and entropy of the denoiser's prediction and the expected embedding of the token. These
    come from the forward that the first step makes anyway: a decoder that follows the plan makes no further one.

    Args:
        out: numbers per position, T for a plan.
        vocab_size: token classes V of the denoiser.
        width: size of the hidden vectors.
        kernel: positions that a convolution sees, odd.
        periods: of the waves, at least 2.
        reads_opening: False leaves the view out: a plan blind to what is given.
        noise: standard deviation of the initial W, which tells steps apart.
        period: length P of the pattern; None for a plan without one.
    """

    periods: Tensor

    def __init__(
        self,
        out: int,
        vocab_size: int,
        width: int = 32,
        kernel: int = 5,
        periods: Sequence[int] = PERIODS,
        reads_opening: bool = True,
        noise: float = 0.1,
        period: int | None = None,
    ) -> None:
        super().__init__()
        self.reads_opening, self.out = reads_opening, out
        self.register_buffer("periods", torch.tensor(list(periods)), persistent=False)
        self.pattern = None if period is None else PositionTable(period, out, periodic=True)
        places = 2 * len(periods) + 4
        self.place = nn.Linear(places, out)
        nn.init.normal_(self.place.weight, std=noise)
        nn.init.zeros_(self.place.bias)
        self.project = nn.Linear(places + 3 * reads_opening, width)
        self.embed = nn.Embedding(vocab_size, width) if reads_opening else None
        self.mix = Neighbours(width, kernel)
        self.head = nn.Linear(width, out)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, opening: State) -> Tensor:
        """Plan the rows, float [B, S, out]; the denoiser is read without a gradient."""
        latent = opening.latent
        place = _waves(latent, self.periods).to(self.place.weight.dtype)  # [B, S, P]
        hidden = place
        if self.embed is not None:
            with torch.no_grad():
                view = opening.per_position(_view).to(place.dtype)  # [B, S, 3]
                probs = opening.per_position(torch.exp).to(place.dtype)  # [B, S, V]
            hidden = self.project(torch.cat([place, view], -1)) + probs @ self.embed.weight  # [B, S, W]
        else:
            hidden = self.project(place)
        logits: Tensor = self.place(place) + self.head(F.gelu(self.mix(hidden, latent, opening.attention_mask)))
        return logits if self.pattern is None else logits + self.pattern(opening)


def _waves(latent: Tensor, periods: Tensor) -> Tensor:
    """Cosine and sine of the position in every period, and how near the two ends are: float [B, S, 2 P + 4]."""
    left = attended_positions(latent)  # [B, S]
    right = (latent.sum(-1, keepdim=True) - 1 - left).clamp(min=0)
    angle = 2 * math.pi * (left[..., None] % periods) / periods
    ends = [1 / (1 + left), (-left / 4).exp(), 1 / (1 + right), (-right / 4).exp()]
    return torch.cat([angle.cos(), angle.sin(), torch.stack(ends, -1)], -1)


def log_odds(log_p: Tensor) -> Tensor:
    """log p - log(1 - p), within -10 and 10: float [*]."""
    return (log_p - torch.log(-torch.expm1(log_p.clamp(max=-1e-4)))).clamp(-10, 10)


def _view(log_probs: Tensor) -> Tensor:
    """Log odds, margin and entropy of predictions, of about unit size: float [.., 3]."""
    clamped = log_probs.clamp(min=-30.0)  # -inf (impossible tokens) must not meet an infinite gradient
    first, second = clamped.topk(2, -1).values.unbind(-1)
    uncertainty = entropy(clamped) / math.log(log_probs.shape[-1])
    return torch.stack([log_odds(first) / 4, first.exp() - second.exp(), uncertainty], -1)


class ScanNetwork(Configurable, nn.Module):
    """Reads the steps of earlier positions one after another, for orders whose steps depend on each other.

        e_i^rate = one-hot of r_{i-1} + rate e_{i-1}^rate
        h_i      = GRU([e_i, context_i], h_{i-1}),      logits_i = W h_i (+ U [e_i, context_i])

    A trace e^rate holds how far back each step was last chosen; that of rate 0 is the step of the position before. With
    several of them the logits read them directly, too: spacing is a few weights of U, which a short fit finds, where a
    GRU alone has to learn to count. A draw takes a pass per position. See `ScanPlan`.

    Args:
        num_steps: T.
        context: opening -> what is known of every position, float [B, S, out], with an attribute `out`: a
            `PositionTable` of free numbers, or an `OpeningPlan` that reads the denoiser's first predictions.
        width: size of what the scan holds.
        bias: log-odds of the last step at the start; with -2, sets reveal about one position in eight.
        rates: of the traces, the share that is kept from one position to the next, such as 0, 0.5, 0.75, 0.9.

    Raises:
        UserError: rates that are not from 0 to below 1, or none.
    """

    rates: Tensor

    def __init__(
        self, num_steps: int, context: nn.Module, width: int = 32, bias: float = 0.0, rates: Sequence[float] = (0.0,)
    ) -> None:
        super().__init__()
        if not rates or not all(0 <= rate < 1 for rate in rates):
            raise UserError("rates", f"{list(rates)} are not shares from 0 to below 1", "give at least one, such as 0")
        self.num_steps = num_steps
        self.context = context
        self.register_buffer("rates", torch.tensor([float(rate) for rate in rates]), persistent=False)
        size = context.out
        assert isinstance(size, int)
        inputs = len(rates) * (num_steps + 1) + size
        self.cell = nn.GRU(inputs, width, batch_first=True)
        self.head = nn.Linear(width, num_steps)
        with torch.no_grad():
            self.head.bias[-1] += bias
        self.direct = nn.Linear(inputs, num_steps, bias=False) if len(rates) > 1 else None
        if self.direct is not None:
            nn.init.zeros_(self.direct.weight)
        self.first = nn.Parameter(torch.zeros(width))

    def turns(self, length: int) -> Tensor:
        """One position after another; see `Scan`."""
        return torch.arange(length, device=self.first.device)

    def _chosen(self, before: Tensor) -> Tensor:
        """One-hot of the step of the position before, int64 [..], -1 at the first: float [.., T + 1]."""
        return F.one_hot(before + 1, self.num_steps + 1).to(self.first.dtype)

    def _logits(self, held: Tensor, inputs: Tensor) -> Tensor:
        """Step logits from what is held and what is read, float [.., T]."""
        logits: Tensor = self.head(held)
        return logits if self.direct is None else logits + self.direct(inputs)

    def forward(self, context: Tensor, steps: Tensor, there: Tensor) -> Tensor:
        """Step logits of all positions at once, float [N, L, T]; see `Scan`."""
        before = torch.cat([torch.full_like(steps[:, :1], -1), steps[:, :-1]], 1)
        place = torch.arange(steps.shape[1], device=steps.device)
        since = (place[:, None] - place).clamp(min=0)
        kept = (self.rates[:, None, None] ** since).tril()  # [R, L, L]
        traces = torch.einsum("rij,njt->nirt", kept, self._chosen(before))  # [N, L, R, T + 1]
        inputs = torch.cat([traces.flatten(2), context], -1)
        held, _ = self.cell(inputs, self.first.expand(1, len(steps), -1).contiguous())
        return self._logits(held, inputs)

    def draw(self, context: Tensor, noise: Tensor, there: Tensor) -> Tensor:
        """Draw the steps position by position, int64 [N, L]; see `Scan`."""
        gru = self.cell
        weights: Any = gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0
        held, before = self.first.expand(len(context), -1), torch.full_like(there[:, 0], -1, dtype=torch.int64)
        traces = context.new_zeros(len(context), len(self.rates), self.num_steps + 1)
        steps = []
        for place in range(context.shape[1]):
            traces = self.rates[:, None] * traces + self._chosen(before).unsqueeze(1)
            inputs = torch.cat([traces.flatten(1), context[:, place]], -1)
            held = torch.gru_cell(inputs, held, *weights)
            before = sample_categorical(self._logits(held, inputs), noise[:, place])
            steps.append(before)
        return torch.stack(steps, -1)


class GroupedNetwork(Configurable, nn.Module):
    """Draws interleaved groups of positions one after another, each seeing the steps of the earlier ones.

        logits_i = head(conv(conv([one-hot of r_j where j is in an earlier group, context_j, group_j]_j)))_i,
        group_i  = i mod G

    A few passes over all positions at once instead of one per position, as context models of image compression have;
    positions of one group are independent given the earlier ones. See `ScanPlan`.

    Args:
        num_steps: T.
        context: see `ScanNetwork`.
        groups: G, at least 2.
        width: size of the hidden vectors.
        kernel: positions that a convolution sees, odd.

    Raises:
        UserError: fewer than two groups.
    """

    def __init__(self, num_steps: int, context: nn.Module, groups: int = 4, width: int = 32, kernel: int = 5) -> None:
        super().__init__()
        if groups < 2:
            raise UserError("groups", f"{groups} groups say nothing to each other", "use 2 or more, or a Plan")
        self.num_steps, self.context, self.groups = num_steps, context, groups
        size = context.out
        assert isinstance(size, int)
        self.project = nn.Linear(num_steps + 1 + size + groups, width)
        self.mix = Neighbours(width, kernel)
        self.head = nn.Linear(width, num_steps)

    def forward(self, context: Tensor, steps: Tensor, there: Tensor) -> Tensor:
        """Step logits of all positions at once, float [N, L, T]; see `Scan`."""
        group = self.turns(steps.shape[1])  # [L]
        stages = torch.arange(self.groups, device=steps.device)[:, None]  # [G, 1]
        known = torch.where(group < stages.unsqueeze(1), steps, -1)  # [G, N, L]
        many = context.repeat(self.groups, 1, 1), known.flatten(0, 1), there.repeat(self.groups, 1)
        logits = self._logits(*many).unflatten(0, (self.groups, -1))  # [G, N, L, T]
        own = group[None, None, :, None].expand((1,) + logits.shape[1:])
        return logits.gather(0, own).squeeze(0)

    def draw(self, context: Tensor, noise: Tensor, there: Tensor) -> Tensor:
        """Draw the steps group by group, int64 [N, L]; see `Scan`."""
        group = self.turns(there.shape[1])
        steps = torch.full_like(there, -1, dtype=torch.int64)
        for now in range(self.groups):
            drawn = sample_categorical(self._logits(context, steps, there), noise)
            steps = torch.where(group == now, drawn, steps)
        return steps

    def turns(self, length: int) -> Tensor:
        """One group after another; see `Scan`."""
        return torch.arange(length, device=self.head.weight.device) % self.groups

    def _logits(self, context: Tensor, known: Tensor, there: Tensor) -> Tensor:
        """Step logits from the steps that are known, int64 [N, L], -1 elsewhere: float [N, L, T]."""
        group = self.turns(known.shape[1])
        place = F.one_hot(group, self.groups).to(context.dtype).expand(known.shape + (self.groups,))
        seen = F.one_hot(known + 1, self.num_steps + 1).to(context.dtype)
        hidden = self.project(torch.cat([seen, context, place], -1))
        logits: Tensor = self.head(F.gelu(self.mix(hidden, there, there)))
        return logits


FEATURES = ("confidence", "margin", "entropy")
POLICY_FEATURES = (*FEATURES, "before", "chance", "prediction", "hidden", "price")


class PolicyNetwork(Configurable, nn.Module):
    """Reads a partially revealed sequence and the denoiser's view of it; gives a reveal logit per position.

    With `sees_truth` it is the network of a posterior: it is also given all true tokens, as embeddings and, by the
    feature `likelihood`, through what the denoiser thinks of them.

    Per position to reveal it sees the denoiser features asked for, whether the position is masked, the share of steps
    left, the log number of masked positions and the relative position; with `reads_tokens` also all visible tokens.
    Otherwise it never sees hidden tokens. Gradients reach the denoiser through the features if it is trained.

    Args:
        num_tokens: number of token ids, MASK included.
        width: size of the hidden vectors.
        layers: number of blocks.
        heads: attention heads.
        features: any of `confidence` (log odds of the top token), `margin` (top minus second probability), `entropy`
            (share of the largest possible), `before` (entropy of the masked positions that are more certain; tells
            equally uncertain ones apart), `chance` (the same for all positions: sum of log c_i over the masked ones,
            the log-probability that all top tokens are right if they do not depend on each other), `prediction` (the
            expected embedding of the token, needs `reads_tokens`), `hidden` (what the output head reads, needs its
            size), `price` (that of a step, needs `prices`) and, with `sees_truth`, `likelihood` (log-probability of the
            true token). Without any of those that read the denoiser it is not called.
        reads_tokens: False leaves visible tokens out, given ones too.
        zero_init: start with all logits 0, as a correction on top of a heuristic does.
        bias: initial logit otherwise; the default reveals about one position in eight.
        sees_truth: read the true tokens of the state; for guides.
        prices: the range of the feature `price`, that which the model charges.
        places: most positions to reveal, to give every one an embedding of its own, for canvases on which it has a
            meaning of its own (the cells of a grid). None tells positions apart by distance only.
        hidden: size of the denoiser's hidden states, for the feature `hidden`.
        vectors: size of the vectors that it gives to what decides by them (`ScanNetwork`); None: logits.

    Raises:
        UserError: an unknown feature, or one without what it needs.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        features: Sequence[str] = FEATURES,
        *,
        reads_tokens: bool = True,
        zero_init: bool = False,
        bias: float = -2.0,
        sees_truth: bool = False,
        prices: PriceRange | None = None,
        places: int | None = None,
        hidden: int | None = None,
        vectors: int | None = None,
    ) -> None:
        super().__init__()
        _check_features(features, reads_tokens, sees_truth, prices, hidden)
        self.features, self.reads_tokens, self.prices = tuple(features), reads_tokens, prices
        self.sees_truth = sees_truth
        self.embed = nn.Embedding(num_tokens, width) if reads_tokens else None
        self.embed_truth = nn.Embedding(num_tokens, width) if sees_truth else None
        self.embed_place = None if places is None else nn.Embedding(places, width)
        self.read_hidden = None if hidden is None else nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.hidden_size = hidden
        numbers = [name for name in self.features if name not in ("prediction", "hidden")]
        self.project = nn.Linear(len(numbers) + 4, width)
        self.backbone = Backbone(width, layers, heads)
        self.out = vectors
        self.head = nn.Linear(width, vectors or 1)
        if zero_init:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        elif vectors is None:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.constant_(self.head.bias, bias)

    def forward(self, state: State) -> Tensor:
        """Reveal logits, float [*, S] (vectors, float [*, S, out]); meaningless where nothing is masked.

        Raises:
            UserError: a network that sees the truth where it is not known.
        """
        dtype, latent = self.project.weight.dtype, state.latent
        hidden = self.project(self._numbers(state).to(dtype))  # [*, S, W]
        hidden = hidden + self._vectors(state, dtype)
        # Without tokens there is nothing to see before the first position to reveal.
        start = 0 if self.reads_tokens else min(state.batch.prefix, state.shape[-1] - 1)
        hidden, latent = hidden[..., start:, :], latent[..., start:]
        attention = state.attention_mask if self.reads_tokens else latent
        lead, size = hidden.shape[:-2], hidden.shape[-2]
        parts = hidden, latent, attention
        hidden, latent, attention = (part.reshape(-1, size, *part.shape[len(lead) + 1 :]) for part in parts)
        hidden = hidden * latent[..., None]
        if self.embed is not None:
            hidden = hidden + self.embed(state.tokens.reshape(-1, size))
        keys = torch.cat([state.step.reshape(-1, 1), state.tokens[..., start:].reshape(-1, size)], -1)
        distinct = distinct_rows(keys, lead[-1])
        if distinct is None:
            logits = self.head(self.backbone(hidden, attention))
        else:
            places, kind = distinct
            logits = self.head(self.backbone(hidden[places], attention[places]))[kind]
        logits = F.pad(logits.reshape(*lead, size, -1), (0, 0, start, 0))
        return logits.squeeze(-1) if self.out is None else logits

    def _numbers(self, state: State) -> Tensor:
        """Features of every position: float [*, S, F + 4]."""
        masked, latent = state.masked, state.latent
        columns: list[Tensor] = []
        if any(name in self.features for name in (*FEATURES, "before", "chance")):
            seen = state.per_position(_top_two_and_entropy)  # [*, S, 3]
            top, second, nats = seen.unbind(-1)
            by_name = {
                "confidence": lambda: log_odds(top) / 4,
                "margin": lambda: top.exp() - second.exp(),
                "entropy": lambda: nats / math.log(state.denoiser.vocab_size),
                "before": lambda: entropy_before(nats, masked).clamp(max=32) / 8,
                "chance": lambda: torch.where(masked, top, 0.0).sum(-1, keepdim=True).clamp(min=-32).expand_as(top) / 8,
            }
            columns += [by_name[name]() for name in by_name if name in self.features]
        if "likelihood" in self.features:
            columns.append(state.token_log_prob(_truth_of(state)).clamp(min=-10) / 4)
        masked_here = masked.to(columns[0].dtype if columns else self.project.weight.dtype)  # [*, S]
        if self.prices is not None:
            places = self.prices.places(state)[:, None]  # [B, 1]
            columns.append(places.to(masked_here.dtype).expand_as(masked_here))
        left = (state.steps_left.to(masked_here.dtype) / state.num_steps)[..., None].expand_as(masked_here)
        count = masked_here.sum(-1, keepdim=True).log1p().expand_as(masked_here) / 4
        place = attended_positions(latent) / (latent.sum(-1, keepdim=True) - 1).clamp(min=1)
        return torch.stack([*columns, masked_here, left, count, place.to(masked_here.dtype)], -1)

    def _vectors(self, state: State, dtype: torch.dtype) -> Tensor | float:
        """What is added to the projected numbers, float [*, S, W]."""
        total: Tensor | float = 0.0
        if "prediction" in self.features and self.embed is not None:
            weight = self.embed.weight
            expected = state.per_position(lambda log_probs: log_probs.exp().to(dtype) @ weight[: log_probs.shape[-1]])
            total = total + expected
        if self.read_hidden is not None:
            total = total + state.hidden(self._read_hidden)
        if self.embed_truth is not None:
            total = total + self.embed_truth(_truth_of(state))
        if self.embed_place is not None:
            total = total + self.embed_place(attended_positions(state.latent))
        return total

    def _read_hidden(self, inside: Tensor) -> Tensor:
        assert self.read_hidden is not None
        if inside.shape[-1] != self.hidden_size:
            problem = f"the hidden states have {inside.shape[-1]} numbers, the network was made for {self.hidden_size}"
            raise UserError("hidden", problem, f"set it to {inside.shape[-1]}")
        projected: Tensor = self.read_hidden(inside.to(self.project.weight.dtype))
        return projected


def _truth_of(state: State) -> Tensor:
    """The true tokens, int64 [*, S]."""
    if state.truth is None:
        raise UserError("sees_truth", "the true tokens are not known here", "use such a network in a guide only")
    return state.truth.expand(state.shape)


def _top_two_and_entropy(log_probs: Tensor) -> Tensor:
    """The two largest log-probabilities and the entropy: float [.., 3]."""
    clamped = log_probs.clamp(min=-30.0)  # -inf (impossible tokens) must not meet an infinite gradient
    return torch.cat([clamped.topk(2, -1).values, entropy(clamped).unsqueeze(-1)], -1)


def _check_features(
    features: Sequence[str], reads_tokens: bool, sees_truth: bool, prices: PriceRange | None, hidden: int | None
) -> None:
    known = (*POLICY_FEATURES, "likelihood") if sees_truth else POLICY_FEATURES
    unknown = [name for name in features if name not in known]
    if unknown:
        raise UserError("features", f"unknown feature {unknown[0]!r}", f"use any of {', '.join(known)}")
    if "prediction" in features and not reads_tokens:
        raise UserError("features", "prediction needs the embedding of the tokens", "set reads_tokens")
    if ("price" in features) != (prices is not None):
        remedy = "give prices, the range that the model charges, or leave the feature out"
        raise UserError("features", "price and a range of prices need each other", remedy)
    if ("hidden" in features) != (hidden is not None):
        problem = "hidden and the size of the denoiser's hidden states need each other"
        raise UserError("features", problem, "give hidden=128 for a denoiser of width 128, or leave it out")
