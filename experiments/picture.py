"""The moving picture of the README: one puzzle decoded twice with two forwards, in the usual and in a learned order.

    python experiments/picture.py --out docs/replay.svg

Both are decoded by the denoiser of docs/results/sudoku. The order is learned here, as the opening of `sudoku.py` on
seed 0, in less than a minute. The puzzle is the first test puzzle that one order solves and the other does not; the
shares are those of all 500 test puzzles.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from sudoku import learn_opening

from orderppl import Policy, decode
from orderppl.data import Sudoku
from orderppl.files import write_text
from orderppl.models.denoisers import load_denoiser
from orderppl.policies import Ranked

SIDE, CELL, TOP, STEPS = 4, 56, 84, 2
PANELS = (("Most confident first", 24), ("Learned order", 328))
STYLE = """
svg { --card: #ffffff; --text: #1f2328; --soft: #59636e; --line: #8c959f; --given: #eaeef2; --bad: #b3261e;
  --first: #ffd58a; --second: #a9d4f5; --ink: #1f2328; --good: #116329; }
@media (prefers-color-scheme: dark) { svg { --card: #161b22; --text: #e6edf3; --soft: #9da7b3; --line: #6e7681;
  --given: #2d333b; --bad: #ff8a80; --first: #7a4b00; --second: #0b4f82; --ink: #ffffff; --good: #6fdd8b; } }
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--text); }
.title { font-size: 19px; font-weight: 600; } .note { font-size: 15px; fill: var(--soft); }
.digit { font-size: 26px; text-anchor: middle; fill: var(--ink); } .clue { fill: var(--text); font-weight: 700; }
.cell { stroke: var(--line); fill: none; } .given { fill: var(--given); } .first { fill: var(--first); }
.second { fill: var(--second); } .box { stroke: var(--soft); stroke-width: 2.5; fill: none; }
.conflict { stroke: var(--bad); stroke-width: 4; fill: none; } .wrong { fill: var(--bad); font-weight: 600; }
.right { fill: var(--good); font-weight: 600; } .verdict { font-size: 17px; }
.f1 { animation: f1 9s infinite; } .f2 { animation: f2 9s infinite; } .end { animation: end 9s infinite; }
@keyframes f1 { 0%, 12% { opacity: 0 } 17%, 97% { opacity: 1 } 100% { opacity: 0 } }
@keyframes f2 { 0%, 34% { opacity: 0 } 39%, 97% { opacity: 1 } 100% { opacity: 0 } }
@keyframes end { 0%, 52% { opacity: 0 } 57%, 97% { opacity: 1 } 100% { opacity: 0 } }
@media (prefers-reduced-motion: reduce) { .f1, .f2, .end { animation: none } }
"""


class Decoded(NamedTuple):
    """What an order wrote in the cells of one puzzle, when, and the share of all puzzles that it solves."""

    digits: str
    step: list[int]
    forwards: int
    solved: float


def groups(cell: int) -> set[int]:
    """The cells that share a row, a column or a box with one, itself left out."""
    row, column = divmod(cell, SIDE)
    others = {(r, c) for r in range(SIDE) for c in range(SIDE)}
    same_box = {(r, c) for r, c in others if (r // 2, c // 2) == (row // 2, column // 2)}
    shared = {(r, c) for r, c in others if r == row or c == column} | same_box
    return {r * SIDE + c for r, c in shared} - {cell}


def panel(decoded: Decoded, puzzle: str, title: str, left: int) -> list[str]:
    """One grid with its title and verdict; cells appear with the forward that wrote them."""
    parts = [f'<text class="title" x="{left}" y="38">{title}</text>']
    parts.append(f'<text class="note" x="{left}" y="64">{decoded.forwards} denoiser forwards</text>')
    bad = [cell for cell in range(SIDE**2) if any(decoded.digits[cell] == decoded.digits[o] for o in groups(cell))]
    for cell, digit in enumerate(decoded.digits):
        x, y = left + CELL * (cell % SIDE), TOP + CELL * (cell // SIDE)
        square = f'x="{x}" y="{y}" width="{CELL}" height="{CELL}"'
        spot = f'x="{x + CELL // 2}" y="{y + 37}"'
        parts.append(f'<rect class="cell" {square}/>')
        if puzzle[cell] != ".":
            parts.append(f'<rect class="cell given" {square}/><text class="digit clue" {spot}>{digit}</text>')
            continue
        when = ("first", "second")[decoded.step[cell]]
        shown = f'<rect class="cell {when}" {square}/><text class="digit" {spot}>{digit}</text>'
        parts.append(f'<g class="f{decoded.step[cell] + 1}">{shown}</g>')
    for box in range(SIDE):
        x, y = left + 2 * CELL * (box % 2), TOP + 2 * CELL * (box // 2)
        parts.append(f'<rect class="box" x="{x}" y="{y}" width="{2 * CELL}" height="{2 * CELL}"/>')
    inset = [(left + CELL * (cell % SIDE) + 3, TOP + CELL * (cell // SIDE) + 3) for cell in bad]
    marks = [
        f'<rect class="conflict" x="{x}" y="{y}" width="{CELL - 6}" height="{CELL - 6}" rx="5"/>' for x, y in inset
    ]
    word = "wrong: marked cells clash" if bad else "right"
    verdict = f'<text class="verdict {"wrong" if bad else "right"}" x="{left}" y="{TOP + 4 * CELL + 32}">{word}</text>'
    parts.append(f'<g class="end">{"".join(marks)}{verdict}</g>')
    share = f"solves {100 * decoded.solved:.0f}% of 500 test puzzles"
    parts.append(f'<text class="note" x="{left}" y="{TOP + 4 * CELL + 57}">{share}</text>')
    return parts


def drawing(usual: Decoded, learned: Decoded, puzzle: str) -> str:
    """The SVG: it needs no script, and shows the last picture where nothing moves."""
    height = TOP + 4 * CELL + 116
    key = height - 26
    label = "The same 4x4 sudoku in two forwards: most confident first ends in a clash, the learned order is right"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 576 {height}" role="img" aria-label="{label}">']
    parts += [f"<style>{STYLE}</style>", f'<rect width="576" height="{height}" rx="12" fill="var(--card)"/>']
    for decoded, (title, left) in zip((usual, learned), PANELS, strict=True):
        parts += panel(decoded, puzzle, title, left)
    for x, name, text in ((24, "given", "given"), (128, "first", "forward 1"), (264, "second", "forward 2")):
        parts.append(f'<rect class="cell {name}" x="{x}" y="{key - 15}" width="20" height="20"/>')
        parts.append(f'<text class="note" x="{x + 28}" y="{key}">{text}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(
    denoiser: Path = Path(__file__).parents[1] / "docs/results/sudoku/denoiser",
    updates: int = 600,
    out: Path = Path("docs/replay.svg"),
) -> None:
    """Learn, decode and draw.

    Args:
        denoiser: run folder of train-denoiser.
        updates: half of them are those of the plan; see `sudoku.py`.
        out: the SVG file.
    """
    network = load_denoiser(denoiser)
    data = Sudoku(train=4000, min_clues=2, max_clues=4)
    test = data.splits(network.tokenizer)["test"].take(500)
    puzzles = test.references or []
    with TemporaryDirectory() as folder:
        learned = learn_opening(network, data, 0, updates, Path(folder) / "opening")
    policies: list[Policy] = [Ranked("top_prob"), learned]
    outputs = [decode(network, policy, test.batch, max_steps=STEPS, mode=True) for policy in policies]
    texts = [test.texts(output.sequences) for output in outputs]
    right = torch.stack([test.grade(found, puzzles) for found in texts])
    row = int(((right[0] == 0) & (right[1] == 1)).nonzero()[0])
    shown = [
        Decoded(text[row], output.reveal_step[row, -(SIDE**2) :].tolist(), int(output.nfe[row]), float(share))
        for text, output, share in zip(texts, outputs, right.mean(1), strict=True)
    ]
    write_text(out, drawing(shown[0], shown[1], puzzles[row]))
    print(f"puzzle {puzzles[row]}: {shown[0].digits} is wrong, {shown[1].digits} is right; {out}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
