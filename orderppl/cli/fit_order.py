"""Fit a guide and a policy to a denoiser."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from pyro.infer import ELBO
from torch import nn

from orderppl.cli.assemble import Known, check_device, fit_settings, make_data, make_denoiser, the_one
from orderppl.config import Builder
from orderppl.data import DataSet
from orderppl.errors import UserError
from orderppl.guides import Guide
from orderppl.inference.fitting import FitSettings
from orderppl.policies import Policy
from orderppl.unmasking import Denoiser

MODEL = {"class_path": "orderppl.models.UnmaskingModel"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fit a guide and a policy to a denoiser; can be interrupted (Ctrl-C) and resumed.

        orderppl fit-order --config chain --out runs/chain
        orderppl fit-order --config chain --guide my_module.MyGuide --guide.width 32 --out runs/mine
        orderppl fit-order --config runs/mine/config.yaml --seed 1 --out runs/mine-1
        orderppl fit-order --config chain --out runs/chain --resume
        torchrun --nproc_per_node 2 -m orderppl.cli.main fit-order --config chain --out runs/chain

    Objects are written as class paths with arguments, your own too: --guide.help CLASS shows what a class takes.
    Arguments that the run knows (num_steps, denoiser, policy, vocab_size, length, ...) need not be given.

    Args:
        guide: posterior over the order; a PolicyGuide plays a policy.
        num_steps: step budget T.
        data: the data set.
        denoiser: what is unmasked with; stays frozen.
        policy: prior over reveal sets; random steps when left out.
        model: the program, with its options such as --model.step_price.
        objective: what is maximised; RevealTraceGraph_ELBO when left out.
        fit: the training.
        seed: of everything random.
        device: where to train, such as cpu or cuda:0.
        dtype: of the networks; for bfloat16 by autocast see --fit.bfloat16.
        out: the run folder.
        resume: go on with the run in --out.
        estimate: print what the training needs in memory, operations and hours at so many TFLOP/s, and stop.
        processes: that the estimate is for, as torchrun would start them.
    """

    guide: Guide
    num_steps: int | None = None
    data: DataSet | None = None
    denoiser: Denoiser | None = None
    policy: Policy | None = None
    model: nn.Module = field(default_factory=lambda: dict(MODEL))  # type: ignore[assignment]
    objective: ELBO | None = None
    fit: FitSettings = field(default_factory=FitSettings)
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"
    out: str = "runs/fit-order"
    resume: bool = False
    estimate: float | None = None
    processes: int = 1


def run(config: Config) -> None:
    """Make the objects, fit, and say where the result is."""
    from pathlib import Path

    import pyro
    import torch

    from orderppl.inference.fitting import fit
    from orderppl.runs import default_dtype

    check_device(config.device)
    with default_dtype(getattr(torch, config.dtype)), pyro.validation_enabled(False):  # a third of a small update
        torch.manual_seed(config.seed)
        parts = make_parts(config)
        if config.estimate is not None:
            estimate(parts, config.estimate, config.processes)
            return
        say_framing(parts, config.device)
        result = fit(**parts, out=Path(config.out), resume=config.resume)
    if os.environ.get("RANK", "0") != "0":
        return
    last = result.validations[-1] if result.validations else {}
    found = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "update")
    print(f"{result.updates} updates in {result.seconds:.1f} s{'; held out: ' * bool(found)}{found}")
    print(f"run folder: {config.out}")


def say_framing(parts: dict[str, Any], device: str) -> None:
    """Say where the rows of the data should have other ends than they have."""
    from orderppl.models.denoisers.framing import framing_advice

    denoiser, data = parts["model"].denoiser, parts["data"]
    if os.environ.get("RANK", "0") != "0" or not isinstance(denoiser, nn.Module):
        return
    advice = framing_advice(denoiser.to(device), next(iter(data.splits().values())))
    if advice is not None:
        print(f"note: {advice}")


def estimate(parts: dict[str, Any], tflops: float, processes: int = 1) -> None:
    """Print what the fit of these parts needs."""
    from dataclasses import fields

    from orderppl.cli.costs import show_costs
    from orderppl.inference import RevealTraceGraph_ELBO
    from orderppl.inference.batches import training_rows
    from orderppl.inference.fitting import PairLoss
    from orderppl.inference.trainer import frozen

    model, objective = parts["model"], parts["objective"] or RevealTraceGraph_ELBO()
    rows, _ = training_rows(parts["data"], model.denoiser)
    settings = FitSettings(**{item.name: parts[item.name] for item in fields(FitSettings)})
    with frozen(model.denoiser, unless=settings.train_denoiser):
        show_costs(PairLoss(model, parts["guide"], objective), rows, settings, tflops, processes)


def make_parts(config: Any) -> dict[str, Any]:
    """Everything that `orderppl.fit` is called with.

    Raises:
        UserError: names the field that is missing or wrong.
    """
    builder = Builder(Known())
    inside = config.model.get("init_args") or {}
    data = make_data(builder, config.data)
    make_denoiser(builder, the_one("denoiser", config.denoiser, inside.get("denoiser")), data)
    num_steps = the_one("num_steps", config.num_steps, inside.get("num_steps"))
    if num_steps is None:
        raise UserError("num_steps", "is missing", "give --num_steps")
    builder.known |= {"num_steps": num_steps, "out": num_steps}
    policy = the_one("policy", config.policy, inside.get("policy")) or {"class_path": "orderppl.policies.RandomSteps"}
    builder.known["policy"] = builder.make(policy, "policy")
    model = builder.make(config.model, "model")
    guide = builder.make(config.guide, "guide")
    objective = builder.make(config.objective, "objective")
    settings = fit_settings(builder, FitSettings, config)
    return {"model": model, "guide": guide, "data": data, "objective": objective, **settings}
