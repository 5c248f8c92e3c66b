"""What holds for every policy on every problem (the seven invariants), and that a planted bug is noticed.

1 A revealed token never changes, only masked positions are revealed, MASK is never emitted. 2 Every active row reveals
at least one position per step; where the policy selects none, its arg-max, and `fallback` counts it. 3 The last step
reveals everything. 4 A row decoded alone equals the row in any padded batch. 5 Finished rows cost nothing. 6 Same seed,
same result, however the rows are batched. 7 Requested steps and realised NFE are two numbers; guidance counts twice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orderppl.data.answer_tokens import AnswerTokens
from orderppl.decoding import (
    POLICIES,
    AnswerReady,
    Block,
    DecodeOutput,
    EosAware,
    GreedyOracle,
    OracleMargin,
    PlannedOrder,
    Policy,
    RevealScheduler,
    StochasticDecision,
    decode,
    generate,
    make_policy,
)
from orderppl.decoding.policy import policy_score
from orderppl.denoising import Canvas
from orderppl.distributions import RevealSet
from orderppl.models import LearnedPolicy
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.models.networks import PolicyNetwork

from extreme_policies import Everything, Nothing

VOCAB, MASK, SEPARATOR = 8, 7, 6
EXAMPLES = settings(max_examples=4, deadline=None, derandomize=True, database=None)


# ---- denoisers: deterministic given the state, float64


class Bag:
    """Logits from sums over the attended tokens, prompt included; whole numbers, so that ties are common and exact."""

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
            VOCAB, MASK, width=8, layers=2, heads=2, max_length=32, separator_index=SEPARATOR,
            prompt_reads_response=not once, positions="learned",  # rotary ones cannot tell masks without a prompt apart
        )  # fmt: skip
        for parameter in self.parameters():
            parameter.data.normal_(std=0.7)
        self.requires_grad_(False).double()
        self.calls: list[int] = []

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls.append(len(state))
        return super().hidden_states(state, attention_mask)

    def tail_states(self, state: Tensor, attention_mask: Tensor, start: int) -> Tensor:
        self.calls.append(len(state))
        return super().tail_states(state, attention_mask, start)

    def response_states(self, tokens: Tensor, attention_mask: Tensor, prompt: Tensor, context_mask: Tensor) -> Tensor:
        self.calls.append(len(tokens))
        return super().response_states(tokens, attention_mask, prompt, context_mask)


DENOISERS = [make(seed) for seed in range(2) for make in (Bag, Guided)]
DENOISERS += [Attentive(seed, once) for seed, once in ((0, False), (1, True), (2, True))]


# ---- problems


@dataclass(frozen=True)
class Row:
    prompt: tuple[int, ...]
    length: int
    id: int

    def numbers(self, count: int) -> Tensor:
        """Some numbers of its own per position, such as a truth or a plan: int64 [L]."""
        return (torch.arange(self.length) * (3 + self.id) + len(self.prompt) + self.id) % count


@dataclass(frozen=True)
class Problem:
    denoiser: Bag | Attentive
    rows: tuple[Row, ...]
    steps: int
    temperature: float
    seed: int
    size: int  # of blocks

    @property
    def cost(self) -> int:
        return int(getattr(self.denoiser, "forwards_per_call", 1))

    def stacked(self, count: int) -> Tensor:
        """`Row.numbers` of all rows: int64 [B, L]."""
        longest = max(row.length for row in self.rows)
        return torch.stack([torch.cat([r.numbers(count), torch.zeros(longest - r.length).long()]) for r in self.rows])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows = []
    for number in range(draw(st.integers(1, 3))):
        prompt = draw(st.lists(st.integers(0, VOCAB - 3), max_size=4))
        ending = draw(st.sampled_from([(SEPARATOR,), ()]))
        rows.append(Row((*prompt, *ending), draw(st.integers(0, 8)), number))
    return Problem(
        draw(st.sampled_from(DENOISERS)),
        tuple(rows),
        draw(st.integers(4, 6)),
        draw(st.sampled_from([0.0, 0.8])),
        draw(st.integers(0, 99)),
        draw(st.integers(2, 4)),
    )


def padded(rows: tuple[Row, ...], left: bool = False, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts int64 [B, C] and their mask; padding holds tokens that must not be read."""
    width = max(len(row.prompt) for row in rows) + extra
    context = torch.full((len(rows), width), 1)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(width - len(row.prompt), width) if left else slice(0, len(row.prompt))
        context[number, place], mask[number, place] = torch.tensor(row.prompt, dtype=torch.int64), True
    return context, mask


