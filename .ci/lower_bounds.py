"""Print pip constraints that pin every dependency to the lower bound that pyproject.toml declares for it.

python .ci/lower_bounds.py > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

BOUND = re.compile(r"^([\w.-]+)(?:\[[\w,-]+\])?>=([\d.]+)")  # extras have no place among constraints


def pins(pyproject: Path) -> list[str]:
    """Of the core dependencies, each of which has a bound, and of the adapter for lm-eval."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    found = {
        name: BOUND.match(name) for name in [*project["dependencies"], *project["optional-dependencies"]["lm-eval"]]
    }
    unbound = [name for name, match in found.items() if match is None]
    if unbound:
        raise SystemExit(f"{pyproject}: no lower bound: {', '.join(unbound)}; write name>=version")
    return [f"{match[1]}=={match[2]}" for match in found.values() if match is not None]


if __name__ == "__main__":
    sys.stdout.write("\n".join(pins(Path(__file__).resolve().parents[1] / "pyproject.toml")) + "\n")
