"""One self-contained HTML file of a run: its tables and figures, and a replay of decoding under two policies.

    orderppl report runs/quickstart
    orderppl report runs/gsm8k --problems 6 --out runs/gsm8k-report

report.html opens anywhere, without a network or a server. What it replays is recorded now, from the learned orders of
the run, into replay.json beside it; every other number comes from a file of the run, which the page names. Figures and
summaries that `orderppl diagnose` left in the run are shown too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from orderppl.errors import UserError
from orderppl.experiments.config import RunConfig, setting
from orderppl.experiments.markup import Markup, join, table, tag
from orderppl.experiments.replay import find_orders, load_parts, record_replays
from orderppl.experiments.results import Record, pivot, read_results
from orderppl.inference.checkpoints import write_text

REPORT_FILE, REPLAY_FILE, SUMMARY_FILE = "report.html", "replay.json", "summary.json"
FIGURES = {".png": "image/png", ".svg": "image/svg+xml"}
WANTED = {"experiment": str, "config": dict, "environment": dict, "seconds": (int, float), "records": list}


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of report."""

    run: str = setting("runs/quickstart", "folder of a run that fits orders", file=True, option="RUN")
    problems: int = setting(3, "rows of each test split to replay", at_least=1, option="--problems")
    alternatives: int = setting(5, "most probable tokens kept per revealed token", at_least=1)
    threshold: float = setting(0.9, "confidence of the threshold policy", above=0, below=1)
    temperature: float | None = setting(
        None, "of decoded tokens; null: 0 (most likely) with a prompt, 1 without one", at_least=0
    )

    def __post_init__(self) -> None:
        """Check the run before anything is written."""
        folder = Path(self.run)
        if not folder.is_dir():
            raise UserError("run", f"{folder} is not a folder", "give the folder of a run")
        read_run(folder)
        find_orders(folder)
        for path in _files(folder, SUMMARY_FILE):
            read_summary(path)


def default_out(config: Config) -> Path:
    """The report lies in the folder of its run."""
    return Path(config.run) / "report"


def run(config: Config, out: Path) -> Iterable[Record]:
    """Record the replays, and write the page."""
    folder = Path(config.run)
    replay = record_replays(
        load_parts(folder, config.device, config.threshold),
        problems=config.problems,
        count=config.alternatives,
        temperature=config.temperature,
        seed=config.seed,
        device=config.device,
    )
    document = page(folder, replay, out / REPLAY_FILE)
    write_text(out / REPLAY_FILE, json.dumps(replay, separators=(",", ":"), allow_nan=False) + "\n")
    write_text(out / REPORT_FILE, document)
    return list(_records(replay, config.seed))


def _records(replay: Mapping[str, Any], seed: int) -> Iterator[Record]:
    """Nats of the recorded true tokens, per token, arm and row."""
    for part in replay["parts"]:
        for problem in part["problems"]:
            for arm, kinds in problem["recordings"].items():
                followed = kinds["follow"]
                labels = {"arm": arm, "part": part["name"], "split": part["split"], "row": problem["row"], "seed": seed}
                size = max(len(followed["tokens"]), 1)
                yield {"metric": "path_nats", "value": followed["total_nats"] / size, "n": 1, **labels}


# ----------------------------------------------------------------------------------------------------- files of the run


def read_run(folder: Path) -> dict[str, Any]:
    """Read results.json, and check that this version can show it.

    Raises:
        UserError: names the file and what it lacks.
    """
    path = folder / "results.json"
    try:
        document = read_results(folder)
    except (ValueError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(path), "is not a JSON object", "run the experiment again") from error
    for name, kind in WANTED.items():
        if not isinstance(document.get(name), kind):  # type: ignore[arg-type]
            problem = f"has no {name}" if name not in document else f"{name} is a {type(document[name]).__name__}"
            raise UserError(str(path), problem, "run the experiment again with this version")
    for index, record in enumerate(document["records"]):
        value = record.get("value") if isinstance(record, dict) else None
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not isinstance(record.get("metric"), str):
            problem = f"records[{index}] has no metric with a value"
            raise UserError(str(path), problem, "run the experiment again with this version")
    return document


