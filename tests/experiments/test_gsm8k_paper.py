"""The experiment of the paper, in small: every line of its preset, estimates, resumption, processes and refusals."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # comes with accelerate
import pytest
import torch
from safetensors.torch import load_file

from orderppl.decoding.registry import POLICIES
from orderppl.experiments import gsm8k
from orderppl.experiments.build import PretrainedDenoiserConfig
from orderppl.experiments.config import config_dict, load_config
from orderppl.experiments.results import read_results
from orderppl.models.denoisers import SmdmConfig, SmdmDenoiser, denoiser_tokenizer

import command_line
from gsm8k_rows import write_rows
from tiny_models import write_model

SIZES = {  # what the small preset may change of the paper's
    *("validation", "max_context", "max_length", "canvas", "dtype"),
    *("updates", "batch_size", "accumulate", "warmup", "validate_every", "checkpoint_every"),
    *("width", "layers", "heads", "num_particles", "rows", "random_seeds", "resamples"),
}
CLOCK = ("seconds_per_row", "policy_wall_share")


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {p: v for key, inner in items for p, v in leaves(inner, (*path, str(key))).items()}
    return found if isinstance(value, (dict, list)) and value else {path: value}


def test_the_small_preset_is_the_paper_s_in_other_sizes() -> None:
    plain = [config_dict(load_config(gsm8k.Config, gsm8k.PRESETS[name])) for name in ("paper", "paper-tiny")]
    start = [config["equations"].pop("denoiser") for config in plain]
    assert [config["name"] for config in start] == ["pretrained", "stand_in"]
    paper, tiny = (leaves(config) for config in plain)
    assert paper.keys() == tiny.keys()
    changed = {path for path in paper if paper[path] != tiny[path]}
    assert {path[-1] for path in changed} <= SIZES
    assert {path[0] for path in changed} == {"dtype", "equations"}


def test_the_paper_preset_is_the_paper_s() -> None:
    config = load_config(gsm8k.Config, gsm8k.PRESETS["paper"])
    settings = config.equations
    assert (config.form, config.dtype) == ("equations", "bfloat16")
    assert isinstance(settings.denoiser, PretrainedDenoiserConfig)
    with torch.device("meta"):
        whole = SmdmDenoiser("170M")
    assert sum(parameter.numel() for parameter in whole.parameters()) == 219_050_496  # 170M without its embeddings
    assert (settings.training.updates, settings.training.batch_size) == (45_000, 256)
    assert [arm.num_steps for arm in settings.orders] == [5, 10, 15]
    for arm in settings.orders:
        assert (arm.fit.updates, arm.fit.batch_size, arm.elbo.num_particles) == (15_000, 32, 8)
        assert arm.fit.temperature is not None
        assert (arm.fit.temperature.start, arm.fit.temperature.end) == (0.1, 0.05)
        assert arm.freeze_denoiser
    joint = load_config(gsm8k.Config, gsm8k.PRESETS["paper"], ["equations.orders.*.freeze_denoiser=false"])
    assert not any(arm.freeze_denoiser for arm in joint.equations.orders)


def test_the_paper_preset_compares_with_every_policy_that_needs_no_truth() -> None:
    compare = load_config(gsm8k.Config, gsm8k.PRESETS["paper"]).equations.compare
    assert compare is not None
    swept = {name for sweep in compare.heuristics for name in sweep.policy}
    swept |= {"block" for sweep in compare.heuristics if sweep.block_size}
    swept |= {"eos_aware" for sweep in compare.heuristics if sweep.eos_aware}
    swept |= {"answer_ready" for sweep in compare.heuristics if sweep.sure}
    assert swept == {name for name, kind in POLICIES.items() if kind.needs_truth is not True}
    fixed = {name for sweep in compare.heuristics if {5, 10, 15} <= set(sweep.budgets) for name in sweep.policy}
    assert fixed == {"random", "top_prob", "margin", "entropy", "left_to_right"}  # at the budgets of the orders


# --------------------------------------------------------------------------------------------------------- the dry run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    write_rows(folder, "train.jsonl", 0, 400)
    write_rows(folder, "test.jsonl", 1000, 6)
    return folder


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["gsm8k", "--preset", "paper-tiny", "--data", str(data), "--out", str(out), *more]


def call(data: Path, out: Path, *more: str) -> int:
    return command_line.call(*command(data, out, *more))


JOINT = ("--set", "equations.orders.0.freeze_denoiser=false")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages one after another, each by its name."""
    out = tmp_path_factory.mktemp("paper") / "run"
    for stage in ("denoiser", "order", "evaluate"):
        with open(out.parent / f"{stage}.txt", "w") as said, contextlib.redirect_stdout(said):
            assert call(data, out, "--stage", stage, *JOINT) == 0
    return out


