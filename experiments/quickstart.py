"""The main job in a few minutes: learn two orders, one where the best is known and one on a real pretrained model.

    make quickstart

The first part is an exact Markov chain (4 states, 16 positions, 4 steps): the log evidence and the best fixed order are
known. The second is a pretrained antibody model; without a file, sequences are drawn from it.
"""

from pathlib import Path

from jsonargparse import auto_cli

import antibodies
import chain


def main(train: Path | None = None, out: Path = Path("runs/quickstart")) -> None:
    """Learn both orders and compare them.

    Args:
        train: FASTA or CSV file of antibody sequences; drawn from the model when left out.
        out: folder of runs and results.
    """
    chain.main(seeds=1, steps=4, out=out / "chain")
    antibodies.main(train, steps=4, rows=25_000, out=out / "antibodies")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
