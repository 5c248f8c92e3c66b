"""The page of a report in a real browser: replay, given tokens, keyboard, phone width, light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import NEEDS_BROWSER, launched

from orderppl import load_run
from orderppl.data.dataset import Examples
from orderppl.evaluation import Arm
from orderppl.evaluation.results import write_results
from orderppl.policies import Ranked, Threshold
from orderppl.report import record_replay
from orderppl.report.page import page, sections
from orderppl.unmasking import Batch

pytestmark = NEEDS_BROWSER
HOSTILE = '<img src="x" onerror="document.title=1">'


@pytest.fixture(scope="module")
def run(chain_run: Path, word_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report on an order of states, one of words, and one of states between given ones."""
    folder = tmp_path_factory.mktemp("reported") / "both"
    folder.mkdir()
    parts = []
    for name, source, temperature in (("states", chain_run / "seed-0", 1.0), ("words", word_run, 0.0)):
        loaded = load_run(source)
        arms = [
            Arm("learned", loaded.policy, loaded.num_steps, mode=True, temperature=temperature),
            Arm("entropy", Ranked("entropy"), loaded.num_steps, temperature=temperature),
            Arm("threshold", Threshold(0.3), loaded.num_steps, temperature=temperature),
        ]
        examples = loaded.data.splits()["test"].take(2)
        parts.append(record_replay(arms, loaded.denoiser, examples, name=name, alternatives=4))
    used = parts[1]["problems"][0]["recordings"]["learned"]["decode"]["tokens"][0]
    parts[1]["spelling"][str(used)] = HOSTILE
    loaded = load_run(chain_run / "seed-0")
    given = torch.tensor([[1, 0, 0, 1, 1, 0, 1]]).bool()
    between = Examples(Batch(torch.tensor([[0, 0, 1, 1, 1, 2, 2]]), given=given))
    parts.append(record_replay(arms, loaded.denoiser, between, name="between"))
    replay = {"schema": 2, "seed": 0, "parts": parts}
    (folder / "replay.json").write_text(json.dumps(replay))
    records = [{"metric": "path_nats", "arm": "learned", "value": 1.25, "low": 1.0, "high": 1.5}]
    write_results(folder, "both", {}, [*records, {"metric": "accuracy", "arm": "a rather long name", "value": 0.5}])
    (folder / "report.html").write_text(page("both", replay, "replay.json", sections(folder, [loaded])))
    return folder


