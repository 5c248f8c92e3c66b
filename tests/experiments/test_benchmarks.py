"""The benchmarks: the twin by hand is the library's update, decoding is the plain loop's; small runs of the scripts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn

from orderppl import Batch, RevealTraceGraph_ELBO
from orderppl.evaluation.results import read_results
from orderppl.evaluation.timing import Rounds, Timing, median_interval
from orderppl.guides import MeanFieldGuide, PolicyGuide, SequentialGuide
from orderppl.models import LearnedPolicy, PolicyNetwork, SequenceEncoder, SequentialUnmaskingModel, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.policies import RandomSteps, Threshold

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
sys.path.insert(0, str(FOLDER))

import decode  # noqa: E402
import estimators  # noqa: E402
import gradients  # noqa: E402
import handwritten  # noqa: E402
import reference  # noqa: E402
import speed  # noqa: E402
import updates  # noqa: E402

import timing  # noqa: E402

STEPS, PARTICLES, VOCAB, LENGTH, PROMPT = 3, 4, 8, 6, 3
ONCE = Rounds(1, 1)
CPU = torch.device("cpu")


def chosen(records: list[dict[str, Any]], metric: str, **labels: object) -> list[dict[str, Any]]:
    return [r for r in records if r["metric"] == metric and all(r.get(k) == v for k, v in labels.items())]


# ---- the hand-written updates are the library's: one loss and one gradient for the same order


@pytest.fixture
def double_precision() -> Iterator[None]:
    with pyro.settings.context(module_local_params=True):
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def ragged_batch() -> Batch:
    """Five rows with prompts, padded at both."""
    sizes, prompts = torch.tensor([6, 4, 1, 5, 6]), torch.tensor([2, 3, 1, 3, 2])
    place = torch.arange(PROMPT + LENGTH)
    is_prompt = place < prompts[:, None]
    attention = is_prompt | ((place >= PROMPT) & (place < PROMPT + sizes[:, None]))
    return Batch(torch.randint(0, VOCAB - 1, attention.shape), attention, is_prompt)


def make_denoiser(frozen: bool, behind: bool = False) -> TransformerDenoiser:
    """MASK inside the vocabulary, or just behind it."""
    mask_index = VOCAB if behind else VOCAB - 1
    return TransformerDenoiser(VOCAB, mask_index, width=16, layers=1, heads=2).requires_grad_(not frozen)


def make_encoder() -> SequenceEncoder:
    network = SequenceEncoder(VOCAB, STEPS, width=8, layers=1, heads=2)
    nn.init.normal_(network.head.weight)
    return network


def make_policy(kind: str) -> LearnedPolicy:
    network = PolicyNetwork(VOCAB, width=8, layers=1, heads=2)
    nn.init.normal_(network.head.weight)
    return LearnedPolicy(network, Threshold(0.5, temperature=1.0) if kind == "residual" else None)


def loss_and_draw(model: nn.Module, guide: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The library's loss per sequence, and what the guide has drawn."""
    drawn: list[dict[str, Tensor]] = []
    handle = guide.register_forward_hook(lambda module, inputs, output: drawn.append(detach_provenance(output)))
    loss = RevealTraceGraph_ELBO(PARTICLES).differentiable_loss(model, guide, batch) / len(batch)
    handle.remove()
    return loss, drawn[-1]


def assert_same(library: Tensor, by_hand: Tensor, modules: list[nn.Module]) -> None:
    over = [p for module in modules for p in module.parameters() if p.requires_grad]
    assert by_hand.item() == pytest.approx(library.item(), rel=1e-9)
    wanted = torch.autograd.grad(library, over, allow_unused=True)
    found = torch.autograd.grad(by_hand, over, allow_unused=True)
    size = 0.0
    for mine, theirs, parameter in zip(wanted, found, over, strict=True):
        zero = torch.zeros_like(parameter)
        mine, theirs = (zero if g is None else g for g in (mine, theirs))
        torch.testing.assert_close(theirs, mine, rtol=1e-6, atol=1e-9)
        size += float(mine.abs().sum())
    assert size > 0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("ragged", [True, False])
def test_stacked(double_precision: None, frozen: bool, behind: bool, ragged: bool) -> None:
    denoiser, network, batch = make_denoiser(frozen, behind), make_encoder(), ragged_batch()
    if not ragged:
        batch = Batch(batch.tokens[:, PROMPT:])
    model, guide = UnmaskingModel(denoiser, RandomSteps(), STEPS), MeanFieldGuide(network, STEPS)
    loss, drawn = loss_and_draw(model, guide, batch)
    order = drawn["reveal_step"][..., batch.prefix :]
    assert order.shape == (PARTICLES, 5, LENGTH)
    settings = {"num_steps": STEPS, "num_particles": PARTICLES, "order": order}
    assert_same(loss, handwritten.stacked_update(denoiser, network, batch, **settings), [denoiser, network])