def solve(problem: Problem, policy: Policy, left: bool = False, extra: int = 0) -> DecodeOutput:
    return decode(
        problem.denoiser,
        policy,
        *padded(problem.rows, left, extra),
        length=torch.tensor([row.length for row in problem.rows]),
        max_steps=problem.steps,
        temperature=problem.temperature,
        generator=torch.Generator().manual_seed(problem.seed),
        row_ids=torch.tensor([row.id for row in problem.rows]),
        record_history=True,
    )


# ---- every policy


class Hazard:
    """A distribution over sets: each masked position by the confidence in it."""

    needs_noise = remembers = False

    def distribution(self, state):
        q = 0.02 + 0.6 * state.log_probs.amax(-1).exp() ** 2
        return RevealSet(q.log(), (1 - q).log(), state.masked)

    def select(self, state):
        return self.distribution(state).probs > 0.4


def plan_of_prompt(canvas: Canvas) -> Tensor:
    """Step logits that read the prompt through its mask: float64 [B, L, 4]."""
    assert canvas.context is not None
    assert canvas.context_mask is not None
    told = (canvas.context * canvas.context_mask).sum(-1)[:, None, None]
    place = torch.arange(canvas.attention_mask.shape[-1])[:, None]
    return 2 * torch.sin(1.7 * (told + 1) * (place + 1) + 2.3 * torch.arange(4)).double()


def learned() -> LearnedPolicy:
    """A real policy network, with its denoiser features, tokens and prompt."""
    torch.manual_seed(5)
    network = PolicyNetwork(VOCAB, width=8, layers=1, heads=2, bias=-0.5)
    torch.nn.init.normal_(network.head.weight)
    return LearnedPolicy(network.double(), non_empty=False)


LEARNED = learned()
Factory = Callable[[Problem], Policy]
BY_NAME: dict[str, list[Factory]] = {
    "random": [lambda p: make_policy("random"), lambda p: make_policy("random", sizes=1.5)],
    "top_prob": [lambda p: make_policy("top_prob"), lambda p: make_policy("top_prob", ties="random")],
    "margin": [lambda p: make_policy("margin", sizes="cosine")],
    "entropy": [lambda p: make_policy("entropy"), lambda p: make_policy("entropy", sizes=2.5)],
    "left_to_right": [lambda p: make_policy("left_to_right")],
    "threshold": [lambda p: make_policy("threshold", tau=0.4)],
    "factor": [lambda p: make_policy("factor", factor=2.2)],
    "entropy_bound": [lambda p: make_policy("entropy_bound", gamma=1.5)],
    "klass": [lambda p: make_policy("klass", tau=0.3, eps=0.4), lambda p: make_policy("klass", tau=0.1, eps=9.0)],
    "oracle_margin": [lambda p: OracleMargin(tokens=p.stacked(VOCAB - 1))],
    "greedy_oracle": [lambda p: GreedyOracle(tokens=p.stacked(VOCAB - 1))],
    "block": [lambda p: Block(make_policy("margin"), p.size)],
    "eos_aware": [lambda p: EosAware(make_policy("top_prob"), [0, 1])],
    "answer_ready": [lambda p: AnswerReady(make_policy("top_prob"), AnswerTokens([0], [1]), 0.3)],
}
EVERY: dict[str, Factory] = {
    f"{name}-{number}" if number else name: make for name, makes in BY_NAME.items() for number, make in enumerate(makes)
}
EVERY |= {
    "mode": lambda p: StochasticDecision(Hazard(), "mode"),
    "sample": lambda p: StochasticDecision(Hazard(), "sample"),
    "beta": lambda p: StochasticDecision(Hazard(), "sample", beta=0.3),
    "learned_mode": lambda p: StochasticDecision(LEARNED, "mode"),
    "learned_beta": lambda p: StochasticDecision(LEARNED, "sample", beta=2.0),
    "hazard": lambda p: Hazard(),
    "plan": lambda p: PlannedOrder(p.stacked(4)),
    "plan_sample": lambda p: PlannedOrder(plan_of_prompt, "sample"),
    "plan_mode": lambda p: PlannedOrder(plan_of_prompt, "mode"),
    "plan_rank": lambda p: PlannedOrder(plan_of_prompt, "rank"),
    "nothing": lambda p: Nothing(),
    "everything": lambda p: Everything(),
}
INNER = (
    "random",
    "entropy",
    "threshold",
    "factor",
    "entropy_bound",
    "klass",
    "greedy_oracle",
    "sample",
    "learned_mode",
)
EVERY |= {f"block_{name}": lambda p, make=EVERY[name]: Block(make(p), p.size) for name in (*INNER, "plan_rank")}
EVERY |= {f"eos_{name}": lambda p, make=EVERY[name]: EosAware(make(p), [0, 1]) for name in INNER}
EVERY |= {
    f"ready_{name}": lambda p, make=EVERY[name]: AnswerReady(make(p), AnswerTokens([0], [1]), 0.3) for name in INNER
}
EVERY["block_eos"] = lambda p: Block(EosAware(make_policy("factor", factor=1.5), [0, 1]), p.size)
EVERY["eos_block"] = lambda p: EosAware(Block(make_policy("threshold", tau=0.4), p.size), [0, 1])
every_policy = pytest.mark.parametrize("name", EVERY)


