"""The report of a run: what is recorded, what the page says, and how bad input ends."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orderppl import evaluate, load_run
from orderppl.data.dataset import Examples
from orderppl.diagnostics import diagnose
from orderppl.errors import UserError
from orderppl.evaluation import Arm, summary
from orderppl.evaluation.results import write_results
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Oracle, Ranked, Threshold
from orderppl.report import record_replay, write_report
from orderppl.report.markup import tag
from orderppl.report.page import page, sections
from orderppl.unmasking import Batch

HEURISTICS = [f"{score} T=3" for score in ("random", "top_prob", "margin", "entropy", "left_to_right")]
HEURISTICS += ["threshold tau=0.9", "oracle T=3"]


@pytest.fixture(scope="module")
def run(chain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chains with results and a report."""
    folder = tmp_path_factory.mktemp("reported") / "chain"
    shutil.copytree(chain_run, folder)
    loaded = load_run(folder / "seed-1")
    arms = [Arm("learned", loaded.policy, 3, mode=True, training_seed=1), Arm("threshold", Threshold(0.5))]
    table = evaluate(arms, loaded.denoiser, loaded.data.splits()["test"], progress=False)
    (folder / "results").mkdir()
    records = summary(table, resamples=50)
    paired = {"metric": "path_nats", "arm": "learned", "baseline": "threshold", "value": -0.5}
    others = [paired, {"metric": "seconds", "value": 3.25, "machine": "mine"}]
    write_results(folder / "results", "chain", {}, [*records.to_dict("records"), *others])
    assert write_report(folder, problems=4) == folder / "report" / "report.html"
    return folder


@pytest.fixture(scope="module")
def replay(run: Path) -> dict[str, Any]:
    return json.loads((run / "report" / "replay.json").read_text())


def test_every_arm_is_recorded_on_every_row(replay: dict[str, Any]) -> None:
    (part,) = replay["parts"]
    learned = [f"learned (seed-{seed}){how}" for seed in (0, 1) for how in ("", ", sampled")]
    assert [arm["name"] for arm in part["arms"]] == learned + HEURISTICS
    assert [arm["source"] for arm in part["arms"]][:5] == ["seed-0", "seed-0", "seed-1", "seed-1", None]
    assert part["name"] == "Chains, 3 steps" and part["split"] == "test"
    assert [problem["row"] for problem in part["problems"]] == [0, 1, 2, 3]
    for problem in part["problems"]:
        assert problem["prompt"] is None and problem["size"] == 7
        assert "decode" not in problem["recordings"]["oracle T=3"]  # it needs the truth
        for kinds in problem["recordings"].values():
            assert kinds["follow"]["tokens"] == problem["truth"]
            for one in kinds.values():
                assert sorted(set(one["step"])) == list(range(one["forwards"]))  # every forward reveals something
                sizes = [one["step"].count(t) for t in range(one["forwards"])]
                assert [step["tokens"] for step in one["steps"]] == sizes
                assert sum(step["nats"] for step in one["steps"]) == pytest.approx(one["total_nats"], abs=1e-5)
                assert sum(one["nats"]) == pytest.approx(one["total_nats"], abs=1e-5)
                entries = zip(one["tokens"], one["probability"], one["alternatives"], strict=True)
                for token, probability, options in entries:  # all 4 states listed
                    assert dict(map(tuple, options))[token] == pytest.approx(probability, abs=2e-6)
                    assert sum(share for _, share in options) == pytest.approx(1, abs=1e-5)


def test_followed_nats_are_those_of_the_evaluation(run: Path, replay: dict[str, Any]) -> None:
    loaded = load_run(run / "seed-1")
    arms = [
        Arm("learned (seed-1)", loaded.policy, 3, mode=True),
        Arm("learned (seed-1), sampled", loaded.policy, 3),
        Arm("random T=3", Ranked("random"), 3),
    ]
    table = evaluate(arms, loaded.denoiser, loaded.data.splits()["test"].take(4), batch_size=2, progress=False)
    for name, rows in table.groupby("arm"):
        nats = [problem["recordings"][name]["follow"]["total_nats"] for problem in replay["parts"][0]["problems"]]
        assert nats == pytest.approx(rows["nats"].tolist(), abs=1e-5)


