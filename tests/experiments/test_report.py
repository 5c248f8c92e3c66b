"""`orderppl report`: what is recorded, what the page says, and how bad input ends."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch

from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.evaluation import path_likelihood
from orderppl.experiments import evaluate, fit_order, report
from orderppl.experiments.build import learned_policy
from orderppl.experiments.config import load_config
from orderppl.experiments.markup import tag
from orderppl.experiments.replay import load_parts, record_replays
from orderppl.experiments.results import write_results

from command_line import call

CHAIN = ["task.length=7", "task.train=40", "task.validation=8", "task.test=9", "fit.updates=3", "num_steps=3"]
TEXT = [
    "task={name: arithmetic, train: 30, validation: 4, test: 4, num_operations: 2}",
    "denoiser={name: transformer, width: 8, layers: 1, heads: 1}",
    "freeze_denoiser=false",  # so that it is saved with the order
    "prior=uniform_steps",
    "guide={name: mean_field, network: table}",
    "elbo.num_particles=2",
    "fit={updates: 1, batch_size: 2, validate_every: null}",
]


def chain_run(out: Path) -> Path:
    words = [word for setting in CHAIN for word in ("--set", setting)]
    assert call("chain", "--out", str(out), "--set", "starts=1", "--seeds", "2", *words) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two seeds, with a report."""
    folder = chain_run(tmp_path_factory.mktemp("runs") / "chain")
    assert call("report", str(folder), "--problems", "4") == 0
    return folder


@pytest.fixture(scope="module")
def replay(run: Path) -> dict:
    return json.loads((run / "report" / "replay.json").read_text())


def test_every_arm_is_recorded_on_every_row(replay: dict) -> None:
    (part,) = replay["parts"]
    learned = [f"learned (seed-{seed}){how}" for seed in (0, 1) for how in ("", ", sampled", ", ranked")]
    fixed = ["best fixed order", "best policy", "random", "top prob", "entropy", "left to right"]
    assert [arm["name"] for arm in part["arms"]] == learned + fixed
    sources = {arm["source"] for arm in part["arms"]}
    assert sources == {None, "seed-0/order.safetensors", "seed-1/order.safetensors"}
    assert [problem["row"] for problem in part["problems"]] == [0, 1, 2, 3]
    for problem in part["problems"]:
        for kinds in problem["recordings"].values():
            assert kinds["follow"]["tokens"] == problem["truth"]
            for one in kinds.values():
                assert sorted(set(one["step"])) == list(range(one["forwards"]))  # every forward reveals something
                assert [step["tokens"] for step in one["steps"]] == [
                    one["step"].count(t) for t in range(one["forwards"])
                ]
                assert sum(step["nats"] for step in one["steps"]) == pytest.approx(one["total_nats"], abs=1e-5)
                assert sum(one["nats"]) == pytest.approx(one["total_nats"], abs=1e-5)
                for token, probability, options in zip(
                    one["tokens"], one["probability"], one["alternatives"], strict=True
                ):
                    assert dict(map(tuple, options))[token] == pytest.approx(
                        probability, abs=2e-6
                    )  # all 4 states listed
                    assert sum(share for _, share in options) == pytest.approx(1, abs=1e-5)


def test_followed_nats_are_those_of_the_evaluation(run: Path, replay: dict) -> None:
    _, problem = evaluate.load_order(run / "seed-1")
    test = list(problem.task.stream("test", 5, shuffle=False).once())
    for name, decision in (("", "mode"), (", sampled", "sample")):
        path = path_likelihood(problem.model.denoiser, learned_policy(problem, decision), test, 3, seed=0)
        nats = [
            p["recordings"][f"learned (seed-1){name}"]["follow"]["total_nats"] for p in replay["parts"][0]["problems"]
        ]
        torch.testing.assert_close(torch.tensor(nats).double(), path.nats[:4], atol=1e-5, rtol=0)