def test_no_policy_is_left_out():
    assert set(BY_NAME) == set(POLICIES)


# ---- one run


class Watched:
    """Hands on what a policy says and keeps what it selected, row by row."""

    def __init__(self, policy: Policy, problem: Problem) -> None:
        self.policy = policy
        self.selected: list[list[set[int]]] = [[] for _ in problem.rows]
        self.best: list[list[int]] = [[] for _ in problem.rows]

    def __getattr__(self, name: str) -> object:
        return getattr(self.policy, name)

    def select(self, state):
        selection = self.policy.select(state)
        score = policy_score(self.policy, state).masked_fill(~state.masked, -torch.inf)
        for row, chosen, masked, best in zip(
            state.memory["row"].tolist(), selection, state.masked, score.argmax(-1).tolist(), strict=True
        ):
            self.selected[row].append(set((chosen & masked).nonzero()[:, 0].tolist()))
            self.best[row].append(best)
        return selection


def check_run(problem: Problem, out: DecodeOutput, watched: Watched, calls: list[int]) -> None:
    """Invariants 1, 2, 3, 5 and 7 of one decoding."""
    assert out.steps == problem.steps
    forwards = out.nfe // problem.cost
    assert torch.equal(forwards * problem.cost, out.nfe)
    assert calls == [int((forwards > step).sum()) for step in range(int(forwards.max()))]
    assert out.history is not None
    assert torch.equal(out.history[-1], out.sequences)
    for before, after in itertools.pairwise(out.history):
        assert ((before == after) | (before == MASK)).all()
    for number, row in enumerate(problem.rows):
        attended, reveal_step = out.attention_mask[number], out.reveal_step[number]
        assert int(attended.sum()) == row.length
        assert (out.history[0][number, attended] == MASK).all()
        assert (out.sequences[number, attended] != MASK).all()
        assert (out.sequences[number, ~attended] == 0).all()
        assert (reveal_step[~attended] == -1).all()
        used = sorted(set(reveal_step[attended].tolist()))
        assert used == list(range(int(forwards[number])))  # every forward reveals something, and in the end everything
        assert len(used) <= problem.steps
        fallbacks = 0
        for step in used:
            revealed = set((reveal_step == step).nonzero()[:, 0].tolist())
            left = set((reveal_step >= step).nonzero()[:, 0].tolist())
            if step == problem.steps - 1:
                assert revealed == left
                assert len(watched.selected[number]) == step  # nobody asks
            elif watched.selected[number][step]:
                assert revealed == watched.selected[number][step]
            else:
                assert revealed == {watched.best[number][step]}
                fallbacks += 1
        assert out.fallback[number] == fallbacks
        assert (out.token_log_prob[number, attended] <= 0).all()
        if row.length:
            assert out.tokens_per_forward[number] == pytest.approx(row.length / int(out.nfe[number]))