@pytest.fixture(scope="module")
def replay(run: Path) -> dict[str, Any]:
    return json.loads((run / "replay.json").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture
def opened(run: Path, browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the report; in the end the console must have stayed silent and nothing but the file been asked for."""
    faults: list[str] = []
    contexts = []

    def page(width: int = 1280, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.clock.install(time=datetime(2026, 1, 1))
        address = (run / "report.html").as_uri()
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on(
            "request",
            lambda request: None if request.url.startswith((address, "data:")) else faults.append(request.url),
        )
        tab.goto(address)
        tab.clock.pause_at(datetime(2026, 1, 2))  # from here only the tests move it, however slow the machine is
        return tab

    yield page
    for context in contexts:
        context.close()
    assert faults == []


def visible(tab: Any, pane: int) -> dict[int, str]:
    """Position -> token that a pane shows."""
    script = """pane => [...document.querySelectorAll(`#tokens-${pane} .token`)].map(
        (cell, i) => cell.classList.contains("masked") ? null : [i, cell.firstChild.textContent])"""
    return dict(entry for entry in tab.evaluate(script, pane) if entry)


def recorded(replay: dict[str, Any], tab: Any, pane: int, done: int) -> dict[int, str]:
    """What the pane must show after `done` steps, from the recordings."""
    part = replay["parts"][int(tab.input_value("#part"))]
    arm, kind = tab.input_value(f"#arm-{pane}"), tab.input_value("#kind")
    one = part["problems"][int(tab.input_value("#problem"))]["recordings"][arm][kind]
    spelt = {token: text.replace(" ", "␣").replace("\n", "⏎") for token, text in part["spelling"].items()}
    return {i: spelt[str(one["tokens"][i])] for i, step in enumerate(one["step"]) if step < done}  # -1: given


def test_play_reveals_tokens_in_the_recorded_order_in_both_panes(
    opened: Callable[..., Any], replay: dict[str, Any]
) -> None:
    tab = opened()
    for part, kind in (("0", "decode"), ("0", "follow"), ("1", "decode"), ("1", "follow")):
        tab.select_option("#part", part)
        tab.select_option("#kind", kind)
        arms = tab.locator("#arm-1 option").all_text_contents()
        tab.select_option("#arm-1", arms[-1])  # on words the threshold, which needs fewer steps
        assert visible(tab, 0) == visible(tab, 1) == {}
        tab.click("#play")
        steps = int(tab.get_attribute("#slider", "max"))
        for done in range(1, steps + 1):
            tab.clock.run_for(900)
            assert tab.input_value("#slider") == str(done)
            assert tab.text_content("#position") == f"Step {done} of {steps}"
            for pane in (0, 1):
                assert visible(tab, pane) == recorded(replay, tab, pane, done)
        assert tab.text_content("#play") == "Play"
        assert len(visible(tab, 0)) == tab.locator("#tokens-0 .token").count() > 0
        tab.clock.run_for(5000)
        assert tab.input_value("#slider") == str(steps)


def test_the_alternatives_are_those_of_the_recording(opened: Callable[..., Any], replay: dict[str, Any]) -> None:
    tab = opened()
    tab.click("#last")
    one = replay["parts"][0]["problems"][0]["recordings"]["learned"]["decode"]
    for position in (0, 5, 6):
        tab.click(f"#token-0-{position}")
        text = tab.text_content("#detail-0 p")
        assert f"Position {position + 1} of 7" in text
        assert f"step {one['step'][position] + 1}, probability {one['probability'][position]:.3f}" in text
        rows = tab.locator("#detail-0 tr").all_inner_texts()
        shares = [float(row.split()[-1]) for row in rows]
        assert [row.split()[0] for row in rows] == [str(token) for token, _ in one["alternatives"][position]]
        assert shares == pytest.approx([share for _, share in one["alternatives"][position]], abs=5.1e-4)
    steps = tab.locator("#steps-0 tbody tr").all_inner_texts()
    assert [int(row.split()[1]) for row in steps] == [step["tokens"] for step in one["steps"]]
    assert f"{one['total_nats']:.3f} nats" in tab.text_content("#outcome-0")


def test_the_keyboard_is_enough(opened: Callable[..., Any], replay: dict[str, Any]) -> None:
    tab = opened()
    focused = "document.activeElement.id"
    order = []
    for _ in range(14):
        tab.keyboard.press("Tab")
        order.append(tab.evaluate(focused))
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"  # the focus is seen
    assert order[:9] == ["part", "problem", "kind", "first", "back", "play", "next", "last", "slider"]
    assert {"arm-0", "tokens-0", "arm-1", "tokens-1"} <= set(order)
    tab.focus("#play")
    tab.keyboard.press("Space")
    assert tab.text_content("#play") == "Pause"
    tab.clock.run_for(900)
    tab.keyboard.press("Space")
    tab.clock.run_for(9000)
    assert tab.input_value("#slider") == "1"
    for key, done in (
        ("ArrowRight", 2),
        ("ArrowRight", 3),
        ("ArrowLeft", 2),
        ("End", 3),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        tab.keyboard.press(key)
        assert tab.input_value("#slider") == str(done)
        assert all(visible(tab, pane) == recorded(replay, tab, pane, done) for pane in (0, 1))
    tab.focus("#slider")
    tab.keyboard.press("ArrowRight")
    assert "Step 1 of 3" in tab.text_content("#announcement")
    assert "learned: revealed" in tab.text_content("#announcement")
    tab.focus("#tokens-1")
    tab.keyboard.press("Home")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
        tab.keyboard.press(key)
    assert tab.get_attribute("#tokens-1", "aria-activedescendant") == "token-1-1"
    assert tab.input_value("#slider") == "1"  # inside the tokens the arrows do not step
    tab.keyboard.press("Space")
    tab.clock.run_for(900)
    assert tab.input_value("#slider") == "2"


def test_given_tokens_are_there_from_the_start(opened: Callable[..., Any], replay: dict[str, Any]) -> None:
    tab = opened()
    tab.select_option("#part", "2")
    assert visible(tab, 0) == visible(tab, 1) == recorded(replay, tab, 0, 0) == {0: "0", 3: "1", 4: "1", 6: "2"}
    assert tab.locator("#tokens-0 .given").count() == 4 and not tab.locator("#prompt").is_visible()
    assert tab.text_content("#outcome-0") == "3 tokens, all masked."
    assert tab.locator("#tokens-0 .fresh").count() == 0
    assert tab.get_attribute("#token-0-3", "aria-label") == "position 4: 1, given"
    assert "Position 2 of 7: masked until step" in tab.text_content("#detail-0 p")  # the first one to reveal
    tab.click("#token-0-3")
    assert tab.text_content("#detail-0") == "Position 4 of 7: 1, given."
    tab.click("#last")
    assert len(visible(tab, 0)) == 7 and tab.locator("#tokens-0 .given").count() == 4
    one = replay["parts"][2]["problems"][0]["recordings"]["learned"]["decode"]
    assert f"{one['total_nats']:.3f} nats in all" in tab.text_content("#outcome-0")


def test_a_phone_shows_everything_without_scrolling_sideways(opened: Callable[..., Any]) -> None:
    tab = opened(360, has_touch=True)
    for part in ("0", "1", "2"):
        tab.select_option("#part", part)
        tab.tap("#next")
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        for name in ("first", "back", "play", "next", "last", "slider", "arm-0", "arm-1"):
            box = tab.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360
            assert box["height"] >= 44
    assert tab.locator("#tokens-1").bounding_box()["y"] > tab.locator("#tokens-0").bounding_box()["y"]


CONTRAST = """() => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const luminance = colour => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(
            c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
    };
    const tokens = [".token:not(.masked)", ".token.masked span", ".token.given"];
    return ["h1", ".hint", "thead th", "#play", "select", ".detail p", "caption", ...tokens]
        .flatMap(rule => [...document.querySelectorAll(rule)].map(element => {
            const pair = [luminance(getComputedStyle(element).color), luminance(ground(element))].sort();
            return [rule, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
        }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(opened: Callable[..., Any], scheme: str) -> None:
    tab = opened(color_scheme=scheme, reduced_motion="reduce")
    ground = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    assert tab.evaluate("getComputedStyle(document.querySelector('.token')).transitionDuration") == "0s"
    tab.select_option("#part", "2")
    tab.click("#next")
    measured = tab.evaluate(CONTRAST)
    assert len({rule for rule, _ in measured}) == 10
    assert [(rule, ratio) for rule, ratio in measured if ratio < 4.5] == []


def test_token_strings_are_text(opened: Callable[..., Any]) -> None:
    tab = opened()
    tab.select_option("#part", "1")
    tab.click("#last")
    assert tab.text_content("#token-0-0 span") == HOSTILE.replace(" ", "␣")
    assert tab.locator("#player img").count() == 0
    assert tab.title() == "both: orderppl report"
    prompt = tab.text_content("#prompt")
    assert prompt and tab.locator("#prompt").is_visible()
