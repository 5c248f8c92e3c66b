"""One HTML file of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orderppl.cli.hints import any_class


@dataclass(frozen=True, kw_only=True)
class Config:
    """One HTML file of a run: its tables and figures, and decoding replayed, two policies side by side.

        orderppl report runs/chain
        orderppl report runs/gsm8k --problems 6 --out page

    report.html opens anywhere, without a network or a server. What it replays is recorded now, into replay.json beside
    it; every other number comes from a file of the run, which the page names. A folder with several runs in it makes
    one page of all of them.

    Args:
        run: run folder, or a folder with several.
        split: rows to replay.
        problems: how many.
        alternatives: most probable tokens kept per revealed token.
        temperature: of decoded tokens; 0 (most likely) where something is given, else 1, when left out.
        data: other data than the run's.
        seed: of everything random.
        out: folder of the page; RUN/report when left out.
        device: such as cpu or cuda:0.
    """

    run: str
    split: Literal["train", "validation", "test"] = "test"
    problems: int = 3
    alternatives: int = 5
    temperature: float | None = None
    data: any_class("orderppl.data.DataSet") | None = None  # type: ignore[valid-type]
    seed: int = 0
    out: str | None = None
    device: str = "cpu"
    POSITIONAL = "run"


def run(config: Config) -> None:
    """Record the replays, and write the page."""
    from orderppl.cli.assemble import check_device
    from orderppl.cli.held_out import read_examples
    from orderppl.report import write_report
    from orderppl.runs import load_run

    check_device(config.device)
    examples = None
    if config.data is not None or config.split != "test":
        examples = read_examples(load_run(config.run), config.data, config.split, config.problems)
    page = write_report(
        config.run,
        config.out,
        examples=examples,
        problems=config.problems,
        alternatives=config.alternatives,
        temperature=config.temperature,
        seed=config.seed,
        device=config.device,
    )
    print(f"page: {page}")
