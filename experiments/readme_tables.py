"""The two tables of the README, from the records of a frontier.

    python experiments/readme_tables.py docs/results/frontier-programs-wide

The first has the paper's opponents (arXiv 2602.23968) at equal mean forwards, the second the best of all opponents.
"""

from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from orderppl.evaluation.results import read_results

PAPER = {"IID": "random", "top-prob": "top_prob", "margin": "margin"}
FORWARDS = (2, 2.5, 3, 4, 8)


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines])


def percent(record: dict[str, Any], key: str = "value") -> str:
    """One decimal."""
    return f"{100 * record[key]:.1f}"


def tables(folder: Path) -> tuple[str, str]:
    """The paper's comparison and the full one, percent of the test problems."""
    records = read_results(folder)["records"]
    compared = [r for r in records if r["metric"] == "advantage" and "target_nfe" in r and "grid" not in r]
    gains = {r["target_nfe"]: r for r in compared}
    rules = [r for r in records if r["metric"] == "accuracy" and r["kind"] == "heuristic"]
    values = {(r["family"], r["steps"]): r for r in rules}
    paper, full = [], []
    for nfe in FORWARDS:
        gain = gains[nfe]
        if nfe == int(nfe):
            others = [percent(values[family, nfe]) for family in PAPER.values()]
            paper.append([f"{nfe:g}", f"**{percent(gain, 'own')}**", *others])
        interval = f"{100 * gain['value']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
        full.append([f"{nfe:g}", percent(gain, "own"), f"{percent(gain, 'frontier')} ({gain['of']})", interval])
    return (
        table(["mean forwards", "learned", *PAPER], paper),
        table(["mean forwards", "learned", f"best of {len(rules)}", "learned ahead by (paired)"], full),
    )


def main(folder: Path) -> None:
    """Print both.

    Args:
        folder: of results.json.
    """
    print(*tables(folder), sep="\n\n")


if __name__ == "__main__":
    auto_cli(main)
