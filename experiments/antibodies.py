"""Learn the order in which a pretrained antibody model should write a heavy variable domain.

    orderppl antibodies --train heavy.csv --steps 4 --out runs/antibodies
    orderppl antibodies --train train.fasta --test test.fasta --steps 8
    orderppl antibodies --out runs/antibodies-drawn           # no file: sequences drawn from the model itself

All residues start masked. The order is a plan: one distribution over the steps per aligned position, blind to the
residues and therefore deployable. The table gives `path_nats` on held-out sequences: nats per residue along each
arm's own order, with the same number of steps (a threshold uses as many as it needs, up to that budget). The oracle
ranks positions by the probability of the true residue. The figure shows what was learned.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from torch import Tensor

from orderppl.decoding import Policy, decode, make_policy
from orderppl.errors import UserError
from orderppl.evaluation import evaluate_policies
from orderppl.experiments.build import (
    AntibodyDenoiserConfig,
    AntibodyTask,
    OrderConfig,
    OrderProblem,
    build_problem,
    build_task,
    learned_policy,
)
from orderppl.experiments.config import setting
from orderppl.experiments.evaluate import heuristics
from orderppl.experiments.fit_order import fit_problem, save_order
from orderppl.experiments.results import Record, results_table, save_figure
from orderppl.guides import MeanFieldGuide
from orderppl.inference.checkpoints import write_text
from orderppl.models.denoisers import AntibodyDenoiser
from orderppl.models.denoisers.antibody import PADDING

CONFIG = "antibodies"
DRAWN_FILE = "drawn.fasta"
SHORTEST, LONGEST = 112, 128  # residues of a drawn domain, the bulk of human heavy domains


@dataclass(frozen=True)
class Config(OrderConfig):
    """Settings of antibodies."""

    train: str | None = setting(None, "FASTA or CSV file of training sequences", file=True, option="--train")
    test: str | None = setting(None, "FASTA or CSV file of held-out sequences", file=True, option="--test")
    draw: int = setting(90, "sequences drawn from the model when no file is given", at_least=20)
    draw_temperature: float = setting(0.25, "of the drawn residues; at 1 the draws leave the family", above=0)
    threshold: float = setting(0.9, "confidence of the threshold policy", above=0, below=1)

    def __post_init__(self) -> None:
        """Check what belongs together."""
        super().__post_init__()
        if not isinstance(self.task, AntibodyTask) or not isinstance(self.denoiser, AntibodyDenoiserConfig):
            raise UserError("task.name", f"is {self.task.name!r}", "use `orderppl fit-order` for other tasks")
        if self.test is not None and self.train is None:
            raise UserError("test", "given without training sequences", "give --train too")


def run(config: Config, out: Path, resume: bool = False) -> Iterable[Record]:
    """Get sequences, learn the order, compare on held-out sequences, draw the figure."""
    assert isinstance(config.task, AntibodyTask)
    train = config.train or config.task.train
    if train is None:
        train = str(draw_sequences(config, out / DRAWN_FILE))
    task_config = replace(config.task, train=train, test=config.test or config.task.test)
    problem = build_problem(config, build_task(task_config, config.seed))
    if not resume:  # the same command again replaces its own run
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    fit_problem(config, problem, out, resume=resume)
    save_order(replace(config, task=task_config), problem, out)

    test = list(problem.task.stream("test", 64, shuffle=False, device=config.device).once())
    policies: dict[str, Policy] = {
        "learned": learned_policy(problem, "mode"),
        "learned, sampled": learned_policy(problem, "sample"),
        "learned, ranked": learned_policy(problem, "rank"),
        **heuristics(threshold=config.threshold),
    }
    source = "drawn" if (config.train or config.task.train) is None else "file"
    records = evaluate_policies(
        problem.model.denoiser,
        policies,
        test,
        config.num_steps,
        seed=config.seed,
        baseline="learned",
        labels={"task": "antibodies", "sequences": source, "train_n": len(problem.task.held("train")["tokens"])},
    )
    shown = [record for record in records if record["metric"] in ("path_nats", "nfe")]
    held_out = sum(len(batch["tokens"]) for batch in test)
    title = f"Antibodies ({source}), {held_out} held-out domains, {config.num_steps} steps"
    Console().print(results_table(shown, title=title))
    plot_order(problem, test[0], out / "order.png")
    return records


def draw_sequences(config: Config, path: Path) -> Path:
    """Draw domains from the denoiser, one residue a step in random order, and keep them in a FASTA file."""
    if path.is_file():
        return path
    generator = torch.Generator().manual_seed(config.seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (config.draw,), generator=generator)
    assert isinstance(config.denoiser, AntibodyDenoiserConfig)
    output = decode(
        AntibodyDenoiser.from_wheel(config.denoiser.chain).to(config.device),
        make_policy("random"),
        length=lengths,
        max_steps=LONGEST,
        temperature=config.draw_temperature,
        generator=generator,
        device=config.device,
        pad_token_id=PADDING,
    )
    domains = map(AntibodyDenoiser.decode, output.sequences, output.attention_mask)
    write_text(path, "".join(f">drawn-{i}\n{domain}\n" for i, domain in enumerate(domains)))
    return path


def plot_order(problem: OrderProblem, batch: dict[str, Tensor], path: Path) -> None:
    """Draw P(step | position) of the longest held-out domain, and the mean number of residues per step."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    guide = problem.guide
    assert isinstance(guide, MeanFieldGuide)
    row = int(batch["attention_mask"].sum(-1).argmax())
    with torch.no_grad():
        mask = batch["attention_mask"][row : row + 1]
        probs = guide.network(None, mask, None, None).softmax(-1)[0][mask[0]].cpu().numpy()  # [L, T]
    figure, (heat, bars) = plt.subplots(2, 1, figsize=(7, 3.6), height_ratios=(2, 1), layout="constrained")
    image = heat.imshow(probs.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    heat.set(xlabel="position", ylabel="step", title="P(step | position)", yticks=range(probs.shape[1]))
    figure.colorbar(image, ax=heat)
    bars.bar(range(probs.shape[1]), probs.sum(0), color="#0072b2")
    bars.set(xlabel="step", ylabel="residues", xticks=range(probs.shape[1]))
    save_figure(figure, path)
