"""The main job, in a few minutes on two cores: learn an order twice, and compare it with the heuristics.

    orderppl quickstart --out runs/quickstart
    orderppl quickstart --train heavy.csv          # your antibody sequences instead of drawn ones

First the exact Markov chain, where the log evidence and the best fixed order are known. Then a real pretrained
denoiser of antibody sequences; without a file of sequences, training and held-out ones are drawn from the denoiser.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from orderppl.experiments import antibodies, chain
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.results import Record

CONFIG = "quickstart"


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of quickstart."""

    train: str | None = setting(None, "FASTA or CSV file of antibody sequences", file=True, option="--train")
    test: str | None = setting(None, "FASTA or CSV file of held-out sequences", file=True, option="--test")
    chain: chain.Config = setting(chain.Config, "the exact chain")
    antibodies: antibodies.Config = setting(antibodies.Config, "the antibody model")


def run(config: Config, out: Path) -> Iterable[Record]:
    """Both parts, each in a folder of its own."""
    seed, device, dtype = config.seed, config.device, config.dtype
    console = Console()
    console.print("\n[bold]1. An exact Markov chain[/bold]: how far is an order from the log evidence?")
    records = list(chain.run(replace(config.chain, seed=seed, device=device, dtype=dtype), out / "chain"))
    console.print("\n[bold]2. A pretrained antibody model[/bold]: nats per residue on held-out sequences")
    (out / "antibodies").mkdir(exist_ok=True)
    part = replace(config.antibodies, train=config.train, test=config.test, seed=seed, device=device, dtype=dtype)
    records += antibodies.run(part, out / "antibodies")
    console.print(f"\nThe learned order is drawn in {out / 'antibodies' / 'order.png'}")
    return records
