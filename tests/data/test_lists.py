from __future__ import annotations

from collections import Counter
from itertools import chain, combinations, permutations, product
from math import factorial, prod
from typing import Any

import pytest
import torch
from torch import Tensor

from orderppl import decode
from orderppl.data import Lists
from orderppl.data.dataset import Row
from orderppl.data.lists import KINDS, LETTERS, answers, limit, solved
from orderppl.data.report import LoadReport
from orderppl.errors import UserError
from orderppl.policies import Ranked

PROMPTS = {
    "copy": "d k b : copy",
    "replace": "d k b : replace k by q",
    "sort": "d k b : sort",
    "insert": "d k b : insert q",
    "shuffle": "d k b : shuffle",
    "square": "12343412........ : square",
}


def generate(**options: Any) -> dict[str, list[Row]]:
    return Lists(**options).make_rows(LoadReport())


def is_right(kind: str, text: str) -> bool:
    """By the rule of the task, of the prompts above."""
    if kind == "square":
        cells = [text[4 * row : 4 * row + 4] for row in range(4)]
        lines = [*cells, *("".join(column) for column in zip(*cells, strict=True))]
        return text.startswith("12343412") and all(sorted(line) == list("1234") for line in lines)
    items = text.split()
    return {
        "copy": items == ["d", "k", "b"],
        "replace": items == ["d", "q", "b"],
        "sort": items == ["b", "d", "k"],
        "insert": items.count("q") == 1 and [item for item in items if item != "q"] == ["d", "k", "b"],
        "shuffle": sorted(items) == ["b", "d", "k"],
    }[kind]


def candidates(kind: str) -> list[str]:
    if kind == "square":
        return ["12343412" + "".join(cells) for cells in product("1234", repeat=8)]
    return [" ".join(items) for size in (3, 4) for items in product("bdkq", repeat=size)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_all_texts_that_the_rule_allows(kind: str) -> None:
    texts = candidates(kind)
    right = [text for text in texts if is_right(kind, text)]
    assert sorted(answers(PROMPTS[kind])) == sorted(right)
    assert len(right) == {"insert": 4, "shuffle": 6, "square": 4}.get(kind, 1)
    expected = torch.tensor([is_right(kind, text) for text in texts], dtype=torch.float64)
    assert torch.equal(solved(texts, [PROMPTS[kind]] * len(texts)), expected)


def best_by_enumeration(right: list[tuple[str, ...]], shown: tuple[str | None, ...], steps: int) -> float:
    """Every set, and every outcome of independent draws from the exact conditionals, right or not."""
    left = [answer for answer in right if all(s in (None, token) for s, token in zip(shown, answer, strict=True))]
    hidden = [place for place, token in enumerate(shown) if token is None]
    if not left or not hidden:
        return float(bool(left))
    share = {place: {v: n / len(left) for v, n in Counter(a[place] for a in left).items()} for place in hidden}
    sizes = range(len(hidden) if steps == 1 else 1, len(hidden) + 1)
    best = 0.0
    for chosen in chain.from_iterable(combinations(hidden, size) for size in sizes):
        total = 0.0
        for values in product(*(share[place] for place in chosen)):
            chance = prod(share[place][value] for place, value in zip(chosen, values, strict=True))
            drawn = dict(zip(chosen, values, strict=True))
            after = tuple(drawn.get(place, token) for place, token in enumerate(shown))
            total += chance * best_by_enumeration(right, after, steps - 1)
        best = max(best, total)
    return best


@pytest.mark.parametrize(
    ("prompt", "steps"),
    [
        *((PROMPTS[kind], steps) for kind in ("copy", "replace", "sort") for steps in (1, 2)),
        *(
            (f"{' '.join(LETTERS[:n])} : {task}", t)
            for n in (2, 3)
            for task in ("insert z", "shuffle")
            for t in (1, 2, 3)
        ),
        ("a b c d : shuffle", 2),
        *((f"{clues} : square", steps) for clues in ("1234341223......", "12343412......2.") for steps in (1, 2)),
    ],
)
def test_limits_are_those_of_all_sets_and_all_draws(prompt: str, steps: int) -> None:
    right = [tuple(text.split() if " " in text else text) for text in answers(prompt)]
    hidden: list[str | None] = [None] * len(right[0])
    if "square" in prompt:  # cells that are certain may be written first: they cost nothing
        columns = list(zip(*right, strict=True))
        hidden = [column[0] if len(set(column)) == 1 else None for column in columns]
    assert limit(prompt, steps) == pytest.approx(best_by_enumeration(right, tuple(hidden), steps), abs=1e-12)


def test_limits_in_closed_form() -> None:
    for n in range(2, 8):
        letters = " ".join(LETTERS[:n])
        assert limit(f"{letters} : insert z", 1) == pytest.approx(factorial(n) * 2**n / (n + 1) ** (n + 1))
        assert limit(f"{letters} : shuffle", 1) == pytest.approx(factorial(n) / n**n)
        assert limit(f"{letters} : shuffle", 2) == pytest.approx(
            max(factorial(n) / (factorial(n - k) * n**k) * factorial(n - k) / (n - k) ** (n - k) for k in range(1, n))
        )
        for task in ("insert z", "shuffle"):
            chances = [limit(f"{letters} : {task}", steps) for steps in range(1, n + 1)]
            assert chances == sorted(chances) and chances[-1] == 1
    # two rows are open, in each of their columns two numbers, which two columns share
    assert limit(PROMPTS["square"], 1) == 4 / 2**8
    assert limit(PROMPTS["square"], 2) == 1
    with pytest.raises(UserError, match="steps"):
        limit("a b : copy", 0)


class Exact:
    """The exact conditionals of one prompt's answers."""

    def __init__(self, right: Tensor, prompt: int, vocab_size: int, mask_index: int) -> None:
        self.right, self.prompt, self.vocab_size, self.mask_index = right, prompt, vocab_size, mask_index

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        shown = state[:, None, self.prompt :]  # [N, 1, L]
        agrees = ((shown == self.right) | (shown == self.mask_index)).all(-1).double()  # [N, A]
        count = torch.einsum("na,alv->nlv", agrees, torch.nn.functional.one_hot(self.right, self.vocab_size).double())
        logits = torch.zeros(*state.shape, self.vocab_size, dtype=torch.float64)
        logits[:, self.prompt :] = torch.where(agrees.any(-1)[:, None, None], count.log(), 0.0)
        return logits


@pytest.mark.parametrize("steps", [1, 2])
def test_decoding_with_exact_conditionals_reaches_the_limit(steps: int) -> None:
    """Shuffles of 4 items in sets of equal sizes, which are the best ones; N = 4,000 drawn texts, |z| < 4.5."""
    data = Lists(["shuffle"], train=200, validation=0, test=1, min_items=4, max_items=4)
    row, n = data.splits()["test"], 4000
    tokenizer, prompt = row.tokenizer, str((row.answers or [""])[0])
    assert tokenizer is not None
    right = torch.tensor([tokenizer.encode(text) for text in answers(prompt)])
    denoiser = Exact(right, row.batch.prefix, data.vocab_size, data.mask_index)
    many = row.rows([0] * n)
    torch.manual_seed(0)
    found = decode(denoiser, Ranked("random"), many.batch, max_steps=steps, temperature=1.0)
    assert (found.nfe == steps).all()
    chance, got = limit(prompt, steps), many.grade(many.texts(found.sequences), many.references or []).mean().item()
    assert abs(got - chance) < 4.5 * (chance * (1 - chance) / n) ** 0.5


def test_rows_are_right_and_different() -> None:
    splits = generate(train=600, validation=60, test=120, min_clues=6, seed=1)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 600, "validation": 60, "test": 120}
    rows = [row for part in splits.values() for row in part]
    assert len({row.prompt for row in rows}) == len(rows)
    assert solved([row.text for row in rows], [str(row.prompt) for row in rows]).all()
    assert all(row.answer == row.prompt for row in rows)
    for row in rows:
        given, _, task = str(row.prompt).partition(" : ")
        size = 16 - given.count(".") if "square" in task else len(given.split())
        assert row.name == f"{task.split()[0]} {size}"
    assert Counter(row.name.split()[0] for row in splits["train"]) == dict.fromkeys(KINDS, 100)
    assert {row.name for row in rows} == {
        *(f"{kind} {size}" for kind in KINDS[:-1] for size in range(3, 7)),
        *(f"square {clues}" for clues in range(6, 11)),
    }
    assert splits == generate(train=600, validation=60, test=120, min_clues=6, seed=1)


