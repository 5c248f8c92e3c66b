"""Every figure is one file that reads well on light and dark pages."""

import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from orderppl.figures import COLOURS, DARK, GREY, GRID, INK, STYLE, WIDTH, colour_bar, legend, new_figure, save_figure

ROOT = Path(__file__).parents[1]
COLOUR = re.compile(r"(?:fill|stroke): (#[0-9a-f]{6})")


def luminance(colour: str) -> float:
    """Of WCAG 2."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))


def contrast(first: str, second: str) -> float:
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("light", [colour for colour in DARK if colour not in (GREY, GRID)])
def test_a_colour_can_be_seen_on_both_grounds(light: str) -> None:
    least = 4.5 if light == INK else 2.0
    assert contrast(light, "#ffffff") >= least and contrast(DARK[light], "#1e2129") >= least + 1.0


def drawn(tmp_path: Path, name: str = "figure.svg") -> str:
    with plt.rc_context(STYLE):
        figure = new_figure()
        axis = figure.subplots()
        colour_bar(axis.imshow(np.eye(3)), axis, "P(step | position)")
        lines = {f"curve {i}": axis.plot([0, 1, 2], [0, i % 3, 1], "o-", color=c)[0] for i, c in enumerate(COLOURS)}
        axis.set(xlabel="position", ylabel="step <3>")
        legend(figure, lines)
    save_figure(figure, tmp_path / name)
    return (tmp_path / name).read_text("utf-8")


def test_every_colour_of_a_file_has_one_for_dark_pages_and_the_ground_is_none(tmp_path: Path) -> None:
    text = drawn(tmp_path)
    root = ElementTree.fromstring(text)
    assert root.get("width") == f"{72 * WIDTH:g}pt"
    style = next(element.text or "" for element in root if element.tag.endswith("style"))
    used = {colour for element in root.iter() for colour in COLOUR.findall(element.get("style", ""))}
    assert used >= {*COLOURS, INK} and used <= set(DARK)
    for colour in used:
        assert f'{colour}"]{{' in style and DARK[colour] in style
    words = {"".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")}
    assert {"position", "step <3>", "P(step | position)", "curve 6"} <= words
    assert not re.search(r"(?:href|src)=\"(?!#|data:)", text) and not plt.get_fignums()


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    assert drawn(tmp_path) == drawn(tmp_path, "again.svg")


def test_all_that_draws_a_file_draws_it_here() -> None:
    """Nothing of library, models or experiments saves a figure in another way."""
    for folder in ("orderppl", "models", "guides", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "figures.py" or ".savefig(" not in path.read_text("utf-8"), path
