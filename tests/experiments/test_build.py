from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orderppl.errors import UserError
from orderppl.experiments import cli, evaluate, fit_order, frontier, train_denoiser
from orderppl.experiments.build import (
    DENOISER_FILE,
    ArithmeticTask,
    MeanFieldConfig,
    RandomGuideConfig,
    RevealTraceGraphConfig,
    SavedDenoiserConfig,
    SudokuTask,
    TransformerConfig,
    build_denoiser,
    build_problem,
    build_schedule,
    build_task,
    learned_policy,
)
from orderppl.experiments.config import config_dict, dump_config, load_config, packaged_configs
from orderppl.experiments.results import read_results
from orderppl.experiments.sweeps import SweepConfig, heuristic_arms
from orderppl.inference import EnumeratedELBO
from orderppl.inference.checkpoints import save_weights

SMALL = [
    "task={name: chain, num_states: 3, length: 6, train: 40, validation: 10, test: 10}",
    "num_steps=3",
    "elbo.num_particles=2",
    "fit.updates=2",
    "fit.batch_size=8",
    "fit.kl_weight=null",
]
PRIORS = [
    "uniform_steps",
    "cosine_steps",
    "left_to_right",
    "easy_first",
    "bounded_entropy",
    "learned_policy",
    "residual_policy",
    "{name: finishing_policy, prior: easy_first}",
    "learned_steps",
    "learned_schedule",
    "{name: heuristic, policy: klass, tau: 0.6, smoothing: 0.1}",
    "fixed_sizes",
    "{name: fixed_sizes, sizes: cosine}",
    "{name: step_price, price: 0.5, prior: residual_policy}",
]
GUIDES = [
    "random",
    "mean_field",
    "{name: mean_field, network: transformer, sees_tokens: true}",
    "renormalised_score",
    "policy",
    "posterior",
    "plackett_luce",
    "{name: plackett_luce, sizes: cosine}",
    "{name: heuristic, policy: greedy_oracle, sizes: cosine}",
    "{name: heuristic, policy: random, smoothing: 0.1, block_size: 2}",
]


def settings(*more: str) -> fit_order.Config:
    return load_config(fit_order.Config, "chain", [*SMALL, *more])


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_with_every_guide_is_one_line(prior: str, guide: str) -> None:
    config = settings(f"prior={prior}", f"guide={guide}")
    may_wait = isinstance(config.guide, RandomGuideConfig | MeanFieldConfig)
    never_empty = prior not in ("uniform_steps", "cosine_steps", "learned_steps", "learned_schedule")
    sizes = "cosine" if "cosine}" in prior else "uniform"
    cosine, smoothed = "sizes: cosine" in guide, "smoothing" in guide
    ranked = ("plackett_luce" in guide or "oracle" in guide) and not smoothed and cosine == (sizes == "cosine")
    other_sizes = "fixed_sizes" in prior and guide != "policy" and not ranked
    if (may_wait and never_empty) or other_sizes:
        with pytest.raises(UserError, match=r"guide.name: .* the ELBO is -inf"):
            build_problem(config)
        return
    problem = build_problem(config)
    measured = fit_order.held_out_bound(problem, problem.task.stream("test", 8, shuffle=False), 1.0)()
    assert all(math.isfinite(value) for value in measured.values())
    assert measured["elbo"] == pytest.approx(measured["objective"], abs=1e-4)
    assert 1 <= measured["mean_steps"] <= 3
    records = evaluate.chain_gaps(
        problem.denoiser, {"learned": learned_policy(problem)}, [problem.task.splits["test"]], config.num_steps
    )
    assert math.isfinite(float(str(records[0]["value"])))


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        ("uniform_steps", "mean_field"),
        ("learned_steps", "{name: mean_field, tied: true}"),
        ("{name: step_price, prior: residual_policy}", "policy"),
        ("residual_policy", "renormalised_score"),
        ("learned_policy", "posterior"),
        ("{name: heuristic, policy: threshold}", "{name: posterior, network: {features: []}}"),
        ("learned_policy", "{name: heuristic, policy: greedy_oracle}"),
        ("learned_schedule", "{name: plackett_luce, sizes: {name: fractional, mean: 2.5}}"),
    ],
)
def test_a_fit_is_saved_and_read_back(tmp_path: Path, prior: str, guide: str) -> None:
    config = settings(f"prior={prior}", f"guide={guide}")
    records = list(fit_order.run(config, tmp_path))
    assert {"elbo", "kl", "path_nats", "nfe"} <= {str(record["metric"]) for record in records}
    again, problem = evaluate.load_order(tmp_path)
    assert config_dict(again) == config_dict(config)
    compared = list(evaluate.run(evaluate.Config(run=str(tmp_path)), tmp_path))
    path = {record["arm"]: record["value"] for record in compared if record["metric"] == "path_nats"}
    fitted = next(record["value"] for record in records if record["metric"] == "path_nats")
    assert path["learned"] == pytest.approx(fitted, abs=1e-6)
    gaps = {record["arm"]: float(str(record["value"])) for record in compared if record["metric"] == "gap_nats"}
    assert gaps.keys() == path.keys()
    assert problem.task.name == "chain"


