"""The decoder and teacher-forced paths on a small random transformer and on written probabilities."""

from __future__ import annotations

import pytest
import torch

from orderppl.decoding import (
    Block,
    EosAware,
    NetworkPlan,
    PlannedOrder,
    StochasticDecision,
    decode,
    follow,
    make_policy,
)
from orderppl.denoising import Canvas
from orderppl.distributions import RevealSet
from orderppl.errors import UserError

from extreme_policies import Everything, Nothing

VOCAB, MASK = 7, 6


class Hazard:
    """A distribution over sets: each masked position with a probability from the denoiser, squashed."""

    def distribution(self, state):
        q = 0.05 + 0.6 * state.log_probs.amax(-1).exp() ** 2
        return RevealSet(q.log(), (1 - q).log(), state.masked)

    def select(self, state):
        return self.distribution(state).probs > 0.5


def plan_logits(canvas):
    """Plan of up to two steps from the denoiser's features of the empty canvas: float [B, L, 2]."""
    empty = torch.full(canvas.attention_mask.shape, MASK)
    return canvas.logits(empty)[..., :2]


POLICIES = {
    **{name: make_policy(name) for name in ("random", "top_prob", "margin", "entropy", "left_to_right")},
    "entropy_cosine": make_policy("entropy", sizes="cosine"),
    "random_fractional": make_policy("random", sizes=1.5),
    "threshold": make_policy("threshold", tau=0.55),
    "factor": make_policy("factor", factor=1.3),
    "entropy_bound": make_policy("entropy_bound", gamma=1.0),
    "klass": make_policy("klass", tau=0.4, eps=0.5),
    "block_threshold": Block(make_policy("threshold", tau=0.5), 3),
    "block_margin": Block(make_policy("margin"), 2),
    "block_eos": Block(EosAware(make_policy("top_prob"), [0, 1]), 3),
    "eos_block": EosAware(Block(make_policy("factor", factor=1.3), 3), [0, 1]),
    "eos_entropy": EosAware(make_policy("entropy", sizes="cosine"), [0, 1]),
    "eos_hazard": EosAware(StochasticDecision(Hazard(), "sample"), [0, 1]),
    "mode": StochasticDecision(Hazard(), "mode"),
    "sample": StochasticDecision(Hazard(), "sample", beta=0.7),
    "hazard": Hazard(),
    "plan_sample": PlannedOrder(plan_logits, "sample"),
    "plan_mode": PlannedOrder(plan_logits, "mode"),
    "plan_rank": PlannedOrder(plan_logits, "rank"),
    "nothing": Nothing(),
    "everything": Everything(),
}


def pad(rows, width):
    context, context_mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width).bool()
    for i, (prompt, _) in enumerate(rows):
        context[i, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        context_mask[i, : len(prompt)] = True
    return context, context_mask


def run(denoiser, policy, rows, steps, temperature, seed):
    return decode(
        denoiser,
        policy,
        *pad(rows, max(len(prompt) for prompt, _ in rows)),
        length=torch.tensor([length for _, length in rows]),
        max_steps=steps,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )


def test_another_seed_gives_another_result(denoiser):
    rows = [([1, 2], 9)] * 8
    first, second = (run(denoiser, POLICIES["random"], rows, 3, 1.0, seed) for seed in (0, 1))
    assert not torch.equal(first.sequences, second.sequences)
    assert not torch.equal(first.reveal_step, second.reveal_step)
    assert len({tuple(row) for row in first.reveal_step.tolist()}) > 1  # rows differ by their ids


def test_fallback_reveals_the_arg_max_and_is_counted(denoiser, table):
    probs = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5]])
    out = decode(table(probs), Nothing(), length=4, max_steps=4)
    assert out.reveal_step.tolist() == [[2, 0, 1, 3]]  # by confidence; the last step is no fallback
    assert out.fallback.tolist() == [3]
    assert out.nfe.tolist() == [4]

    class Leftmost(Nothing):
        def score(self, state):
            return -torch.arange(4.0).expand(state.masked.shape)

    out = decode(table(probs), Leftmost(), length=4, max_steps=9)
    assert out.reveal_step.tolist() == [[0, 1, 2, 3]]
    assert out.fallback.tolist() == [4]

    class Rare(Nothing):
        def distribution(self, state):
            q = torch.tensor([0.1, 0.2, 0.4, 0.3]).expand(state.masked.shape)
            return RevealSet(q.log(), (1 - q).log(), state.masked)

    out = decode(table(probs), Rare(), length=4, max_steps=9)
    assert out.reveal_step.tolist() == [[3, 2, 0, 1]]