def records(out: Path) -> list[dict[str, Any]]:
    """The measurements of a comparison, without what a clock measured and where it ran."""
    found = [r for r in read_results(out)["records"] if "arm" in r]
    return [{k: v for k, v in r.items() if k not in (*CLOCK, "run_folder")} for r in found]


def test_the_denoiser_is_a_real_checkpoint_that_was_trained_on(finished: Path) -> None:
    said = (finished.parent / "denoiser.txt").read_text()
    assert "No public model was asked for" in said
    folder = finished / "equations"
    before, after = (
        load_file(folder / "stand-in" / "model.safetensors"),
        load_file(folder / "denoiser" / "denoiser.safetensors"),
    )
    assert before.keys() == after.keys()
    assert {"lm_head.weight", "transformer.wte.weight", "transformer.h.1.mlp.swiglu.w3.weight"} <= before.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert json.loads((folder / "denoiser" / "denoiser.json").read_text())["model_type"] == "smdm"
    tokenizer = denoiser_tokenizer(folder / "denoiser")
    text = "Mia has <<12*3=36>> #### 36"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.mask_index == 1000  # behind the classes, as in the real one
    log = [json.loads(line) for line in (folder / "denoiser" / "log.jsonl").read_text().splitlines()]
    assert [entry["update"] for entry in log if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert {entry["update"] for entry in log if "validation" in entry} == {3, 6}


def test_three_budgets_are_learned_frozen_and_jointly(finished: Path) -> None:
    for arm, steps in (("T5", 5), ("T10", 10), ("T15", 15)):
        folder = finished / "equations" / arm
        learned = load_file(folder / "order.safetensors")
        assert any(name.startswith("denoiser.") for name in learned) == (arm == "T5")
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        updates = [entry for entry in log if "loss" in entry]
        assert [entry["guide.temperature"] for entry in updates] == pytest.approx([0.1, 0.1 - 0.05 / 3, 0.1 - 0.1 / 3])
        assert all(1 <= entry["steps"] <= steps for entry in updates)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "update_00000002",
            "update_00000003",
        ]


def test_every_arm_is_compared(finished: Path) -> None:
    found = records(finished)
    arms = {r["arm"] for r in found if r["metric"] == "accuracy"}
    assert {f"T{T} ({decision})" for T in (5, 10, 15) for decision in ("mode", "sample")} <= arms
    assert {"margin uniform T=12", "entropy uniform eos-aware T=4", "klass eps=0.01 tau=0.5", "factor factor=1"} <= arms
    assert all(r["n"] == 4 for r in found)
    path = {r["arm"]: r for r in found if r["metric"] == "path_nats"}
    assert path["left_to_right uniform sequential"]["nfe"] == 40  # the canvas: one token a step
    assert path["T5 (mode)"]["nfe_max"] <= 5
    assert any(r["metric"] == "advantage" and r["arm"] == "T5 (mode)" for r in found)
    times = {r["stage"] for r in read_results(finished)["records"] if r["metric"] == "seconds"}
    assert times == {"denoiser", "T5", "T10", "T15"}


def test_estimates_are_printed_before_training(finished: Path, data: Path, tmp_path: Path) -> None:
    for stage, heads in (("denoiser", ("denoiser",)), ("order", ("T5", "T10", "T15"))):
        said = (finished.parent / f"{stage}.txt").read_text()
        assert "Before training: what each process needs" in said and "measured, forwards of this denoiser" in said
        assert all(head in said for head in heads)
    shutil.copytree(finished / "equations" / "stand-in", tmp_path / "run" / "equations" / "stand-in")
    settings = ("--set", "device_tflops=2", "--stage", "estimate")
    assert call(data, tmp_path / "run", *settings, *JOINT) == 0
    told = {(r["stage"], r["metric"]): r for r in read_results(tmp_path / "run")["records"]}
    assert {stage for stage, _ in told} == {"denoiser", "T5", "T10", "T15"}
    for stage, updates in (("denoiser", 6), ("T5", 3)):
        flops = told[stage, "estimated_flops_per_update"]["value"]
        assert told[stage, "estimated_hours"]["value"] == pytest.approx(flops * updates / 2e12 / 3600)
    config = SmdmConfig(n_layer=2, n_head=2, n_embd=16, intermediate_size=24, vocab_size=1000)
    weights = 4 * sum(parameter.numel() for parameter in SmdmDenoiser(config).parameters())
    assert told["denoiser", "estimated_bytes"]["value"] > 5 * weights  # gradient, two moments and an average besides
    assert not (tmp_path / "run" / "equations" / "denoiser").exists()  # nothing is begun


