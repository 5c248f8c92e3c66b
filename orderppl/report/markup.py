"""HTML from Python, with everything escaped that is not markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = {"img", "input", "link", "meta", "br"}  # elements without an end


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: `Markup` stays as it is; anything else is shown as text.
        attributes: `class_` and `for_` stand for the reserved words, `_` for a hyphen; True is an attribute without a
            value, None and False are left out.
    """
    shown = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            shown.append(f" {key}")
        elif value is not None and value is not False:
            shown.append(f' {key}="{html.escape(str(value))}"')
    start = f"<{name}{''.join(shown)}>"
    return Markup(start) if name in VOID else Markup(f"{start}{join(children)}</{name}>")


def join(parts: Iterable[object]) -> Markup:
    """One after the other."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))


def table(caption: object, heads: Sequence[str], lines: Iterable[Sequence[object]], text_columns: int = 1) -> Markup:
    """A table that scrolls sideways on its own where the page is too narrow.

    Args:
        caption: shown above.
        heads: one per column.
        lines: cells, one per column.
        text_columns: columns at the left that hold text; the others hold numbers and are aligned to the right.
    """

    def cells(line: Sequence[object]) -> Markup:
        return join(
            tag("th", cell, scope="row")
            if index == 0
            else tag("td", cell, class_="text" if index < text_columns else None)
            for index, cell in enumerate(line)
        )

    head = join(
        tag("th", name, scope="col", class_="text" if index < text_columns else None)
        for index, name in enumerate(heads)
    )
    body = join(tag("tr", cells(line)) for line in lines)
    whole = tag("table", tag("caption", caption), tag("thead", tag("tr", head)), tag("tbody", body))
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label="Table")