OBJECTIVES = [
    "reveal_trace_graph",
    "trace_graph",
    "trace",
    "importance_weighted",
    "wake_sleep",
    "enumerated",
    "relaxed",
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_fits_and_is_validated_by_the_same_bound(tmp_path: Path, name: str) -> None:
    config = load_config(fit_order.Config, "chain", [*(s for s in SMALL if "elbo" not in s), f"elbo.name={name}"])
    assert config.elbo.name == name
    assert load_config(fit_order.Config, None, [f"elbo={name}"]).elbo.name == name
    problem = build_problem(config)
    fit_order.fit_problem(config, problem, tmp_path)
    held_out = problem.task.stream("test", 10, shuffle=False)
    measured = fit_order.held_out_bound(problem, held_out, fit_order.final_kl_weight(config))()
    exact = EnumeratedELBO()
    exact.loss(problem.model, problem.guide, **next(held_out.once()))
    assert measured["kl"] == pytest.approx(exact.metrics["kl"].item(), abs=1e-4)
    assert measured["elbo"] == pytest.approx(exact.metrics["elbo"].item(), abs=1.0)  # 10 sequences of a few orders
    again = load_config(fit_order.Config, None, [f"elbo={dump_config(config.elbo)}"])
    assert again.elbo == config.elbo


def test_a_bound_without_a_name_is_the_default_one() -> None:
    config = load_config(fit_order.Config, None, ["elbo={num_particles: 3, leave_one_out: false, one_step: true}"])
    assert config.elbo == RevealTraceGraphConfig(num_particles=3, leave_one_out=False, one_step=True)
    assert load_config(fit_order.Config, "chain").elbo == RevealTraceGraphConfig()
    for name in ("trace_graph", "trace"):
        assert load_config(fit_order.Config, None, [f"elbo={{name: {name}, one_step: true}}"]).elbo.one_step


def test_a_tied_guide_shares_the_network_of_its_prior() -> None:
    problem = build_problem(settings("prior=learned_steps", "guide={name: mean_field, tied: true}"))
    assert problem.guide.network is problem.model.prior.network
    measured = fit_order.held_out_bound(problem, problem.task.stream("test", 8, shuffle=False), 1.0)()
    assert measured["kl"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(UserError, match=r"guide.tied: needs a prior"):
        build_problem(settings("guide={name: mean_field, tied: true}"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("denoiser=antibody", "denoiser.name"),
        ("guide={name: heuristic, policy: factor, tau: 0.5}", "policy"),
        ("guide={name: heuristic, eos_aware: true}", "eos_aware"),
        ("guide={name: heuristic, smoothing: 0.5}", "guide.smoothing"),
        ("prior={name: heuristic, policy: greedy_oracle}", "policy"),
        ("prior={name: heuristic, policy: random}", "policy"),
        ("prior={name: learned_steps, steps: 9}", "prior.steps"),
        ("task={name: antibodies}", "task.train"),
        ("denoiser={name: saved, run: /no/such}", "denoiser.run"),
        ("fit.temperature={start: 1.0, end: 0.1, updates: 5}", "fit.temperature"),
        ("fit.step_price={start: 1.0, end: 0.1, updates: 5}", "fit.step_price"),
        ("elbo={name: importance_weighted, one_step: true}", "elbo.one_step"),
        ("elbo={name: wake_sleep, one_step: true}", "elbo.one_step"),
        ("elbo={name: enumerated, one_step: true}", "elbo.one_step"),
        ("elbo={name: trace, leave_one_out: true}", "elbo.leave_one_out"),
        ("elbo={credit: gain, one_step: true}", "elbo.credit"),
        ("elbo={name: wake_sleep, num_particles: 1}", "elbo.num_particles"),
        ("elbo={name: relaxed, one_step: true}", "elbo.one_step"),
        ("elbo={name: relaxed, temperature: 0}", "elbo.temperature"),
        ("elbo=elbo", "elbo"),
        ("fit.kl_weight={start: 1.0, end: 0.1, updates: -5}", "fit.kl_weight.updates"),
        ("guide={name: renormalised_score, temperature: 0}", "guide.temperature"),
        ("prior={name: easy_first, threshold: 1}", "prior.threshold"),
        ("num_steps=0", "num_steps"),
        ("optimizer.lr=0", "optimizer.lr"),
    ],
)
def test_settings_that_do_not_belong_together_are_named(change: str, field: str) -> None:
    with pytest.raises(UserError) as error:
        build_problem(settings(change))
    assert error.value.field == field


def test_an_objective_without_a_kl_weight_has_none_to_anneal() -> None:
    with pytest.raises(UserError, match="fit.kl_weight: wake_sleep has no weight"):
        load_config(fit_order.Config, "chain", ["elbo.name=wake_sleep"])


def test_the_learning_rate_warms_up_and_decays() -> None:
    config = settings("optimizer={lr: 0.5, warmup: 4, schedule: linear}").optimizer
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    make = build_schedule(config, updates=8)
    assert make is not None
    schedule = make(optimizer)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.375, 0.25, 0.125, 0.0])


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_fit(tmp_path: Path, dtype: str) -> None:
    config = settings(f"dtype={dtype}", "prior=residual_policy", "guide=policy")
    results = cli.run_experiment("fit-order", fit_order, config, tmp_path / "run")
    assert results.is_file()
    assert torch.get_default_dtype() == torch.float32


