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


def test_it_stays_one_line_inside_a_traced_program() -> None:
    def program() -> None:
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        raise ERROR

    with pytest.raises(UserError, match=r"\Asteps: 3: too few; and odd; use 4\Z"):
        poutine.trace(program).get_trace()