@pytest.mark.parametrize("frozen", [True, False])
def test_sequential(double_precision: None, frozen: bool) -> None:
    denoiser, network, batch = make_denoiser(frozen), make_encoder(), ragged_batch()
    model = SequentialUnmaskingModel(denoiser, RandomSteps(), STEPS)
    loss, drawn = loss_and_draw(model, SequentialGuide(MeanFieldGuide(network, STEPS)), batch)
    order = torch.full((PARTICLES, *batch.tokens.shape), STEPS - 1).masked_fill(~batch.latent, -1)
    for t in range(STEPS - 1):
        order = order.masked_fill(drawn[f"reveal_{t}"], t)
    settings = {"num_steps": STEPS, "num_particles": PARTICLES, "order": order[..., PROMPT:]}
    assert_same(loss, handwritten.sequential_update(denoiser, network, batch, **settings), [denoiser, network])


@pytest.mark.parametrize("kind", ["learned", "residual"])
@pytest.mark.parametrize("frozen", [True, False])
def test_tied_policy(double_precision: None, kind: str, frozen: bool) -> None:
    denoiser, policy, batch = make_denoiser(frozen), make_policy(kind), ragged_batch()
    model, guide = UnmaskingModel(denoiser, policy, STEPS), PolicyGuide(policy, denoiser, STEPS)
    loss, drawn = loss_and_draw(model, guide, batch)
    settings = {"num_steps": STEPS, "num_particles": PARTICLES, "order": drawn["reveal_step"][..., PROMPT:]}
    by_hand = handwritten.tied_policy_update(denoiser, policy.logits, batch, **settings)
    assert_same(loss, by_hand, [denoiser, policy])


@pytest.mark.parametrize(
    ("update", "one_of"),
    [
        (handwritten.stacked_update, "network"),
        (handwritten.sequential_update, "network"),
        (handwritten.tied_policy_update, "policy"),
    ],
)
def test_own_draws_have_the_mean_of_the_library(
    double_precision: None, update: Callable[..., Tensor], one_of: str
) -> None:
    """Mean loss over 100 updates of 8 particles with the function's own draws; |z| < 5."""
    denoiser, batch = make_denoiser(True), ragged_batch()
    policy, network = make_policy("learned"), make_encoder()
    prior = policy if one_of == "policy" else RandomSteps()
    guide = PolicyGuide(policy, denoiser, STEPS) if one_of == "policy" else MeanFieldGuide(network, STEPS)
    elbo, model = RevealTraceGraph_ELBO(100), UnmaskingModel(denoiser, prior, STEPS)
    with torch.no_grad():
        reference = torch.tensor([elbo.loss(model, guide, batch) / 5 for _ in range(20)])
        settings = {"num_steps": STEPS, "num_particles": 8}
        learner = policy.logits if one_of == "policy" else network
        found = torch.stack([update(denoiser, learner, batch, **settings) for _ in range(100)])
    error = (found.var() / 100 + reference.var() / 20).sqrt()
    assert abs(found.mean() - reference.mean()) < 5 * error
    assert error < 0.05 * reference.mean().abs()


# ---- timing


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_another() -> None:
        for _ in range(3):
            torch.empty(1000, 1000).zero_()

    def together() -> None:
        torch.cat([torch.zeros(1000, 1000) for _ in range(3)])

    size = 4 * 1000 * 1000
    assert timing.peak_bytes(one_after_another, CPU) == pytest.approx(size, rel=0.01)
    assert timing.peak_bytes(together, CPU) == pytest.approx(6 * size, rel=0.01)


def test_interval_of_a_median() -> None:
    """Of 15 values the 4th and the 12th: P(Bin(15, 1/2) <= 3) = 0.018; of few values all."""
    assert median_interval(list(range(1, 16))) == (4, 12)
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert median_interval([2.0]) == (2.0, 2.0)


def test_ratios_are_of_paired_rounds() -> None:
    taken = Timing({"a": [2.0, 9.0, 8.0], "b": [1.0, 3.0, 1.0]}, {"a": [1.0] * 3, "b": [2.0] * 3})
    wall, cpu = taken.ratios("a", "b")
    assert (wall["metric"], wall["value"], wall["low"], wall["high"]) == ("time_ratio", 3.0, 2.0, 8.0)
    assert (cpu["metric"], cpu["value"]) == ("cpu_time_ratio", 0.5)


# ---- small runs; their ratios mean little