def test_recorded_probabilities_are_those_of_the_state_at_the_reveal(run: Path, replay: dict) -> None:
    """Each recording is walked again from all masked, token by token, with the denoiser alone."""
    _, problem = evaluate.load_order(run / "seed-0")
    denoiser = problem.model.denoiser
    canvas = Canvas(denoiser, torch.ones(1, 7, dtype=torch.bool))
    for row in replay["parts"][0]["problems"][:2]:
        for kinds in row["recordings"].values():
            for one in kinds.values():
                tokens, step = torch.tensor([one["tokens"]]), torch.tensor([one["step"]])
                for position in range(7):
                    state = torch.where(step < one["step"][position], tokens, denoiser.mask_index)
                    probs = canvas.logits(state).softmax(-1)[0, position]
                    assert one["probability"][position] == pytest.approx(
                        float(probs[one["tokens"][position]]), abs=2e-6
                    )
                    for token, share in one["alternatives"][position]:
                        assert share == pytest.approx(float(probs[token]), abs=2e-6)


def test_the_page_holds_the_recordings_and_loads_nothing(run: Path, replay: dict) -> None:
    page = (run / "report" / "report.html").read_text()
    (recorded,) = re.findall(r'<script type="application/json" id="recordings">(.*?)</script>', page, re.DOTALL)
    assert json.loads(recorded) == replay
    assert "http://" not in page and "https://" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "default-src &#x27;none&#x27;" in page
    assert "0.05" in page and "learned, sampled" in page and "report/replay.json" in page


def test_every_number_of_the_result_tables_is_in_results_json(run: Path) -> None:
    page = (run / "report" / "report.html").read_text()
    section = page[page.index('<section id="results">') : page.index('<section id="run">')]
    shown = {float(text) for text in re.findall(r"(?<!\d)-?\d+\.\d{3}", section)}
    records = json.loads((run / "results.json").read_text())["records"]
    known = [float(record[key]) for record in records for key in ("value", "low", "high") if key in record]
    over_seeds: dict[tuple[str, str], list[float]] = {}
    for record in records:
        over_seeds.setdefault((record["metric"], record["arm"]), []).append(record["value"])
    known += [sum(values) / len(values) for values in over_seeds.values()]
    assert len(shown) > 10
    assert all(min(abs(number - value) for value in known) <= 5.1e-4 for number in shown)


def test_text_is_data(tmp_path: Path) -> None:
    """Words, a prompt and an alarm that look like markup; an exact-match verdict for every decoded answer."""
    config = load_config(fit_order.Config, "arithmetic_order", TEXT)
    out = tmp_path / "<b>run&"
    out.mkdir()
    records = list(fit_order.run(config, out))
    write_results(out, "fit-order", config, [*records, {"metric": "<i>", "value": 1, "arm": "</td><b>"}], 1.0)
    (part,) = load_parts(out, "cpu", 0.9)
    assert part.task.tokenizer is not None
    part.task.tokenizer.tokens[:] = [f"</script><b>{token}" for token in part.task.tokenizer.tokens]
    document = record_replays([part], problems=2, count=3, temperature=None, seed=0, device="cpu")
    (recorded,) = document["parts"]
    assert recorded["temperature"] == 0
    assert all(text.startswith("</script>") for text in recorded["spelling"].values())
    for problem in recorded["problems"]:
        assert problem["prompt"]
        assert all(
            isinstance(kinds["decode"]["correct"], bool)
            for kinds in problem["recordings"].values()
            if "decode" in kinds
        )
    assert "decode" not in recorded["problems"][0]["recordings"]["greedy_oracle uniform"]  # it needs the truth
    page = report.page(out, document, out / "replay.json")
    assert "<b>" not in page and "<i>" not in page
    assert page.count("</script>") == 2


