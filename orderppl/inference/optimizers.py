"""Optimisers, their learning rates, and the moving average, from the settings of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel

from orderppl.errors import UserError


def make_optimizer(
    made_by: Callable[..., Optimizer] | Optimizer | PyroOptim,
    named: Mapping[str, nn.Parameter],
    lr: float | Mapping[str, float] | None = None,
) -> Optimizer:
    """Make the optimiser of named parameters.

    Args:
        made_by: what makes a torch optimiser; one that has been made; or one of `pyro.optim`.
        named: the parameters by their dotted names.
        lr: learning rate, or those of parts: `{"guide": 0.01, "policy": 0.001}` for all parameters below a module of
            that name, the longest name first, and the optimiser's own for the rest.

    Raises:
        UserError: an optimiser that cannot train them, or a part that has none.
    """
    if isinstance(made_by, Optimizer):
        known = {id(parameter) for parameter in named.values()}
        if lr is not None or not any(id(p) in known for group in made_by.param_groups for p in group["params"]):
            problem = "has been made already, with its own rates" if lr is not None else "holds none of what is trained"
            raise UserError("optimizer", problem, "give its class, such as torch.optim.Adam")
        return made_by
    options: dict[str, Any] = {}
    if isinstance(made_by, PyroOptim):
        made_by, options = made_by.pt_optim_constructor, dict(made_by.pt_optim_args)
    if not isinstance(lr, Mapping):
        return made_by(list(named.values()), **(options if lr is None else options | {"lr": lr}))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named.items():
        parts = [part for part in lr if f".{part}." in f".{name}."]
        part = max(parts, key=len, default="rest")
        rate = {"lr": lr[part]} if parts else {}
        groups.setdefault(part, {"params": [], "part": part, **rate})["params"].append(parameter)
    for part in lr:
        if part not in groups:
            raise UserError(f"lr.{part}", "names no part that is trained", "use e.g. guide, or model.policy")
    return made_by(list(groups.values()), **options)


def make_scheduler(
    schedule: str | Callable[[Optimizer], LRScheduler], optimizer: Optimizer, warmup: int, updates: int
) -> LRScheduler | None:
    """Make the scheduler of the learning rate: a linear rise, then `constant` or a `cosine` that ends at 0."""
    if callable(schedule):
        return schedule(optimizer)
    if schedule == "constant" and not warmup:
        return None

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        part = min((update - warmup) / max(updates - warmup, 1), 1.0)
        return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * part)) / 2

    return LambdaLR(optimizer, factor)


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The learning rates for the log: `lr`, or one for each part."""
    groups = optimizer.param_groups
    return {f"lr.{group['part']}" if "part" in group else "lr": float(group["lr"]) for group in groups[::-1]}


def mean_gradient_norm(optimizer: Optimizer) -> Tensor | None:
    """Norm of the running mean of the gradient that Adam keeps, bias-corrected; None for other optimisers."""
    states = [state for state in optimizer.state.values() if "exp_avg" in state]
    if not states:
        return None
    decay = optimizer.param_groups[0]["betas"][0]
    return nn.utils.get_total_norm([state["exp_avg"] for state in states]) / (1 - decay ** states[0]["step"])


def moving_average(parameters: list[Tensor], decay: float) -> AveragedModel:
    """An exponential moving average that starts at the parameters, with a shorter memory at first."""

    def blend(averages: Any, values: Any, _: Any) -> None:
        count = int(average.n_averaged)  # on the host
        torch._foreach_lerp_(averages, values, 1 - min(decay, count / (9 + count)))

    average = AveragedModel(nn.ParameterList(parameters), multi_avg_fn=blend)
    average.update_parameters(nn.ParameterList(parameters))
    return average


@contextmanager
def averaged(parameters: list[Tensor], average: AveragedModel | None) -> Iterator[None]:
    """Hold the averages, where there are any, in the parameters for a while."""
    own = [parameter.detach().clone() for parameter in parameters] if average is not None else []
    set_to_average(parameters, average)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, own, strict=False):
                parameter.copy_(value)


@torch.no_grad()
def set_to_average(parameters: list[Tensor], average: AveragedModel | None) -> None:
    """Put the averages, where there are any, into the parameters."""
    if average is not None:
        torch._foreach_copy_(parameters, [value.detach() for value in average.module.parameters()])
