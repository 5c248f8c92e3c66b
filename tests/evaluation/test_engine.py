"""The engine on an exact denoiser: what it measures, that nothing but the row matters, resumption and refusals."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from orderppl import evaluate
from orderppl.data.dataset import Examples
from orderppl.errors import UserError
from orderppl.evaluation import Arm, paired_difference, summary
from orderppl.evaluation.engine import decoding_seconds
from orderppl.evaluation.table import pass_at_k
from orderppl.models import LearnedPolicy
from orderppl.policies import EosAware, Oracle, Policy, Ranked, Smoothed, Threshold
from orderppl.unmasking import Batch

from chain_rows import ARMS, BOTH, CLASSES, MASK, ROWS, STAY, Chain, digits, padded, texts


def evidence(row: Sequence[int]) -> float:
    moves = sum(math.log(STAY if a == b else (1 - STAY) / 2) for a, b in itertools.pairwise(row))
    return math.log(1 / CLASSES) + moves


def play(policy: Policy, steps: int | None = 3, examples: Any = None, **options: Any) -> pd.DataFrame:
    """The table of one arm, without its labels."""
    arm_options = {name: options.pop(name) for name in ("mode", "block_size", "seeds") if name in options}
    examples = padded(ROWS) if examples is None else examples
    denoiser = options.pop("denoiser", Chain())
    table = evaluate([Arm("a", policy, steps, **arm_options)], denoiser, examples, progress=False, **options)
    return table.loc[:, "run":]


# ----------------------------------------------------------------------------------------------------------- measures


@pytest.mark.parametrize("score", ["random", "left_to_right", "entropy", "margin", "oracle"])
def test_one_token_a_step_gives_the_evidence_whatever_the_order(score: Any) -> None:
    policy = Oracle("margin", sizes=1.0) if score == "oracle" else Ranked(score, sizes=1.0)
    table = play(policy, 6)
    assert table["nats"].tolist() == pytest.approx([-evidence(row) for row in ROWS])
    assert table["nfe"].tolist() == table["tokens"].tolist() == [len(row) for row in ROWS]
    assert table["row"].tolist() == [0, 1, 2, 3, 4]
    assert table["correct"].isna().all() and (table["run"] == "teacher_forced").all()
    pd.testing.assert_frame_equal(play(policy, None), table)  # a step per token of the longest row


def test_one_step_gives_the_marginals() -> None:
    table = play(Ranked("random"), 1)
    assert table["nats"].sum() / table["tokens"].sum() == pytest.approx(math.log(CLASSES))


@pytest.mark.parametrize(
    "policy", [Ranked("random"), EosAware(Ranked("entropy", sizes="cosine"), [0]), Threshold(0.6, temperature=0.5)]
)
def test_a_row_does_not_depend_on_its_batch(policy: Policy) -> None:
    one, together = (play(policy, batch_size=size) for size in (1, 5))
    pd.testing.assert_frame_equal(one, together)
    some = play(policy, rows=[4, 1, 2])
    pd.testing.assert_frame_equal(some, one.iloc[[4, 1, 2]].reset_index(drop=True))
    # a prompt before the response changes nothing for this denoiser
    prompted = play(policy, denoiser=Chain(prompt=2), examples=padded(ROWS, prompt=2))
    pd.testing.assert_frame_equal(prompted, one)


def test_seconds_are_of_whole_decodings_of_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds at batch sizes 1 and 2, each arm once before; a clock that counts the denoiser's rows."""
    read: list[int] = []

    class Counting(Chain):
        def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            read.append(len(state))
            return super().__call__(state, attention_mask)

    monkeypatch.setattr("orderppl.evaluation.timing.time.perf_counter", lambda: float(sum(read)))
    arms = [Arm("one", Ranked("top_prob"), 1, seeds=(3, 4)), Arm("two", Threshold(0.99)), Arm("truth", Oracle(), 1)]
    found = decoding_seconds(arms, Counting(), padded(ROWS), rounds=2, batch_sizes=(1, 2, 32), rows=3)
    wanted = evaluate(arms[:2], Chain(), texts(), rows=[0, 1, 2], metrics=["accuracy"], progress=False)
    forwards = wanted.groupby("arm")["nfe"].mean()
    assert found["metric"].tolist() == ["seconds_batch_1"] * 2 + ["seconds_batch_2"] * 2
    for row in found.itertuples():
        assert row.value == row.low == row.high == pytest.approx(forwards[row.arm]) == pytest.approx(row.nfe)
    assert set(found["n"]) == {3} and set(found["rounds"]) == {2}
    assert max(read) == 2 and sum(read) == 2 * 3 * 3 * (1 + forwards["two"])