def test_diagnoses_and_figures_of_the_run_are_shown(tmp_path: Path) -> None:
    folder = chain_run(tmp_path / "again")
    order = str(folder / "seed-1")
    assert call("diagnose", order, "--draws", "30", "--sequences", "2") == 0
    assert call("report", str(folder), "--problems", "1") == 0
    page = (folder / "report" / "report.html").read_text()
    inner = folder / "seed-1" / "diagnosis"
    summary = json.loads((inner / "summary.json").read_text())
    section = page[page.index('<section id="diagnostics">') : page.index('<section id="figures">')]
    cells = re.findall(
        r'<th scope="row">(.*?)</th><td class="text">.*?</td><td class="text">.*?</td><td>(.*?)</td>', section
    )
    shown = {name: entry.get("note") or f"{entry['value']:.6g}" for name, entry in summary["numbers"].items()}
    assert dict(cells) == shown and "elbo" in shown
    assert "seed-1/diagnosis/summary.json" in section
    assert len(summary["figures"]) > 5
    for figure in summary["figures"]:
        assert base64.b64encode((inner / figure).read_bytes()).decode() in page
        assert f"seed-1/diagnosis/{figure}" in page

    summary["alarms"] = ["collapse & more"]
    summary["numbers"]["kl"] = {"value": None, "unit": "nats", "source": "sample_stats", "note": "infinite"}
    (inner / "summary.json").write_text(json.dumps(summary))
    again = report.page(folder, {"parts": []}, folder / "report" / "replay.json")
    assert "collapse &amp; more" in again and "<td>infinite</td>" in again

    del summary["numbers"]["kl"]["unit"]
    (inner / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"summary.json: kl has no unit"):
        report.Config(run=str(folder))


def damaged(folder: Path, how: str) -> str:
    """Spoil a copy of a run; returns the text the error must have."""
    results = folder / "results.json"
    document = json.loads(results.read_text())
    if how == "no results":
        results.unlink()
        return "results.json: no such file"
    if how == "not JSON":
        results.write_text("{")
        return "results.json: is not a JSON object"
    if how == "older schema":
        del document["environment"]
        results.write_text(json.dumps(document))
        return "results.json: has no environment"
    if how == "record":
        del document["records"][2]["value"]
        results.write_text(json.dumps(document))
        return "records[2] has no metric with a value"
    if how == "no order":
        (folder / "seed-0" / "order.safetensors").unlink()
        return "no order.safetensors in"
    if how == "no settings":
        (folder / "seed-0" / "order.yaml").unlink()
        return "seed-0 holds no order.yaml"
    (folder / "seed-0" / "order.yaml").write_text("numsteps: 3\n")
    return "order.yaml: numsteps: no such setting"


@pytest.mark.parametrize(
    "how", ["no results", "not JSON", "older schema", "record", "no order", "no settings", "settings"]
)
def test_a_damaged_run_is_one_line_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder = tmp_path / "run"
    (folder / "seed-0").mkdir(parents=True)
    for name in ("results.json", "seed-0/order.safetensors", "seed-0/order.yaml"):
        (folder / name).write_bytes((run / name).read_bytes())
    text = damaged(folder, how)
    before = sorted(tmp_path.rglob("*"))
    assert call("report", str(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_runs_and_empty_splits_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, text in ((tmp_path / "none", "no such file"), (run / "results.json", "is not a folder")):
        assert call("report", str(folder), "--out", str(tmp_path / "out")) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (part,) = load_parts(run, "cpu", 0.9)
    part.task.splits["test"] = {name: rows[:0] for name, rows in part.task.splits["test"].items()}
    with pytest.raises(UserError, match="the test split of chain, 3 steps has no rows"):
        record_replays([part], problems=2, count=3, temperature=None, seed=0, device="cpu")


def test_markup_escapes_text_and_values() -> None:
    assert (
        tag("p", "a<b", tag("b", "&"), class_='x"y', hidden=True, id=None)
        == '<p class="x&quot;y" hidden>a&lt;b<b>&amp;</b></p>'
    )