def test_last_step_reveals_everything(table):
    out = decode(table([[0.6, 0.4]] * 6), make_policy("left_to_right", sizes=1.0), length=6, max_steps=3)
    assert out.reveal_step.tolist() == [[0, 1, 2, 2, 2, 2]]
    assert out.nfe.tolist() == [3]
    assert out.steps == 3
    assert decode(table([[0.6, 0.4]] * 6), Nothing(), length=6, max_steps=1).nfe.tolist() == [1]


def test_requested_steps_and_realised_nfe_are_two_numbers(confident):
    out = decode(confident([0.95] * 4), make_policy("threshold", tau=0.9), length=torch.tensor([4, 2]), max_steps=7)
    assert out.steps == 7
    assert out.nfe.tolist() == [1, 1]
    assert out.tokens_per_forward.tolist() == [4.0, 2.0]


def test_guidance_counts_two_forwards(table):
    guided = table([[0.6, 0.4]] * 4)
    guided.forwards_per_call = 2
    assert decode(guided, make_policy("top_prob"), length=4, max_steps=2).nfe.tolist() == [4]


def test_temperature(table):
    # n = 20,000 draws of p proportional to (0.5, 0.3, 0.2) ** 2 at temperature 0.5; |z| < 4.
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    lengths = torch.full((1000,), 20)
    out = decode(table(probs.expand(20, 3)), make_policy("random"), length=lengths, max_steps=2, temperature=0.5)
    expected = probs**2 / (probs**2).sum()
    counts = torch.bincount(out.sequences.flatten(), minlength=3)
    z = (counts - 20_000 * expected) / (20_000 * expected * (1 - expected)).sqrt()
    assert z.abs().max() < 4
    # log-probabilities are those of the denoiser, at temperature 1
    torch.testing.assert_close(out.token_log_prob, probs.log()[out.sequences])
    greedy = decode(table(probs.expand(20, 3)), make_policy("random"), length=20, max_steps=2)
    assert (greedy.sequences == 0).all()


def test_block_size_of_the_decoder(confident):
    ramp = confident([0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    free = decode(ramp, make_policy("top_prob"), length=6, max_steps=6)
    blocked = decode(ramp, make_policy("top_prob"), length=6, max_steps=6, block_size=2)
    assert free.reveal_step.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert blocked.reveal_step.tolist() == [[1, 0, 3, 2, 5, 4]]
    with pytest.raises(UserError, match="block_size"):
        decode(ramp, make_policy("top_prob"), length=6, max_steps=2, block_size=2)


def test_dropout_is_off_while_decoding_and_restored(denoiser):
    denoiser.train()
    first = run(denoiser, POLICIES["top_prob"], [([1], 8)], 4, 0.0, 0)
    assert denoiser.training
    assert denoiser.dropout.training
    denoiser.eval()
    second = run(denoiser, POLICIES["top_prob"], [([1], 8)], 4, 0.0, 0)
    denoiser.train()
    assert torch.equal(first.token_log_prob, second.token_log_prob)


def test_dropout_of_a_planning_network_is_off(table):
    class Network(torch.nn.Module):
        """Ranks positions by a random projection of one-hot positions, with dropout on it."""

        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)
            self.seen = []

        def forward(self, tokens, attention_mask, context, context_mask):
            self.seen.append((tokens, attention_mask.shape, self.training))
            ramp = torch.arange(6.0)[:, None] * torch.tensor([0.0, 1.0, 2.0])
            return self.dropout(ramp).expand(len(attention_mask), 6, 3)

    network = Network()
    policy = Block(PlannedOrder(NetworkPlan(network), "rank"), 3)
    out = decode(table([[0.6, 0.4]] * 6), policy, length=torch.tensor([6, 6]), max_steps=4)
    assert network.seen == [(None, (2, 6), False)]
    assert network.training
    assert network.dropout.training
    assert out.reveal_step[0].tolist() == sorted(out.reveal_step[0].tolist())


def test_single_precision_logits(denoiser, table):
    single = table([[0.6, 0.4]] * 3)
    single.probs = single.probs.float()
    out = decode(single, make_policy("margin"), length=3, max_steps=2, temperature=1.0)
    assert out.nfe.tolist() == [2]
    assert out.token_log_prob[0].exp().tolist() == pytest.approx(
        [0.6 if t == 0 else 0.4 for t in out.sequences[0].tolist()]
    )


def test_empty_batch(denoiser):
    nobody = torch.zeros(0, dtype=torch.int64)
    out = decode(denoiser, POLICIES["top_prob"], length=nobody, max_steps=3, record_history=True)
    assert out.sequences.shape == (0, 0)
    assert out.nfe.shape == (0,)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"length": torch.tensor([3, -1])}, "length"),
        ({"length": torch.tensor([3, 1]), "row_ids": torch.arange(3)}, "length"),
        ({"block_size": 0}, "block_size"),
        ({"context": torch.zeros(3, 2, dtype=torch.int64), "length": torch.tensor([3, 1])}, "length"),
    ],
)
def test_bad_arguments(denoiser, options, field):
    with pytest.raises(UserError, match=field):
        decode(denoiser, POLICIES["top_prob"], **({"length": 4, "max_steps": 2} | options))