def infilling() -> Examples:
    """Three chains: given positions in the middle and at the end; a prompt; padding."""
    tokens = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 0, 0, 0, 1], [2, 2, 2, 1, 77, 77]])
    given, attended = torch.zeros_like(tokens, dtype=torch.bool), torch.ones_like(tokens, dtype=torch.bool)
    given[0, [0, 2, 3, 5]] = True
    given[1, :3] = True
    attended[2, 4:] = False
    return Examples(Batch(tokens, attended, given))


def recorded_infilling() -> tuple[MarkovChainDenoiser, dict[str, Any]]:
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    arms = [Arm("sure first", Ranked("top_prob"), 2), Arm("one by one", Ranked("random", temperature=0), 6, seeds=(3,))]
    return denoiser, record_replay([*arms, Arm("oracle", Oracle(), 2)], denoiser, infilling(), alternatives=2)


def test_given_positions_are_shown_as_given() -> None:
    _, part = recorded_infilling()
    holes, prompted, padded = part["problems"]
    assert (holes["prompt"], holes["truth"], holes["size"]) == (None, [0, 0, 1, 1, 1, 2], 2)
    assert (prompted["prompt"], prompted["truth"], prompted["size"]) == ("3 3 0", [0, 0, 1], 3)
    assert (padded["prompt"], padded["truth"], padded["size"]) == (None, [2, 2, 2, 1], 4)
    for kinds in holes["recordings"].values():
        for one in kinds.values():
            assert [step == -1 for step in one["step"]] == [True, False, True, True, False, True]
            assert [one["tokens"][place] for place in (0, 2, 3, 5)] == [0, 1, 1, 2]
            assert [len(options) for options in one["alternatives"]] == [0, 2, 0, 0, 2, 0]
            assert sum(step["tokens"] for step in one["steps"]) == 2
            assert sum(one["nats"]) == pytest.approx(one["total_nats"])
    assert {row["recordings"]["one by one"]["decode"]["forwards"] for row in part["problems"]} == {2, 3, 4}


def test_recorded_probabilities_are_those_of_the_state_at_the_reveal(run: Path, replay: dict[str, Any]) -> None:
    """Each recording is walked again from the start, token by token, with the denoiser alone."""
    own = [(MarkovChainDenoiser(4, 0.85, 7), row, 0) for row in replay["parts"][0]["problems"][:2]]
    denoiser, part = recorded_infilling()
    own += [(denoiser, row, 3 if row["prompt"] else 0) for row in part["problems"]]
    for denoiser, row, skipped in own:
        prompt = torch.tensor([int(text) for text in (row["prompt"] or "").split()], dtype=torch.int64)
        for kinds in row["recordings"].values():
            for one in kinds.values():
                tokens, step = torch.tensor(one["tokens"]), torch.tensor(one["step"])
                for position in [place for place, t in enumerate(one["step"]) if t >= 0]:
                    hidden = torch.where(step < one["step"][position], tokens, denoiser.mask_index)
                    state = torch.cat([prompt, hidden])[None]
                    probs = denoiser(state, torch.ones_like(state, dtype=torch.bool)).softmax(-1)[0, skipped + position]
                    wanted = [(one["tokens"][position], one["probability"][position]), *one["alternatives"][position]]
                    for token, share in wanted:
                        assert share == pytest.approx(float(probs[token]), abs=2e-6)


def test_the_page_holds_the_recordings_and_loads_nothing(run: Path, replay: dict[str, Any]) -> None:
    text = (run / "report" / "report.html").read_text()
    (recorded,) = re.findall(r'<script type="application/json" id="recordings">(.*?)</script>', text, re.DOTALL)
    assert json.loads(recorded) == replay
    assert "http://" not in text and "https://" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "default-src &#x27;none&#x27;" in text
    assert "learned (seed-0), sampled" in text and "report/replay.json" in text
    assert "class_path: orderppl.models.PositionTable" in text  # the settings


def test_every_number_of_the_result_tables_is_in_results_json(run: Path) -> None:
    text = (run / "report" / "report.html").read_text()
    section = text[text.index('<section id="results">') : text.index('<section id="run">')]
    shown = {float(number) for number in re.findall(r"(?<!\d)-?\d+\.\d{3}", section)}
    records = json.loads((run / "results" / "results.json").read_text())["records"]
    known = [float(record[key]) for record in records for key in ("value", "low", "high") if key in record]
    assert len(shown) > 6
    assert all(min(abs(number - value) for value in known) <= 5.1e-4 for number in shown)
    assert "results/results.json" in section and "machine=mine" in section and ">-0.500<" in section


