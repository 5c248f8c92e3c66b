"""Public denoisers through the commands: learn an order, share it, decode with it in another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from orderppl.decoding import decode
from orderppl.errors import UserError
from orderppl.experiments.build import (
    ArithmeticTask,
    ChainTask,
    PretrainedDenoiserConfig,
    build_denoiser,
    build_task,
    learned_policy,
    saved_tokenizer,
)
from orderppl.experiments.evaluate import load_order
from orderppl.experiments.results import read_results
from orderppl.models.denoisers import load_denoiser

from command_line import call
from tiny_models import write_model

REMOTE = ("llada", "Dream")
KINDS = ("bert", "smdm", *REMOTE)
STEPS = 3
SIZES = [5, 2, 7]
SETTINGS = {
    "num_steps": STEPS,
    "task": {"name": "arithmetic", "train": 64, "validation": 16, "test": 16, "num_operations": 2},
    "prior": {"name": "residual_policy", "network": {"width": 16, "layers": 1, "heads": 2}},
    "guide": "policy",
    "elbo": {"num_particles": 2},
    "fit": {"updates": 20, "batch_size": 4, "validate_every": None, "checkpoint_every": 20},
}
ELSEWHERE = """
import json, sys, torch
from orderppl.decoding import decode
from orderppl.models import OrderPolicy
from orderppl.models.denoisers import load_denoiser