def check_rows(problem: Problem, make: Factory, left: bool, extra: int, order: random.Random) -> None:
    """Invariants 4 and 6: rows alone, and the same rows in another order with other padding."""
    shuffled = list(problem.rows)
    order.shuffle(shuffled)
    among = replace(problem, rows=tuple(shuffled))
    batch = solve(among, make(among), left, extra)
    for place, row in enumerate(shuffled):
        single = replace(problem, rows=(row,))
        alone = solve(single, make(single))
        for name in ("sequences", "reveal_step"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[place, : row.length]), name
        assert alone.nfe[0] == batch.nfe[place]
        assert alone.fallback[0] == batch.fallback[place]
        torch.testing.assert_close(alone.token_log_prob[0], batch.token_log_prob[place, : row.length])


def watched_run(problem: Problem, make: Factory) -> tuple[DecodeOutput, Watched]:
    watched = Watched(make(problem), problem)
    problem.denoiser.calls.clear()
    out = solve(problem, watched)
    return out, watched


@every_policy
@EXAMPLES
@given(problem=problems())
def test_every_run(name, problem):
    out, watched = watched_run(problem, EVERY[name])
    check_run(problem, out, watched, problem.denoiser.calls)
    again = solve(problem, EVERY[name](problem))
    for field in ("sequences", "reveal_step", "nfe", "fallback", "token_log_prob"):
        assert torch.equal(getattr(out, field), getattr(again, field))


@every_policy
@EXAMPLES
@given(problem=problems(), left=st.booleans(), extra=st.integers(0, 2), order=st.randoms(use_true_random=False))
def test_every_row_by_itself(name, problem, left, extra, order):
    check_rows(problem, EVERY[name], left, extra, order)


# ---- the other ways in


@every_policy
@settings(EXAMPLES, max_examples=2)
@given(problem=problems(), left=st.booleans())
def test_scheduler_and_generate_give_the_same(name, problem, left):
    rows = tuple(row for row in problem.rows if row.length) or (Row((1,), 3, 0),)
    problem = replace(problem, rows=rows)
    expected = solve(problem, EVERY[name](problem), left)
    prompt, mask = padded(problem.rows, left)
    generator = torch.Generator().manual_seed(problem.seed)
    ids = torch.tensor([row.id for row in problem.rows])
    lengths = torch.tensor([row.length for row in problem.rows])
    options = {"temperature": problem.temperature, "generator": generator, "row_ids": ids}
    written = generate(
        problem.denoiser,
        prompt,
        mask,
        max_new_tokens=lengths,
        steps=problem.steps,
        policy=EVERY[name](problem),
        **options,
    )
    assert torch.equal(written.decoded.sequences, expected.sequences)
    assert torch.equal(written.sequences, torch.cat([prompt, expected.sequences], -1))
    assert torch.equal(written.attention_mask, torch.cat([mask, expected.attention_mask], -1))

    sample = torch.cat([prompt, expected.attention_mask * MASK], -1)
    scheduler = RevealScheduler(EVERY[name](problem), MASK, problem.temperature)
    scheduler.set_timesteps(problem.steps)
    fallback = torch.zeros_like(expected.fallback)
    for step, t in enumerate(scheduler.timesteps):
        logits = problem.denoiser(sample, written.attention_mask)
        done = scheduler.step(
            logits, t, sample, prompt_length=prompt.shape[1], attention_mask=written.attention_mask,
            generator=generator, row_ids=ids,
        )  # fmt: skip
        assert torch.equal(done.reveal[:, prompt.shape[1] :], expected.reveal_step == step)
        sample, fallback = done.prev_sample, fallback + done.fallback
    assert torch.equal(sample, written.sequences)
    assert torch.equal(fallback, expected.fallback)