def test_a_trained_denoiser_carries_an_order(tmp_path: Path) -> None:
    task = "task={name: arithmetic, num_operations: 2, train: 200, validation: 20, test: 20}"
    fast = ["denoiser={name: transformer, width: 16, layers: 1, heads: 2}", "fit={updates: 3, batch_size: 16}"]
    trained = load_config(train_denoiser.Config, None, [task, *fast])
    cli.run_experiment("train-denoiser", train_denoiser, trained, tmp_path / "first")
    saved = f"denoiser={{name: saved, run: {tmp_path / 'first'}}}"
    further = load_config(train_denoiser.Config, None, [task, saved, "fit={updates: 1, batch_size: 16, lr: 1e-9}"])
    cli.run_experiment("train-denoiser", train_denoiser, further, tmp_path / "denoiser")
    first, last = (load_file(tmp_path / name / "denoiser.safetensors") for name in ("first", "denoiser"))
    for name, weights in first.items():  # it goes on from where the other run has ended
        torch.testing.assert_close(last[name], weights, atol=1e-6, rtol=0)
    order = [
        task,
        f"denoiser={{name: saved, run: {tmp_path / 'denoiser'}}}",
        "num_steps=3",
        "outlier=0.5",
        "asked=answer",
    ]
    network = "network: {features: [confidence, prediction, price]}"
    order += [f"prior={{name: step_price, price: 0.1, highest: 2, prior: {{name: residual_policy, {network}}}}}"]
    order += ["guide=policy"]
    order += ["elbo.num_particles=2", "fit={updates: 2, batch_size: 8}"]
    fitted = load_config(fit_order.Config, None, order)
    cli.run_experiment("fit-order", fit_order, fitted, tmp_path / "order")
    config = evaluate.Config(run=str(tmp_path / "order"))
    results = cli.run_experiment("evaluate", evaluate, config, tmp_path / "comparison")
    assert results.is_file()
    arms = {(record["metric"], record["arm"]) for record in read_results(tmp_path / "comparison")["records"]}
    assert ("accuracy", "learned") in arms
    assert ("path_nats", "greedy_oracle uniform") in arms
    assert ("accuracy", "greedy_oracle uniform") not in arms  # an oracle cannot decode