def test_given_positions_are_neither_revealed_nor_counted() -> None:
    batch = padded(ROWS)
    given = torch.zeros_like(batch.attention_mask)
    given[0, 1], given[2, 2:4] = True, True
    table = play(Ranked("left_to_right", sizes=1.0), 6, Batch(batch.tokens, batch.attention_mask, given))
    assert table["tokens"].tolist() == table["nfe"].tolist() == [3, 2, 4, 3, 1]
    assert table["nats"][0] == pytest.approx(-evidence(ROWS[0]) + math.log(1 / CLASSES))  # log p(rest | the given one)


def test_the_seed_matters_for_what_is_drawn_only() -> None:
    def nats(policy: Policy, **options: Any) -> list[list[float]]:
        table = play(policy, 2, seeds=(0, 1), **options)
        return [list(part) for _, part in table.groupby("seed")["nats"]]

    assert nats(Ranked("entropy"))[0] == nats(Ranked("entropy"))[1]
    drawn = nats(Ranked("random"))
    assert drawn[0] != drawn[1]
    soft = nats(Threshold(0.6, temperature=0.5), mode=True)
    assert soft[0] == soft[1]


def test_decoded_answers_are_graded() -> None:
    # Conditionals of an empty canvas tie, so the first class is written, and then the most likely neighbour: 000...
    policy = Ranked("left_to_right", sizes=1.0)
    table = play(policy, 6, texts(), metrics=["accuracy"], batch_size=2)
    assert table["correct"].tolist() == [1, 1, 0, 1, 0]
    assert table["nfe"].tolist() == [4, 2, 6, 3, 1]
    assert table["nats"].isna().all() and (table["run"] == "decoding").all()
    some = play(policy, 6, texts(), metrics=["accuracy"], rows=[3, 2])
    assert some["correct"].tolist() == [1, 0]
    seen: list[list[str]] = []

    def never(written: Sequence[str], references: Sequence[str]) -> Tensor:
        seen.extend([list(written), list(references)])
        return torch.zeros(len(written))

    assert not play(policy, 6, texts(), metrics=["accuracy"], grade=never, rows=[3, 2])["correct"].any()
    assert seen == [["0 0 0", "0 0 0 0 0 0"], ["#### 000", "#### 1"]]


def test_holes_anywhere_are_filled_and_graded() -> None:
    batch = padded(ROWS)
    given = torch.zeros_like(batch.attention_mask)
    given[0, 2], given[2, 2:4] = True, True  # ones, which make their neighbours ones
    holes = Batch(batch.tokens, batch.attention_mask, given)
    examples = Examples(holes, grade=digits, answers=["1111", "00", "111111", "111", "0"], whole=True)
    table = play(Ranked("left_to_right", sizes=1.0), 6, examples, metrics=["accuracy"], batch_size=2)
    assert table["correct"].tolist() == [1, 1, 1, 0, 1]
    assert table["nfe"].tolist() == table["tokens_written"].tolist() == [3, 2, 4, 3, 1]


