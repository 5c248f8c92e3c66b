"""The answer parser on the forms it meets."""

from decimal import Decimal

import pytest

from orderppl.errors import UserError
from orderppl.evaluation import answers_match, exact_match, parse_answer


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
    ],
)
def test_parse_answer(text, strict, flexible):
    assert parse_answer(text) == (None if strict is None else Decimal(strict))
    assert parse_answer(text, flexible=True) == (None if flexible is None else Decimal(flexible))


def test_answers_are_compared_as_numbers():
    assert answers_match("#### 1000.0", "... #### 1,000")
    assert answers_match("#### 007", "7")
    assert answers_match("# 20", "#### 20")
    assert not answers_match("#### 10", "#### 100")
    assert not answers_match("it is 20", "#### 20")
    assert answers_match("it is 20", "#### 20", flexible=True)
    assert not answers_match("", "#### 0")
    assert answers_match("#### -0", "0")


def test_exact_match():
    assert exact_match(["#### 1", "#### 2", "none"], ["1", "#### 3", "4"]).tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="2 predictions for 1 references"):
        exact_match(["1", "2"], ["1"])
    with pytest.raises(UserError, match="reference"):
        exact_match(["#### 1"], ["I do not know, perhaps 1"])
