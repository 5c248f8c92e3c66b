"""A fit that starts by imitating a heuristic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch

from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.experiments import fit_order
from orderppl.experiments.build import OrderProblem, WarmStartConfig, build_imitation, build_problem
from orderppl.experiments.config import load_config
from orderppl.inference import OrderLoss
from orderppl.path import RevealPath
from orderppl.states import reveal_set

SMALL = [
    "task={name: chain, length: 8, train: 200, validation: 10, test: 50}",
    "num_steps=4",
    "prior={name: learned_policy, network: {width: 16, layers: 1, heads: 2}}",
    "guide=policy",
    "optimizer={lr: 0.02}",
    "fit={batch_size: 16, updates: 9, checkpoint_every: 3, validate_every: null, warm_start: {tau: 0.6, updates: 9}}",
]


def agreement(problem: OrderProblem, tau: float) -> float:
    """Share of the states met by a threshold decoder where the prior reveals exactly what it reveals."""
    batch = problem.task.splits["test"]
    teacher = build_imitation(WarmStartConfig(tau=tau, smoothing=0.0), problem).teacher
    order = teacher(**batch)["reveal_step"]  # [B, L]
    path = RevealPath(Canvas(problem.denoiser, batch["attention_mask"]), batch["tokens"], problem.model.num_steps)
    states = path(order)  # [T, B, L]
    wanted = reveal_set(order, states.step.unsqueeze(-1))
    choices = states.masked.any(-1) & ~states.is_last
    assert choices.sum() > 100
    with torch.no_grad():
        same = (problem.model.prior.select(states) == wanted).all(-1)
    return float(same[choices].float().mean())


def test_a_policy_learns_to_reveal_what_the_teacher_reveals(tmp_path: Path) -> None:
    pyro.set_rng_seed(0)
    config = load_config(fit_order.Config, None, SMALL)
    problem = build_problem(config)
    assert agreement(problem, 0.6) < 0.5
    fit_order.imitate_teacher(config, WarmStartConfig(tau=0.6, updates=150), problem, tmp_path)
    assert agreement(problem, 0.6) > 0.9


@pytest.mark.parametrize("call", [5, 9, 10, 14])
def test_a_warm_start_is_resumed_wherever_it_was_interrupted(
    tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the imitation, after its last update, before the first of the fit, and in the fit: bit-equal weights."""
    config = load_config(fit_order.Config, None, SMALL)

    def fitted(out: Path, resume: bool = False) -> OrderProblem:
        pyro.set_rng_seed(3)
        problem = build_problem(config)
        fit_order.fit_problem(config, problem, out, resume=resume)
        return problem

    whole = fitted(tmp_path / "whole")
    for folder in (tmp_path / "whole", tmp_path / "whole" / "warm-start"):
        assert (folder / "log.jsonl").read_text().count("\n") == 9
    calls, forward = iter(range(100)), OrderLoss.forward

    def interrupted(self: OrderLoss, **batch: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            raise KeyboardInterrupt
        return forward(self, **batch)

    with monkeypatch.context() as patch:
        patch.setattr(OrderLoss, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path / "broken")
    resumed = fitted(tmp_path / "broken", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])
    cold = replace(config, fit=replace(config.fit, warm_start=None))
    pyro.set_rng_seed(3)
    other = build_problem(cold)
    fit_order.fit_problem(cold, other, tmp_path / "cold")
    different = [not torch.equal(v, other.model.state_dict()[name]) for name, v in whole.model.state_dict().items()]
    assert any(different)


def test_a_teacher_that_the_student_cannot_follow_is_named(tmp_path: Path) -> None:
    config = load_config(fit_order.Config, None, [*SMALL, "prior=uniform_steps", "guide=plackett_luce"])
    with pytest.raises(UserError, match="teacher: the guide gives orders"):
        fit_order.fit_problem(config, build_problem(config), tmp_path)
