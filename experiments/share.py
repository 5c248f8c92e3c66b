"""Make a learned order a folder to share: weights, configuration and a card.

    orderppl share --run runs/gsm8k-order --out my-order
    orderppl share --run runs/gsm8k-order --out my-order --decision sample
    hf upload OWNER/NAME my-order

`orderppl generate --policy my-order` and `OrderPolicy.from_pretrained("OWNER/NAME")` decode with it. Where the denoiser
was trained as well, it goes into the folder `denoiser` inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from orderppl.experiments.build import (
    DENOISER_FILE,
    OrderConfig,
    OrderProblem,
    PretrainedDenoiserConfig,
    SavedDenoiserConfig,
    learned_order,
    save_tokenizer,
)
from orderppl.experiments.config import RunConfig, config_dict, setting
from orderppl.experiments.evaluate import load_order
from orderppl.experiments.results import Record, read_results
from orderppl.inference.checkpoints import save_weights
from orderppl.models import DenoiserIdentity, OrderPolicy, StepPrice

DENOISER_FOLDER = "denoiser"  # in that of the policy, where the two were trained together


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of share."""

    run: str = setting("runs/fit-order", "folder with an order.safetensors", file=True, option="--run")
    decision: Literal["mode", "sample", "rank"] = setting(
        "mode", "how the learned probabilities become reveal sets: mode, sample or (plans) rank", option="--decision"
    )
    beta: float | None = setting(None, "factor on the reveal probabilities", above=0, option="--beta")
    price: float | None = setting(None, "of a step, where a range of prices was learned", above=0, option="--price")


def run(config: Config, out: Path) -> Iterable[Record]:
    """Load the run, and write what decodes."""
    fitted, problem = load_order(config.run, config.device)
    policy = order_policy(
        fitted,
        problem,
        decision=config.decision,
        beta=config.beta,
        price=config.price,
        results=read_results(config.run)["records"] if (Path(config.run) / "results.json").is_file() else (),
    )
    policy.save_pretrained(out)
    if not fitted.freeze_denoiser:
        save_denoiser(problem, out / DENOISER_FOLDER)
    size = sum(parameter.numel() for parameter in policy.parameters())
    return [{"metric": "parameters", "value": size, "task": problem.task.name, "steps": policy.num_steps}]


def order_policy(config: OrderConfig, problem: OrderProblem, **options: Any) -> OrderPolicy:
    """What a fit learned, with all that decoding needs to know of the fit.

    Args:
        config: of the fit.
        problem: the fitted objects.
        options: `decision`, `beta`, `price` and `results` of `OrderPolicy`.
    """
    task, source, prior = problem.task, config.denoiser, problem.model.prior
    name = revision = None
    if isinstance(source, PretrainedDenoiserConfig) and config.freeze_denoiser:
        name, revision = source.model, source.revision
    elif isinstance(source, SavedDenoiserConfig) and config.freeze_denoiser:
        name = source.run
    training = {
        "task": task.name,
        "response_length": task.longest,
        "separator": task.separator is not None,
        "temperature": getattr(config.guide, "temperature", None),
        "step_price": config.prior.price if hasattr(config.prior, "price") and isinstance(prior, StepPrice) else None,
        "settings": config_dict(OrderConfig(**{key: getattr(config, key) for key in OrderConfig.__dataclass_fields__})),
    }
    identity = DenoiserIdentity.of(problem.model.denoiser, task.tokenizer, name, revision)
    return OrderPolicy(learned_order(problem), config.num_steps, identity, training=training, **options)


def save_denoiser(problem: OrderProblem, folder: Path) -> None:
    """Write a denoiser that was trained with the order, where `load_denoiser` finds it."""
    denoiser: Any = problem.denoiser
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(denoiser, "save_pretrained"):
        denoiser.save_pretrained(folder)
        tokenizer = getattr(problem.task.tokenizer, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return
    assert isinstance(denoiser, nn.Module)
    save_weights(denoiser, folder / DENOISER_FILE)
    if problem.task.tokenizer is not None:
        save_tokenizer(problem.task.tokenizer, folder)
