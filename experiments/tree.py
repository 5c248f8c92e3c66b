"""An exact Markov field on a binary tree of 15 nodes: a second task whose log evidence and best fixed order are known.

    python experiments/tree.py --seeds 3 --steps 3 --out runs/tree

The experiment is that of chain.py; where a chain is best revealed by bisection, a tree has other separators.
"""

from pathlib import Path

from jsonargparse import auto_cli

import chain


def main(
    seeds: int = 3,
    steps: int = 3,
    updates: int = 2500,
    batch_size: int = 128,
    bonus: float = 0.3,
    out: Path = Path("runs/tree"),
) -> None:
    """Learn on every seed and compare.

    Args:
        seeds: training seeds, from 0.
        steps: step budget T.
        updates: SVI updates per seed.
        batch_size: sequences of an update, 8 orders each.
        bonus: weight of the entropy bonus at the start; it fades.
        out: folder of runs and results.
    """
    chain.main(seeds, steps, updates=updates, batch_size=batch_size, bonus=bonus, out=out, task="tree")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
