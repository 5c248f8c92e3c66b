"""What holds for every policy on every problem (the eight invariants), and that a planted bug is noticed.

1 A revealed token never changes, only latent positions are revealed, MASK is never emitted. 2 Every active row reveals
at least one position per step; where the policy selects none, its first, and `fallback` counts it. 3 The last step
reveals everything. 4 A row decoded alone equals the row in any batch, with padding and other rows' given positions
anywhere. 5 Finished rows cost nothing. 6 Same seed, same result, however the rows are batched. 7 Requested steps and
realised NFE are two numbers; guidance counts twice. 8 Given positions are never masked, revealed, counted or changed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import orderppl.policies
from orderppl import Batch, Policy, State, UserError, decode, follow, generate
from orderppl.data.answer_tokens import AnswerTokens
from orderppl.decoding import RevealScheduler
from orderppl.decoding.decode import DecodeOutput
from orderppl.distributions import DecidedSet, IndependentSet
from orderppl.models import LearnedPolicy, OpeningPlan, PolicyNetwork, PositionTable
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.models.networks import GroupedNetwork, ScanNetwork
from orderppl.policies import (
    AtPrice,
    Blocks,
    CorrectOracle,
    Dilated,
    Eager,
    EarlyCommit,
    EndStop,
    EntropyBound,
    EosAware,
    Factor,
    FixedOrder,
    Halved,
    Klass,
    LogitPolicy,
    LookAhead,
    Oracle,
    Plan,
    PositionWeighted,
    PriceRange,
    RandomSteps,
    Ranked,
    Renormalised,
    ScanPlan,
    ScanPolicy,
    Smoothed,
    Spaced,
    Threshold,
)
from orderppl.policies.plans import Planned
from orderppl.policies.wrappers import Wrapper
from orderppl.unmasking.denoiser import Reader

from extreme_policies import Everything, Nothing

VOCAB, MASK, SEPARATOR = 8, 7, 6
EXAMPLES = settings(max_examples=4, deadline=None, derandomize=True, database=None)


# ---- denoisers: deterministic given the state, float64


class Bag:
    """Logits from sums over the attended tokens, given ones included; whole numbers, so that ties are exact."""

    mask_index, vocab_size = MASK, VOCAB

    def __init__(self, seed: int) -> None:
        self.table = torch.randint(-3, 4, (VOCAB, VOCAB), generator=torch.Generator().manual_seed(seed))
        self.calls: list[int] = []

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(len(state))
        position = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        read = (self.table[state] * attention_mask[..., None]).cumsum(-2)  # what stands to the left, and itself
        around = (self.table[state] * attention_mask[..., None]).sum(-2, keepdim=True)
        return ((3 * read + around + position[..., None] * torch.arange(VOCAB)) % 5).double()


class Guided(Bag):
    """The same at the price of two forwards."""

    forwards_per_call = 2


class Attentive(TransformerDenoiser):
    """A transformer that offers its head by itself; `once` reads the prompt once where it ends with a separator."""

    def __init__(self, seed: int, once: bool) -> None:
        torch.manual_seed(seed)
        super().__init__(
            VOCAB, MASK, width=8, layers=2, heads=2, max_length=40, separator_index=SEPARATOR,
            prompt_reads_response=not once, positions="learned",  # rotary ones cannot tell masks without a prompt apart
        )  # fmt: skip
        for parameter in self.parameters():
            parameter.data.normal_(std=0.7)
        self.requires_grad_(False).double()
        self.calls: list[int] = []

    def mixed_states(self, state: Tensor, attention_mask: Tensor, start: int, layout: Any = None) -> Tensor:
        self.calls.append(len(state))
        return super().mixed_states(state, attention_mask, start, layout)


DENOISERS: list[Any] = [make(seed) for seed in range(2) for make in (Bag, Guided)]
DENOISERS += [Attentive(seed, once) for seed, once in ((0, False), (1, True), (2, True))]


# ---- problems


@dataclass(frozen=True)
class Row:
    """A canvas without padding: a token that is given, or None for a position to reveal."""

    cells: tuple[int | None, ...]
    id: int

    @property
    def latent(self) -> int:
        return self.cells.count(None)

    def truth(self) -> list[int]:
        """Some tokens of its own at all positions, those that are given among them."""
        own = ((place * (3 + self.id) + self.id) % (VOCAB - 2) for place in range(len(self.cells)))
        return [number if cell is None else cell for number, cell in zip(own, self.cells, strict=True)]


@dataclass(frozen=True)
class Problem:
    denoiser: Any
    rows: tuple[Row, ...]
    steps: int
    temperature: float
    mode: bool
    seed: int
    size: int  # of blocks

    @property
    def cost(self) -> int:
        return int(getattr(self.denoiser, "forwards_per_call", 1))

    @property
    def longest(self) -> int:
        return max((row.latent for row in self.rows), default=0)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Prompts, with a separator or without, and behind them positions to reveal among given ones."""
    rows = []
    for number in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, VOCAB - 3), max_size=4))
        ending = draw(st.sampled_from([(SEPARATOR,), ()]))
        token = st.one_of(st.none(), st.none(), st.none(), st.integers(0, VOCAB - 3))
        body = draw(st.one_of(st.lists(token, max_size=10), st.integers(0, 8).map(lambda size: [None] * size)))
        body = [cell for place, cell in enumerate(body) if cell is not None or body[:place].count(None) < 8]
        rows.append(Row((*prompt, *ending, *body), number))
    return Problem(
        draw(st.sampled_from(DENOISERS)),
        tuple(rows),
        draw(st.integers(4, 6)),
        draw(st.sampled_from([0.0, 0.8])),
        draw(st.booleans()),
        draw(st.integers(0, 99)),
        draw(st.integers(2, 4)),
    )


