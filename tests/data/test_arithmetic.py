import re
from collections import Counter
from typing import Any

import pytest

from orderppl.data import Arithmetic
from orderppl.data.arithmetic import Variant
from orderppl.data.dataset import Row, texts_of
from orderppl.data.report import LoadReport
from orderppl.data.tokenizers import WordTokenizer
from orderppl.errors import UserError


def generate(*args: Any, **options: Any) -> dict[str, list[Row]]:
    return Arithmetic(*args, **options).make_rows(LoadReport())


def _run(equation: str, modulus: int | None = None) -> tuple[int, int]:
    """Value of the left side, and the result written."""
    left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", equation).groups()  # type: ignore[union-attr]
    a, b = int(left), int(right)
    if sign == "/":
        assert a % b == 0
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // max(b, 1)}[sign]
    return (value if modulus is None else value % modulus), int(result)


def _check(equations: list[str], answer: str, modulus: int | None = None) -> None:
    previous = None
    for equation in equations:
        value, result = _run(equation, modulus)
        assert value == result
        if previous is not None:
            assert equation.split()[0] == previous
        previous = str(result)
    assert previous == answer


def test_chain() -> None:
    splits = generate("chain", train=300, validation=20, test=30, limit=20, seed=3)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 300, "validation": 20, "test": 30}
    signs: Counter[str] = Counter()
    for row in splits["train"]:
        chain, answer = row.text.split(" # ")
        equations = chain.split(" ; ")
        assert len(equations) == 4
        _check(equations, answer)
        assert row.answer == answer
        numbers = [int(n) for n in re.findall(r"\d+", row.text)]
        assert min(numbers) >= 1
        assert max(numbers) <= 20
        # the numbers of the prompt are the start and the operands, in this order
        asked = re.findall(r"\d+", (row.prompt or ""))
        assert asked == [equations[0].split()[0], *(e.split()[2] for e in equations)]
        assert len(row.text.split()) == 25
        signs.update(re.findall(r"[-+*/]", row.text))
    assert set(signs) == set("+-*/")


def test_mod20() -> None:
    splits = generate("mod20", train=200, validation=0, test=20, seed=0)
    assert set(splits) == {"train", "test"}
    tokenizer = WordTokenizer.build(texts_of(splits["train"]))
    for row in splits["train"]:
        chain, answer = row.text.split(" # ")
        equations = chain.split(" ; ")
        _check(equations, answer, modulus=20)
        assert (row.prompt or "").split() == [equations[0].split()[0], *(p for e in equations for p in e.split()[1:3])]
        assert len(tokenizer.encode(row.text)) == 25  # 26 with eos
        assert tokenizer.decode(tokenizer.encode(row.prompt or "")) == (row.prompt or "")


def test_dual() -> None:
    splits = generate("dual", train=400, validation=10, test=10, seed=0)
    first = 0
    for row in splits["train"]:
        parts = row.text.split(" ; ")
        if (row.prompt or "").endswith(" . answer first ?"):
            first += 1
            assert parts[0] == f"# {row.answer}"
            _check(parts[:0:-1], str(row.answer))
        else:
            assert (row.prompt or "").endswith(" . answer last ?")
            chain, answer = row.text.split(" # ")
            _check(chain.split(" ; "), answer)
            assert answer == row.answer
    assert abs(first - 200) < 5 * 10  # binomial(400, 1/2), z = 5


@pytest.mark.parametrize("variant", ["chain", "mod20", "dual"])
def test_splits_share_no_problem(variant: Variant) -> None:
    splits = generate(variant, train=200, validation=100, test=100, num_operations=2, limit=12, seed=0)
    rows = [row for part in splits.values() for row in part]
    assert len({(row.prompt or "") for row in rows}) == 400
    # nor the same problem told with other names, or asked for in the other direction
    problems = set()
    for row in rows:
        equations = [part for part in row.text.replace(" # ", " ; # ").split(" ; ") if not part.startswith("#")]
        problems.add(tuple(equations[::-1] if row.text.startswith("#") else equations))
    assert len(problems) == 400
    tokenizer = WordTokenizer.build(texts_of(rows))
    for row in rows:
        for text in ((row.prompt or ""), row.text):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_seed_fixes_everything() -> None:
    made = [generate("dual", train=30, validation=5, test=5, seed=seed) for seed in (4, 4, 5)]
    assert made[0] == made[1]
    assert made[0]["train"] != made[2]["train"]


def test_bad_settings() -> None:
    with pytest.raises(UserError, match=r"^variant: 'sum' is unknown"):
        generate("sum")
    with pytest.raises(UserError, match=r"^limit: 3 is too small"):
        generate(limit=3)
    with pytest.raises(UserError, match=r"^test: -1 is too small"):
        generate(test=-1)
    with pytest.raises(UserError, match=r"^train: 0 is too small"):
        generate(train=0)
    with pytest.raises(UserError, match=r"only \d+ different problems"):
        generate(train=500, num_operations=1, limit=4)


def test_canvases() -> None:
    """The prompt is given on the left; a response ends, or is filled up with ends."""
    data = Arithmetic("chain", train=40, validation=0, test=5, num_operations=3, limit=10, separator=True)
    examples = data.splits()["train"]
    tokenizer, batch = examples.tokenizer, examples.batch
    assert tokenizer is not None
    assert (data.end_index, data.separator_index, data.mask_index) == (tokenizer.eos_index, tokenizer.eos_index, 1)
    first = batch.prefix
    assert data.prompt_length == first
    assert (batch.tokens[:, first - 1] == tokenizer.eos_index).all()  # the separator
    assert not batch.latent[:, :first].any() and batch.latent[:, first].all()
    assert examples.grade(examples.texts(batch.tokens), examples.references or []).all()
    assert len(tokenizer.tokens) > 21 and {"0", "20"} <= set(tokenizer.tokens)
    filled = Arithmetic("chain", train=40, validation=0, test=5, num_operations=3, limit=10, canvas=30)
    batch = filled.splits()["train"].batch
    assert batch.latent.sum(-1).eq(30).all()
    assert filled.separator_index is None
