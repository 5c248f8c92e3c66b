"""Pages that the documentation site makes from files written for other readers."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path

import notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?.*$", re.MULTILINE)
INTERVAL = re.compile(r"(?<=\| )([-+]?[\d.]+ [\[(][^\])|]*[\])])(?= *\|)")
TITLE = re.compile(r"^# (.+)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page, a page for every tutorial and notebook, and an index of the results."""
    docs = Path(config.docs_dir)
    pages = {"index.md": as_front_page((docs.parent / "README.md").read_text("utf-8"))}
    for script in sorted((docs / "tutorials").glob("*.py")):
        text = script.read_text("utf-8")
        if text.startswith("# %%"):  # cells; the tests run them. Other files are shown by those that use them.
            pages[f"tutorials/{script.stem}.md"] = as_markdown(text)
    pages |= {f"notebooks/{path.stem}.md": as_page(path) for path in notebooks.NOTEBOOKS}
    pages["results.md"] = as_index(sorted((docs / "results").glob("*/README.md")), docs)
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Keep a number and its interval in one line of a table; show the pages of notebooks."""
    markdown = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)
    return INTERVAL.sub(r'<span class="number">\1</span>', markdown)


def as_front_page(readme: str) -> str:
    """Turn links into the repository into links within the site; files that the site lacks become plain text."""
    readme = re.sub(r"\]\(docs/(tutorials/\w+)\.py\)", r"](\1.md)", readme)
    readme = readme.replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((CONTRIBUTING\.md|CHANGELOG\.md|CITATION\.cff|mkdocs\.yml|LICENSE)\)", r"\1", readme)


def as_markdown(script: str) -> str:
    """Turn a script of cells into text and blocks of code."""
    parts: list[str] = []
    cells = list(CELL.finditer(script))
    ends = [cell.start() for cell in cells[1:]] + [len(script)]
    for cell, end in zip(cells, ends, strict=True):
        body = script[cell.end() : end].strip("\n")
        if cell["markdown"]:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.splitlines()))
        elif body:
            parts.append(f"```python\n{body}\n```")
    return "\n\n".join(parts) + "\n"


def as_page(path: Path) -> str:
    """Run a notebook, and show its cells with what they show."""
    parts = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("docs").symlink_to(notebooks.ROOT / "docs")
        for cell in notebooks.run(path):
            if cell.kind == "code":
                parts.append(f"```python\n{cell.source}\n```")
                parts += [f"```text\n{cell.shown.rstrip()}\n```"] if cell.shown else []
            else:
                parts.append(cell.source)
    parts.insert(1, f"A [notebook]({path.name}), with what its cells showed when this page was built.")
    return "\n\n".join(parts) + "\n"


def as_index(readmes: list[Path], docs: Path) -> str:
    """List the pages of results by their titles."""
    lines = ["# Results", "", "Every table stands under the command that wrote it.", ""]
    for readme in readmes:
        title = TITLE.search(readme.read_text("utf-8"))
        lines.append(f"- [{title[1] if title else readme.parent.name}]({readme.relative_to(docs).as_posix()})")
    return "\n".join(lines) + "\n"