def test_settings_of_the_machine_may_change_and_others_may_not(
    finished: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "equations" / "denoiser" / "denoiser.safetensors").stat().st_mtime_ns
    other = ("training.accumulate=3", "training.compile=true", "orders.*.fit.accumulate=1", "orders.*.fit.log_every=1")
    changes = [part for change in other for part in ("--set", f"equations.{change}")]
    for stage in ("denoiser", "order"):
        assert call(data, finished, "--stage", stage, *changes, *JOINT) == 0
    assert (finished / "equations" / "denoiser" / "denoiser.safetensors").stat().st_mtime_ns == before
    assert call(data, finished, "--stage", "order", "--set", "equations.orders.2.fit.batch_size=5", *JOINT) == 2
    assert "equations.T15: fit.batch_size differs" in capsys.readouterr().err
    call(data, finished, "--stage", "evaluate", *JOINT)  # puts back the results


def test_a_compiled_denoiser_trains_alike_and_keeps_its_names(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "equations" / "stand-in", tmp_path / "run" / "equations" / "stand-in")
    options = ("equations.training.compile=true", "equations.training.compile_backend=eager")
    changes = [part for change in options for part in ("--set", change)]
    assert call(data, tmp_path / "run", "--stage", "denoiser", *changes) == 0
    compiled = load_file(tmp_path / "run" / "equations" / "denoiser" / "denoiser.safetensors")
    plain = load_file(finished / "equations" / "denoiser" / "denoiser.safetensors")
    assert compiled.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("equations.denoiser={name: pretrained, model: nowhere/x/y.safetensors}", "HF_HUB_OFFLINE is set"),
        (
            "equations.denoiser={name: pretrained, model: BERT}",
            "use SMDM here, or fit-order with freeze_denoiser=false",
        ),
        ("equations.denoiser={name: pretrained, model: SMDM, dtype: bfloat16}", "lost in rounding"),
        ("equations.training.compile_backend=no_such", "compile: the denoiser cannot be compiled here"),
        ("equations.orders.3.num_steps=2", "the list has 3 items; write 0 to 2, or * for all"),
        ("equations.compare=null", "equations is not evaluated in shards"),
    ],
)
def test_bad_input_is_one_line(
    setting: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("bert", "smdm"):
        if kind.upper() in setting:
            setting = setting.replace(kind.upper(), str(write_model(tmp_path / kind, kind)))
    more = ["--shard", "1/2"] if "compare" in setting else ["--set", "equations.training.compile=true"]
    small = ["--set", "equations.task={name: gsm8k, max_length: 100, max_context: 100}"] if "bert" in setting else []
    assert call(data, tmp_path / "run", "--stage", "denoiser", *more, *small, "--set", setting) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert not list(tmp_path.glob("run/**/denoiser.safetensors"))


def test_what_does_not_fit_goes_on_in_pieces(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "equations" / "stand-in", tmp_path / "run" / "equations" / "stand-in")
    forward = SmdmDenoiser.forward

    def small(self: SmdmDenoiser, state: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(state) > 2 and not state.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return forward(self, state, attention_mask)

    monkeypatch.setattr(SmdmDenoiser, "forward", small)
    assert call(data, tmp_path / "run", "--stage", "denoiser") == 2
    assert "raise accumulate" in capsys.readouterr().err.splitlines()[-1]
    assert call(data, tmp_path / "run", "--stage", "denoiser", "--set", "equations.training.accumulate=4") == 0
    pieces = load_file(tmp_path / "run" / "equations" / "denoiser" / "denoiser.safetensors")
    for name, tensor in load_file(finished / "equations" / "denoiser" / "denoiser.safetensors").items():
        torch.testing.assert_close(pieces[name], tensor, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- processes


@contextlib.contextmanager
def started(words: list[str], said: Path) -> Any:
    """A command with all processes that it starts, gone at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(said, "ab") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # a launcher gives its workers sessions of their own
                own = psutil.Process(process.pid)
                for one in (own, *own.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
            process.wait()


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"]
CLI = "orderppl.experiments.cli"


@pytest.mark.slow
def test_two_processes_are_killed_and_one_goes_on(data: Path, tmp_path: Path) -> None:
    """In float64, so that the tolerance is that of rounding."""
    more = ("--stage", "denoiser", "--dtype", "float64", "--set", "equations.training.updates=60")
    folder = tmp_path / "broken" / "equations" / "denoiser"
    with started([sys.executable, *LAUNCHER, CLI, *command(data, tmp_path / "broken", *more)], tmp_path / "x") as two:
        deadline = time.monotonic() + 600
        while not (folder / "checkpoints" / "update_00000006").exists():
            assert two.poll() is None, (tmp_path / "x").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not (folder / "denoiser.safetensors").exists()
    assert not json.loads((folder / "stage.json").read_text())["finished"]
    assert call(data, tmp_path / "broken", *more) == 0
    assert call(data, tmp_path / "whole", *more) == 0
    whole = load_file(tmp_path / "whole" / "equations" / "denoiser" / "denoiser.safetensors")
    resumed = load_file(folder / "denoiser.safetensors")
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-9, atol=1e-11)
    logs = [(tmp_path / run / "equations" / "denoiser" / "log.jsonl").read_text() for run in ("broken", "whole")]
    losses = [[r["loss"] for r in map(json.loads, log.splitlines()) if "loss" in r] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(losses[0]) == 60


@pytest.mark.slow
def test_two_workers_share_the_evaluation_and_a_killed_one_goes_on(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "equations" / "evaluation")
    more = ("--stage", "evaluate", *JOINT)
    workers = [[sys.executable, "-m", CLI, *command(data, out, *more, "--shard", f"{n}/2")] for n in (1, 2)]
    rows = out / "equations" / "evaluation" / "rows-2-of-2.jsonl"
    with started(workers[0], tmp_path / "x1") as first:
        with started(workers[1], tmp_path / "x2") as second:
            deadline = time.monotonic() + 600
            while not rows.exists() or rows.read_bytes().count(b"\n") < 8:
                assert second.poll() is None, (tmp_path / "x2").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.01)
        done = rows.read_bytes().split(b"\n")[:-1]
        assert first.wait(timeout=600) == 0, (tmp_path / "x1").read_text()[-3000:]
    assert [r["metric"] for r in read_results(out)["records"] if r["metric"] == "missing"] == ["missing"]
    assert call(data, out, *more, "--shard", "2/2") == 0
    assert rows.read_bytes().split(b"\n")[: len(done)] == done
    assert records(out) == records(finished)


@pytest.mark.slow
def test_all_stages_on_two_processes(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "launched"
    shutil.copytree(finished / "equations" / "stand-in", out / "equations" / "stand-in")
    with started([sys.executable, *LAUNCHER, CLI, *command(data, out, *JOINT)], tmp_path / "x") as two:
        assert two.wait(timeout=1200) == 0, (tmp_path / "x").read_text()[-3000:]
    one, other = ({r["arm"]: r for r in records(folder) if r["metric"] == "path_nats"} for folder in (finished, out))
    assert one.keys() == other.keys()
    for arm in ("top_prob uniform T=5", "T10 (sample)"):
        assert other[arm]["value"] == pytest.approx(one[arm]["value"], rel=1e-3)
    assert len(list((out / "equations" / "evaluation").glob("rows-*-of-2.jsonl"))) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it imports its compiler
def test_the_real_compiler_trains_alike(finished: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "equations" / "stand-in", tmp_path / "run" / "equations" / "stand-in")
    assert call(data, tmp_path / "run", "--stage", "denoiser", "--set", "equations.training.compile=true") == 0
    compiled = load_file(tmp_path / "run" / "equations" / "denoiser" / "denoiser.safetensors")
    for name, tensor in load_file(finished / "equations" / "denoiser" / "denoiser.safetensors").items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)
