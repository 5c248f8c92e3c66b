"""The documentation site in a browser, opened from its folder: links, widths, silence, search and the reference."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import pytest
from browser import NEEDS_BROWSER, launched
from test_reference import SHOWN

ROOT = Path(__file__).parents[1]
pytestmark = [
    *NEEDS_BROWSER,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed, see `make docs`"),
]
WIDTHS = (1280, 390)  # a desktop and a phone
# Elements of the text that reach beyond the screen, unless they or what holds them can be scrolled.
BEYOND = """() => [...document.querySelectorAll(".md-content *")].filter(e => {
    const box = e.getBoundingClientRect()
    if (box.width === 0 || box.right <= innerWidth + 1) return false
    for (let holder = e; holder; holder = holder.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(holder).overflowX)) return false
    return true
}).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # strict: a warning is an error
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_the_screen_and_ask_nobody(site: Path, browser: Any, scheme: str) -> None:
    faults: list[str] = []
    for width in WIDTHS:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab = context.new_page()
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "about:")) else faults.append(r.url))
        tab.on("requestfailed", lambda request: faults.append(request.url))
        for path in pages(site):
            tab.goto(path.as_uri())
            where = f"{path.relative_to(site)} at {width}"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, where
            assert tab.evaluate(BEYOND) == [], where
            assert tab.evaluate("[...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).length") == 0
        tab.wait_for_load_state("networkidle")  # closing it would abort what still loads
        context.close()
    assert faults == []


def test_no_link_is_broken(site: Path, browser: Any) -> None:
    tab = browser.new_page()
    links: dict[Path, set[str]] = {}
    anchors: dict[Path, set[str]] = {}
    for path in pages(site):
        tab.goto(path.as_uri())
        links[path] = set(tab.evaluate("[...document.links].map(a => a.href)"))
        anchors[path] = set(tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
    assert len(links) > 50
    for path, targets in links.items():
        for target in targets:
            if target.startswith("file:"):
                address, anchor = urldefrag(target)
                file = Path(unquote(address.removeprefix("file://")))
                assert file.is_file(), (path.name, target)
                assert not anchor or anchor == "__skip" or unquote(anchor) in anchors[file], (path.name, target)


def test_search_works_without_a_server(site: Path, browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto((site / "getting_started.html").as_uri())
    tab.keyboard.press("/")
    tab.keyboard.type("importance weighted")
    tab.wait_for_selector(".md-search-result__item")
    assert "Diagnostics" in tab.inner_text(".md-search-result__list")


def test_the_reference_shows_every_name(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory[inventory.index(b"zlib.\n") + 6 :]).decode().splitlines()
    names = {line.split()[0].rpartition(".")[2] for line in listed}
    assert {thing.__name__ for thing in SHOWN} <= names
