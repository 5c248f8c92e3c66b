"""The decoder and teacher-forced paths on a small random transformer and on written probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from written_denoisers import MASK, Confident, RandomTransformer, Table, masks

from orderppl import Batch, Policy, State, UserError, decode, follow
from orderppl.decoding.decode import DecodeOutput
from orderppl.distributions import DecidedSet, IndependentSet
from orderppl.policies import (
    Blocks,
    Dilated,
    Eager,
    EntropyBound,
    EosAware,
    Factor,
    FixedOrder,
    Klass,
    Oracle,
    Plan,
    Ranked,
    Smoothed,
    Threshold,
)

from extreme_policies import Everything, Nothing

DENOISER = RandomTransformer()


class Hazard(Policy):
    """Each masked position with a probability from the denoiser, squashed."""

    def forward(self, state: State) -> IndependentSet:
        q = 0.05 + 0.6 * state.per_position(lambda log_probs: log_probs.amax(-1)).exp() ** 2
        return IndependentSet(q.log(), (1 - q).log(), state.masked)


class PlanOfTwo(nn.Module):
    """Step logits from what the denoiser says of the opening: float [B, S, 2]."""

    def forward(self, opening: State) -> Tensor:
        return opening.per_position(lambda log_probs: log_probs[..., :2])


POLICIES: dict[str, Policy] = {
    **{name: Ranked(name) for name in ("random", "top_prob", "margin", "entropy", "left_to_right")},
    "entropy_cosine": Ranked("entropy", "cosine"),
    "random_fractional": Ranked("random", 1.5),
    "threshold": Threshold(0.55),
    "factor": Factor(1.3),
    "entropy_bound": EntropyBound(1.0),
    "klass": Klass(0.4, 0.5),
    "block_threshold": Blocks(Threshold(0.5), 3),
    "block_margin": Blocks(Ranked("margin"), 2),
    "block_eos": Blocks(EosAware(Ranked("top_prob"), [0, 1]), 3),
    "eos_block": EosAware(Blocks(Factor(1.3), 3), [0, 1]),
    "eos_entropy": EosAware(Ranked("entropy", "cosine"), [0, 1]),
    "eos_hazard": EosAware(Hazard(), [0, 1]),
    "hazard": Hazard(),
    "lazy": Eager(Hazard(), 0.7),
    "smoothed": Smoothed(Klass(0.4, 0.5), 0.1),
    "plan": Plan(PlanOfTwo()),
    "fixed": FixedOrder([1, 0, 2], periodic=True),
    "dilated": Dilated(),
    "nothing": Nothing(),
    "everything": Everything(),
}
ROWS = ["12_________", "3____", "201_2__0__"]  # given tokens, and holes


def canvas(rows: list[str]) -> Batch:
    """Rows of given tokens and holes, padded on the right."""
    width = max(len(row) for row in rows)
    cells = [[MASK if cell == "_" else int(cell) for cell in row] + [0] * (width - len(row)) for row in rows]
    tokens = torch.tensor(cells)
    attended = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return Batch(tokens, attended)


def run(policy: Policy, rows: list[str], steps: int, temperature: float, seed: int) -> DecodeOutput:
    generator = torch.Generator().manual_seed(seed)
    return decode(DENOISER, policy, canvas(rows), max_steps=steps, temperature=temperature, generator=generator)


def test_another_seed_gives_another_result():
    rows = ["12_________"] * 8
    first, second = (run(POLICIES["random"], rows, 3, 1.0, seed) for seed in (0, 1))
    assert not torch.equal(first.sequences, second.sequences)
    assert not torch.equal(first.reveal_step, second.reveal_step)
    assert len({tuple(row) for row in first.reveal_step.tolist()}) > 1  # rows differ by their ids


def test_torch_s_seed_counts_without_a_generator():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(decode(DENOISER, POLICIES["random"], canvas(["______"] * 8), max_steps=3).reveal_step)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_fallback_reveals_the_arg_max_and_is_counted():
    denoiser = Table([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5]])
    out = decode(denoiser, Nothing(), masks(denoiser, 4), max_steps=4)
    assert out.reveal_step.tolist() == [[2, 0, 1, 3]]  # by confidence; the last step is no fallback
    assert out.fallback.tolist() == [3]
    assert out.nfe.tolist() == [4]

    class Rare(Policy):
        def forward(self, state: State) -> IndependentSet:
            q = torch.tensor([0.1, 0.2, 0.4, 0.3]).expand(state.shape)
            return IndependentSet(q.log(), (1 - q).log(), state.masked)

    out = decode(denoiser, Rare(), masks(denoiser, 4), max_steps=9, mode=True)
    assert out.reveal_step.tolist() == [[3, 2, 0, 1]]  # by its own probabilities
    assert out.fallback.tolist() == [4]


def test_last_step_reveals_everything():
    denoiser = Table([[0.6, 0.4]] * 6)
    out = decode(denoiser, Ranked("left_to_right", 1.0), masks(denoiser, 6), max_steps=3)
    assert out.reveal_step.tolist() == [[0, 1, 2, 2, 2, 2]]
    assert out.nfe.tolist() == [3]
    assert out.steps == 3
    assert decode(denoiser, Nothing(), masks(denoiser, 6), max_steps=1).nfe.tolist() == [1]


def test_requested_steps_and_realised_nfe_are_two_numbers():
    denoiser = Confident([0.95] * 4)
    out = decode(denoiser, Threshold(0.9), masks(denoiser, 4, 2), max_steps=7)
    assert out.steps == 7
    assert out.nfe.tolist() == [1, 1]
    assert out.tokens_per_forward.tolist() == [4.0, 2.0]


def test_given_positions_cost_nothing():
    """Two holes in eight positions are one token a step, and a row without a hole is never read."""
    denoiser = Confident([0.9] * 8)
    tokens = torch.tensor([[0, 1, 2, 0, 1, 0, 2, 1], [0, 1, 1, 0, 1, 0, 0, 1]])
    out = decode(denoiser, Ranked("left_to_right"), tokens, max_steps=8)
    assert out.reveal_step.tolist() == [[-1, -1, 0, -1, -1, -1, 1, -1], [-1] * 8]
    assert out.nfe.tolist() == [2, 0]
    assert out.tokens_per_forward.tolist() == [1.0, 0.0]
    assert out.sequences.tolist() == [[0, 1, 0, 0, 1, 0, 0, 1], tokens[1].tolist()]
    assert out.nats.tolist() == pytest.approx([-2 * torch.tensor(0.9).log().item(), 0.0])


def test_what_is_said_to_be_given_stays_even_where_it_is_mask():
    denoiser = Confident([0.9] * 4)
    tokens = torch.tensor([[2, 2, 0, 2]])
    given = torch.tensor([[True, False, False, True]])
    out = decode(denoiser, Ranked("left_to_right"), Batch(tokens, given=given), max_steps=4)
    assert out.sequences.tolist() == [[2, 0, 0, 2]]
    assert out.latent.tolist() == [[False, True, True, False]]  # and a token is written over where nothing is given


@pytest.mark.parametrize("source", ["tensor", "dict", "batch"])
def test_any_form_of_a_batch(source: str):
    denoiser, tokens = Confident([0.9] * 3), torch.tensor([[2, 1, 2]])
    batch: Any = {"tensor": tokens, "dict": {"input_ids": tokens}, "batch": Batch(tokens)}[source]
    assert decode(denoiser, Ranked(), batch, max_steps=2).sequences.tolist() == [[0, 1, 0]]
    assert follow(Ranked(), denoiser, torch.tensor([[1, 1, 0]]), 2).sequences.tolist() == [[1, 1, 0]]


def test_guidance_counts_two_forwards():
    guided = Table([[0.6, 0.4]] * 4)
    guided.forwards_per_call = 2
    assert decode(guided, Ranked(), masks(guided, 4), max_steps=2).nfe.tolist() == [4]


def test_temperature():
    # n = 20,000 draws of p proportional to (0.5, 0.3, 0.2) ** 2 at temperature 0.5; |z| < 4.
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    denoiser = Table(probs.expand(20, 3))
    out = decode(denoiser, Ranked("random"), masks(denoiser, *[20] * 1000), max_steps=2, temperature=0.5)
    expected = probs**2 / (probs**2).sum()
    counts = torch.bincount(out.sequences.flatten(), minlength=3)
    z = (counts - 20_000 * expected) / (20_000 * expected * (1 - expected)).sqrt()
    assert z.abs().max() < 4
    # log-probabilities are those of the denoiser, at temperature 1
    torch.testing.assert_close(out.token_log_prob, probs.log()[out.sequences])
    greedy = decode(denoiser, Ranked("random"), masks(denoiser, 20), max_steps=2)
    assert (greedy.sequences == 0).all()


def test_block_size_of_the_decoder():
    ramp = Confident([0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
    free = decode(ramp, Ranked(), masks(ramp, 6), max_steps=6)
    blocked = decode(ramp, Ranked(), masks(ramp, 6), max_steps=6, block_size=2)
    assert free.reveal_step.tolist() == [[5, 4, 3, 2, 1, 0]]
    assert blocked.reveal_step.tolist() == [[1, 0, 3, 2, 5, 4]]
    with pytest.raises(UserError, match="block_size"):
        decode(ramp, Ranked(), masks(ramp, 6), max_steps=2, block_size=2)


def test_dropout_is_off_while_decoding_and_restored():
    DENOISER.train()
    try:
        first = run(POLICIES["top_prob"], ["1________"], 4, 0.0, 0)
        assert DENOISER.training
        assert DENOISER.dropout.training
        DENOISER.eval()
        second = run(POLICIES["top_prob"], ["1________"], 4, 0.0, 0)
        assert torch.equal(first.token_log_prob, second.token_log_prob)
    finally:
        DENOISER.train()


def test_dropout_of_a_planning_network_is_off():
    class Network(nn.Module):
        """Plans the positions one after another, with dropout on it."""

        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)
            self.seen: list[tuple[Any, bool]] = []

        def forward(self, opening: State) -> Tensor:
            self.seen.append((tuple(opening.shape), self.training))
            steps = torch.arange(6) // 2
            return self.dropout(9.0 * nn.functional.one_hot(steps, 3)).expand(*opening.shape, 3)

    network, denoiser = Network(), Table([[0.6, 0.4]] * 6)
    out = decode(denoiser, Blocks(Plan(network), 3), masks(denoiser, 6, 6), max_steps=4, mode=True)
    assert network.seen == [((2, 6), False)]
    assert network.training
    assert network.dropout.training
    assert out.reveal_step.tolist() == [[0, 0, 1, 2, 3, 3]] * 2


def test_single_precision_logits():
    single = Table([[0.6, 0.4]] * 3)
    single.probs = single.probs.float()
    out = decode(single, Ranked("margin"), masks(single, 3), max_steps=2, temperature=1.0)
    assert out.nfe.tolist() == [2]
    assert out.token_log_prob.dtype == torch.float64
    found = out.token_log_prob[0].exp().tolist()
    assert found == pytest.approx([0.6 if t == 0 else 0.4 for t in out.sequences[0].tolist()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype: torch.dtype):
    probs = torch.tensor([[0.6, 0.3, 0.1]] * 3, dtype=torch.float64)

    class Low(Table):
        def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            return super().__call__(state, attention_mask).to(dtype)

    denoiser = Low(probs)
    out = decode(denoiser, Ranked(), masks(denoiser, 3), max_steps=1)
    wanted = probs.log().to(dtype).float().log_softmax(-1)[0, 0].item()
    assert out.token_log_prob[0].tolist() == pytest.approx([wanted] * 3, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float32, 1e-5), (torch.float64, 1e-12)]
)
def test_a_row_by_itself_as_far_as_its_denoiser_rounds_alike(dtype: torch.dtype, tolerance: float):
    """Along one path, of the same tokens: log-probabilities alone and in a batch differ by the rounding of kernels."""
    denoiser = RandomTransformer().eval().to(dtype)
    rows = ["12_________", "3____", "201_2__0__", "1_1_1_1_1_1_1"]
    batch = canvas(rows)
    truth = Batch(torch.where(batch.tokens == MASK, 2, batch.tokens), batch.attention_mask, batch.tokens != MASK)
    together = follow(Ranked("left_to_right"), denoiser, truth, 4)
    for row in range(len(rows)):
        here = truth.attention_mask[row]
        single = Batch(truth.tokens[row : row + 1, here], given=truth.given[row : row + 1, here])
        alone = follow(Ranked("left_to_right"), denoiser, single, 4)
        assert torch.equal(alone.reveal_step[0], together.reveal_step[row, here])
        difference = (alone.token_log_prob[0] - together.token_log_prob[row, here]).abs().max()
        assert difference <= tolerance


def test_empty_batch():
    nobody = Batch(torch.zeros(0, 0, dtype=torch.int64))
    out = decode(DENOISER, POLICIES["top_prob"], nobody, max_steps=3, record_history=True)
    assert out.sequences.shape == (0, 0)
    assert out.nfe.shape == (0,)
    path = follow(POLICIES["top_prob"], DENOISER, nobody, 3)
    assert path.nfe.shape == (0,)


def test_history_goes_from_all_masked_to_finished():
    denoiser = Confident([0.6, 0.7, 0.8])
    tokens = torch.tensor([[2, 1, 2], [2, 2, 2]])
    out = decode(denoiser, Ranked(), tokens, max_steps=5, record_history=True)
    assert out.history.tolist() == [
        [[2, 1, 2], [2, 2, 2]],
        [[2, 1, 0], [2, 2, 0]],
        [[0, 1, 0], [2, 0, 0]],
        [[0, 1, 0], [0, 0, 0]],
    ]
    assert decode(denoiser, Ranked(), tokens, max_steps=5).history is None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"row_ids": torch.arange(3)}, "row_ids"),
        ({"block_size": 0}, "block_size"),
        ({"batch": torch.zeros(2, 3)}, "tokens"),
        ({"batch": torch.zeros(3, dtype=torch.int64)}, "tokens"),
        ({"batch": {"tokens": torch.full((2, 3), MASK), "attn_mask": torch.ones(2, 3)}}, "batch"),
        ({"batch": torch.zeros(2, 3, dtype=torch.int64)}, "batch"),  # no MASK
    ],
)
def test_bad_arguments(options: dict[str, Any], field: str):
    options = {"batch": torch.full((2, 4), MASK), "max_steps": 2} | options
    with pytest.raises(UserError, match=f"^{field}: ") as caught:
        decode(DENOISER, POLICIES["top_prob"], options.pop("batch"), **options)
    assert "\n" not in str(caught.value)


class Broken:
    """A denoiser that returns what it is told to."""

    mask_index, vocab_size = 2, 2

    def __init__(self, output: Any) -> None:
        self.output = output

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Any:
        return self.output(state)


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (lambda state: torch.full((*state.shape, 2), torch.nan), "NaN"),
        (lambda state: torch.zeros(*state.shape, 3), "returned 3 token classes, it declares 2"),
        (lambda state: torch.zeros(*state.shape), "returned"),
        (lambda state: torch.zeros(len(state), 9, 2), "returned"),
        (lambda state: "logits", "returned str"),
        (lambda state: (torch.zeros(*state.shape, 2),), "returned tuple"),
    ],
)
@pytest.mark.parametrize("policy", [Ranked("top_prob"), Ranked("left_to_right"), Hazard()])
def test_a_broken_denoiser_is_named(output: Any, problem: str, policy: Policy):
    tokens = torch.tensor([[2, 2, 1]])
    calls = (
        lambda denoiser: decode(denoiser, policy, tokens, max_steps=2),
        lambda denoiser: follow(policy, denoiser, torch.tensor([[0, 1, 1]]), 2),
    )
    for call in calls:
        with pytest.raises(UserError, match=problem) as caught:
            call(Broken(output))
        assert "\n" not in str(caught.value)


def test_a_policy_of_nan_weights_is_named():
    class Lost(Policy):
        def forward(self, state: State) -> IndependentSet:
            return IndependentSet.bernoulli(torch.full(state.shape, torch.nan), state.masked)

    with pytest.raises(UserError, match="^policy: gives NaN"):
        decode(Confident([0.6, 0.7]), Lost(), torch.tensor([[2, 2]]), max_steps=2)


# ---- teacher-forced paths


@pytest.mark.parametrize("name", POLICIES)
def test_follow_equals_decoding_its_own_result(name: str):
    """Following the greedy result of a policy takes the same path and has the same likelihood."""
    out = run(POLICIES[name], ROWS, 5, 0.0, 7)
    batch = canvas(ROWS)
    truth = Batch(out.sequences, batch.attention_mask, ~out.latent)
    path = follow(POLICIES[name], DENOISER, truth, 5, generator=torch.Generator().manual_seed(7))
    assert torch.equal(path.reveal_step, out.reveal_step)
    assert torch.equal(path.nfe, out.nfe)
    assert torch.equal(path.fallback, out.fallback)
    torch.testing.assert_close(path.token_log_prob, out.token_log_prob)
    torch.testing.assert_close(path.nats, -out.token_log_prob.sum(-1))


def test_follow_scores_the_truth_at_the_state_that_reveals_it():
    tokens = torch.tensor([[1, 4, 2, 5], [3, 3, 0, MASK]])
    attended = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    path = follow(Ranked("left_to_right"), DENOISER, Batch(tokens, attended), 2)
    assert path.reveal_step.tolist() == [[0, 0, 1, 1], [0, 1, 1, -1]]
    DENOISER.eval()
    for row, cut in ((0, 2), (1, 1)):
        size = int(attended[row].sum())
        here = torch.ones(1, size).bool()

        def scored(state: Tensor, here: Tensor = here) -> Tensor:
            logits = DENOISER(state, here)
            return logits.masked_fill(torch.arange(logits.shape[-1]) == MASK, -torch.inf).log_softmax(-1)

        first = scored(torch.full((1, size), MASK))
        second = scored(torch.where(torch.arange(size) < cut, tokens[[row], :size], MASK))
        expected = [(first if i < cut else second)[0, i, int(tokens[row, i])].item() for i in range(size)]
        assert path.token_log_prob[row, :size].tolist() == pytest.approx(expected)
    DENOISER.train()


def test_only_paths_show_the_truth():
    """What oracles need is there while following, and never while decoding."""
    seen: list[Any] = []

    class Spy(Policy):
        def forward(self, state: State) -> DecidedSet:
            seen.append(state.truth)
            return DecidedSet(state.masked, state.masked)

    tokens = torch.tensor([[1, 4, 2, 5, 0]])
    follow(Spy(), DENOISER, tokens, 3)
    decode(DENOISER, Spy(), torch.full((1, 5), MASK), max_steps=3)
    assert torch.equal(seen[0], tokens) and seen[1] is None
    for policy in (Oracle("margin"), Blocks(Oracle("greedy"), 2)):
        forced = follow(policy, DENOISER, tokens, 4)
        assert sorted(set(forced.reveal_step[0].tolist())) == list(range(int(forced.nfe)))


@pytest.mark.parametrize(
    ("tokens", "steps", "options", "field"),
    [
        ([[1, 2]], 0, {}, "num_steps"),
        ([[1, MASK]], 2, {}, "tokens"),
        ([[1, 2, 3]], 2, {"block_size": 1}, "block_size"),
        ([[1, 2, 3]], 2, {"row_ids": torch.arange(2)}, "row_ids"),
    ],
)
def test_bad_paths(tokens: list[list[int]], steps: int, options: dict[str, Any], field: str):
    with pytest.raises(UserError, match=f"^{field}: "):
        follow(POLICIES["random"], DENOISER, torch.tensor(tokens), steps, **options)