def test_what_is_written_behind_the_end_does_not_count() -> None:
    table = play(Ranked("left_to_right", sizes=1.0), 6, texts(end_index=1), metrics=["accuracy", "path_nats"])
    written = {run: part["tokens_written"].tolist() for run, part in table.groupby("run")}
    assert written["teacher_forced"] == [3, 2, 1, 3, 1]  # the true rows up to their first 1
    assert written["decoding"] == [4, 2, 6, 3, 1]  # zeros


def test_sampled_tokens_do_not_depend_on_the_batch_size() -> None:
    examples = Examples(padded(ROWS * 4), grade=digits, answers=["0"] * 20)
    arms = [Arm("a", Ranked("random"), 3, temperature=1.0, seeds=(0, 1))]

    def correct(size: int) -> list[float]:
        options: dict[str, Any] = {"metrics": ["accuracy"], "progress": False}
        return evaluate(arms, Chain(), examples, batch_size=size, **options)["correct"].tolist()

    assert correct(1) == correct(7)
    assert correct(1)[:20] != correct(1)[20:]


def test_a_learned_policy_is_played_as_a_draw_or_by_its_mode() -> None:
    class Even(nn.Module):
        def forward(self, state: Any, tokens: Tensor | None = None) -> Tensor:
            return torch.zeros(state.shape)

    policy = LearnedPolicy(Even())
    mode, drawn = (play(policy, 4, mode=mode, seeds=(0, 1)) for mode in (True, False))
    assert mode["nfe"].max() <= drawn["nfe"].max() <= 4
    assert len({tuple(part) for _, part in drawn.groupby("seed")["nats"]}) == 2
    assert (drawn["fallback"] == 0).all()  # conditioned to be non-empty


# ---------------------------------------------------------------------------------------------------------- the table


def test_records_of_a_comparison() -> None:
    arms = [Arm("random", Ranked("random"), 6, seeds=(3, 4)), Arm("one by one", Ranked("entropy", sizes=1.0), 6)]
    table = evaluate(arms, Chain(), texts(["0", "0", "1", "0", "2"]), metrics=["accuracy", "path_nats"], progress=False)
    found = summary(table).set_index(["metric", "arm"])
    accuracy, path, nfe = (found.loc[(metric, "one by one")] for metric in ("accuracy", "path_nats", "nfe"))
    assert accuracy["value"] == pytest.approx(3 / 5)
    assert accuracy["run"] == nfe["run"] == "decoding" and path["run"] == "teacher_forced"
    assert path["value"] == pytest.approx(-sum(map(evidence, ROWS)) / 16)
    assert (nfe["value"], nfe["nfe"], nfe["nfe_min"], nfe["nfe_max"]) == (3.2, 3.2, 1, 6)
    assert nfe["tokens_per_forward"] == 1.0
    assert (found.loc[("nfe", "random"), "seeds"], nfe["seeds"], nfe["n"], nfe["steps"]) == (2, 1, 5, 6)
    gap = paired_difference(table, "one by one", "random", "path_nats")
    assert gap.value == pytest.approx(path["value"] - found.loc[("path_nats", "random"), "value"])
    single = play(Ranked("random"), 6, seeds=(4,))["nats"]
    drawn = table[(table["arm"] == "random") & (table["run"] == "teacher_forced")]
    assert drawn[drawn["seed"] == 4]["nats"].tolist() == single.tolist()


