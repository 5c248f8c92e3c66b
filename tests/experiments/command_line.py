"""The `orderppl` command, called in this process."""

from __future__ import annotations

import pytest

from orderppl.experiments import cli


def call(*words: str) -> int:
    """Exit code of the command with these words."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    assert isinstance(end.value.code, int)
    return end.value.code
