"""Learned orders against every heuristic at equal numbers of forwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from orderppl.cli.hints import any_class


@dataclass(frozen=True, kw_only=True)
class Config:
    r"""Learned orders against every heuristic at equal numbers of denoiser forwards.

        orderppl frontier runs/order-0 runs/order-1 --split validation --out runs/frontier
        orderppl frontier runs/mine --heuristics '[{policy: Threshold, tau: [0.5, 0.7, 0.9]}]' --rows 200
        orderppl frontier --data JsonLines --data.test rows.jsonl --denoiser load_denoiser \
            --denoiser.name_or_path bert-base-uncased            # heuristics alone
        torchrun --nproc_per_node 2 -m orderppl.cli.main frontier runs/mine

    Each learned order is compared with the best heuristic interpolated at the same mean number of forwards
    (`advantage`, positive is better), paired over rows, the choice of the best heuristic included. Tune on
    --split validation; look at the test rows once. Runs that differ in their seed alone are training seeds of one
    order. Finished parts are kept in the folder: repeat the command after a kill, or with more arms, and it goes on.
    The folder then has table.csv (one line per arm and row), results.json (means, advantages, and where rows are
    decoded the area under accuracy against tokens per forward, `aup`) and frontier.svg.

    Args:
        runs: run folders, or folders or hub names of shared orders; that of a denoiser for heuristics alone.
        split: rows to use.
        rows: how many of them, from the first; all when left out.
        choose_on_validation: choose the best heuristic at every number of forwards on the validation split.
        mixtures: compare with mixtures of any two heuristics as well: a coin per row decides between them.
        heuristics: grids of policies, see `orderppl.evaluation.sweep`; every heuristic there is when left out.
        learned: grids of wrappers around the learned policies, such as {policy: Eager, factor: [1.5, 2]}.
        budgets: step budgets of the learned policies; that of the run when left out.
        mode: the learned policies play their most probable sets; false: they draw them.
        metrics: accuracy of decoded answers, path_nats, marginal_nats (over the seeds); the first two, as the rows
            allow, when left out.
        seeds: times that arms with random sets are played.
        targets: mean numbers of forwards at which curves are compared.
        samples: times that tokens are sampled for pass@k; 0: not at all.
        temperature: of sampled tokens.
        k: of pass@k.
        end_stop: decode with the stop at the end token as well (see `EndStop`), for `nfe_stopped`; when left out, where
            responses are filled up with end tokens.
        timed_rounds: times that every arm is timed on the first 32 rows, one by one and 32 together; 0: not at all.
        data: other data than those of the first run.
        denoiser: another denoiser than that of the first run.
        batch_size: rows played together.
        shard: this process's share of the work, 1/4 to 4/4; all when left out.
        out: folder of the files.
        device: such as cpu or cuda:0.
    """

    runs: list[str] = field(default_factory=list)
    split: Literal["train", "validation", "test"] = "test"
    rows: int | None = None
    choose_on_validation: bool = False
    mixtures: bool = False
    heuristics: list[dict[str, Any]] | None = None
    learned: list[dict[str, Any]] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    mode: bool = True
    metrics: list[Literal["accuracy", "path_nats", "marginal_nats"]] | None = None
    seeds: int = 3
    targets: list[float] = field(default_factory=lambda: [2.0, 2.5, 3.0, 4.0])
    samples: int = 0
    temperature: float = 1.0
    k: list[int] = field(default_factory=lambda: [1, 4])
    end_stop: bool | None = None
    timed_rounds: int = 0
    data: any_class("orderppl.data.DataSet") | None = None  # type: ignore[valid-type]
    denoiser: any_class("orderppl.unmasking.Denoiser") | None = None  # type: ignore[valid-type]
    batch_size: int = 256
    shard: str | None = None
    out: str = "runs/frontier"
    device: str = "cpu"
    POSITIONAL = "runs"


def run(config: Config) -> None:
    """Play every arm on every row that is not played yet; with all there, compare and show."""
    from orderppl.cli.comparison import compare

    compare(config)
