"""Lists and Latin squares, whose rows need different numbers of forwards, and the most that any rule can reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import combinations, permutations
from math import perm
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from orderppl.data.answers import graded
from orderppl.data.dataset import SPLITS, Row, TextData, at_least, different, one_of, texts_of
from orderppl.data.report import LoadReport
from orderppl.data.sudoku import BLANK, CELLS, all_grids, completions
from orderppl.data.tokenizers import Tokenizer, WordTokenizer
from orderppl.errors import UserError

Kind = Literal["copy", "replace", "sort", "insert", "shuffle", "square"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LETTERS = "abcdefghijklmnopqrst"
MOST_ITEMS = 8  # 40,320 orders


@lru_cache(maxsize=10_000)
def answers(prompt: str) -> tuple[str, ...]:
    """All right responses to a prompt of `Lists`; rows have each of them with the same probability."""
    given, _, task = prompt.partition(" : ")
    items, (kind, *words) = given.split(), task.split()
    if kind == "square":
        return tuple("".join(map(str, grid)) for grid in all_grids(boxes=False)[completions(given, boxes=False)])
    found: Iterable[Sequence[str]] = [items]
    if kind == "replace":
        found = [[words[2] if item == words[0] else item for item in items]]
    elif kind == "sort":
        found = [sorted(items)]
    elif kind == "insert":
        found = [[*items[:place], *words, *items[place:]] for place in range(len(items) + 1)]
    elif kind == "shuffle":
        found = permutations(items)
    return tuple(map(" ".join, found))


def solved(texts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Whether texts are among the right responses to the prompts: float64 [N]."""
    return graded(texts, prompts, lambda text, prompt: text in answers(prompt))


def limit(prompt: str, steps: int) -> float:
    """The largest probability of a right response that any rule can reach with so many forwards, tokens drawn.

    The rule may know everything, and read all that is revealed; but the tokens of one step are drawn independently of
    each other, each from its exact conditional. So every answer that is left has the same probability, and

        best(A, T) = max over sets S of the sum over values v of S in A of best(A with v, T - 1) prod_i p_i(v_i),

    where the last set is all that is hidden, and best is 1 where one answer is left. Tokens that are certain cost
    nothing. It follows that

        copy, replace, sort: 1.
        insert into n items, m = n + 1 places, T = 1: (m - 1)! 2^(m - 1) / m^m. One token tells on which side of it
            the new item stands, so that further forwards search for its place.
        shuffle m items: best(m, T) = max over sizes k of m! / ((m - k)! m^k) best(m - k, T - 1).
        square: from the list of all completions; with fewer than 4 clues that takes long.

    Greedy tokens are not bound by it: a denoiser may prefer one of several equal answers.

    Args:
        prompt: of a row of `Lists`.
        steps: forwards T, at least 1.
    """
    at_least(1, steps=steps)
    if prompt.endswith("shuffle"):
        return _shuffled(len(prompt.split()) - 2, steps)
    texts = answers(prompt)
    tokens = np.array([text.split() if " " in text else list(text) for text in texts])  # [A, L]
    return _best(_plain(tokens), steps)


@cache
def _shuffled(items: int, steps: int) -> float:
    """Of `steps` sets, one of each size at most: the items that are left are alike."""
    if steps == 1 or items < 2:
        return perm(items) / max(items, 1) ** items
    tried = (perm(items, size) / items**size * _shuffled(items - size, steps - 1) for size in range(1, items + 1))
    return max(tried)