def test_text_is_data(word_run: Path, tmp_path: Path) -> None:
    """Words, a prompt, a result and an alarm that look like markup; a verdict for every decoded answer."""
    folder = tmp_path / "<b>run&"
    shutil.copytree(word_run, folder)
    write_results(folder, "x", {}, [{"metric": "<i>", "value": 1, "arm": "</td><b>", "task": "<script>"}])
    (folder / "diagnosis").mkdir()
    numbers = {"<i>kl": {"value": None, "unit": "<b>", "source": "</td>", "note": "<b>infinite"}}
    alarms = {"numbers": numbers, "alarms": ["<b>collapse"], "left_out": {"<i>": "<b>"}}
    (folder / "diagnosis" / "summary.json").write_text(json.dumps(alarms))
    loaded = load_run(folder)
    loaded.data.splits()["test"].tokenizer.tokens[:] = [
        f"</script><b>{token}" for token in loaded.data.splits()["test"].tokenizer.tokens
    ]
    text = write_report(loaded, problems=2, alternatives=3).read_text()
    (part,) = json.loads((folder / "report" / "replay.json").read_text())["parts"]
    assert part["name"] == "Arithmetic, 4 steps"
    assert all(word.startswith("</script>") for word in part["spelling"].values())
    for problem in part["problems"]:
        assert "<b>" in problem["prompt"]
        decoded = [kinds["decode"] for kinds in problem["recordings"].values() if "decode" in kinds]
        assert all(one["correct"] is False for one in decoded)
    assert "<b>" not in text and "<i>" not in text
    assert text.count("</script>") == 2 and text.count("<script") == 2


def test_a_right_answer_is_said_to_be_right(word_run: Path) -> None:
    """A denoiser that knows the row; that of the run knows nothing, see above."""
    loaded = load_run(word_run)
    examples = loaded.data.splits()["test"].take(1)

    class Knows(torch.nn.Module):
        vocab_size, mask_index = loaded.denoiser.vocab_size, loaded.denoiser.mask_index

        def forward(self, state, attention_mask):
            known = examples.batch.trimmed().tokens.expand(state.shape)
            return 9.0 * torch.nn.functional.one_hot(known, self.vocab_size)

    part = record_replay([Arm("sure first", Ranked(), 1)], Knows(), examples)
    one = part["problems"][0]["recordings"]["sure first"]["decode"]
    assert one["correct"] is True and one["tokens"] == part["problems"][0]["truth"]
    assert part["problems"][0]["prompt"].endswith("?")


def test_an_impossible_token_is_infinite_and_no_fault() -> None:
    class Stubborn(torch.nn.Module):
        vocab_size = mask_index = 3

        def forward(self, state, attention_mask):
            return torch.tensor([0.0, -torch.inf, 0.0]).expand(*state.shape, 3)

    part = record_replay([Arm("sure first", Ranked(), 1)], Stubborn(), Batch(torch.tensor([[0, 1, 2]])))
    one = part["problems"][0]["recordings"]["sure first"]["follow"]
    assert one["nats"] == [pytest.approx(0.693147), None, pytest.approx(0.693147)]
    assert one["total_nats"] is None and one["steps"][0]["nats"] is None and one["probability"][1] == 0
    json.dumps(part, allow_nan=False)


