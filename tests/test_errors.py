"""The one-line error survives what builds exceptions from their text."""

import pickle

import pyro
import pytest
from pyro import poutine

from orderppl.errors import UserError

ERROR = UserError("steps", "3: too few; and odd", "use 4")


def test_copies_made_from_the_text_are_equal() -> None:
    copy = pickle.loads(pickle.dumps(ERROR))
    assert str(copy) == str(ERROR) == "steps: 3: too few; and odd; use 4"
    assert (copy.field, copy.problem, copy.remedy) == ("steps", "3: too few; and odd", "use 4")


def test_line_breaks_in_names_of_users_do_not_break_the_line() -> None:
    assert str(UserError("a\nb", "has the fields \r\n, x\u2028y", "use z")) == "a b: has the fields  , x y; use z"


def test_it_stays_one_line_inside_a_traced_program() -> None:
    def program() -> None:
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        raise ERROR

    with pytest.raises(UserError, match=r"\Asteps: 3: too few; and odd; use 4\Z"):
        poutine.trace(program).get_trace()
