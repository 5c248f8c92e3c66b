"""The page: replay, result tables, diagnostics, figures and settings of a run, in one file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from orderppl.data.dataset import Examples
from orderppl.errors import UserError
from orderppl.evaluation import Arm, sweep
from orderppl.evaluation.arms import draws
from orderppl.evaluation.results import FILE as RESULTS_FILE
from orderppl.evaluation.results import read_results, results_table
from orderppl.files import TEMPORARY, write_text
from orderppl.identity import weights_digest
from orderppl.report.markup import Markup, join, table, tag
from orderppl.report.replay import SCHEMA, record_replay
from orderppl.runs import CONFIG, INFO, Run, load_run
from orderppl.unmasking import Batch

REPORT_FILE, REPLAY_FILE, SUMMARY_FILE = "report.html", "replay.json", "summary.json"
FIGURES = {".png": "image/png", ".svg": "image/svg+xml"}
KEYS = ("Space", "←", "→", "Home", "End")
HINT = "Space play or pause, ← → one step, Home End start and end; inside the tokens the arrows choose the token whose "
HINT += "alternatives are shown."
SCORES = ["random", "top_prob", "margin", "entropy", "left_to_right"]


def write_report(
    source: Run | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    examples: Examples | Batch | None = None,
    arms: Sequence[Arm] | None = None,
    problems: int = 3,
    alternatives: int = 5,
    temperature: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Path:
    """Record replays of the learned orders of a run, and write them and all that the run holds as one HTML file.

    report.html opens anywhere, without a network or a server. Its recordings are also in replay.json beside it; every
    other number and figure comes from a file of the run, which the page names.

    Args:
        source: a run; its folder; or a folder with several runs in it. Those learned on the same data for the same
            denoiser and steps are shown side by side.
        out: folder of the report; `report` in that of the run when left out.
        examples: sequences to replay; the first held-out rows of the run's data when left out.
        arms: what to show beside the learned order; heuristics at its step budget when left out.
        problems: rows to replay.
        alternatives: most probable tokens kept per revealed token.
        temperature: of the tokens that learned orders and heuristics write; left out: 0, the most likely ones, where
            something is given, else 1 (without that the most likely tokens are the same for every row).
        seed: of what is drawn.
        device: where runs are loaded to.

    Returns:
        The file.

    Raises:
        UserError: no run, one without an order, a file of it that cannot be shown, or no examples; nothing is written.
    """
    for name, count in (("problems", problems), ("alternatives", alternatives)):
        if count < 1:
            raise UserError(name, f"{count} is not positive", "give at least 1")
    folder = source.folder if isinstance(source, Run) else Path(source)
    runs = [source] if isinstance(source, Run) else [load_run(path, device=device) for path in find_runs(folder)]
    runs = [run for run in runs if run.policy is not None and run.denoiser is not None]
    if not runs:
        raise UserError("run", f"{folder} holds no learned order with its denoiser", "give the folder of a fit")
    out = folder / "report" if out is None else Path(out)
    content = sections(folder, runs)
    parts = []
    for name, group in side_by_side(runs, folder).items():
        rows, split = held_out(group[0], examples, problems)
        heat = temperature
        if heat is None:
            heat = 0.0 if bool((rows.batch.attention_mask & ~rows.batch.latent).any()) else 1.0
        learned = learned_arms(group, heat)
        beside = heuristics(group[0].num_steps, heat, seed) if arms is None else arms
        options: dict[str, Any] = {"name": name, "split": split, "alternatives": alternatives, "seed": seed}
        options["sources"] = {arm.name: _named(run.folder, folder) for arm, run in learned}
        parts.append(record_replay([*(arm for arm, _ in learned), *beside], group[0].denoiser, rows, **options))
    replay = {"schema": SCHEMA, "seed": seed, "parts": parts}
    document = page(folder.resolve().name, replay, _named(out / REPLAY_FILE, folder), content)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / REPLAY_FILE, json.dumps(replay, separators=(",", ":"), allow_nan=False) + "\n")
    write_text(out / REPORT_FILE, document)
    return out / REPORT_FILE


# -------------------------------------------------------------------------------------------------- what is replayed


def find_runs(folder: Path) -> list[Path]:
    """Run folders at or below a folder; below a run lie only its own parts.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("run", f"{folder} is not a folder", "give the folder of a run")
    found = sorted(path.parent for path in folder.rglob(INFO))
    return [path for path in found if not any(other in path.parents for other in found)]