def test_diagnoses_and_figures_of_the_run_are_shown(chain_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(chain_run, folder)
    inner = folder / "seed-1" / "diagnosis"
    loaded = load_run(folder / "seed-1")
    diagnose(loaded, loaded.data.splits()["test"].take(2), inner, num_samples=30, num_state_draws=2)
    text = write_report(folder, problems=1).read_text()
    summed = json.loads((inner / "summary.json").read_text())
    section = text[text.index('<section id="diagnostics">') : text.index('<section id="figures">')]
    cells = re.findall(
        r'<th scope="row">(.*?)</th><td class="text">.*?</td><td class="text">.*?</td><td>(.*?)</td>', section
    )
    shown = {name: entry.get("note") or f"{entry['value']:.6g}" for name, entry in summed["numbers"].items()}
    assert dict(cells) == shown and "elbo" in shown
    assert "seed-1/diagnosis/summary.json" in section
    assert len(summed["figures"]) > 5
    for figure in summed["figures"]:
        assert base64.b64encode((inner / figure).read_bytes()).decode() in text
        assert f"seed-1/diagnosis/{figure}" in text

    summed["alarms"] = ["collapse & more"]
    summed["numbers"]["kl"] = {"value": None, "unit": "nats", "source": "sample_stats", "note": "infinite"}
    (inner / "summary.json").write_text(json.dumps(summed))
    again = page("again", {"parts": []}, "replay.json", sections(folder, [loaded]))
    assert "collapse &amp; more" in again and "<td>infinite</td>" in again

    del summed["numbers"]["kl"]["unit"]
    (inner / "summary.json").write_text(json.dumps(summed))
    with pytest.raises(UserError, match=r"summary.json: kl has no unit"):
        write_report(folder)


def damaged(folder: Path, how: str) -> str:
    """Spoil a copy of a run; returns the text the error must have."""
    results = folder / "results" / "results.json"
    if how == "no results to read":
        results.write_text("{")
        return "results.json: cannot be read"
    if how == "older results":
        results.write_text("{}")
        return "results.json: holds no records"
    if how == "record":
        document = json.loads(results.read_text())
        del document["records"][2]["value"]
        results.write_text(json.dumps(document))
        return r"records\[2\] has no metric with a value"
    if how == "no weights":
        (folder / "seed-0" / "weights.safetensors").unlink()
        return "weights.safetensors"
    if how == "no config":
        (folder / "seed-0" / "config.yaml").unlink()
        return "config.yaml"
    for seed in (0, 1):
        (folder / f"seed-{seed}" / "run.json").unlink()
    return "holds no learned order with its denoiser"


@pytest.mark.parametrize("how", ["no results to read", "older results", "record", "no weights", "no config", "no run"])
def test_a_damaged_run_is_one_line_and_nothing_is_written(run: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("report", "checkpoints"))
    said = damaged(folder, how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said) as error:
        write_report(folder)
    assert str(error.value).count("\n") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_replayed_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="problems: 0 is not positive"):
        write_report(run, tmp_path / "out", problems=0)
    loaded = load_run(run / "seed-0")
    loaded.data = None
    with pytest.raises(UserError, match="its config does not name; give the sequences"):
        write_report(loaded, tmp_path / "out")
    with pytest.raises(UserError, match="the example rows of Chains, 3 steps are none"):
        write_report(loaded, tmp_path / "out", examples=Batch(torch.zeros(0, 7, dtype=torch.int64)))
    twice = [Arm("one", Ranked(), 3), Arm("one", Threshold(), 3)]
    with pytest.raises(UserError, match="arms: one comes twice"):
        write_report(run, tmp_path / "out", arms=twice)
    assert not (tmp_path / "out").exists()


def test_own_arms_and_examples_are_replayed(run: Path, tmp_path: Path) -> None:
    arms = [Arm("mine", Threshold(0.3), 2, temperature=0.5)]
    loaded = load_run(run / "seed-0")
    given = Batch(torch.tensor([[0, 0, 1, 1, 1, 2]]), given=torch.tensor([[1, 0, 1, 0, 1, 1]]))
    written = write_report(loaded, tmp_path / "out", examples=given, arms=arms)
    assert written == tmp_path / "out" / "report.html"
    (part,) = json.loads((tmp_path / "out" / "replay.json").read_text())["parts"]
    assert [arm["name"] for arm in part["arms"]] == ["learned", "learned, sampled", "mine"]
    (problem,) = part["problems"]
    assert problem["truth"] == [0, 0, 1, 1, 1, 2] and problem["size"] == 2
    assert "replay.json" in written.read_text() and "report/replay.json" not in written.read_text()


def test_markup_escapes_text_and_values() -> None:
    assert (
        tag("p", "a<b", tag("b", "&"), class_='x"y', hidden=True, id=None)
        == '<p class="x&quot;y" hidden>a&lt;b<b>&amp;</b></p>'
    )