# ---- teacher-forced paths


def test_follow_equals_decoding_its_own_result(denoiser):
    """Following the greedy result of a policy takes the same path and has the same likelihood."""
    rows = [([1, 2], 9), ([3], 4), ([2, 0, 1], 6)]
    for name in POLICIES:
        out = run(denoiser, POLICIES[name], rows, 4, 0.0, 7)
        canvas = Canvas(denoiser, out.attention_mask, *pad(rows, 3))
        generator = torch.Generator().manual_seed(7)
        path = follow(POLICIES[name], canvas, out.sequences, 4, generator=generator)
        assert torch.equal(path.reveal_step, out.reveal_step), name
        assert torch.equal(path.nfe, out.nfe)
        assert torch.equal(path.fallback, out.fallback)
        torch.testing.assert_close(path.token_log_prob, out.token_log_prob)
        torch.testing.assert_close(path.nats, -out.token_log_prob.sum(-1))


def test_follow_scores_the_truth_at_the_state_that_reveals_it(denoiser):
    tokens = torch.tensor([[1, 4, 2, 5], [3, 3, 0, MASK]])
    canvas = Canvas(denoiser, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool())
    path = follow(make_policy("left_to_right"), canvas, tokens, 2)
    assert path.reveal_step.tolist() == [[0, 0, 1, 1], [0, 1, 1, -1]]
    for row, cut in ((0, 2), (1, 1)):
        size = int(canvas.attention_mask[row].sum())
        single = Canvas(denoiser, torch.ones(1, size).bool())
        denoiser.eval()
        first = single.logits(torch.full((1, size), MASK)).log_softmax(-1)
        second = single.logits(torch.where(torch.arange(size) < cut, tokens[[row], :size], MASK)).log_softmax(-1)
        denoiser.train()
        expected = [(first if i < cut else second)[0, i, int(tokens[row, i])].item() for i in range(size)]
        assert path.token_log_prob[row, :size].tolist() == pytest.approx(expected)


def test_follow_gives_the_truth_to_oracles_only(denoiser):
    tokens = torch.tensor([[1, 4, 2, 5, 0]])
    canvas = Canvas(denoiser, torch.ones_like(tokens).bool())

    class Spy:
        needs_truth = False
        seen: list[set[str]] = []

        def select(self, state):
            self.seen.append(set(state.memory))
            return state.masked

    spy = Spy()
    follow(spy, canvas, tokens, 3)
    assert spy.seen == [{"row"}]
    spy.needs_truth = True
    follow(spy, canvas, tokens, 3)
    assert spy.seen[1] == {"row", "truth"}
    for policy in (make_policy("oracle_margin"), make_policy("block", policy="greedy_oracle", size=2)):
        forced = follow(policy, canvas, tokens, 4)
        assert sorted(set(forced.reveal_step[0].tolist())) == list(range(int(forced.nfe)))


@pytest.mark.parametrize(
    ("tokens", "steps", "field"),
    [([[1, 2]], 0, "num_steps"), ([[1, 2, 3]], 2, "tokens"), ([[1, MASK]], 2, "tokens")],
)
def test_bad_paths(denoiser, tokens, steps, field):
    canvas = Canvas(denoiser, torch.ones(1, 2).bool())
    with pytest.raises(UserError, match=field):
        follow(POLICIES["random"], canvas, torch.tensor(tokens), steps)