def test_labels_stand_left_of_what_is_measured() -> None:
    arms = [
        Arm("t", Threshold(0.6), 4, family="threshold", setting={"tau": 0.6}),
        Arm("o", Oracle(), 4, block_size=2),
        Arm("l", Smoothed(Threshold(0.6)), 3, training_seed=1, mode=True, setting={"price": 0.1, "note": "x"}),
    ]
    table = evaluate(arms, Chain(), texts(), metrics=["accuracy", "path_nats"], progress=False)
    assert len(table) == 5 * (2 + 1 + 2)  # an oracle is not decoded
    names = list(table.columns)
    assert names[: names.index("run")] == [
        *("arm", "family", "kind", "setting", "tau", "policy", "policy_parameters"),
        *("steps", "mode", "temperature", "block_size", "training_seed", "price", "note"),
    ]
    first = {name: part.iloc[0] for name, part in table.groupby("arm")}
    assert [first[name]["kind"] for name in "tol"] == ["heuristic", "oracle", "learned"]
    assert [first[name]["setting"] for name in "tol"] == ["tau=0.6", "T=4", "price=0.1 note=x"]
    assert (first["t"]["tau"], first["l"]["training_seed"], first["o"]["block_size"]) == (0.6, 1, 2)
    assert pd.isna(first["t"]["block_size"]) and pd.isna(first["t"]["training_seed"])
    assert table.attrs["missing"] == 0
    found = summary(table).set_index(["metric", "arm"])
    assert found.loc[("accuracy", "t"), "policy"] == "Threshold"
    assert ("accuracy", "o") not in found.index
    assert paired_difference(table, "l", "t", "path_nats").low <= 0.1


def test_sampled_tokens_make_a_second_table(tmp_path: Path) -> None:
    """Greedy and sampled arms can share a folder; the seeds of sampled ones are the samples."""
    options: dict[str, Any] = {"metrics": ["accuracy"], "out": tmp_path, "progress": False}
    greedy = Arm("greedy", Threshold(0.6), 4)
    sampled = [
        Arm(f"sampled {tau}", Threshold(tau), 4, temperature=2.0, seeds=(0, 1, 2), setting={"tau": tau})
        for tau in (0.4, 0.6)
    ]
    assert (evaluate([greedy], Chain(), texts(), **options)["temperature"] == 0).all()
    found = pass_at_k(evaluate(sampled, Chain(), texts(), **options), [1, 2, 4])
    assert sorted(zip(found["arm"], found["k"], strict=True)) == [(arm.name, k) for arm in sampled for k in (1, 2)]
    assert (found["seeds"] == 3).all() and (found["temperature"] == 2.0).all()
    by_arm = found.pivot(index="arm", columns="k", values="value")
    assert (by_arm[2] >= by_arm[1]).all()


# --------------------------------------------------------------------------------------------------------- resumption


class Counting(Chain):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(state, attention_mask)


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    return evaluate(ARMS, Chain(), texts(), **BOTH)


def test_finished_parts_are_kept(whole: pd.DataFrame, tmp_path: Path) -> None:
    denoiser = Counting()
    pd.testing.assert_frame_equal(
        evaluate(ARMS[:2], denoiser, texts(), out=tmp_path, **BOTH), whole[whole.arm != "ranked"]
    )
    first = denoiser.calls
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    pd.testing.assert_frame_equal(evaluate(ARMS, denoiser, texts(), out=tmp_path, **BOTH), whole)
    assert 0 < denoiser.calls - first < first
    calls = denoiser.calls
    renamed = [Arm("renamed", ARMS[0].policy, 2, seeds=(1,), setting={"p": 1}), *ARMS[1:]]
    table = evaluate(renamed, denoiser, texts(), out=tmp_path, **BOTH)
    assert denoiser.calls == calls and table["arm"].iloc[0] == "renamed"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    lost = sorted(kept)[0]
    lost.unlink()
    pd.testing.assert_frame_equal(evaluate(ARMS, denoiser, texts(), out=tmp_path, **BOTH), whole)
    assert denoiser.calls > calls and lost.exists()


