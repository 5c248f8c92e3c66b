"""Regular expressions of users."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from orderppl import UserError
from orderppl.data import Fasta
from orderppl.data.patterns import Pattern


def test_finds() -> None:
    assert Pattern("umab$", "names").is_in("adalimumab")
    assert not Pattern("umab$", "names").is_in("umab 2")


def test_spans() -> None:
    assert Pattern(r"\d+", "hides").spans("3 pens, 20 ink") == [(0, 1), (8, 10)]
    assert Pattern(r"\d+", "hides").spans("3 pens, 20 ink", most=1) == [(0, 1)]
    assert Pattern(r"\d+", "hides").spans("pens") == []


@pytest.mark.parametrize("text", ["(", "[", "*a", "(" * 5000 + ")" * 5000])
def test_refuses_what_is_none(text: str) -> None:
    with pytest.raises(UserError, match="^names: "):
        Pattern(text, "names")


def test_a_search_that_would_take_for_ever_is_stopped() -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"^names: '\(a\+\)\+\$' takes more than 1 s on one text"):
        Pattern("(a+)+$", "names").is_in("a" * 60 + "b")
    assert time.monotonic() - began < 5


def test_a_data_set_names_its_option(tmp_path: Path) -> None:
    (tmp_path / "train.fasta").write_text(f">{'a' * 60}b\nACDE\n")
    with pytest.raises(UserError, match=r"^names: .* takes more than 1 s"):
        Fasta(str(tmp_path / "train.fasta"), names="(a+)+$").splits()
