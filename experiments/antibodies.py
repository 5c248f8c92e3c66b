"""Learn the order in which a pretrained antibody model should write a heavy variable domain.

    orderppl antibodies --train heavy.csv --steps 4 --out runs/antibodies
    orderppl antibodies --train train.fasta --test test.fasta --steps 8
    orderppl antibodies --out runs/antibodies-drawn           # no file: sequences drawn from the model itself

All residues start masked. The order is a plan: one distribution over the steps per aligned position, blind to the
residues and therefore deployable. With many steps what has been written tells more than the position: with `overrule`
what is certain goes first, and the plan decides about the rest. The table gives `path_nats` on held-out sequences: nats
per residue along each arm's own order, with the same number of steps (a threshold uses as many as it needs, up to that
budget). The oracle ranks positions by the probability of the true residue. With `--set judge=true` an independent model
(the package antiberty, 97 MB) scores what the arms write freely. The figure shows what was learned, region by region.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from rich.console import Console

from orderppl.data.antibody_regions import REGIONS, antibody_regions
from orderppl.decoding import decode, make_policy
from orderppl.errors import UserError
from orderppl.experiments.antibody_judge import AntibodyJudge
from orderppl.experiments.build import AntibodyDenoiserConfig, AntibodyTask
from orderppl.experiments.config import setting
from orderppl.experiments.molecules import (
    Comparison,
    MoleculeConfig,
    best_heuristic,
    learn_and_compare,
    revealed_steps,
    step_probabilities,
)
from orderppl.experiments.results import Record, results_table, save_figure
from orderppl.inference.checkpoints import write_text
from orderppl.models.denoisers import AntibodyDenoiser
from orderppl.models.denoisers.antibody import PADDING

CONFIG = "antibodies"
DRAWN_FILE = "drawn.fasta"
SHORTEST, LONGEST = 112, 128  # residues of a drawn domain, the bulk of human heavy domains


@dataclass(frozen=True)
class Config(MoleculeConfig):
    """Settings of antibodies."""

    train: str | None = setting(None, "FASTA or CSV file of training sequences", file=True, option="--train")
    test: str | None = setting(None, "FASTA or CSV file of held-out sequences", file=True, option="--test")
    draw: int = setting(90, "sequences drawn from the model when no file is given", at_least=20)
    draw_temperature: float = setting(0.25, "of the drawn residues; at 1 the draws leave the family", above=0)
    judge: bool = setting(False, "let an independent model score what the arms write")

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
    source = "drawn" if train is None else "file"
    if train is None:
        train = str(draw_sequences(config, out / DRAWN_FILE))
    task = replace(config.task, train=train, test=config.test or config.task.test)
    labels = {"task": "antibodies", "sequences": source}
    comparison = learn_and_compare(config, task, out, resume, labels, f"Antibodies ({source})")
    records = comparison.records + region_steps(comparison)
    if config.judge and config.rows_written:
        records += judge_written(config, comparison)
    plot_order(comparison, records, out / "order.png")
    return records


def region_steps(comparison: Comparison) -> list[Record]:
    """`mean_step` of every region, from 0, over the held-out domains whose regions can be told."""
    steps: dict[str, list[float]] = {name: [] for name in REGIONS}
    for batch in comparison.test:
        revealed = revealed_steps(comparison, batch)  # [B, L]
        for row, attended in enumerate(batch["attention_mask"]):
            domain = AntibodyDenoiser.decode(batch["tokens"][row], attended)
            for region, step in zip(
                antibody_regions(domain) or (), revealed[row][attended.cpu()].tolist(), strict=False
            ):
                steps[region].append(float(step))
    found = {name: torch.tensor(values) for name, values in steps.items() if values}
    return [comparison.record("mean_step", values, "learned", region=name) for name, values in found.items()]


def judge_written(config: Config, comparison: Comparison) -> list[Record]:
    """`judge_nats` of real domains, and of those that three arms write at temperature 1."""
    try:
        judge = AntibodyJudge()
    except UserError as error:
        Console().print(f"no independent judge: {error}")
        return []
    real = [
        AntibodyDenoiser.decode(tokens, attended)
        for batch in comparison.test
        for tokens, attended in zip(batch["tokens"], batch["attention_mask"], strict=True)
    ][: config.rows_written]
    records = [comparison.record("judge_nats", judge.nats(real), "held-out domains")]
    for arm in ("learned", best_heuristic(comparison.records), "random uniform"):
        rows = comparison.written(arm, config.rows_written, config.num_steps, 1.0, config.seed)
        domains = [AntibodyDenoiser.decode(torch.tensor(row)) for row in rows]
        records.append(comparison.record("judge_nats", judge.nats(domains), arm))
    title = "Written freely at temperature 1: nats per residue of an independent model"
    Console().print(results_table(records, title=title))
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


def plot_order(comparison: Comparison, records: Iterable[Record], path: Path) -> None:
    """Draw P(step | position) of the longest held-out domain with its regions, and the mean step of every region."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    row = int(comparison.test[0]["attention_mask"].sum(-1).argmax())
    batch = {name: tensor[row : row + 1] for name, tensor in comparison.test[0].items()}
    attended = batch["attention_mask"][0].cpu()
    probs = step_probabilities(comparison, batch)[0][attended].numpy()  # [L, T]
    figure, (heat, bars) = plt.subplots(2, 1, figsize=(8, 4.2), height_ratios=(2, 1), layout="constrained")
    image = heat.imshow(probs.T, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    heat.set(xlabel="position", ylabel="step", title="P(step | position)", yticks=range(probs.shape[1]))
    figure.colorbar(image, ax=heat)
    regions = antibody_regions(AntibodyDenoiser.decode(batch["tokens"][0].cpu(), attended))
    if regions is not None:
        heat.set_title("P(step | position)", pad=16)
        for name in REGIONS:
            first = regions.index(name)
            heat.axvline(first - 0.5, color="white", linewidth=0.8)
            heat.text(first + regions.count(name) / 2 - 0.5, -0.7, name, ha="center", va="bottom", fontsize=7)
    means = {r["region"]: r["value"] for r in records if r["metric"] == "mean_step"}
    if means:
        loops = ["#d55e00" if str(name).startswith("CDR") else "#0072b2" for name in means]
        bars.bar(list(means), list(means.values()), color=loops)
        bars.set(ylabel="mean step")
    else:
        bars.bar(range(probs.shape[1]), probs.sum(0), color="#0072b2")
        bars.set(xlabel="step", ylabel="residues", xticks=range(probs.shape[1]))
    save_figure(figure, path)