def test_every_right_response_is_as_frequent() -> None:
    """Of one prompt: the place of the new item in 3,000 lists of three; |z| < 4.5."""
    rows = generate(kinds=["insert"], train=3000, validation=0, test=0, min_items=3, max_items=3)["train"]
    places = Counter(row.text.split().index(str(row.prompt).split()[-1]) for row in rows)
    assert len(places) == 4
    assert all(abs(n - 750) < 4.5 * (3000 * 0.25 * 0.75) ** 0.5 for n in places.values())
    orders = generate(kinds=["shuffle"], train=3000, validation=0, test=0, min_items=3, max_items=3)["train"]
    seen = Counter(tuple(str(row.prompt).split().index(item) for item in row.text.split()) for row in orders)
    assert set(seen) == set(permutations(range(3)))
    assert all(abs(n - 500) < 4.5 * (3000 / 6 * 5 / 6) ** 0.5 for n in seen.values())


def test_one_token_per_letter_and_cell() -> None:
    data = Lists(train=60, validation=12, test=30)
    for rows in data.splits().values():
        assert rows.tokenizer is not None and rows.names is not None and rows.answers is not None
        for index, (prompt, name) in enumerate(zip(rows.answers, rows.names, strict=True)):
            size = 16 if "square" in name else len(answers(prompt)[0].split())
            assert rows.batch.latent[index].sum() == size
            given = rows.batch.tokens[index][rows.batch.given[index]].tolist()
            assert rows.tokenizer.decode(given[:-1]) == prompt and given[-1] == data.separator_index
        assert data.grade(rows.texts(rows.batch.tokens), rows.references or []).all()
    assert data.end_index is None
    alone = Lists(["copy"], train=30, validation=0, test=0)
    assert alone.vocab_size == data.vocab_size  # whatever the kinds


def test_settings_out_of_range() -> None:
    with pytest.raises(UserError, match="6 to 3 items"):
        Lists(min_items=6, max_items=3)
    with pytest.raises(UserError, match="4 to 17 clues"):
        Lists(max_clues=17)
    with pytest.raises(UserError, match="kinds: 'reverse' is unknown"):
        Lists(["reverse"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="there is none"):
        Lists([])
    with pytest.raises(UserError, match="different rows were found"):
        Lists(["sort"], train=500, validation=0, test=0, min_items=2, max_items=2).splits()