Layout = Callable[[Row, int], list[int]]
"""Where the cells of a row stand on a canvas of a width, ascending."""


def left_aligned(row: Row, width: int) -> list[int]:
    return list(range(len(row.cells)))


def right_aligned(row: Row, width: int) -> list[int]:
    return list(range(width - len(row.cells), width))


def anywhere(seed: int) -> Layout:
    """Padding on both sides and inside of rows."""
    return lambda row, width: sorted(random.Random(f"{seed} {row.id}").sample(range(width), len(row.cells)))


LAYOUTS = [left_aligned, right_aligned, anywhere(0), anywhere(1)]


def canvas(rows: tuple[Row, ...], layout: Layout = left_aligned, extra: int = 0, clean: bool = False) -> Batch:
    """A padded batch; padding holds a token that must not be read. `clean` writes the truth where it is to be found."""
    width = max((len(row.cells) for row in rows), default=0) + extra
    tokens = torch.full((len(rows), width), 1)
    attended, fixed = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        places = layout(row, width)
        values = row.truth() if clean else [MASK if cell is None else cell for cell in row.cells]
        tokens[number, places] = torch.tensor(values, dtype=torch.int64)
        attended[number, places] = True
        fixed[number, places] = torch.tensor([cell is not None for cell in row.cells], dtype=torch.bool)
    return Batch(tokens, attended, fixed)


def is_followed(name: str) -> bool:
    """Oracles look at the true tokens: they follow them, as all others do in `test_every_path`."""
    return "oracle" in name


def solve(problem: Problem, policy: Policy, batch: Batch | None = None, path: bool = False) -> DecodeOutput:
    batch = canvas(problem.rows, clean=path) if batch is None else batch
    options = {
        "mode": problem.mode,
        "generator": torch.Generator().manual_seed(problem.seed),
        "row_ids": torch.tensor([row.id for row in problem.rows]),
    }
    if path:
        return follow(policy, problem.denoiser, batch, problem.steps, **options)
    options |= {"temperature": problem.temperature, "record_history": True}
    return decode(problem.denoiser, policy, batch, max_steps=problem.steps, **options)


# ---- every policy


class Hazard(Policy):
    """Each masked position by the confidence in it; may select nothing."""

    def forward(self, state: State) -> IndependentSet:
        q = 0.02 + 0.6 * state.per_position(lambda log_probs: log_probs.amax(-1)).exp() ** 2
        return IndependentSet(q.log(), (1 - q).log(), state.masked)


class TokenPlan(Policy):
    """Step logits that read the given tokens, with everything hidden: float64 [B, S, 4]."""

    def forward(self, opening: State) -> Tensor:
        told = torch.where(opening.attention_mask & ~opening.latent, opening.tokens, 0).sum(-1)[:, None, None]
        place = (opening.latent.cumsum(-1) - 1).clamp(min=0)[..., None]
        return 2 * torch.sin(1.7 * (told + 1) * (place + 1) + 2.3 * torch.arange(4)).double()