@pytest.mark.parametrize(
    "changed",
    [
        Arm("threshold", Threshold(0.7), 4),
        Arm("threshold", Threshold(0.6), 3),
        Arm("threshold", Threshold(0.6), 4, seeds=(1,)),
        Arm("threshold", Threshold(0.6), 4, mode=True),
        Arm("threshold", Threshold(0.6), 4, block_size=2),
        Arm("threshold", Threshold(0.6), 4, temperature=1.0),
    ],
)
def test_what_the_result_depends_on_is_played_again(changed: Arm, tmp_path: Path) -> None:
    options = {**BOTH, "metrics": ["accuracy"]}
    before = evaluate([ARMS[1]], Chain(), texts(), out=tmp_path, **options)
    denoiser = Counting()
    denoiser._made_by = Chain()._made_by  # described as the same one
    after = evaluate([changed], denoiser, texts(), out=tmp_path, **options)
    assert denoiser.calls > 0
    assert len(list((tmp_path / "parts").iterdir())) == 3  # two parts and the identity
    again = evaluate([ARMS[1]], denoiser, texts(), out=tmp_path, **options)
    pd.testing.assert_frame_equal(again, before)
    assert len(after) == len(before)


def test_references_are_part_of_what_is_graded(tmp_path: Path) -> None:
    policy = Ranked("left_to_right", sizes=1.0)
    for answers, right in ((None, 3), (["0"] * 5, 5)):
        examples = texts() if answers is None else texts(answers)
        table = evaluate([Arm("a", policy)], Chain(), examples, out=tmp_path, **BOTH)
        assert table["correct"].sum() == right
    assert len(list((tmp_path / "parts").iterdir())) == 4  # decoded twice, followed once, and the identity


class Foreign(nn.Module):
    """Keeps its argument under another name."""

    mask_index, vocab_size = MASK, CLASSES

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.hidden_scale = scale

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.zeros(*state.shape, CLASSES) * self.hidden_scale


def test_what_cannot_be_told_from_another_is_not_kept(tmp_path: Path) -> None:
    denoiser = Foreign(2.0)
    assert len(evaluate(ARMS, denoiser, padded(ROWS), progress=False)) == 20
    with pytest.raises(UserError, match="^denoiser, to be kept: scale"):
        evaluate(ARMS, denoiser, padded(ROWS), out=tmp_path, progress=False)


def test_weights_are_part_of_the_arm(tmp_path: Path) -> None:
    def policy(weight: float) -> Policy:
        layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(layer.weight, weight)
        policy = Smoothed(Threshold(0.6))
        policy.add_module("layer", layer)
        return policy

    for count, weight in ((2, 0.0), (3, 1.0), (3, 0.0)):
        evaluate([Arm("l", policy(weight), 2)], Chain(), padded(ROWS), out=tmp_path, progress=False)
        assert len(list((tmp_path / "parts").iterdir())) == count


def test_shards_are_one_evaluation(whole: pd.DataFrame, tmp_path: Path) -> None:
    for index in range(3):
        table = evaluate(ARMS, Chain(), texts(), out=tmp_path, shard=(index, 3), **BOTH)
        assert table.attrs["missing"] == (5, 2, 0)[index]
        if index < 2:
            with pytest.raises(UserError, match="left to other shards"):
                summary(table[table["arm"] == "random"])
    pd.testing.assert_frame_equal(table, whole)
    pd.testing.assert_frame_equal(evaluate(ARMS, Chain(), texts(), out=tmp_path, **BOTH), whole)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[2])
from chain_rows import ARMS, BOTH, Chain, texts
from orderppl import evaluate

