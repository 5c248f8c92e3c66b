"""What README and documents tell a reader to type: their Python runs, their commands are ones that there are."""

from __future__ import annotations

import ast
import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from orderppl.cli.main import COMMANDS
from orderppl.cli.parser import parse

import readme_tables

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MY_MODULE = """
from orderppl import Policy
from orderppl.guides import Guide

class MyGuide(Guide):
    def __init__(self, num_steps: int, width: int = 8) -> None:
        super().__init__(num_steps)

class MyPolicy(Policy):
    def __init__(self, tau: float = 0.5) -> None:
        super().__init__()
"""


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The lines of shell on a page that run something of ours, as words."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").replace("$T", "5").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("orderppl", "torchrun", "python"):
                yield words


@pytest.fixture
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the documents take as given: a module and a config of one's own."""
    (tmp_path / "my_module.py").write_text(MY_MODULE, "utf-8")
    for name in ("my.yaml", "large.yaml"):
        (tmp_path / name).write_text("num_steps: 4\ndata: Chains\ndenoiser: MarkovChainDenoiser\nguide: PolicyGuide\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(page: Path) -> tuple[dict[str, object], str]:
    """Run the Python of a page in one session; what is left in it, and what it printed."""
    session: dict[str, object] = {}
    with redirect_stdout(io.StringIO()) as output:
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), session)  # the file under test is our own
    return session, output.getvalue()


def test_the_readme_is_one_screen_of_each() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 120
    (code,) = blocks(ROOT / "README.md", "python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15 and sum(line.startswith(("import", "from")) for line in lines) == 1


def test_the_python_of_the_readme_runs_and_its_order_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    _, printed = run_blocks(ROOT / "README.md")
    low = re.search(r"low=(-?[\d.]+)", printed)
    assert low is not None and float(low[1]) > 0


def test_the_tables_of_the_readme_are_those_of_its_command() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for table in readme_tables.tables(ROOT / "docs" / "results" / "frontier-programs-wide"):
        assert f"\n{table}\n\n" in text, "python experiments/readme_tables.py docs/results/frontier-programs-wide"


@pytest.mark.filterwarnings("ignore:.*requires_grad.*:UserWarning")  # Pyro 1.9 converts its own loss that way
def test_the_python_of_the_page_on_python_runs_top_to_bottom() -> None:
    assert len(blocks(ROOT / "docs" / "python.md", "python")) >= 3
    session, _ = run_blocks(ROOT / "docs" / "python.md")
    assert session["loss"] == session["loss"]
    assert session["nats"] > 0  # type: ignore[operator]


def test_the_python_of_infilling_runs() -> None:
    session, _ = run_blocks(ROOT / "docs" / "infilling.md")
    assert session["output"].reveal_step[0, [0, 9]].tolist() == [-1, -1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    """Pages of tutorials are made from scripts, and the index of results from its folders."""
    for link in LINK.findall(page.read_text("utf-8")):
        if not link.startswith("http"):
            path = page.parent / link
            assert path.is_file() or path.with_suffix(".py").is_file() or link == "results.md", link


def test_there_are_commands_to_check() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) >= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_there_is(page: Path, somewhere: Path) -> None:
    for words in commands(page):
        if words[0] == "python":
            check_script(words[1:])
            continue
        start = words.index("orderppl.cli.main") if words[0] == "torchrun" else 0
        command, arguments = words[start + 1], words[start + 2 :]
        assert command in COMMANDS, words
        kind = import_module(f"orderppl.cli.{command.replace('-', '_')}").Config
        assert parse(kind, arguments, command) is not None, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_of_a_page_is_one_of_fit_order(page: Path, somewhere: Path) -> None:
    from orderppl.cli.fit_order import Config

    for text in blocks(page, "yaml"):
        (somewhere / "page.yaml").write_text(text, "utf-8")
        assert parse(Config, ["--config", "page.yaml"], "fit-order") is not None


def check_script(words: list[str]) -> None:
    """An experiment is there, and takes the options that it is given; a module is there."""
    if words[0] == "-m":
        assert find_spec(words[1]) is not None, words
        return
    path = ROOT / words[0]
    assert path.is_file(), words
    (main,) = (
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    known = {argument.arg for argument in (*main.args.args, *main.args.kwonlyargs)}
    given = {word[2:].split("=")[0].split(".")[0] for word in words[1:] if word.startswith("--")}
    assert given <= known, words
