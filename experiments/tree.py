"""An exact Markov field on a binary tree: a second task whose log evidence and best fixed order are known.

    orderppl tree --out runs/tree
    orderppl tree --seeds 3 --steps 2 --out runs/tree-2

The experiment is that of `orderppl chain`; where a chain is best revealed by bisection, a tree has other separators.
`gap_nats` is the log evidence minus the path log-likelihood, nats per sequence: 0 is perfect, and level by level is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orderppl.experiments import chain
from orderppl.experiments.build import DenoiserConfig, TaskConfig, TreeDenoiserConfig, TreeTask
from orderppl.experiments.config import setting
from orderppl.experiments.results import Record

CONFIG = "tree"


@dataclass(frozen=True)
class Config(chain.Config):
    """Settings of tree."""

    task: TaskConfig = setting(TreeTask, "data")
    denoiser: DenoiserConfig = setting(TreeDenoiserConfig, "what fills in the tokens")
    starts: int = setting(2, "fits per seed; the best on validation rows is kept", at_least=1)


def run(config: Config, out: Path) -> Iterable[Record]:
    """Learn per seed, then measure every arm on the test rows."""
    return chain.run(config, out)