call = Chain.__call__
Chain.__call__ = lambda *inputs: (time.sleep(0.05), call(*inputs))[1]
evaluate(ARMS, Chain(), texts(), out=sys.argv[1], **BOTH)
"""


def test_a_killed_evaluation_goes_on(whole: pd.DataFrame, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    words = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(list(parts.glob("[!.]*.json"))) < 3:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    done = {path: path.read_bytes() for path in parts.glob("[!.]*.json")}  # not what it was writing
    assert 3 <= len(done) < 9
    pd.testing.assert_frame_equal(evaluate(ARMS, Chain(), texts(), out=tmp_path, **BOTH), whole)
    assert {path: path.read_bytes() for path in done} == done  # nothing was lost or done again
    assert len(list(parts.glob("[!.]*.json"))) == 9


# ----------------------------------------------------------------------------------------------------------- refusals


def test_results_of_another_denoiser_or_other_examples_are_refused(tmp_path: Path) -> None:
    evaluate(ARMS[:1], Chain(), texts(), out=tmp_path, **BOTH)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    cases = [
        (Chain(stay=0.7), texts(), {}, "results of other denoisers"),
        (Chain(), texts(end_index=0), {}, "results of other examples"),
        (Chain(), texts(), {"rows": [0, 1]}, "results of other examples"),
    ]
    for denoiser, examples, options, message in cases:
        with pytest.raises(UserError, match=message):
            evaluate(ARMS[:1], denoiser, examples, out=tmp_path, **options, **BOTH)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    evaluate(ARMS[1:2], Chain(), texts(), out=tmp_path, **BOTH)
    part = next(path for path in (tmp_path / "parts").iterdir() if "columns" in json.loads(path.read_text()))
    for text in ("{", "[]", json.dumps({"columns": {"nfe": [1]}})):
        part.write_text(text)
        with pytest.raises(UserError, match=part.name):
            evaluate(ARMS[1:2], Chain(), texts(), out=tmp_path, **BOTH)


class Broken(nn.Module):
    """A denoiser, or a policy network, whose numbers are NaN."""

    mask_index, vocab_size = MASK, CLASSES

    def __init__(self, weight: float = math.nan) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, state: Any, attention_mask: Tensor | None = None) -> Tensor:
        if isinstance(state, Tensor):
            return torch.zeros(*state.shape, CLASSES) / (self.weight * 0)
        return torch.zeros(state.shape) + self.weight


def refusals() -> Iterator[tuple[Arm, Any, str]]:
    fine = Ranked("random")
    yield Arm("mine", LearnedPolicy(Broken())), Chain(), r"^arm 'mine': NaN in its weights \(.*weight\); "
    yield Arm("mine", fine), Broken(), r"^denoiser: NaN in its weights \(weight\); "
    yield Arm("mine", fine), Broken(0.0), r"^arm 'mine': denoiser: gives NaN"
    yield Arm("mine", fine, denoiser=Broken()), Chain(), r"^arm 'mine': NaN in its weights"


@pytest.mark.parametrize(("arm", "denoiser", "message"), list(refusals()))
@pytest.mark.parametrize("metric", ["accuracy", "path_nats"])
def test_nan_is_refused_in_one_line(arm: Arm, denoiser: Any, message: str, metric: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate([Arm("good", Ranked("entropy"), denoiser=Chain()), arm], denoiser, texts(), metrics=[metric])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["speed"]}, "unknown metric 'speed'"),
        ({"metrics": ["accuracy"], "examples": texts(["x"] * 5)}, "reference"),
        ({"metrics": []}, "metrics"),
        ({"arms": []}, "arms: there are none"),
        ({"arms": [ARMS[0], ARMS[0]]}, "random comes twice"),
        ({"arms": [Arm("a", Ranked(), 2, block_size=2)]}, "3 blocks of 2 in 2 steps"),
        ({"examples": texts(["1"]), "metrics": ["accuracy"]}, "1 references for 5 examples"),
        ({"examples": texts(None), "metrics": ["accuracy"]}, "without references"),
        ({"examples": padded(ROWS), "metrics": ["accuracy"]}, "without references"),
        ({"examples": Batch(torch.zeros(2, 3).long(), given=torch.ones(2, 3).bool())}, "nothing to reveal"),
        ({"rows": []}, "rows"),
        ({"rows": [5]}, "rows"),
        ({"batch_size": 0}, "batch_size"),
        ({"shard": (3, 3)}, "shard"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"arms": ARMS, "examples": texts(), "progress": False} | options
    with pytest.raises(UserError, match=message):
        evaluate(arguments.pop("arms"), Chain(), arguments.pop("examples"), **arguments)