def of_network(**options: Any) -> PolicyNetwork:
    """A real policy network, with its denoiser features and tokens."""
    torch.manual_seed(5)
    network = PolicyNetwork(VOCAB, width=8, layers=1, heads=2, bias=-0.5, **options)
    torch.nn.init.normal_(network.head.weight)
    return network.double()


def opening_plan() -> Plan:
    torch.manual_seed(6)
    network = OpeningPlan(4, VOCAB, width=8, noise=1.0)
    torch.nn.init.normal_(network.head.weight)
    return Plan(network.double())


PRICES = PriceRange(0.1, 2.0)
EVERYTHING_SEEN = ("confidence", "margin", "entropy", "before", "chance", "prediction", "hidden")
LEARNED = LearnedPolicy(of_network(), non_empty=False)
SEEING = LearnedPolicy(of_network(features=EVERYTHING_SEEN, hidden=VOCAB), non_empty=True)
PRICED = LearnedPolicy(of_network(features=("confidence", "price"), prices=PRICES), non_empty=False)
BLIND = LearnedPolicy(of_network(features=(), reads_tokens=False), Threshold(0.4, temperature=1.0))
OPENING = opening_plan()


def scan_plan(steps: int = 4, beams: int | None = None) -> ScanPlan:
    torch.manual_seed(7)
    return ScanPlan(ScanNetwork(steps, PositionTable(8, 3, noise=2.0), width=8).double(), beams=beams)


SCAN = scan_plan()
HALVED = Halved(scan_plan(2, beams=8))
GROUPED = ScanPlan(GroupedNetwork(4, PositionTable(8, 3, noise=2.0), groups=3, width=8).double(), beams=4)


def scan_policy(make: Callable[[PolicyNetwork], ScanNetwork | GroupedNetwork], non_empty: bool = True) -> ScanPolicy:
    torch.manual_seed(8)
    return ScanPolicy(make(PolicyNetwork(VOCAB, width=8, layers=1, heads=2, vectors=3)).double(), non_empty=non_empty)