def _plain(tokens: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Answers [A, L] without certain columns, values numbered as they come: alike problems are looked up."""
    columns = []
    for column in tokens.T.tolist():
        numbers = {value: number for number, value in enumerate(dict.fromkeys(column))}
        if len(numbers) > 1:
            columns.append([numbers[value] for value in column])
    return tuple(zip(*columns, strict=True)) or ((),)


@cache
def _best(rows: tuple[tuple[int, ...], ...], steps: int) -> float:
    """See `limit`; answers as `_plain` writes them."""
    if len(rows) <= steps:  # a token at a time leaves out one answer at least
        return 1.0
    tokens = np.array(rows)  # [A, L]
    share = (tokens[:, None] == tokens).mean(1)  # [A, L], the conditional of every answer's token
    best = float(share.prod(1).sum())
    if steps == 1:
        return best
    places = range(tokens.shape[1])
    sets = [chosen for size in range(1, len(places)) for chosen in combinations(places, size)]
    tried = []
    for chosen in map(list, sets):
        _, first, group = np.unique(tokens[:, chosen], axis=0, return_index=True, return_inverse=True)
        drawn = share[first][:, chosen].prod(1)  # [G], of every outcome that some answer has
        tried.append((float(drawn.sum()), drawn, group.reshape(-1)))
    for most, drawn, group in sorted(tried, key=lambda entry: -entry[0]):
        if most <= best + 1e-12:
            break
        left = [_best(_plain(tokens[group == number]), steps - 1) for number in range(len(drawn))]
        best = max(best, float(drawn @ np.array(left)))
    return best


class Lists(TextData):
    """Tasks on which rules are said not to adapt: lists of different letters, and Latin squares of order 4.

    Rows are of all kinds, mixed; every prompt says of which kind it is. Where several responses are right, each has
    the same probability. Kinds of tasks are those of ParallelBench (arXiv 2510.04767); rows are generated.

    Kinds:
        copy: `d k b : copy` -> `d k b`.
        replace: `d k b : replace k by q` -> `d q b`.
        sort: `d k b : sort` -> `b d k`.
        insert: `d k b : insert q` -> `d q k b`, or with q at any other of the 4 places.
        shuffle: `d k b : shuffle` -> `k b d`, or any other order.
        square: `12....3.3....4.. : square` -> 16 digits, every row and column with 1 to 4; any completion is right.

    The name of a row is its difficulty, such as `shuffle 5` (items) or `square 6` (clues). No two rows share a prompt.

    Args:
        kinds: which of them, equally often; one that is named twice comes twice as often.
        train: training rows.
        validation: validation rows (0: no such split).
        test: test rows (0: no such split).
        min_items: fewest items of a list; their number is uniform.
        max_items: most items.
        min_clues: fewest clues of a square; their number is uniform.
        max_clues: most clues.
        seed: fixes the rows.
        options: see `TextData`.

    Raises:
        UserError: a setting is out of range, or there are not that many different rows.
    """

    usual_grade = staticmethod(solved)
    usual_separator = True
    ends = False

    def __init__(
        self,
        kinds: Sequence[Kind] = KINDS,
        train: int = 40_000,
        validation: int = 500,
        test: int = 1200,
        min_items: int = 3,
        max_items: int = 6,
        min_clues: int = 4,
        max_clues: int = 10,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not kinds:
            raise UserError("kinds", "there is none", f"give some of {', '.join(KINDS)}")
        self.kinds = [one_of("kinds", kind, *KINDS) for kind in kinds]
        at_least(1, train=train)
        at_least(0, validation=validation, test=test)
        for name, low, high, lowest, highest in (
            ("min_items", min_items, max_items, 2, MOST_ITEMS),
            ("min_clues", min_clues, max_clues, 0, CELLS),
        ):
            if not lowest <= low <= high <= highest:
                remedy = f"use {lowest} to {highest}, the smaller first"
                raise UserError(name, f"{low} to {high} {name.removeprefix('min_')}", remedy)
        self.sizes = dict(zip(SPLITS, (train, validation, test), strict=True))
        self.items, self.clues, self.seed = (min_items, max_items), (min_clues, max_clues), seed

    def build_tokenizer(self, rows: Iterable[Row]) -> Tokenizer:
        """One token per letter, cell and word, of all kinds: a denoiser of some of them may learn the others."""
        return WordTokenizer.build(["1" + BLANK, *texts_of(rows), *LETTERS, *KINDS, "by"], "digits", 9)

    def make_rows(self, report: LoadReport) -> dict[str, list[Row]]:
        """Draw the rows."""
        rng = np.random.default_rng(self.seed)
        seen: set[tuple[str, str]] = set()

        def draw(found: int) -> tuple[str, str]:
            return self._prompt(self.kinds[found % len(self.kinds)], rng)

        rows: dict[str, list[Row]] = {}
        for split, size in self.sizes.items():
            drawn = different(draw, size, seen, split=split, what="rows", remedy="more kinds, items or clues")
            for name, prompt in drawn:
                right = answers(prompt)
                row = Row(right[rng.integers(len(right))], prompt, answer=prompt, name=name)
                rows.setdefault(split, []).append(row)
        return rows

    def _prompt(self, kind: Kind, rng: np.random.Generator) -> tuple[str, str]:
        """Difficulty and prompt of a row."""
        if kind == "square":
            grids, clues = all_grids(boxes=False), int(rng.integers(self.clues[0], self.clues[1] + 1))
            grid, shown = grids[rng.integers(len(grids))], set(rng.permutation(CELLS)[:clues].tolist())
            puzzle = "".join(str(value) if cell in shown else BLANK for cell, value in enumerate(grid))
            return f"square {clues}", f"{puzzle} : square"
        size = int(rng.integers(self.items[0], self.items[1] + 1))
        *items, new = rng.permutation(list(LETTERS))[: size + 1].tolist()
        words = {"insert": f" {new}", "replace": f" {items[rng.integers(size)]} by {new}"}.get(kind, "")
        return f"{kind} {size}", f"{' '.join(items)} : {kind}{words}"