def read_summary(path: Path) -> dict[str, Any]:
    """Read summary.json of a diagnosis: in `numbers` name -> `value`, `unit`, `source`; and `alarms`.

    Raises:
        UserError: names the file and the entry that is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(str(path), "is not JSON", "run orderppl diagnose again") from error
    numbers = document.get("numbers") if isinstance(document, dict) else None
    if not isinstance(numbers, dict):
        raise UserError(str(path), "has no numbers", "run orderppl diagnose again with this version")
    for name, entry in numbers.items():
        missing = [key for key in ("value", "unit", "source") if not isinstance(entry, dict) or key not in entry]
        if missing:
            remedy = "run orderppl diagnose again with this version"
            raise UserError(str(path), f"{name} has no {missing[0]}", remedy)
    assert isinstance(document, dict)
    return document


def _files(folder: Path, *patterns: str) -> list[Path]:
    """Files of a run below its folder, without its checkpoints and without reports."""
    found = {path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()}
    reports = {path.parent for path in folder.rglob(REPORT_FILE)}
    return sorted(
        path
        for path in found
        if "checkpoints" not in path.relative_to(folder).parts and not reports.intersection(path.parents)
    )


# ------------------------------------------------------------------------------------------------------------- the page


def page(folder: Path, replay: Mapping[str, Any], replay_file: Path) -> str:
    """The whole document.

    Args:
        folder: of the run.
        replay: see `record_replays`.
        replay_file: where it was written, shown as the source of its numbers.
    """
    results = read_run(folder)
    assets = files("orderppl.experiments") / "page"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    # Nothing may be loaded, and no script runs but this one: token strings and labels are data.
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    recorded = json.dumps(replay, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    name = folder.resolve().name
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{name}: orderppl report"),
        tag("style", Markup(style)),
    )
    source = _shown(replay_file, folder)
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", name),
            tag("p", "Report of ", tag("code", f"orderppl {results['experiment']}"), ", made by orderppl report."),
        ),
        tag(
            "main",
            tag("section", tag("h2", "Replay of decoding"), player(source), id="replay"),
            tag("section", tag("h2", "Results"), *result_tables(results["records"]), id="results"),
            *diagnoses(folder),
            *figures(folder),
            tag("section", tag("h2", "The run"), *about(folder, results), id="run"),
        ),
        tag("script", Markup(recorded), type="application/json", id="recordings"),
        tag("script", Markup(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    """Source expression of a content security policy that allows this inline text only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(path: Path, folder: Path) -> str:
    """A path as the page names it: from the run folder where it lies inside."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def player(source: str) -> Markup:
    """Controls and two panes, filled by the script."""

    def choice(label: str, name: str, class_: str = "choice") -> Markup:
        return tag("label", tag("span", label), tag("select", id=name), class_=class_)

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

    controls = tag(
        "div",
        tag("button", "|◀", type="button", id="first", aria_label="Back to the start"),
        tag("button", "◀", type="button", id="back", aria_label="One step back"),
        tag("button", "Play", type="button", id="play"),
        tag("button", "▶", type="button", id="next", aria_label="One step on"),
        tag("button", "▶|", type="button", id="last", aria_label="To the end"),
        tag("input", type="range", id="slider", min=0, value=0, step=1, aria_label="Steps done"),
        tag("output", id="position", for_="slider"),
        class_="controls",
    )
    keys = join((tag("kbd", "Space"), " play or pause, ", tag("kbd", "←"), " ", tag("kbd", "→"), " one step, "))
    keys = join(
        (keys, tag("kbd", "Home"), " ", tag("kbd", "End"), " start and end; inside the tokens the arrows choose")
    )
    return tag(
        "div",
        tag("noscript", tag("p", "The replay needs JavaScript; its numbers are in ", tag("code", source), ".")),
        tag("div", choice("Task", "part"), choice("Problem", "problem"), choice("Show", "kind"), class_="choices"),
        tag("div", id="prompt", class_="prompt"),
        controls,
        tag("p", keys, " the token whose alternatives are shown.", class_="hint"),
        tag("p", id="announcement", class_="unseen", role="status", aria_live="polite"),
        tag("div", pane(0, "left"), pane(1, "right"), class_="panes"),
        tag(
            "p",
            "Source: ",
            tag("code", source),
            ". Probabilities are the denoiser's, at temperature 1.",
            class_="source",
        ),
        id="player",
    )


def result_tables(records: Iterable[Record]) -> list[Markup]:
    """One table of arms per task, one of paired differences, and one of what belongs to no arm."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((str(record.get("task", "")), str(record.get("form", ""))), []).append(record)
    shown = []
    for labels, members in groups.items():
        title = " ".join(label for label in labels if label) or "all records"
        arms = [r for r in members if "arm" in r and "baseline" not in r]
        differences = [r for r in members if "arm" in r and "baseline" in r]
        others = [r for r in members if "arm" not in r]
        if arms:
            shown.append(table(f"{title}: mean [95% interval] of every arm", *pivot(arms)))
        if differences:
            heads, lines = pivot(differences, rows=("arm", "baseline"))
            paired = table("Arm minus baseline, paired by row, mean [95% interval]", heads, lines, text_columns=2)
            shown.append(tag("details", tag("summary", f"{title}: paired differences"), paired))
        if others:
            lines = [[str(r["metric"]), _labels(r), f"{float(str(r['value'])):.6g}"] for r in others]
            plain = table("Records without an arm", ["metric", "labels", "value"], lines, text_columns=2)
            shown.append(tag("details", tag("summary", f"{title}: other records"), plain))
    if not shown:
        shown.append(tag("p", "The run has no records."))
    note = ". A cell of several records is their mean (smallest-largest, number); shown to three decimals."
    return [*shown, tag("p", "Source: ", tag("code", "results.json"), note, class_="source")]


