"""How every figure looks, and how it becomes a file: SVG that reads well on a light and on a dark page.

A figure is drawn with the colours of `DARK` alone, on a transparent ground. The file names the colour that takes the
place of each of them where the reader prefers dark pages; viewers that know no style sheets show the light ones. Text
stays text. The colours are those of Okabe and Ito, with purple in place of yellow; maps are cividis.
"""

from __future__ import annotations

import io
import re
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from orderppl.files import write_text

WIDTH = 5.0  # inches: 480 pixels of a page; a phone shows it at three quarters of that
HEIGHT = 3.2
INK, SOFT, GREY, GRID = "#1f2328", "#57606a", "#c4cad1", "#e3e6ea"
DARK = {
    "#0072b2": "#58a9e6",
    "#d55e00": "#ff8c4d",
    "#009e73": "#35c89f",
    "#cc79a7": "#ea9fca",
    "#e69f00": "#f5b83d",
    "#56b4e9": "#a3d8f8",
    "#7a4fb5": "#b692f0",
    INK: "#e6edf3",
    SOFT: "#9da7b3",
    GREY: "#48505a",
    GRID: "#2b3138",
}
COLOURS = tuple(DARK)[:7]
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "image.cmap": "cividis",
    "image.interpolation": "none",
}
WRITTEN: Any = {"svg.fonttype": "none", "svg.hashsalt": "orderppl"}  # the same figure is the same file
FONT = re.compile(r"'DejaVu Sans'[^;\"]*")
SVG = "{http://www.w3.org/2000/svg}"
ElementTree.register_namespace("", SVG[1:-1])
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
CLIP = re.compile(r'<clipPath id="(\w+)"')
LONG, SPACE = re.compile(r"-?\d+\.\d{2,}"), re.compile(r"\s*([MLQCZz])\s*")


def new_figure(height: float = HEIGHT) -> Figure:
    """An empty figure of the one width; draw on it within `plt.rc_context(STYLE)`."""
    return plt.figure(figsize=(WIDTH, height), layout="constrained")


def legend(figure: Any, handles: dict[str, Any]) -> None:
    """One legend below everything, in as many columns as its names leave room for."""
    columns = max(1, min(4, int(60 / (max(map(len, handles), default=1) + 6))))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns)


def colour_bar(image: ScalarMappable, axes: Any, label: str) -> None:
    """A colour bar that says what its colours measure."""
    first = axes if not isinstance(axes, list) else axes[0]
    first.figure.colorbar(image, ax=axes, label=label).outline.set_visible(False)


def to_svg(figure: Figure) -> str:
    """The SVG of a figure, with the colours for dark pages; the figure is closed."""
    with plt.rc_context(WRITTEN), io.StringIO() as buffer:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Format": None, "Type": None})
        text = FONT.sub("system-ui, sans-serif", buffer.getvalue())
    plt.close(figure)
    root = ElementTree.fromstring(text)
    _slim(root)
    style = ElementTree.Element(f"{SVG}style")
    style.text = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
        if f"{what}: {light}" in text
    )
    style.text = f"@media (prefers-color-scheme: dark){{{style.text}}}"
    root.insert(0, style)
    text = ElementTree.tostring(root, encoding="unicode").replace("><g", ">\n<g") + "\n"
    for number, name in enumerate(CLIP.findall(text)):  # else named by the last digit of its size
        text = text.replace(name, f"clip{number}")
    return text


def _slim(root: ElementTree.Element) -> None:
    """Leave out names, groups of one, digits and spaces that nobody sees: half of the file."""
    for parent in root.iter():
        parent.tail, parent.text = None, (parent.text or "").strip() or None
        for place, child in enumerate(parent):
            while child.tag == f"{SVG}g" and len(child) == 1 and not set(child.attrib) - {"id"}:
                child = child[0]
            parent[place] = child
        if parent.tag == f"{SVG}g":
            parent.attrib.pop("id", None)
            styles = {child.get("style") for child in parent} if all(c.tag == f"{SVG}use" for c in parent) else set()
            if len(styles) == 1 and None not in styles:  # of markers
                parent.set("style", str(styles.pop()))
                for child in parent:
                    del child.attrib["style"]
        if parent.get("transform", "").startswith("rotate(-0 "):
            del parent.attrib["transform"]
        sizes = {"width", "height"} if parent.tag == f"{SVG}rect" else set()
        for name in ({"d", "x", "y"} | sizes) & set(parent.attrib):
            digits = 2 if "C" in parent.attrib[name] else 1  # a marker is small
            parent.set(name, SPACE.sub(r"\1", LONG.sub(partial(_rounded, digits), parent.attrib[name])))


def _rounded(digits: int, number: re.Match[str]) -> str:
    return f"{float(number[0]):.{digits}f}"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, whole or not at all, and close it.

    Args:
        figure: such as `ax.figure`; drawn within `plt.rc_context(STYLE)`, its colours suit dark pages, too.
        path: of the file.
    """
    write_text(path, to_svg(figure))