def test_block_size_is_the_block_wrapper():
    problem = Problem(DENOISERS[0], (Row((1, 2), 7, 0), Row((), 4, 1)), 6, 0.0, 3, 3)
    wrapped = solve(problem, Block(make_policy("margin"), 3))
    context, mask = padded(problem.rows)
    options = {"length": torch.tensor([7, 4]), "max_steps": 6, "block_size": 3}
    assert torch.equal(
        decode(problem.denoiser, make_policy("margin"), context, mask, **options).reveal_step, wrapped.reveal_step
    )


# ---- planted bugs: each of them must be noticed

PLANTED = Problem(DENOISERS[0], (Row((1, 2, SEPARATOR), 8, 0), Row((3,), 3, 1), Row((), 6, 2)), 5, 0.8, 3, 3)


class PooledQuota(Nothing):
    """The most confident positions of the whole batch."""

    def select(self, state):
        score = state.log_probs.amax(-1).masked_fill(~state.masked, -torch.inf)
        best = score.flatten().topk(min(3, int(state.masked.sum()))).indices
        return torch.zeros_like(state.masked).flatten().index_fill(0, best, True).view_as(state.masked)


class QuotaOfTheFirstRow(Nothing):
    """Everyone reveals what the first row is due."""

    def select(self, state):
        count = state.masked[0].sum() // state.steps_left[0]
        rank = state.log_probs.amax(-1).masked_fill(~state.masked, -9.0).argsort(-1, descending=True).argsort(-1)
        return (rank < count.clamp(min=1)) & state.masked


class NoiseOfTheBatch(Nothing):
    """Draws that depend on where in the batch a row stands."""

    def select(self, state):
        return torch.rand(state.masked.shape, generator=torch.Generator().manual_seed(1)) < 0.4


class ReadsPadding(Nothing):
    """Counts the padding of the response."""

    def select(self, state):
        return torch.arange(state.masked.shape[-1]) < (state.masked.shape[-1] + state.step[:, None]) // 3


@pytest.mark.parametrize("bug", [PooledQuota, QuotaOfTheFirstRow, NoiseOfTheBatch, ReadsPadding])
def test_a_policy_that_looks_at_other_rows_is_noticed(bug):
    with pytest.raises(AssertionError):
        check_rows(PLANTED, lambda p: bug(), True, 1, random.Random(1))


def test_a_denoiser_that_reads_padding_is_noticed():
    class Blind(Bag):
        def __call__(self, state, attention_mask):
            return super().__call__(state, torch.ones_like(attention_mask))

    with pytest.raises(AssertionError):
        check_rows(replace(PLANTED, denoiser=Blind(0)), EVERY["top_prob"], True, 1, random.Random(1))


def _emits_mask(monkeypatch):
    monkeypatch.setattr(Canvas, "scores", lambda self, hidden: hidden + 9.0 * (torch.arange(VOCAB) == MASK))


def _never_falls_back(monkeypatch):
    monkeypatch.setattr("orderppl.decoding.step.or_best", lambda policy, state, selected: selected)


def _reveals_two_when_nothing_is_selected(monkeypatch):
    def or_two(policy, state, selected):
        return torch.where(selected.any(-1, keepdim=True), selected, state.masked & (state.masked.cumsum(-1) <= 2))

    monkeypatch.setattr("orderppl.decoding.step.or_best", or_two)


@pytest.mark.parametrize("plant", [_emits_mask, _never_falls_back, _reveals_two_when_nothing_is_selected])
def test_a_step_that_breaks_an_invariant_is_noticed(plant, monkeypatch):
    plant(monkeypatch)
    out, watched = watched_run(PLANTED, EVERY["nothing"])
    with pytest.raises(AssertionError):
        check_run(PLANTED, out, watched, PLANTED.denoiser.calls)


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
    out.sequences[0, 7] = MASK


@pytest.mark.parametrize(
    "tamper", [_batch_nfe, _requested_nfe, _kept_rows, _uncounted_fallback, _changed_token, _unrevealed_rest]
)
def test_a_wrong_record_is_noticed(tamper):
    out, watched = watched_run(PLANTED, EVERY["beta"])
    calls = PLANTED.denoiser.calls.copy()
    check_run(PLANTED, out, watched, calls)
    assert int(out.fallback.sum()) > 0
    tamper(out, calls)
    with pytest.raises(AssertionError):
        check_run(PLANTED, out, watched, calls)
