"""The moving picture of the README is what its command draws."""

from pathlib import Path
from xml.etree import ElementTree

import picture

ROOT = Path(__file__).parents[2]


def test_the_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    picture.main(out=tmp_path / "replay.svg")
    assert (tmp_path / "replay.svg").read_text("utf-8") == (ROOT / "docs" / "replay.svg").read_text("utf-8")


def test_the_picture_needs_no_script_and_rests_where_motion_is_unwanted() -> None:
    text = (ROOT / "docs" / "replay.svg").read_text("utf-8")
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert tags == {"svg", "style", "rect", "text", "g"}
    assert "prefers-color-scheme: dark" in text and "prefers-reduced-motion: reduce" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