TINY = updates.Size(8, 1, 2, batch_size=2, particles=2)
SHAPE = updates.Shape(2, 5, 2, 9)


def test_speed_measures_every_pair(tmp_path: Path) -> None:
    """Two step budgets of every program, a trained denoiser, and a random SMDM; rows are 1 + (T - 1) K."""
    sizes = {"small": TINY, "large": replace(TINY, width=16), "smdm": TINY, "smdm_shape": SHAPE}
    speed.main(tmp_path, ("steps", "trainable", "precision", "smdm"), (2, 3), shape=SHAPE, rounds=ONCE, **sizes)
    records = read_results(tmp_path)["records"]
    ratios = chosen(records, "time_ratio", axis="steps")
    wanted = {(m, d, t) for m in updates.MODES for d in ("0.6M", "10M") for t in (2, 3)}
    assert {(r["mode"], r["denoiser"], r["steps"]) for r in ratios} == wanted
    assert all(0 < r["low"] <= r["value"] <= r["high"] and r["of"] == "by hand" for r in ratios)
    assert len(chosen(records, "memory_ratio", axis="trainable", trainable=True)) == 6
    assert len(chosen(records, "cpu_time_ratio", precision="bfloat16")) == 1
    for record in chosen(records, "denoiser_rows"):
        assert record["value"] == 1 + (record["steps"] - 1) * record["particles"]
    for mode in ("stacked", "policy"):
        peaks = chosen(records, "peak_megabytes", axis="smdm", mode=mode, variant="library")
        assert peaks[0]["value"] < peaks[1]["value"]  # frozen, trained
        assert len(chosen(records, "time_ratio", axis="smdm", mode=mode, of="bare forwards")) == 2


def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        def __init__(self, denoiser: nn.Module) -> None:
            super().__init__()
            self.vocab_size, self.mask_index = denoiser.vocab_size, denoiser.mask_index

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            raise RuntimeError("no compiler here\nsecond line")

    monkeypatch.setattr(torch, "compile", Broken)
    case = updates.Case("compiled", "stacked", "tiny", TINY, SHAPE, compiled=True)
    (record,) = speed.measure(case, ONCE, "cpu")
    assert (record["metric"], record["value"]) == ("compile_available", 0)
    assert "no compiler here second line" in str(record["reason"])


def test_decoding_spends_no_forward_in_vain(tmp_path: Path) -> None:
    """Row-forwards are the rows' own NFE; the loop that keeps finished rows spends at least as many."""
    sizes = {"small": reference.Size(8, 1, 2), "large": reference.Size(16, 1, 2), "long_prompt": 5}
    decode.main(tmp_path, (12, 20), shape=reference.Shape(4, 6, 3, 3), rounds=ONCE, **sizes)
    records = read_results(tmp_path)["records"]
    cases = {(d, v, p) for d in ("0.6M", "10M") for v in (12, 20) for p in decode.POLICIES}
    for other in (decode.FORWARDS, decode.NEEDED, decode.REFERENCE):
        found = chosen(records, "time_ratio", of=other)
        assert {(r["denoiser"], r["vocab_size"], r["policy"]) for r in found} == cases
    assert {r["batch_size"] for r in chosen(records, "time_ratio", of=decode.REFERENCE)} == {4, 1}
    assert {r["denoiser"] for r in chosen(records, "time_ratio", of=decode.REREAD)} == {"0.6M", "10M"}
    ours = chosen(records, "row_forward_ratio", variant=decode.DECODE)
    assert {r["value"] for r in ours} == {1.0}
    theirs = chosen(records, "row_forward_ratio", variant=decode.REFERENCE)
    assert len(theirs) == len(ours)
    assert min(r["value"] for r in theirs) >= 1
    assert {r["value"] for r in chosen(records, "same_rows")} == {1.0}
    shares = {r["policy"]: r["value"] for r in chosen(records, "head_share", denoiser="10M", vocab_size=20)}
    assert shares["random"] < shares["top_prob"] < 1


@pytest.mark.parametrize("policy", decode.POLICIES)
def test_the_reference_loop_decodes_the_same(policy: str) -> None:
    """12 rows of unequal length and NFE, prompts of unequal length."""
    shape = reference.Shape(12, 11, 6, 5)
    batch, denoiser = reference.make_problem(30, reference.Size(32, 2, 2), shape, once=False)
    denoiser = denoiser.double()
    rule = reference.make_policy(policy, batch, denoiser, shape)
    output = decode.decode(denoiser, rule, batch, max_steps=5, generator=torch.Generator())
    sequences, nfe = reference.reference_loop(denoiser, rule, batch, 5)
    assert torch.equal(output.sequences[batch.latent], sequences[batch.latent])
    assert torch.equal(output.nfe, nfe)
    if policy == "threshold":
        assert len(set(nfe.tolist())) > 1