def test_a_range_of_prices_is_checked_when_it_is_read() -> None:
    for wrong, field in (
        (("prior={name: step_price, price: 2, highest: 1}",), "prior.highest"),
        (("prior={name: step_price, price: 0, highest: 1}",), "prior.highest"),
        (("prior={name: step_price, highest: 2}", "fit.step_price={start: 1, end: 2, updates: 3}"), "fit.step_price"),
        (("outlier=0.1", "elbo.one_step=true"), "outlier"),
        (("outlier=0.1", "elbo=relaxed"), "outlier"),
        (("asked=answer", "elbo.one_step=true"), "asked"),
        (("asked=answer", "elbo=relaxed"), "asked"),
        (("token_temperature=0.5", "elbo=relaxed"), "token_temperature"),
    ):
        with pytest.raises(UserError, match=f"^{field}: "):
            load_config(fit_order.Config, "chain", wrong)


CONFIGS = ["chain", "arithmetic_order", "arithmetic_denoiser", "mod20_denoiser", "mod20_order", "dual_denoiser"]
CONFIGS += ["dual_order", "programs_denoiser", "programs_order", "programs_careful"]
CONFIGS += ["programs_wide_denoiser", "programs_wide_order"]
CONFIGS += ["frontier", "frontier_mod20", "frontier_dual", "frontier_programs", "frontier_programs_wide"]


@pytest.mark.parametrize("name", CONFIGS)
def test_packaged_configs_are_valid(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kind = train_denoiser.Config if name.endswith("_denoiser") else fit_order.Config
    kind = frontier.Config if name.startswith("frontier") else kind
    assert name in packaged_configs()
    for run in ("train", "mod20", "dual", "programs", "programs-wide"):
        (tmp_path / "runs" / f"{run}-denoiser").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    load_config(kind, name)


def test_a_heuristic_can_end_a_row_once_its_answer_is_sure() -> None:
    """Two confidences, two curves, beside the same policy without; a task without answers refuses."""
    sweep = SweepConfig(policy=("threshold",), tau=(0.5, 0.9), sure=(0.7, 0.8))
    task = build_task(ArithmeticTask(train=20, validation=2, test=2, num_operations=2), seed=0)
    arms = heuristic_arms([sweep, SweepConfig(policy=("threshold",), tau=(0.5,))], task, 20)
    assert {arm.family for arm in arms} == {"threshold sure 0.7", "threshold sure 0.8", "threshold"}
    assert len(arms) == 5
    assert arms[0].labels == {"policy": "answer_ready(threshold)", "tau": 0.5, "sure": 0.7}
    grids = build_task(SudokuTask(train=8, validation=4, test=4), seed=0)
    with pytest.raises(UserError, match="sure: the responses of sudoku have no answer"):
        heuristic_arms([sweep], grids, 16)


def test_a_saved_denoiser_reads_longer_rows_when_told_so(tmp_path: Path) -> None:
    task_config = ArithmeticTask(train=20, validation=2, test=2, num_operations=2)
    longer = replace(task_config, num_operations=3)
    first = build_denoiser(TransformerConfig(width=8, layers=1, heads=1), build_task(task_config, seed=0), task_config)
    save_weights(first, tmp_path / DENOISER_FILE)
    saved, task = SavedDenoiserConfig(run=str(tmp_path)), build_task(longer, seed=0)
    with pytest.raises(UserError, match=r"^task\.max_length: "):
        build_denoiser(saved, task, longer)
    denoiser = build_denoiser(replace(saved, max_length=task.canvas_length), task, longer)
    assert denoiser.max_length == task.canvas_length


def test_a_separator_ends_every_prompt_of_word_problems_and_a_new_denoiser_counts_from_it() -> None:
    task_config = ArithmeticTask(variant="dual", train=20, validation=2, test=2, separator=True)
    task = build_task(task_config, seed=0)
    denoiser = build_denoiser(TransformerConfig(width=8, layers=1, heads=1), task, task_config)
    prompts = task.splits["train"]["context"]
    last = prompts.gather(1, task.splits["train"]["context_mask"].sum(-1, keepdim=True) - 1)
    assert task.tokenizer is not None
    assert (last == task.tokenizer.eos_index).all()
    assert denoiser.separator_index == task.tokenizer.eos_index
    assert build_task(replace(task_config, separator=False), seed=0).separator is None