SCANNING = scan_policy(lambda context: ScanNetwork(2, context, width=8, bias=-1.0))
WAITING = scan_policy(lambda context: ScanNetwork(2, context, width=8, bias=-1.0, rates=(0.0, 0.9)), non_empty=False)
IN_GROUPS = scan_policy(lambda context: GroupedNetwork(2, context, groups=2, width=8))
ANSWER = AnswerTokens(marks=[0], ends=[1])
Factory = Callable[[Problem], Policy]
EVERY: dict[str, Factory] = {
    "random": lambda p: Ranked("random"),
    "random-1": lambda p: Ranked("random", 1.5),
    "top_prob": lambda p: Ranked("top_prob"),
    "top_prob-ties": lambda p: Ranked("top_prob", temperature=1e-6),
    "top_prob-soft": lambda p: Ranked("top_prob", 1.5, temperature=0.3),
    "margin": lambda p: Ranked("margin", "cosine"),
    "entropy": lambda p: Ranked("entropy"),
    "entropy-1": lambda p: Ranked("entropy", 2.5),
    "left_to_right": lambda p: Ranked("left_to_right"),
    "by_policy": lambda p: Ranked(BLIND),
    "threshold": lambda p: Threshold(0.4),
    "threshold-soft": lambda p: Threshold(0.4, temperature=1.0),
    "factor": lambda p: Factor(2.2),
    "entropy_bound": lambda p: EntropyBound(1.5),
    "entropy_bound-soft": lambda p: EntropyBound(1.5, temperature=0.5),
    "klass": lambda p: Klass(0.3, 0.4),
    "klass-1": lambda p: Klass(0.1, 9.0),
    "klass-2": lambda p: Klass(0.1, 9.0, stable_steps=2),
    "oracle": lambda p: Oracle("greedy"),
    "oracle_margin": lambda p: Oracle("margin"),
    "oracle_soft": lambda p: Oracle("greedy", 2.0, temperature=1.0),
    "random_steps": lambda p: RandomSteps("cosine"),
    "fixed": lambda p: FixedOrder([5, 0, 5, 2, 1, 1, 0]),
    "periodic": lambda p: FixedOrder([0, 3, 1], periodic=True),
    "dilated": lambda p: Dilated(),
    "table": lambda p: Plan(PositionTable(8, 4, noise=1.0).double()),
    "plan": lambda p: Plan(TokenPlan()),
    "opening": lambda p: OPENING,
    "scan": lambda p: SCAN,
    "halved": lambda p: HALVED,
    "grouped": lambda p: GROUPED,
    "scan_policy": lambda p: SCANNING,
    "scan_policy-may_wait": lambda p: WAITING,
    "scan_policy-groups": lambda p: IN_GROUPS,
    "blocks": lambda p: Blocks(Ranked("margin"), p.size),
    "eos_aware": lambda p: EosAware(Ranked("top_prob"), [0, 1]),
    "commit": lambda p: EarlyCommit(Ranked("top_prob"), ANSWER, 0.3),
    "commit-soft": lambda p: EarlyCommit(LEARNED, ANSWER, 0.3, temperature=1.0, network=BLIND.network),
    "commit-priced": lambda p: AtPrice(EarlyCommit(PRICED, network=BLIND.network, prices=PRICES), 0.3),
    "hazard": lambda p: Hazard(),
    "learned": lambda p: LEARNED,
    "seeing": lambda p: SEEING,
    "residual": lambda p: BLIND,
    "renormalised": lambda p: Renormalised(LEARNED, 0.5),
    "correct_oracle": lambda p: CorrectOracle(),
    "end_stop": lambda p: EndStop(Threshold(0.4), [0, 1], 0.3),
    "end_stop-drawn": lambda p: EndStop(LEARNED, [0]),
    "look_ahead": lambda p: LookAhead(Ranked("top_prob", temperature=0.5), 3),
    "look_ahead-learned": lambda p: LookAhead(LEARNED, 2),
    "position_weighted": lambda p: PositionWeighted(0.1, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
    "spaced": lambda p: Spaced(Threshold(0.2), 3.0),
    "spaced-drawn": lambda p: Spaced(LEARNED, 2.0),
    "log_odds": lambda p: Ranked("log_odds", "llada"),
    "dream": lambda p: Ranked("entropy", "dream"),
    "at_price": lambda p: AtPrice(PRICED, 0.7),
    "smoothed": lambda p: Smoothed(Klass(0.3, 0.4), 0.2),
    "smoothed-may_wait": lambda p: Smoothed(Threshold(0.4), 0.4, non_empty=False),
    "eager": lambda p: Eager(LEARNED, 2.0),
    "lazy": lambda p: Eager(Hazard(), 0.3),
    "eager_commit": lambda p: Eager(EarlyCommit(LEARNED, network=BLIND.network), 1.7),
    "nothing": lambda p: Nothing(),
    "everything": lambda p: Everything(),
}
INNER = ("random", "entropy", "threshold", "factor", "entropy_bound", "klass", "oracle", "hazard", "learned")
BLOCKS_TOO = (*INNER, "plan", "opening", "scan", "grouped", "scan_policy", "periodic", "commit", "eager_commit")
EVERY |= {f"blocks_{name}": lambda p, make=EVERY[name]: Blocks(make(p), p.size) for name in BLOCKS_TOO}
EVERY |= {f"eos_{name}": lambda p, make=EVERY[name]: EosAware(make(p), [0, 1]) for name in (*INNER, "plan")}
EVERY |= {f"commit_{name}": lambda p, make=EVERY[name]: EarlyCommit(make(p), ANSWER, 0.3) for name in (*INNER, "plan")}
EVERY["blocks_eos"] = lambda p: Blocks(EosAware(Factor(1.5), [0, 1]), p.size)
EVERY["eos_blocks"] = lambda p: EosAware(Blocks(Threshold(0.4), p.size), [0, 1])
every_policy = pytest.mark.parametrize("name", EVERY)


def test_no_policy_is_left_out():
    """Every class of the library that can be made, by itself or inside another."""
    bases = {Policy, LogitPolicy, Planned, Wrapper}
    public = (getattr(orderppl.policies, name) for name in orderppl.policies.__all__)
    classes = {one for one in public if isinstance(one, type) and issubclass(one, Policy)} - bases
    problem = Problem(DENOISERS[0], (Row((None,), 0),), 4, 0.0, False, 0, 2)
    met = {type(module) for make in EVERY.values() for module in make(problem).modules()}
    assert classes | {LearnedPolicy} <= met


# ---- one run


class Watched(Policy):
    """Hands on what a policy says and keeps what is selected, and what would come first, step by step."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy, self.forwards_per_step = policy, policy.forwards_per_step
        self.selected: list[Tensor] = []  # bool [b, S], of the rows still there
        self.best: list[Tensor] = []  # int64 [b]

    def at_step(self, state: State) -> tuple[Any, Any]:
        sets, carry = self.policy.at_step(state)
        takes_mode = sets.is_certain or state.takes_mode
        self.selected.append((sets.mode if takes_mode else sets.draw(state.noise)) & state.masked)
        confidence = state.per_position(lambda log_probs: log_probs.amax(-1)).exp()
        score = confidence if sets.priority is None else sets.priority
        shown = torch.where((sets.shown & state.masked).any(-1, keepdim=True), sets.shown, True) & state.masked
        score = score.clamp(min=torch.finfo(score.dtype).min)  # impossible positions come after possible ones
        self.best.append(torch.where(shown, score, -torch.inf).argmax(-1))
        return sets, carry


def check_run(problem: Problem, out: DecodeOutput, watched: Watched, calls: list[int], batch: Batch) -> None:
    """Invariants 1, 2, 3, 5, 7 and 8 of one decoding or path."""
    assert out.steps == problem.steps
    ahead = watched.forwards_per_step  # 1, or as many as there are candidates, which are read in one further call
    forwards = out.nfe // (problem.cost * ahead)
    assert torch.equal(forwards * problem.cost * ahead, out.nfe)
    longest = int(forwards.max()) if len(forwards) else 0
    rows_at = [int((forwards > step).sum()) for step in range(longest)]
    expected = []
    for step, rows in enumerate(rows_at):
        decides = step < problem.steps - 1
        expected += [rows, rows * ahead] if ahead > 1 and decides else [rows]
    assert calls == expected
    assert torch.equal(out.latent, batch.latent)
    assert torch.equal(out.sequences[~batch.latent], batch.tokens[~batch.latent])
    assert (out.sequences[batch.latent] != MASK).all()
    assert torch.equal(out.reveal_step >= 0, batch.latent)
    assert (out.token_log_prob[~batch.latent] == 0).all()
    assert (out.token_log_prob <= 0).all()
    if out.history is not None:
        assert torch.equal(out.history[-1], out.sequences)
        assert (out.history[0][batch.latent] == MASK).all()
        for before, after in itertools.pairwise(out.history):
            assert ((before == after) | ((before == MASK) & batch.latent)).all()
    left = [[number for number in range(len(problem.rows)) if forwards[number] > step] for step in range(longest)]
    for number, row in enumerate(problem.rows):
        reveal_step = out.reveal_step[number]
        used = sorted(set(reveal_step[batch.latent[number]].tolist()))
        assert used == list(range(int(forwards[number])))  # every forward reveals something, and in the end everything
        assert len(used) <= problem.steps
        fallbacks = 0
        for step in used:
            revealed, masked = reveal_step == step, reveal_step >= step
            if step == problem.steps - 1:
                assert torch.equal(revealed, masked)
                assert len(watched.selected) == step  # nobody asks
                continue
            place = left[step].index(number)
            selected = watched.selected[step][place]
            assert len(watched.selected[step]) == len(left[step])
            if selected.any():
                assert torch.equal(revealed, selected)
            else:
                assert revealed.nonzero()[:, 0].tolist() == [int(watched.best[step][place])]
                fallbacks += 1
        assert out.fallback[number] == fallbacks
        if isinstance(watched.policy, Blocks):  # one block after the other, whoever decides, and where nobody does
            own = reveal_step[batch.latent[number]]
            for first, second in itertools.pairwise(own.split(watched.policy.size)):
                assert first.max() < second.min()
        if row.latent:
            assert out.tokens_per_forward[number] == pytest.approx(row.latent / int(out.nfe[number]))


def check_rows(
    problem: Problem, make: Factory, layout: Layout, extra: int, order: random.Random, path: bool = False
) -> None:
    """Invariants 4 and 6: rows alone, and the same rows in another order with padding anywhere."""
    shuffled = list(problem.rows)
    order.shuffle(shuffled)
    among = replace(problem, rows=tuple(shuffled))
    batch = canvas(among.rows, layout, extra, clean=path)
    together = solve(among, make(among), batch, path)
    assert torch.equal(together.sequences[~batch.attention_mask], batch.tokens[~batch.attention_mask])
    for number, row in enumerate(shuffled):
        single = replace(problem, rows=(row,))
        alone = solve(single, make(among), path=path)
        here = batch.attention_mask[number]
        for name in ("sequences", "reveal_step"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[number, here]), name
        assert alone.nfe[0] == together.nfe[number]
        assert alone.fallback[0] == together.fallback[number]
        torch.testing.assert_close(alone.token_log_prob[0], together.token_log_prob[number, here])


def watched_run(
    problem: Problem, make: Factory, layout: Layout = left_aligned, path: bool = False
) -> tuple[DecodeOutput, Watched, Batch]:
    watched, batch = Watched(make(problem)), canvas(problem.rows, layout, 0 if layout is left_aligned else 3, path)
    problem.denoiser.calls.clear()
    out = solve(problem, watched, batch, path)
    return out, watched, batch


@every_policy
@EXAMPLES
@given(problem=problems(), layout=st.sampled_from(LAYOUTS))
def test_every_run(name, problem, layout):
    out, watched, batch = watched_run(problem, EVERY[name], layout, is_followed(name))
    check_run(problem, out, watched, problem.denoiser.calls, batch)
    again = solve(problem, Watched(watched.policy), batch, is_followed(name))
    for field in ("sequences", "reveal_step", "nfe", "fallback", "token_log_prob"):
        assert torch.equal(getattr(out, field), getattr(again, field))


@every_policy
@EXAMPLES
@given(
    problem=problems(),
    layout=st.sampled_from(LAYOUTS),
    extra=st.integers(0, 4),
    order=st.randoms(use_true_random=False),
)
def test_every_row_by_itself(name, problem, layout, extra, order):
    policy = EVERY[name](problem)  # the same weights for all
    check_rows(problem, lambda p: policy, layout, extra, order, is_followed(name))


@every_policy
@settings(EXAMPLES, max_examples=2)
@given(problem=problems(), layout=st.sampled_from(LAYOUTS), order=st.randoms(use_true_random=False))
def test_every_path(name, problem, layout, order):
    """The same of teacher-forced paths, whose tokens are given."""
    out, watched, batch = watched_run(problem, EVERY[name], layout, path=True)
    check_run(problem, out, watched, problem.denoiser.calls, batch)
    assert torch.equal(out.sequences, batch.tokens)
    check_rows(problem, lambda p: watched.policy, layout, 2, order, path=True)


# ---- the other ways in


@every_policy
@settings(EXAMPLES, max_examples=2)
@given(problem=problems(), layout=st.sampled_from(LAYOUTS))
def test_what_is_not_mask_is_given(name, problem, layout):
    """Without a word on what is given, MASK says it: a text with holes is filled."""
    if is_followed(name):
        return
    policy, batch = EVERY[name](problem), canvas(problem.rows, layout, 2)
    expected = solve(problem, policy, batch)
    if not batch.latent.any():
        with pytest.raises(UserError, match="^batch: no MASK"):
            solve(problem, policy, replace(batch, given=None))
        return
    filled = solve(problem, policy, replace(batch, given=None))
    for field in ("sequences", "reveal_step", "nfe", "fallback", "token_log_prob"):
        assert torch.equal(getattr(filled, field), getattr(expected, field))


@every_policy
@settings(EXAMPLES, max_examples=2)
@given(problem=problems(), layout=st.sampled_from(LAYOUTS))
def test_the_scheduler_gives_the_same(name, problem, layout):
    if is_followed(name) or "look_ahead" in name:  # which asks the denoiser about states of its own: refused there
        return
    problem = replace(problem, rows=tuple(row for row in problem.rows if row.latent) or (Row((1, None, 2, None), 0),))
    policy, batch = EVERY[name](problem), canvas(problem.rows, layout, 1)
    expected = solve(problem, policy, batch)
    generator, ids = torch.Generator().manual_seed(problem.seed), torch.tensor([row.id for row in problem.rows])
    scheduler = RevealScheduler(Watched(policy), MASK, problem.temperature, mode=problem.mode)
    scheduler.set_timesteps(problem.steps)
    sample, fallback = batch.tokens, torch.zeros_like(expected.fallback)
    for step, t in enumerate(scheduler.timesteps):
        logits = problem.denoiser(torch.where(batch.attention_mask, sample, 0), batch.attention_mask)
        if name in ("seeing",):
            return  # reads hidden states, which a loop of another library does not hand over
        done = scheduler.step(logits, t, sample, attention_mask=batch.attention_mask, generator=generator, row_ids=ids)
        assert torch.equal(done.reveal, expected.reveal_step == step)
        sample, fallback = done.prev_sample, fallback + done.fallback
    assert torch.equal(sample, expected.sequences)
    assert torch.equal(fallback, expected.fallback)


def cut(row: Row) -> int:
    """Where the response begins that `generate` writes: behind the last given token."""
    return max((place + 1 for place, cell in enumerate(row.cells) if cell is not None), default=0)


@every_policy
@settings(EXAMPLES, max_examples=2)
@given(problem=problems(), left=st.booleans())
def test_generate_gives_the_same(name, problem, left):
    """Prompts with holes, padded on either side, and a response of its own length behind each."""
    if is_followed(name) or not any(row.latent for row in problem.rows):
        return
    policy = EVERY[name](problem)
    expected = solve(problem, policy)
    prompts = tuple(Row(row.cells[: cut(row)], row.id) for row in problem.rows)
    prompt = canvas(prompts, right_aligned if left else left_aligned)
    lengths = torch.tensor([len(row.cells) - cut(row) for row in problem.rows])
    written = generate(
        problem.denoiser,
        prompt.tokens,
        prompt.attention_mask,
        max_new_tokens=lengths,
        steps=problem.steps,
        policy=policy,
        temperature=problem.temperature,
        mode=problem.mode,
        generator=torch.Generator().manual_seed(problem.seed),
        row_ids=torch.tensor([row.id for row in problem.rows]),
        pad_token_id=5,
    )
    assert torch.equal(written.sequences, written.decoded.sequences)
    width = prompt.tokens.shape[1]
    assert (written.sequences[:, width:][~written.attention_mask[:, width:]] == 5).all()
    for number, row in enumerate(problem.rows):
        here, size = written.attention_mask[number], len(row.cells)
        assert int(here.sum()) == size
        assert torch.equal(written.sequences[number, here], expected.sequences[number, :size])
        assert torch.equal(written.decoded.reveal_step[number, here], expected.reveal_step[number, :size])
    assert torch.equal(written.decoded.nfe, expected.nfe)


def test_block_size_is_the_block_wrapper():
    problem = Problem(
        DENOISERS[0], (Row((1, 2, *[None] * 7), 0), Row((None, 3, None, None, 1, None), 1)), 6, 0, True, 3, 3
    )
    wrapped = solve(problem, Blocks(Ranked("margin"), 3))
    blocked = decode(problem.denoiser, Ranked("margin"), canvas(problem.rows), max_steps=6, block_size=3)
    assert torch.equal(blocked.reveal_step, wrapped.reveal_step)
    batch = canvas(problem.rows, clean=True)
    for options, policy in (({"block_size": 3}, Ranked("margin")), ({}, Blocks(Ranked("margin"), 3))):
        path = follow(policy, problem.denoiser, batch, 6, **options)
        assert path.reveal_step.shape == batch.tokens.shape
    assert not torch.equal(wrapped.reveal_step, solve(problem, Ranked("margin")).reveal_step)


def test_a_range_of_prices_has_to_be_narrowed_down():
    """What a row is charged in a fit depends on the batch; a decoder must not."""
    problem = Problem(DENOISERS[0], (Row((1, None, None), 0), Row((None, 3), 1)), 6, 0, True, 3, 3)
    with pytest.raises(UserError, match=r"^price: the policy was learned for prices from 0\.1 to 2\.0"):
        solve(problem, PRICED)
    assert solve(problem, AtPrice(PRICED, 0.1)).nfe.min() > 0


# ---- planted bugs: each of them must be noticed

PLANTED = Problem(
    DENOISERS[0],
    (
        Row((1, 2, SEPARATOR, *[None] * 8), 0),
        Row((3, None, None, 5, None), 1),
        Row((None, 4, None, None, None, 2, None, None), 2),
    ),
    5,
    0.8,
    False,
    3,
    3,
)


class PooledQuota(Policy):
    """The most confident positions of the whole batch."""

    def forward(self, state: State) -> DecidedSet:
        score = state.per_position(lambda log_probs: log_probs.amax(-1)).masked_fill(~state.masked, -torch.inf)
        best = score.flatten().topk(min(3, int(state.masked.sum()))).indices
        decided = torch.zeros_like(state.masked).flatten().index_fill(0, best, True).view_as(state.masked)
        return DecidedSet(decided, state.masked)


class QuotaOfTheFirstRow(Policy):
    """Everyone reveals what the first row is due."""

    def forward(self, state: State) -> DecidedSet:
        count = state.masked[0].sum() // state.steps_left[0]
        score = state.per_position(lambda log_probs: log_probs.amax(-1)).masked_fill(~state.masked, -9.0)
        rank = score.argsort(-1, descending=True).argsort(-1)
        return DecidedSet((rank < count.clamp(min=1)) & state.masked, state.masked)


class NoiseOfTheBatch(Policy):
    """Draws that depend on where in the batch a row stands."""

    def forward(self, state: State) -> DecidedSet:
        drawn = torch.rand(state.masked.shape, generator=torch.Generator().manual_seed(1)) < 0.4
        return DecidedSet(drawn & state.masked, state.masked)


class ReadsPadding(Policy):
    """Counts columns, whatever is in them."""

    def forward(self, state: State) -> DecidedSet:
        decided = torch.arange(state.masked.shape[-1]) < (state.masked.shape[-1] + state.step[:, None]) // 3
        return DecidedSet(decided & state.masked, state.masked)


@pytest.mark.parametrize("path", [False, True])
@pytest.mark.parametrize("bug", [PooledQuota, QuotaOfTheFirstRow, NoiseOfTheBatch, ReadsPadding])
def test_a_policy_that_looks_at_other_rows_is_noticed(bug, path):
    with pytest.raises(AssertionError):
        check_rows(PLANTED, lambda p: bug(), right_aligned, 1, random.Random(1), path)


def test_a_denoiser_that_reads_padding_is_noticed():
    class Blind(Bag):
        def __call__(self, state, attention_mask):
            return super().__call__(state, torch.ones_like(attention_mask))

    with pytest.raises(AssertionError):
        check_rows(replace(PLANTED, denoiser=Blind(0)), EVERY["top_prob"], right_aligned, 1, random.Random(1))


def _emits_mask(monkeypatch):
    monkeypatch.setattr(Reader, "logits", lambda self, hidden: hidden + 9.0 * (torch.arange(VOCAB) == MASK))


def _never_falls_back(monkeypatch):
    monkeypatch.setattr("orderppl.decoding.step.or_best", lambda sets, state, selected: selected)


def _reveals_two_when_nothing_is_selected(monkeypatch):
    def or_two(sets, state, selected):
        return torch.where(selected.any(-1, keepdim=True), selected, state.masked & (state.masked.cumsum(-1) <= 2))

    monkeypatch.setattr("orderppl.decoding.step.or_best", or_two)


@pytest.mark.parametrize("plant", [_emits_mask, _never_falls_back, _reveals_two_when_nothing_is_selected])
def test_a_step_that_breaks_an_invariant_is_noticed(plant, monkeypatch):
    plant(monkeypatch)
    out, watched, batch = watched_run(PLANTED, EVERY["nothing"])
    with pytest.raises(AssertionError):
        check_run(PLANTED, out, watched, PLANTED.denoiser.calls, batch)


def _batch_nfe(out, calls):
    out.nfe[:] = out.nfe.max()


def _requested_nfe(out, calls):
    out.nfe[:] = out.steps


def _kept_rows(out, calls):
    calls[:] = [len(out.nfe)] * len(calls)


def _uncounted_fallback(out, calls):
    out.fallback[:] = 0


def _changed_token(out, calls):
    out.history[1:-1] = torch.where(out.history[1:-1] == MASK, MASK, (out.history[1:-1] + 1) % MASK)


def _unrevealed_rest(out, calls):
    out.sequences[0, 10] = MASK


def _changed_given(out, calls):
    out.sequences[0, 0] += 1


def _counted_given(out, calls):
    out.reveal_step[2, 1] = 0


def _scored_given(out, calls):
    out.token_log_prob[1, 0] = -0.5


TAMPERS = [_batch_nfe, _requested_nfe, _kept_rows, _uncounted_fallback, _changed_token, _unrevealed_rest]


@pytest.mark.parametrize("tamper", [*TAMPERS, _changed_given, _counted_given, _scored_given])
def test_a_wrong_record_is_noticed(tamper):
    out, watched, batch = watched_run(PLANTED, EVERY["lazy"])
    calls = PLANTED.denoiser.calls.copy()
    check_run(PLANTED, out, watched, calls, batch)
    assert int(out.fallback.sum()) > 0
    tamper(out, calls)
    with pytest.raises(AssertionError):
        check_run(PLANTED, out, watched, calls, batch)