# ---- estimators


@pytest.mark.parametrize("kind", ["tiny plan", "tiny policy"])
def test_every_estimator_is_unbiased(kind: str) -> None:
    """60 gradients of 64 sequences x 4 orders each; the gradient is that of the sum over all orders."""
    records = estimators.bias(kind, 60, 4)
    names = {"default", "leave-one-out", "gain", "expected", "stock"}
    assert {r["estimator"] for r in records} == names
    assert all(record["value"] < 5 for record in chosen(records, "bias_z"))
    assert max(record["value"] for record in chosen(records, "bias")) < 0.5


def test_a_biased_estimator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign of the score function turned: |z| far above 5."""

    class SignError(RevealTraceGraph_ELBO):
        def _advantage(self, cost: Tensor, baseline: Tensor, masked: Tensor) -> Tensor:
            return -super()._advantage(cost, baseline, masked)

    wrong = {"default": SignError(4)}
    monkeypatch.setattr(gradients, "estimators", lambda particles: wrong)
    (found,) = chosen(estimators.bias("tiny plan", 60, 4), "bias_z")
    assert found["value"] > 10


def test_all_estimators_see_the_same_orders() -> None:
    """With one order the plain estimators are one: no mean of others, no slope."""
    pair = estimators.tiny("tiny plan")
    batch = Batch(torch.randint(3, (2, 4)))
    found = pair.draws(batch, particles=1, count=3)
    torch.testing.assert_close(found["default"], found["leave-one-out"], rtol=0, atol=0)
    assert found["stock"].shape == (3, 12)
    assert not torch.allclose(found["default"], found["expected"])


def test_spread_of_draws() -> None:
    """Of 4,000 draws of two independent numbers of standard deviation 3 and 4: length 5; ratios are of pairs."""
    draws = torch.randn(4000, 2, dtype=torch.float64) * torch.tensor([3.0, 4.0])
    squares = (draws - draws.mean(0)).square().sum(-1)
    found = estimators.root(squares)
    assert found["low"] < 5 < found["high"]
    assert found["high"] - found["low"] < 0.4
    assert estimators.root(squares, squares) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert estimators.root(4 * squares, squares)["value"] == pytest.approx(2)


def test_rows_that_the_default_needs() -> None:
    """By hand: 2, 1 and 0.8 nats at 10, 20 and 40 rows against 3, 1.5 and 0.9, and against one that is ahead."""
    curves = {"default": (2.0, 1.0, 0.8), "gain": (3.0, 1.5, 0.9), "stock": (1.0, 0.6, 0.5)}
    learned = [
        {"estimator": name, "rows": rows, "value": nats + shift}
        for name, curve in curves.items()
        for shift in (-0.01, 0.01)  # two seeds
        for rows, nats in zip((10, 20, 40), curve, strict=True)
    ]
    found = {r["estimator"]: r["value"] for r in estimators.rows_ratios("chain", learned)}
    assert found == {"gain": pytest.approx(30 / 40), "stock": pytest.approx(40 / 15)}


def test_estimators_on_the_chain_and_without_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = gradients.Files(programs=str(tmp_path / "no denoiser"), sudoku=str(tmp_path / "none"), antibodies="no.csv")
    tasks = ("chain", "antibodies", "programs", "sudoku")
    estimators.main(tmp_path, tasks, draws=3, particles=3, updates=4, bias_draws=0, fits=1, files=files)
    records = read_results(tmp_path)["records"]
    names = ("default", "leave-one-out", "gain", "expected", "stock")
    wanted = {("chain", state, name) for state in ("start", "half", "learned") for name in names}
    assert {(r["task"], r["state"], r["estimator"]) for r in chosen(records, "gradient_sd")} == wanted
    assert all(0 < r["low"] <= r["value"] <= r["high"] for r in records if "low" in r)
    learned, orders = chosen(records, "path_nats"), 1 + 3 * 3
    assert len(learned) == len(names) * 8
    assert {r["rows"] for r in learned} == {updates * 8 * orders for updates in range(1, 9)}
    assert {r["estimator"] for r in chosen(records, "rows_ratio")} == set(names[1:])
    shown = capsys.readouterr()
    for task in tasks[1:]:
        assert f"{task} is left out: " in shown.out + shown.err


# ---- as a user calls them


@pytest.mark.parametrize("name", ["speed", "decode", "estimators"])
def test_help_says_what_is_measured(name: str) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--out" in shown
    assert "folder for results.json" in shown
    assert {"speed": "cpu_time_ratio", "decode": "row_forward_ratio", "estimators": "bias_z"}[name] in shown