def _labels(record: Record) -> str:
    return ", ".join(
        f"{key}={value}" for key, value in record.items() if key not in ("metric", "value", "task", "form")
    )


def diagnoses(folder: Path) -> list[Markup]:
    """The summaries that `orderppl diagnose` left in the run."""
    shown = []
    for path in _files(folder, SUMMARY_FILE):
        document = read_summary(path)
        lines = [[name, entry["unit"], entry["source"], _number(entry)] for name, entry in document["numbers"].items()]
        heads = ["quantity", "unit", "made of", "value"]
        where = path.relative_to(folder).as_posix()
        alarms = [str(alarm) for alarm in document.get("alarms", [])]
        shown += [tag("p", tag("strong", "Alarm: "), alarm, class_="alarm") for alarm in alarms]
        title = f"Posterior over orders, {path.parent.relative_to(folder).as_posix()}"
        shown.append(
            tag("details", tag("summary", title), table(title, heads, lines, text_columns=3), open=len(lines) <= 40)
        )
        absent = [f"{name}: {why}. " for name, why in document.get("left_out", {}).items()]
        shown.append(tag("p", "Source: ", tag("code", where), ". ", *absent, class_="source"))
    return [tag("section", tag("h2", "Diagnostics"), *shown, id="diagnostics")] if shown else []


def _number(entry: Mapping[str, Any]) -> str:
    value = entry["value"]
    return str(entry.get("note", "")) if value is None else f"{float(value):.6g}"


def figures(folder: Path) -> list[Markup]:
    """Every figure of the run."""
    shown = []
    for path in _files(folder, *(f"*{ending}" for ending in FIGURES)):
        where = path.relative_to(folder).as_posix()
        data = base64.b64encode(path.read_bytes()).decode()
        name = path.stem.replace("_", " ").replace("-", " ")
        image = tag("img", src=f"data:{FIGURES[path.suffix]};base64,{data}", alt=f"Figure: {name}")
        shown.append(tag("figure", image, tag("figcaption", f"{name}. Source: ", tag("code", where))))
    return [tag("section", tag("h2", "Figures"), tag("div", *shown, class_="figures"), id="figures")] if shown else []


def about(folder: Path, results: Mapping[str, Any]) -> list[Markup]:
    """Environment, settings and files of the run."""
    environment = {**results["environment"], "seconds": results["seconds"]}
    lines = list(environment.items())
    sizes = [[path.relative_to(folder).as_posix(), f"{path.stat().st_size:,}"] for path in _files(folder, "*")]
    settings = json.dumps(results["config"], indent=2)
    return [
        table("Environment", ["what", "value"], lines, text_columns=2),
        tag("details", tag("summary", "Settings"), tag("pre", settings, tabindex=0)),
        tag("details", tag("summary", "Files"), table("Files of the run", ["file", "bytes"], sizes)),
        tag("p", "Source: ", tag("code", "results.json"), " and the folder itself.", class_="source"),
    ]