def side_by_side(runs: Sequence[Run], folder: Path) -> dict[str, list[Run]]:
    """Runs of the same data, denoiser and step budget together, by a name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        denoiser = run.config.get("model", {}).get("init_args", run.config).get("denoiser")
        alike = [run.config.get("data"), run.num_steps, denoiser, weights_digest(run.denoiser)]
        groups.setdefault(json.dumps(alike, sort_keys=True, default=str), []).append(run)
    names = [_task_name(group[0], folder) for group in groups.values()]
    return {
        name if names.count(name) == 1 else f"{name} ({_named(group[0].folder, folder)})": group
        for name, group in zip(names, groups.values(), strict=True)
    }


def _task_name(run: Run, folder: Path) -> str:
    data = (run.config.get("data") or {}).get("class_path", folder.resolve().name).rpartition(".")[-1]
    return f"{data}, {run.num_steps} step{'s' if run.num_steps != 1 else ''}"


def learned_arms(runs: Sequence[Run], temperature: float) -> list[tuple[Arm, Run]]:
    """What was learned: its most probable sets, and its draws where there are other ones."""
    found = []
    for run in runs:
        name = "learned" if len(runs) == 1 else f"learned ({run.name})"
        ways = {name: True, f"{name}, sampled": False} if draws(run.policy) else {name: True}
        for label, mode in ways.items():
            arm = Arm(label, run.policy, run.num_steps, mode=mode, temperature=temperature, training_seed=0)
            found.append((arm, run))
    return found


def heuristics(num_steps: int, temperature: float, seed: int) -> list[Arm]:
    """Every ranking at a step budget, a threshold, and what the truth would rank first."""
    specs = [
        {"policy": "Ranked", "score": SCORES, "budgets": num_steps},
        {"policy": "Threshold", "tau": 0.9},
        {"policy": "Oracle", "budgets": num_steps},
    ]
    return [replace(arm, steps=num_steps, temperature=temperature) for arm in sweep(specs, seeds=(seed,))]


def held_out(run: Run, examples: Examples | Batch | None, problems: int) -> tuple[Examples, str]:
    """The first held-out rows of a run, or of what is given instead, and the name of their split."""
    if examples is not None:
        return (examples if isinstance(examples, Examples) else Examples(examples)).take(problems), "example"
    if run.data is None:
        problem = f"{run.folder} was fitted to sequences that its config does not name"
        raise UserError("examples", problem, "give the sequences to replay")
    splits = run.data.splits()
    split = next(name for name in ("test", "validation", "train") if name in splits)
    return splits[split].take(problems), split


# ------------------------------------------------------------------------------------------------------------ the page


def page(name: str, replay: Mapping[str, Any], source: str, content: Iterable[Markup]) -> str:
    """The whole document.

    Args:
        name: its title.
        replay: recordings by task in `parts`, see `record_replay`.
        source: file that holds them, as the page names it.
        content: further sections.
    """
    assets = files("orderppl.report") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    # Nothing may be loaded, and no script runs but this one: token strings and labels are data.
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    recorded = json.dumps(replay, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: orderppl report"),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", name), tag("p", "Made by ", tag("code", "orderppl report"), ".")),
        tag("main", tag("section", tag("h2", "Replay of decoding"), player(source), id="replay"), *content),
        tag("script", Markup(recorded), type="application/json", id="recordings"),
        tag("script", Markup(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    """Source expression of a content security policy that allows this inline text only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _named(path: Path, folder: Path) -> str:
    """A path as the page names it: from the run folder where it lies inside."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def player(source: str) -> Markup:
    """Controls and two panes, filled by the script."""

    def choice(label: str, name: str) -> Markup:
        return tag("label", tag("span", label), tag("select", id=name), class_="choice")

    def button(text: str, name: str, label: str | None = None) -> Markup:
        return tag("button", text, type="button", id=name, aria_label=label)

    def pane(index: int, side: str) -> Markup:
        return tag(
            "section",
            choice("Policy", f"arm-{index}"),
            tag("p", class_="outcome", id=f"outcome-{index}"),
            tag("div", id=f"tokens-{index}", class_="tokens", role="listbox", tabindex=0, aria_label=f"Tokens, {side}"),
            tag("div", id=f"detail-{index}", class_="detail", aria_live="off"),
            tag("div", id=f"steps-{index}", class_="steps"),
            class_="pane",
            aria_label=f"{side.capitalize()} policy",
        )

    controls = (
        button("|◀", "first", "Back to the start"),
        button("◀", "back", "One step back"),
        button("Play", "play"),
        button("▶", "next", "One step on"),
        button("▶|", "last", "To the end"),
        tag("input", type="range", id="slider", min=0, value=0, step=1, aria_label="Steps done"),
        tag("output", id="position", for_="slider"),
    )
    hint = [part for word in HINT.split() for part in (tag("kbd", word) if word in KEYS else word, " ")]
    note = "Probabilities are the denoiser's, at temperature 1. Dashed tokens are given."
    return tag(
        "div",
        tag("noscript", tag("p", "The replay needs JavaScript; its numbers are in ", tag("code", source), ".")),
        tag("div", choice("Task", "part"), choice("Problem", "problem"), choice("Show", "kind"), class_="choices"),
        tag("div", id="prompt", class_="prompt"),
        tag("div", *controls, class_="controls"),
        tag("p", *hint, class_="hint"),
        tag("p", id="announcement", class_="unseen", role="status", aria_live="polite"),
        tag("div", pane(0, "left"), pane(1, "right"), class_="panes"),
        tag("p", "Source: ", tag("code", source), f". {note}", class_="source"),
        id="player",
    )


# ------------------------------------------------------------------------------------------- sections of what there is


def sections(folder: Path, runs: Sequence[Run]) -> list[Markup]:
    """Everything below the replay, from the files in the folder.

    Raises:
        UserError: names a file that cannot be shown, and what it lacks.
    """
    tables = [shown for path in _files(folder, RESULTS_FILE) for shown in result_tables(path, folder)]
    notes = [shown for path in _files(folder, SUMMARY_FILE) for shown in diagnosis(path, folder)]
    images = [figure(path, folder) for path in _files(folder, *(f"*{ending}" for ending in FIGURES))]
    found = {
        "Results": tables or [tag("p", "Nothing has been measured yet, see ", tag("code", "orderppl evaluate"), ".")],
        "Diagnostics": notes,
        "Figures": [tag("div", *images, class_="figures")] if images else [],
        "The run": about(folder, runs),
    }
    identifiers = {"The run": "run"}
    return [
        tag("section", tag("h2", title), *parts, id=identifiers.get(title, title.lower()))
        for title, parts in found.items()
        if parts
    ]


def _files(folder: Path, *patterns: str) -> list[Path]:
    """Files of a run below its folder, without its checkpoints, reports and what a crash left behind."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    reports = {path.parent for path in folder.rglob(REPORT_FILE)}

    def is_shown(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        hidden = "checkpoints" in parts or any(part.startswith(TEMPORARY) for part in parts)
        return not hidden and not reports.intersection(path.parents)

    return sorted(path for path in found if is_shown(path))


def result_tables(path: Path, folder: Path) -> Iterator[Markup]:
    """Tables of one results.json: arms by metric, paired differences, and what belongs to no arm; one set per task."""
    records = read_results(path.parent)["records"]
    for index, record in enumerate(records):
        value = record.get("value") if isinstance(record, dict) else None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not isinstance(record.get("metric"), str):
            problem = f"records[{index}] has no metric with a value"
            raise UserError(str(path), problem, "run the experiment again with this version")
    where = _named(path, folder)
    for task in dict.fromkeys(str(record.get("task", "")) for record in records):
        members = [record for record in records if str(record.get("task", "")) == task]
        arms = [r for r in members if "arm" in r and "baseline" not in r]
        differences = [r for r in members if "arm" in r and "baseline" in r]
        others = [r for r in members if "arm" not in r]
        title = task or where
        if arms:
            yield _pivoted(f"{title}: mean [95% interval] of every arm", arms, ("arm",))
        if differences:
            caption = "Arm minus baseline, paired by row, mean [95% interval]"
            paired = _pivoted(caption, differences, ("arm", "baseline"))
            yield tag("details", tag("summary", f"{title}: paired differences"), paired)
        if others:
            lines = [[str(r["metric"]), _labels(r), f"{float(str(r['value'])):.6g}"] for r in others]
            plain = table("Records without an arm", ["metric", "labels", "value"], lines, text_columns=2)
            yield tag("details", tag("summary", f"{title}: other records"), plain)
    note = ". A cell of several records is their mean (smallest-largest, number); shown to three decimals."
    yield tag("p", "Source: ", tag("code", where), note, class_="source")


def _pivoted(caption: str, records: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> Markup:
    columns = results_table(records, rows=rows).columns
    lines = zip(*(column.cells for column in columns), strict=True)
    return table(caption, [str(column.header) for column in columns], lines, text_columns=len(rows))


def _labels(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in record.items() if key not in ("metric", "value", "task"))


def diagnosis(path: Path, folder: Path) -> list[Markup]:
    """What `orderppl diagnose` left in a summary.json: its alarms and numbers.

    Raises:
        UserError: names the file and the entry that is something else.
    """
    again = "run orderppl diagnose again with this version"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), "is not JSON", again) from error
    numbers = document.get("numbers") if isinstance(document, dict) else None
    if not isinstance(numbers, dict):
        raise UserError(str(path), "has no numbers", again)
    lines = []
    for name, entry in numbers.items():
        missing = [key for key in ("value", "unit", "source") if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise UserError(str(path), f"{name} has no {missing[0]}", again)
        value = entry["value"]
        text = str(entry.get("note", "")) if value is None else f"{float(value):.6g}"
        lines.append([name, entry["unit"], entry["source"], text])
    title = f"Posterior over orders, {_named(path.parent, folder)}"
    numbers_table = table(title, ["quantity", "unit", "made of", "value"], lines, text_columns=3)
    absent = [f"{name}: {why}. " for name, why in document.get("left_out", {}).items()]
    return [
        *(tag("p", tag("strong", "Alarm: "), alarm, class_="alarm") for alarm in document.get("alarms", [])),
        tag("details", tag("summary", title), numbers_table, open=len(lines) <= 40),
        tag("p", "Source: ", tag("code", _named(path, folder)), ". ", *absent, class_="source"),
    ]


def figure(path: Path, folder: Path) -> Markup:
    """A figure of the run."""
    name = path.stem.replace("_", " ").replace("-", " ")
    content = path.read_bytes()
    source = f"data:{FIGURES[path.suffix]};base64,{base64.b64encode(content).decode()}"
    ground = None if b"prefers-color-scheme" in content else "paper"  # drawn for white pages
    image = tag("img", src=source, alt=f"Figure: {name}", class_=ground)
    return tag("figure", image, tag("figcaption", f"{name}. Source: ", tag("code", _named(path, folder))))


def about(folder: Path, runs: Sequence[Run]) -> list[Markup]:
    """Settings and files of the runs."""
    shown = []
    for run in runs:
        facts = {"kind": run.kind, "seed": run.info.get("seed"), "updates": run.info.get("updates")}
        facts |= run.info.get("versions", {})
        facts |= {f"denoiser, {name}": value for name, value in (run.info["denoiser"] or {}).items()}
        lines = [[name, value] for name, value in facts.items() if value is not None]
        settings = (run.folder / CONFIG).read_text(encoding="utf-8")
        shown.append(table(run.name, ["what", "value"], lines, text_columns=2))
        shown.append(tag("details", tag("summary", f"Settings of {run.name}"), tag("pre", settings, tabindex=0)))
    sizes = [[_named(path, folder), f"{path.stat().st_size:,}"] for path in _files(folder, "*")]
    listed = tag("details", tag("summary", "Files"), table("Files of the run", ["file", "bytes"], sizes))
    sources = join((tag("code", INFO), ", ", tag("code", CONFIG), " and the folder itself."))
    return [*shown, listed, tag("p", "Source: ", sources, class_="source")]
