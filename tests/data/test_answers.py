"""The answer parser on the forms it meets."""

from __future__ import annotations

from decimal import Decimal

import pytest

from orderppl.data import exact_match
from orderppl.data.answers import answers_match, flexible_match, parse_answer, same_text
from orderppl.errors import UserError


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72", "72"),
        ("<<3*20=60>> <<60-15=45>> #### 45", "45", "45"),
        ("3 * 20 = 60 ; 60 - 15 - 25 = 20 # 20", "20", "20"),
        ("#### 1,234,567", "1234567", "1234567"),
        ("#### 1,000 dollars", "1000", "1000"),
        ("#### -3", "-3", "-3"),
        ("# - 3", "-3", "-3"),
        ("#### $18", "18", "18"),
        ("#### -$18.50", "-18.50", "-18.50"),
        ("####18.", "18", "18"),
        ("#### .5", ".5", ".5"),
        ("#### 5 or rather #### 6", "6", "6"),
        ("#### 5 ####", "5", "5"),
        ("#### 5, which is 10-3", "5", "3"),
        ("the answer is 7", None, "7"),
        ("so 10-3=7 and 10 - 3", None, "3"),
        ("x = -3", None, "-3"),
        ("(2)-4", None, "4"),
        ("between 1,2", None, "2"),
        ("no answer ####", None, None),
        ("", None, None),
        # of public issue threads
        ("#### 9{,}500", "9500", "9500"),
        (r"the total is \boxed{$9{,}500}.", "9500", "9500"),
        (r"\boxed{ \$12}", "12", "12"),
        ("#### +18", "18", "18"),
        ("#### $-5", "-5", "-5"),
        ("#### \u22125", "-5", "-5"),
        ("7 \u2212 9 = \u22122", None, "-2"),
        ("#### 18 (see note #2)", "18", "2"),
        (r"\boxed{18} as in case # 2", "18", "2"),
        (r"first \boxed{1}, then \boxed{2}", "2", "2"),
        (r"#### 3, not \boxed{4}", "3", "4"),
    ],
)
def test_parse_answer(text: str, strict: str | None, flexible: str | None) -> None:
    assert parse_answer(text) == (None if strict is None else Decimal(strict))
    assert parse_answer(text, flexible=True) == (None if flexible is None else Decimal(flexible))


def test_answers_are_compared_as_numbers() -> None:
    assert answers_match("#### 1000.0", "... #### 1,000")
    assert answers_match("#### 007", "7")
    assert answers_match("# 20", "#### 20")
    assert not answers_match("#### 10", "#### 100")
    assert not answers_match("it is 20", "#### 20")
    assert answers_match("it is 20", "#### 20", flexible=True)
    assert not answers_match("", "#### 0")
    assert answers_match("#### -0", "0")
    assert answers_match("#### 9500", "9{,}500")
    assert answers_match("#### -5", "\u2212$5")


def test_exact_match() -> None:
    assert exact_match(["#### 1", "#### 2", "none"], ["1", "#### 3", "4"]).tolist() == [1.0, 0.0, 0.0]
    assert flexible_match(["it is 1", "#### 2 or 3"], ["1", "2"]).tolist() == [1.0, 0.0]
    with pytest.raises(UserError, match="2 predictions for 1 references"):
        exact_match(["1", "2"], ["1"])
    for reference in ("I do not know, perhaps 1", "1 or 2", "", "$"):
        with pytest.raises(UserError, match="reference"):
            exact_match(["#### 1"], [reference])


def test_same_text() -> None:
    assert same_text(["a b", " a b\n", "A b", ""], ["a b"] * 4).tolist() == [1.0, 1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="1 predictions for 2 references"):
        same_text(["1"], ["1", "2"])