for policy, model in zip(sys.argv[1::2], sys.argv[2::2]):
    policy, denoiser = OrderPolicy.from_pretrained(policy), load_denoiser(model, trust_remote_code=True)
    context = torch.tensor([[5, 6, 7], [8, 9, 0], [5, 0, 0]])
    mask = torch.arange(3) < torch.tensor([[3], [2], [1]])
    output = decode(denoiser, policy, context, mask, length=torch.tensor({sizes}), max_steps=policy.num_steps)
    print(json.dumps([output.sequences.tolist(), output.reveal_step.tolist()]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a fit and a shared order of every kind."""
    root = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    for kind in KINDS:
        folder = root / kind
        denoiser = {
            "name": "pretrained",
            "model": str(folder / "model"),
            "trust_remote_code": kind in ("llada", "Dream"),
        }
        write_model(folder / "model", kind)
        (folder / "fit.yaml").write_text(json.dumps({**SETTINGS, "denoiser": denoiser}))
        assert call("fit-order", "--config", str(folder / "fit.yaml"), "--out", str(folder / "run")) == 0
        assert call("share", "--run", str(folder / "run"), "--out", str(folder / "order")) == 0
    return root


def test_decodes_alike_in_a_new_process(root: Path) -> None:
    pairs = [str(root / kind / part) for kind in KINDS for part in ("order", "model")]
    script = ELSEWHERE.replace("{sizes}", str(SIZES))
    command = [sys.executable, "-c", script, *pairs]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stderr
    context = torch.tensor([[5, 6, 7], [8, 9, 0], [5, 0, 0]])
    mask = torch.arange(3) < torch.tensor([[3], [2], [1]])
    for kind, line in zip(KINDS, run.stdout.splitlines(), strict=True):
        _, problem = load_order(root / kind / "run")
        output = decode(
            problem.model.denoiser,
            learned_policy(problem),
            context,
            mask,
            length=torch.tensor(SIZES),
            max_steps=STEPS,
        )
        assert json.loads(line) == [output.sequences.tolist(), output.reveal_step.tolist()]
        assert (output.sequences[output.attention_mask] != problem.task.mask_index).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_and_what_is_stored(root: Path, kind: str) -> None:
    """Only the policy was trained; neither the checkpoints nor the run hold a copy of the frozen denoiser."""
    config, problem = load_order(root / kind / "run")
    before = build_denoiser(config.denoiser, problem.task, config.task).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.denoiser.state_dict().items())
    network = problem.model.prior.network
    assert network.head.weight.abs().max() > 0  # it starts at zero
    frozen = sum(tensor.numel() for tensor in before.values())
    largest = max(path.stat().st_size for path in (root / kind / "run").rglob("*.safetensors"))
    assert largest < 4 * sum(parameter.numel() for parameter in network.parameters()) + 4 * frozen
    with safe_open(next((root / kind / "run").rglob("weights.safetensors")), framework="pt") as file:
        assert not any("denoiser" in name for name in file.keys())  # noqa: SIM118


def test_shared_configuration(root: Path) -> None:
    content = json.loads((root / "Dream" / "order" / "order_policy.json").read_text())
    assert content["denoiser"]["name"] == str(root / "Dream" / "model")
    assert (content["denoiser"]["vocab_size"], content["denoiser"]["mask_index"]) == (64, 2)
    assert content["architecture"]["base"] == {"name": "easy_first", "threshold": 0.9, "temperature": 1.0}
    assert content["training"]["task"] == "arithmetic"
    assert {"elbo", "path_nats"} <= {record["metric"] for record in content["results"]}
    card = (root / "Dream" / "order" / "README.md").read_text()
    assert "V = 64, MASK 2" in card


def test_generate(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines without a terminal: every state, fewer and fewer hidden positions, then the text."""
    folder, out = root / "smdm", tmp_path / "out"
    arguments = ("--policy", str(folder / "order"), "--prompt", "2 + 3 =", "--prompt", "7", "--length", "6")
    assert call("generate", *arguments, "--denoiser", str(folder / "model"), "--out", str(out)) == 0
    printed = capsys.readouterr().out
    lines = printed.partition("Files written")[0].strip().splitlines()
    first, second = lines.index("2 + 3 ="), lines.index("7")
    hidden = [line.count("░") for line in lines[first + 1 : second - 1]]
    assert hidden[0] == 6
    assert hidden == sorted(hidden, reverse=True)
    assert len(hidden) == len(set(hidden))
    records = read_results(out)["records"]
    assert [record["prompt"] for record in records] == ["2 + 3 =", "7"]
    assert records[0]["value"] == len(hidden)
    assert lines[second - 1] == f"{records[0]['text']} ({len(hidden)} forwards)".strip()
    assert call("generate", *arguments, "--out", str(tmp_path / "again")) == 0  # it knows its denoiser
    assert read_results(tmp_path / "again")["records"] == records


def test_generate_in_a_terminal(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    order = str(root / "bert" / "order")
    assert call("generate", "--policy", order, "--prompt", "2", "--length", "4", "--out", str(tmp_path / "o")) == 0
    shown = capsys.readouterr().out
    assert "░░░░" in shown
    assert "\x1b[2K" in shown  # the line before is erased


def test_generate_refuses(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order, out = str(root / "bert" / "order"), ("--out", str(tmp_path / "o"))
    for arguments, problem in (
        (
            ("--policy", order, "--denoiser", str(root / "smdm" / "model")),
            "has 42 token classes, the order was learned",
        ),
        (("--policy", order, "--denoiser", str(root / "llada" / "model")), "set trust_remote_code to true"),
        (("--policy", str(tmp_path)), "holds no order_policy.json"),
        (("--policy", "nobody/order"), "HF_HUB_OFFLINE is set"),
        (("--policy", order, "--length", "9999"), "exceeds the model's 511"),
    ):
        assert call("generate", *arguments, *out) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ")
        assert problem in said
        assert not (tmp_path / "o").exists()


def test_a_jointly_trained_denoiser_is_shared_with_its_order(tmp_path: Path, root: Path) -> None:
    settings = {**SETTINGS, "freeze_denoiser": False, "fit": {**SETTINGS["fit"], "updates": 2}}  # type: ignore[dict-item]
    for kind in ("smdm", "Dream"):
        folder = tmp_path / kind
        folder.mkdir()
        denoiser = {"name": "pretrained", "model": str(root / kind / "model"), "trust_remote_code": kind == "Dream"}
        (folder / "fit.yaml").write_text(json.dumps({**settings, "denoiser": denoiser}))
        assert call("fit-order", "--config", str(folder / "fit.yaml"), "--out", str(folder / "run")) == 0
        assert call("share", "--run", str(folder / "run"), "--out", str(folder / "order")) == 0
        _, problem = load_order(folder / "run")
        shared = load_denoiser(folder / "order" / "denoiser", trust_remote_code=True)
        tokens, mask = torch.tensor([[5, problem.task.mask_index, 7]]), torch.ones(1, 3, dtype=torch.bool)
        assert torch.equal(shared(tokens, mask), problem.denoiser(tokens, mask))
        original = load_denoiser(root / kind / "model", trust_remote_code=True)
        assert not torch.equal(shared(tokens, mask), original(tokens, mask))
        trust = ["--trust-remote-code"] * (kind == "Dream")
        options = ["--policy", str(folder / "order"), "--length", "4", "--out", str(folder / "text"), *trust]
        assert call("generate", *options) == 0


def test_what_does_not_belong_together(root: Path) -> None:
    config = PretrainedDenoiserConfig(model=str(root / "bert" / "model"))
    chain = build_task(ChainTask(train=4, validation=4, test=4, length=4), 0)
    with pytest.raises(UserError, match="pretrained reads text, chain has none"):
        build_denoiser(config, chain, ChainTask())
    settings = ArithmeticTask(train=8, validation=4, test=4)
    with pytest.raises(UserError, match=r"knows 44 tokens and MASK 4, arithmetic was read with .*; read the task with"):
        build_denoiser(config, build_task(settings, 0), settings)
    task = build_task(settings, 0, saved_tokenizer(config))
    task.splits["train"]["context"] = torch.zeros(8, 600, dtype=torch.long)
    with pytest.raises(UserError, match="reads 512 tokens, the longest row has"):
        build_denoiser(config, task, settings)


def test_out_of_memory_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orderppl.experiments import fit_order

    def fit_problem(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(fit_order, "fit_problem", fit_problem)
    assert call("fit-order", "--config", str(root / "bert" / "fit.yaml"), "--out", str(tmp_path / "o")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: memory: cpu has none left; lower the batch size or elbo.num_particles")
