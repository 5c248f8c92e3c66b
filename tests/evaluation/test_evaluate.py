"""Path likelihood and policy comparison on an exact denoiser."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from orderppl.decoding import EosAware, StochasticDecision, make_policy
from orderppl.errors import UserError
from orderppl.evaluation import decode_answers, evaluate_policies, path_likelihood

CLASSES, MASK = 3, 3
STAY = 0.8


class Chain:
    """Exact conditionals of a symmetric Markov chain on 3 states, from matrix powers; prompts are ignored.

    p(x_i | visible) is proportional to P^a[left, x_i] P^b[x_i, right], with the nearest visible neighbours.
    """

    mask_index, vocab_size = MASK, CLASSES

    def __init__(self, prompt=0):
        step = torch.full((CLASSES, CLASSES), (1 - STAY) / (CLASSES - 1), dtype=torch.float64)
        step.fill_diagonal_(STAY)
        self.powers = torch.stack([torch.linalg.matrix_power(step, k) for k in range(20)])
        self.prompt = prompt

    def __call__(self, state, attention_mask):
        logits = torch.zeros(*state.shape, CLASSES, dtype=torch.float64)
        for n, row in enumerate(state.tolist()):
            seen = [i for i in range(self.prompt, len(row)) if row[i] != MASK and attention_mask[n, i]]
            for i in range(self.prompt, len(row)):
                left, right = [j for j in seen if j < i], [j for j in seen if j > i]
                if left:
                    logits[n, i] += self.powers[i - left[-1], row[left[-1]]].log()
                if right:
                    logits[n, i] += self.powers[right[0] - i, :, row[right[0]]].log()
        return logits


def batches_of(rows, size, context=None):
    """Right-padded batches; padding holds an id that no token has."""
    result = []
    for start in range(0, len(rows), size):
        part = [torch.tensor(row) for row in rows[start : start + size]]
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=99)
        batch = {"tokens": tokens, "attention_mask": tokens != 99}
        if context is not None:
            batch["context"] = context[start : start + size]
            batch["context_mask"] = torch.ones_like(batch["context"]).bool()
        result.append(batch)
    return result


ROWS = [[0, 0, 1, 1], [2, 2], [1, 1, 1, 1, 1, 0], [0, 2, 2], [1]]


def evidence(row):
    moves = sum(math.log(STAY if a == b else (1 - STAY) / 2) for a, b in itertools.pairwise(row))
    return math.log(1 / CLASSES) + moves


def test_one_token_a_step_gives_the_evidence_whatever_the_order():
    expected = [-evidence(row) for row in ROWS]
    for name in ("random", "left_to_right", "entropy", "oracle_margin"):
        result = path_likelihood(Chain(), make_policy(name, sizes=1.0), batches_of(ROWS, 2), 6)
        assert result.nats.tolist() == pytest.approx(expected)
        assert result.nfe.tolist() == [len(row) for row in ROWS]
        assert result.nfe_batch_max.tolist() == [4, 6, 1]
        assert result.tokens.tolist() == [len(row) for row in ROWS]
        assert result.path_nats == pytest.approx(sum(expected) / 16)


def test_one_step_gives_the_marginals():
    result = path_likelihood(Chain(), make_policy("random"), batches_of(ROWS, 3), 1)
    assert result.path_nats == pytest.approx(math.log(CLASSES))


@pytest.mark.parametrize("policy", [make_policy("random"), EosAware(make_policy("entropy", sizes="cosine"), [0])])
def test_does_not_depend_on_the_batch_size(policy):
    one, all_rows = (path_likelihood(Chain(), policy, batches_of(ROWS, size), 3, seed=5) for size in (1, 5))
    torch.testing.assert_close(one.nats, all_rows.nats)
    assert torch.equal(one.nfe, all_rows.nfe)
    # a prompt before the response changes nothing for this denoiser
    context = torch.zeros(5, 2, dtype=torch.int64)
    prompted = path_likelihood(Chain(prompt=2), policy, batches_of(ROWS, 2, context), 3, seed=5)
    torch.testing.assert_close(prompted.nats, one.nats)


def test_the_seed_matters_for_stochastic_policies_only():
    def run(name, seed):
        return path_likelihood(Chain(), make_policy(name), batches_of(ROWS, 5), 2, seed=seed).nats

    assert torch.equal(run("entropy", 0), run("entropy", 1))
    assert not torch.equal(run("random", 0), run("random", 1))


def as_text(ids):
    return "#### " + "".join(map(str, ids))


def test_decode_answers():
    # Conditionals of an empty canvas tie, so the first class is written, and then the most likely neighbour: 000...
    references = ["0", "0.0", "#### 1", "#### 000", "2"]
    policy = make_policy("left_to_right", sizes=1.0)
    result = decode_answers(Chain(), policy, batches_of(ROWS, 2), 6, decode_text=as_text, references=references)
    assert result.texts == ["#### 0000", "#### 00", "#### 000000", "#### 000", "#### 0"]
    assert result.correct.tolist() == [1, 1, 0, 1, 0]
    assert result.nfe.tolist() == [4, 2, 6, 3, 1]
    whole = decode_answers(
        Chain(), policy, batches_of(ROWS, 2), 6, decode_text=as_text, references=references, length=3
    )
    assert whole.tokens.tolist() == [3] * 5


def test_sampled_tokens_do_not_depend_on_the_batch_size():
    def run(size, seed):
        return decode_answers(
            Chain(),
            make_policy("random"),
            batches_of(ROWS * 4, size),
            3,
            decode_text=as_text,
            references=["0"] * 20,
            temperature=1.0,
            seed=seed,
        ).texts

    assert run(1, 0) == run(7, 0)
    assert run(1, 0) != run(1, 1)


def test_records_of_a_comparison():
    policies = {"random": make_policy("random"), "one by one": make_policy("entropy", sizes=1.0)}
    references = ["0", "0", "1", "0", "2"]
    records = evaluate_policies(
        Chain(),
        policies,
        batches_of(ROWS, 2),
        6,
        metrics=("accuracy", "path_nats", "nfe"),
        decode_text=as_text,
        references=references,
        baseline="random",
        seed=3,
        labels={"task": "chain"},
    )
    assert [(r["metric"], r["arm"]) for r in records] == [
        ("accuracy", "random"),
        ("path_nats", "random"),
        ("nfe", "random"),
        ("accuracy", "one by one"),
        ("path_nats", "one by one"),
        ("nfe", "one by one"),
        ("accuracy_difference", "one by one"),
        ("path_nats_difference", "one by one"),
        ("nfe_difference", "one by one"),
    ]
    for record in records:
        assert all(type(value) in (str, int, float) for value in record.values())
        assert record["task"] == "chain"
        assert (record["steps"], record["seed"], record["n"]) == (6, 3, 5)
        assert record["low"] <= record["value"] <= record["high"]
    accuracy, path, nfe = records[3:6]
    assert accuracy["value"] == pytest.approx(3 / 5)
    assert accuracy["run"] == nfe["run"] == "decoding"
    assert path["run"] == "teacher_forced"
    assert path["value"] == pytest.approx(-sum(map(evidence, ROWS)) / 16)
    assert (path["policy"], path["sizes"], path["sizes_mean"]) == ("entropy", "fractional", 1.0)
    assert (nfe["value"], nfe["nfe"], nfe["nfe_min"], nfe["nfe_max"]) == (3.2, 3.2, 1, 6)
    assert nfe["nfe_batch_max"] == pytest.approx((4 + 6 + 1) / 3)
    assert nfe["tokens_per_forward"] == 1.0
    assert records[7]["value"] == pytest.approx(records[4]["value"] - records[1]["value"])
    assert records[7]["baseline"] == "random"


def test_draws_are_averaged_by_row():
    """An arm with random sets is run with seeds 3, 4 and 5; an arm without is run once."""
    texts = {"decode_text": as_text, "references": ["0", "0", "1", "0", "2"], "metrics": ("accuracy", "path_nats")}
    arms = {"random": make_policy("random"), "entropy": make_policy("entropy")}

    def run(seed, draws):
        rows = {}
        records = evaluate_policies(Chain(), arms, batches_of(ROWS, 2), 3, seed=seed, draws=draws, rows=rows, **texts)
        return records, {key: values for key, (values, _) in rows.items()}

    records, rows = run(3, 3)
    single = [run(seed, 1)[1] for seed in (3, 4, 5)]
    assert not torch.equal(single[0]["path_nats", "random"], single[1]["path_nats", "random"])
    for key, values in rows.items():
        torch.testing.assert_close(values, torch.stack([one[key] for one in single]).mean(0))
    assert {(r["arm"], r["draws"]) for r in records} == {("random", 3), ("entropy", 1)}
    assert all("draws" not in record for record in run(3, 1)[0])


def test_blocks_are_recorded():
    records = evaluate_policies(Chain(), {"a": make_policy("top_prob")}, batches_of(ROWS, 5), 6, block_size=2)
    assert [r["metric"] for r in records] == ["path_nats", "nfe"]
    assert {r["block_size"] for r in records} == {2}


def test_learned_priors_are_policies():
    """The priors of the models decode as they are, by mode, by exact sampling and under the wrappers."""
    priors = pytest.importorskip("orderppl.models.priors")
    for prior in (priors.UniformSteps(), priors.CosineSteps(), priors.LeftToRight(), priors.EasyFirst(0.6)):
        arms = {
            "mode": prior,
            "sample": StochasticDecision(prior, "sample"),
            "eos": EosAware(StochasticDecision(prior), [0]),
        }
        records = evaluate_policies(Chain(), arms, batches_of(ROWS, 2), 4, block_size=3)
        for record in records:
            assert 1 <= record["nfe_min"] <= record["nfe_max"] <= 4
    left = path_likelihood(Chain(), priors.LeftToRight(), batches_of(ROWS, 2), 6)
    assert left.nats.tolist() == pytest.approx([-evidence(row) for row in ROWS])
    easy = path_likelihood(Chain(), StochasticDecision(priors.EasyFirst(), "sample"), batches_of(ROWS, 2), 6)
    assert (easy.fallback == 0).all()  # conditioned to be non-empty


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"metrics": ("speed",)}, "speed"),
        ({"metrics": ("accuracy",)}, "decode_text"),
        ({"baseline": "b"}, "baseline"),
        ({"batches": []}, "batches"),
        ({"num_steps": 0}, "num_steps"),
        ({"metrics": ("accuracy",), "decode_text": as_text, "references": ["1"]}, "5 predictions for 1"),
        ({"metrics": ("accuracy",), "decode_text": as_text, "references": [], "batches": []}, "batches"),
    ],
)
def test_bad_arguments(options, word):
    arguments = {"batches": batches_of(ROWS, 5), "num_steps": 2, "policies": {"a": make_policy("random")}} | options
    with pytest.raises(UserError, match=word):
        evaluate_policies(Chain(), **arguments)
