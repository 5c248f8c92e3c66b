"""Whole commands: what a new user does with a guide, a policy, data and a model of their own, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from own_things import save_bert, write_rows

from orderppl import fit, load_order, load_run
from orderppl.cli import main as module
from orderppl.cli.main import COMMANDS, main
from orderppl.data import JsonLines
from orderppl.evaluation.results import read_results
from orderppl.guides import PolicyGuide
from orderppl.inference.fitting import FitSettings
from orderppl.models import OpeningPlan, UnmaskingModel
from orderppl.models.denoisers import load_denoiser, train_denoiser
from orderppl.policies import Plan, RandomSteps


def test_help_takes_no_time_and_loads_nothing() -> None:
    code = "import sys; from orderppl.cli.main import main; main(['--help']); print(*sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - began < 5  # 0.03 s when nothing else runs
    listed, _, modules = done.stdout.rpartition("\n\n")
    assert all(name in listed for name in COMMANDS)
    assert not {"torch", "jsonargparse", "pyro", "pandas"} & set(modules.split())


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(shell, command: str) -> None:
    text = shell.fine(command, "--help")
    assert f"usage: orderppl {command}" in text
    assert f"orderppl {command} " in text.partition("options:")[0] or command == "env"  # an example
    assert "(type:" in text or command == "env"


@pytest.mark.parametrize("command", ["evaluate", "frontier", "generate", "share", "diagnose", "report"])
def test_help_of_light_commands_does_not_load_torch(command: str) -> None:
    code = f"""
import sys
from orderppl.cli import main
from orderppl.cli.hints import _AnyClass
_AnyClass.__subclasses__ = lambda cls: []  # the list of known classes does
main.main(['{command}', '--help'])
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "pyro", "transformers"} & set(done.stdout.split("\n")[-2].split())


def test_no_command_another_command_and_the_version(shell) -> None:
    assert "usage: orderppl" in shell.fine()
    assert shell.fine("--version").startswith("orderppl 0")
    assert shell.error("fitorder") == "fitorder: no such command; did you mean fit-order?"
    assert "torch" in shell.fine("env")


def test_an_own_guide_through_every_command(shell, small_chain) -> None:
    """Nowhere registered, from the command line alone."""
    shell.fine("fit-order", *small_chain, "--guide", "my_module.MyPlan", "--guide.width", 12, "--out", "runs/mine")
    config = yaml.safe_load(Path("runs/mine/config.yaml").read_text())
    arguments = {"num_steps": 4, "num_tokens": 5, "width": 12}
    assert config["guide"] == {"class_path": "my_module.MyPlan", "init_args": arguments}
    assert load_run("runs/mine").guide.network[0].weight.shape == (5, 12)

    text = shell.fine("evaluate", "runs/mine", "--rows", 6)
    assert "has learned nothing" not in text
    table = pd.read_csv("runs/mine/results/evaluate-6/table.csv")
    assert set(table["row"]) == set(range(6))
    records = read_results("runs/mine/results/evaluate-6")["records"]
    assert {item["policy"] for item in records if item["arm"] == "learned"} == {"GuidePlan"}
    gap = next(item for item in records if item["arm"] == "best fixed order" and item["metric"] == "gap_nats")
    assert gap["value"] < 0.5  # dynamic programming knows the chain

    eager = ("--policy", "Eager", "--policy.factor", 3, "--out", "eager")
    shell.fine("evaluate", "runs/mine", "--rows", 6, *eager)
    assert {item["policy"] for item in read_results("eager")["records"] if item["arm"] == "learned"} == {"Eager"}

    shell.fine(
        "frontier",
        "runs/mine",
        "--rows",
        4,
        "--out",
        "runs/frontier",
        "--heuristics",
        "[{policy: Threshold, tau: [0.5, 0.9]}, {policy: Ranked, score: random, budgets: [1, 4]}]",
        "--mixtures",
        "true",
    )
    mixed = [record for record in read_results("runs/frontier")["records"] if record.get("grid") == "mixtures of two"]
    assert {"frontier", "advantage"} == {record["metric"] for record in mixed}
    assert Path("runs/frontier/frontier.svg").stat().st_size > 1000
    shell.fine("diagnose", "runs/mine", "--rows", 2, "--draws", 4, "--state_draws", 2, "--correlation_draws", 1)
    assert "alarms" in json.loads(Path("runs/mine/results/diagnosis/summary.json").read_text())
    shell.fine("report", "runs/mine", "--problems", 1)
    assert "<html" in Path("runs/mine/report/report.html").read_text()
    shell.fine("share", "runs/mine", "--out", "order")
    assert "my_module.MyPlan" in Path("order/config.yaml").read_text()
    assert "my_module.MyPlan would run code of its own" in shell.error("evaluate", "order", "--rows", 2)


def test_the_installed_command(tmp_path: Path) -> None:
    """Started by its own script, which is called `orderppl` as the package is."""
    command = [Path(sys.executable).with_name("orderppl"), "fit-order", "--config", "tree", "--fit.updates", "1"]
    done = subprocess.run([*command, "--out", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "weights.safetensors").is_file()


def test_a_guide_that_sees_the_tokens_is_no_decoder(shell, small_chain) -> None:
    shell.fine("fit-order", *small_chain, "--guide", "my_module.MyGuide", "--out", "runs/posterior")
    assert "RandomSteps, which decodes, has learned nothing" in shell.fine("evaluate", "runs/posterior", "--rows", 6)


def test_own_policies_and_networks(shell, small_chain) -> None:
    """A policy that is learned around a network that records nothing, and one as an arm of a sweep."""
    policy = ["--policy", "LearnedPolicy", "--policy.network", "my_module.MyNetwork", "--policy.network.bias", 0.5]
    exact = ["--data=Chains", "--denoiser=MarkovChainDenoiser", "--num_steps=3", *small_chain[2:]]
    shell.fine("fit-order", *exact, "--guide=PolicyGuide", *policy, "--out=runs/policy")
    run = load_run("runs/policy")
    assert run.config["model"]["init_args"]["policy"]["init_args"]["network"]["init_args"] == {"bias": 0.5}
    assert run.policy is run.guide.policy
    sweep = "[{policy: my_module.MyPolicy, slope: [-0.5, -1.0], budgets: [2, 4]}]"
    text = shell.fine("frontier", "runs/policy", "--heuristics", sweep, "--rows", 3, "--out", "runs/sweep")
    assert "my_policy" in text
    shell.fine("share", "runs/policy", "--out", "order")
    assert "would run code of its own; allow it by trust_remote_code" in shell.error("evaluate", "order")
    assert type(load_order("order", trust_remote_code=True).policy.network).__name__ == "MyNetwork"


def test_own_rows_and_an_own_masked_model(shell) -> None:
    """JSON lines and a saved BERT with its tokeniser: fit, compare, fill holes, write behind prompts, share."""
    write_rows(Path("rows.jsonl"))
    bert = save_bert(Path("bert"))
    data = ["--data", "JsonLines", "--data.train", "rows.jsonl", "--data.test_share", 0.3]
    denoiser = ["--denoiser", "load_denoiser", "--denoiser.name_or_path", bert]
    policy = ["--policy", "LearnedPolicy", "--policy.network", "PolicyNetwork", "--policy.network.width", 8]
    quick = ["--fit.updates=2", "--fit.batch_size=4", "--fit.progress=false"]
    shell.fine(
        "fit-order", *data, *denoiser, *policy, "--guide=PolicyGuide", "--num_steps=3", *quick, "--out=runs/bert"
    )
    weights = Path("runs/bert/weights.safetensors").stat().st_size
    assert weights < (bert / "model.safetensors").stat().st_size * 2
    heuristics = "[{policy: Ranked, score: [top_prob, entropy], budgets: [2, 3]}, {policy: Threshold, tau: 0.5}]"
    text = shell.fine("frontier", "runs/bert", "--heuristics", heuristics, "--out", "runs/frontier")
    assert "path_nats" in text
    assert "accuracy" in text or "advantage" in text
    shell.fine("frontier", *data, *denoiser, "--heuristics", heuristics, "--out", "runs/heuristics")  # no run at all
    shell.fine("evaluate", "runs/bert", "--heuristics", "[{policy: Threshold, tau: 0.5}]")

    template = "tom has [MASK] apples and buys [MASK] more"
    text = shell.fine("generate", "runs/bert", "--template", template, "--out", "texts.json")
    found = json.loads(Path("texts.json").read_text())
    assert found[0]["given"] == template
    assert found[0]["text"].startswith("tom has ")
    assert "apples and buys" in found[0]["text"]
    assert "░" not in found[0]["text"]
    assert "░" in text
    shell.fine(
        "generate",
        "runs/bert",
        "--prompt",
        "tom has two apples",
        "--prompt",
        "paris is",
        "--length",
        3,
        "--out",
        "texts.json",
    )
    assert [item["given"] for item in json.loads(Path("texts.json").read_text())] == ["tom has two apples", "paris is"]
    shell.fine("generate", *denoiser, "--policy", "Threshold", "--template", template)  # nothing learned

    shell.fine("share", "runs/bert", "--out", "order")
    assert "load_denoiser" in Path("order/config.yaml").read_text()
    shell.fine("generate", "order", "--template", template)
    shell.fine("generate", "order", *denoiser, "--template", template)
    other = Path("bert/vocab.txt").read_text().replace("paris", "berlin")
    save_bert(Path("other"))
    for file in ("vocab.txt", "tokenizer.json"):
        text = (Path("other") / file).read_text()
        (Path("other") / file).write_text(other if file == "vocab.txt" else text.replace("paris", "berlin"))
    denoiser[-1] = Path("other")
    assert shell.error("generate", "order", *denoiser, "--template", template).startswith("denoiser: has ")
    assert shell.error("generate", "order", "--template", "no hole").startswith("template: 'no hole' has no hole")
    assert shell.error("generate", "order").startswith("prompt: there is no text")


def test_an_order_in_python_for_a_masked_model_that_was_trained_on(shell) -> None:
    """Its weights are those of its run, not those of the model that it was trained from."""
    data = JsonLines(str(write_rows(Path("rows.jsonl"))))
    train_denoiser(load_denoiser(save_bert(Path("bert"))), data, updates=2, batch_size=4, out="tuned", progress=False)
    tuned = load_run("tuned").denoiser
    model = UnmaskingModel(tuned, RandomSteps(), 2)
    guide = PolicyGuide(Plan(OpeningPlan(2, tuned.vocab_size)), tuned, 2)
    fit(model, guide, data, updates=2, batch_size=4, out="order", progress=False)
    found = load_run("order").denoiser
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), tuned.parameters(), strict=True))
    start = load_denoiser(Path("bert"))
    assert not all(torch.equal(one, other) for one, other in zip(found.parameters(), start.parameters(), strict=True))


def test_a_denoiser_is_trained_and_used(shell) -> None:
    data = ["--data=Arithmetic", "--data.train=60", "--data.validation=10", "--data.test=10", "--data.num_operations=2"]
    quick = ["--fit.updates=3", "--fit.batch_size=16", "--fit.progress=false"]
    text = shell.fine("train-denoiser", *data, "--denoiser.width=16", "--denoiser.layers=1", *quick, "--out=runs/den")
    assert "nats_per_token" in text
    assert read_results("runs/den/results")["records"][0]["metric"] == "nelbo"
    denoiser = ["--denoiser=load_denoiser", "--denoiser.name_or_path=runs/den"]
    plan = ["--guide=PolicyGuide", "--guide.policy=Plan", "--guide.policy.network=PositionTable", "--num_steps=3"]
    shell.fine("fit-order", *data, *denoiser, *plan, *quick, "--out=runs/plan")
    assert load_run("runs/plan").policy.network.logits.shape[-1] == 3
    shell.fine("generate", "runs/plan", "--prompt", "tom has 3 pens . buys 2 . ?")
    shell.fine("train-denoiser", *data, *denoiser, *quick, "--out=runs/longer")
    assert load_run("runs/longer").config["denoiser"]["class_path"].endswith("TransformerDenoiser")
    shell.fine("train-denoiser", "--config=runs/den/config.yaml", "--out=runs/again")
    again, first = load_run("runs/again").denoiser, load_run("runs/den").denoiser
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), first.parameters(), strict=True))
    few = [*data[:2], "--data.test=0", "--denoiser.width=16", "--denoiser.layers=1", *quick]
    assert "validation" in shell.fine("train-denoiser", *few, "--data.validation=5", "--out=runs/no-test")
    shell.fine("train-denoiser", *few, "--data.validation=0", "--out=runs/no-held")
    assert load_run("runs/no-held").denoiser is not None
    for command in ("evaluate", "share", "report", "diagnose"):
        assert shell.error(command, "runs/den").startswith("run: ")
    shell.fine("frontier", "runs/den", "--rows=3", "--heuristics=[{policy: Threshold, tau: [0.5]}]", "--out=runs/f")


def test_what_decoding_costs_stands_in_one_line(shell) -> None:
    """A denoiser that has learned one word and seven ends: after the word, the stop saves everything."""
    rows = [{"question": f"tom has {count} pens", "answer": "yes"} for count in range(80)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data=JsonLines", "--data.train=rows.jsonl", "--data.test_share=0.5", "--data.validation_share=0"]
    data += ["--data.prompt=question", "--data.response=answer"]
    quick = ["--denoiser.width=16", "--denoiser.layers=1", "--fit.updates=80", "--fit.lr=0.02", "--fit.progress=false"]
    shell.fine("train-denoiser", *data, "--data.canvas=8", *quick, "--out=runs/den")
    heuristics = "[{policy: Ranked, score: left_to_right, budgets: 8}, {policy: Threshold, tau: 1.0, block_size: 2}]"
    command = ["frontier", "runs/den", "--heuristics", heuristics]
    text = shell.fine(*command, "--metrics=[accuracy]", "--timed_rounds=1", "--out=runs/f")
    assert "AUP" in text and "what decoding costs" in text and "nfe stop" in text
    records = read_results("runs/f")["records"]
    found = {(r["metric"], r["arm"]): r["value"] for r in records if r["metric"] != "aup"}
    for arm in ("left_to_right T=8", "threshold block 2 tau=1"):
        assert (found["nfe", arm], found["accuracy", arm], found["accuracy_stopped", arm]) == (8, 1, 1)
        assert 1 <= found["nfe_stopped", arm] <= 2  # the end is revealed, or the first that is open is surely one
        assert found["seconds_batch_1", arm] > 0 and found["seconds_batch_32", arm] > 0
    assert {r["arm"] for r in records if r["metric"] == "aup"} == {"left_to_right", "threshold block 2"}
    shell.fine(*command, "--metrics=[accuracy]", "--rows=4", "--end_stop=false", "--out=runs/g")
    assert not any("stop" in r["metric"] or "seconds" in r["metric"] for r in read_results("runs/g")["records"])
    full = [*data, "--data.canvas=null"]  # one end behind every word: nothing to save
    shell.fine(*command, *full, "--metrics=[accuracy]", "--out=runs/h", "--timed_rounds=0")
    assert not any("stop" in r["metric"] for r in read_results("runs/h")["records"])
    error = shell.error(*command, "--metrics=[path_nats]", "--end_stop=true", "--out=runs/i")
    assert error.startswith("end_stop: nothing is decoded up to an end token")


def test_a_pretrained_model_is_trained_on_with_fewer_tokens(shell) -> None:
    Path("rows.jsonl").write_text("".join(f'{{"text": "tom has {count} apples"}}\n' for count in ("two", "three")))
    Path("test.jsonl").write_text('{"text": "paris is"}\n')
    data = ["--data=JsonLines", "--data.train=rows.jsonl", "--data.test=test.jsonl", "--data.validation_share=0"]
    data += ["--data.prompt=null", "--data.response=text", "--data.ends=false"]
    bert = ["--denoiser=load_denoiser", f"--denoiser.name_or_path={save_bert(Path('bert'))}"]
    quick = ["--fit.updates=3", "--fit.batch_size=2", "--fit.warmup=1", "--fit.progress=false", "--vocabulary=used"]
    shell.fine("train-denoiser", *data, *bert, *quick, "--out=runs/fewer")
    trained, start = load_run("runs/fewer").denoiser, load_denoiser("runs/fewer/start")
    assert trained.vocab_size == start.vocab_size < load_denoiser("bert").vocab_size
    assert {"tom", "has", "two", "apples"} <= set(start.tokenizer.tokens) and "paris" not in start.tokenizer.tokens
    assert any(not torch.equal(a, b) for a, b in zip(trained.parameters(), start.parameters(), strict=True))
    shell.fine("train-denoiser", *data, *bert, *quick, "--out=runs/fewer", "--resume")
    assert "vocabulary" in shell.error("train-denoiser", *data, *quick, "--out=runs/own")


def test_a_run_is_a_config(shell, small_chain) -> None:
    shell.fine("fit-order", *small_chain, "--out=runs/one")
    shell.fine("fit-order", "--config", "runs/one/config.yaml", "--out=runs/two")
    one, two = load_run("runs/one"), load_run("runs/two")
    assert all(torch.equal(a, b) for a, b in zip(one.guide.parameters(), two.guide.parameters(), strict=True))
    shell.fine("fit-order", "--config", "runs/one/config.yaml", "--guide.policy.network.noise=0.5", "--out=runs/three")
    assert (
        load_run("runs/three").config["guide"]["init_args"]["policy"]["init_args"]["network"]["init_args"]["noise"]
        == 0.5
    )
    error = shell.error("fit-order", "--config", "runs/one/config.yaml", "--num_steps=2", "--out=runs/four")
    assert error.startswith("num_steps: is given, and model.num_steps is given, too")


def test_training_seeds_are_one_family(shell, small_chain) -> None:
    for seed in (0, 1):
        shell.fine("fit-order", *small_chain, "--seed", seed, "--out", f"runs/seed-{seed}")
    first, second = (load_run(f"runs/seed-{seed}").policy.network.logits for seed in (0, 1))
    assert not torch.equal(first, second)
    heuristics = "[{policy: Threshold, tau: [0.5, 0.9]}]"
    shell.fine("frontier", "runs/seed-0", "runs/seed-1", "--heuristics", heuristics, "--rows=4", "--out=runs/f")
    records = read_results("runs/f")["records"]
    gains = [item for item in records if item["metric"] == "advantage"]
    assert gains
    assert all(item["training_seeds"] == 2 and item["arm"] == "seed" for item in gains)  # not seed-0


def test_shards_and_what_is_kept(shell, small_chain) -> None:
    shell.fine("fit-order", *small_chain, "--out=runs/one")
    command = [
        "frontier",
        "runs/one",
        "--heuristics=[{policy: Threshold, tau: [0.5, 0.9]}]",
        "--rows=4",
        "--out=runs/f",
    ]
    assert "parts are left to other processes" in shell.fine(*command, "--shard=1/2")
    assert "files: runs/f" in shell.fine(*command, "--shard=2/2")
    whole = read_results("runs/f")["records"]
    shell.fine(*command[:-1], "--out=runs/g")
    assert read_results("runs/g")["records"] == whole
    assert shell.error(*command, "--shard=3/2").startswith("shard: '3/2' is no share")


# ---- what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guide=my_module.MyGuide"], "data: there are none"),
        (["--guide=my_module.MyGuide", "--data=Chains"], "denoiser: there is none"),
        (["--config=chain", "--guide=my_module.MyGuide", "--guide.num_tokens=x"], "guide.num_tokens: must be int"),
        (["--config=chain", "--num_steps=0"], "model.num_steps: 0 is below 1"),
        (["--config=chain", "--fit.updates=0"], "fit.updates: 0 is not positive"),
        (["--config=chain", "--data.stay=2"], "data.stay: 2.0 is no probability"),
        (["--config=chain", "--denoiser.num_states=7"], "denoiser: knows 8 tokens and MASK 7, the data 5 and 4"),
        (["--config=chain", "--device=cuda:99"], "device: cannot use 'cuda:99'"),
        (["--config=chain", "--device=nonsense"], "device: cannot use 'nonsense'"),
        (["--config=chain", "--device=meta"], "device: cannot use 'meta'"),
        (["--config=chain", "--fit.updates=1e300"], "fit.updates: must be int"),
        (["--config=chain", "--fit.updates=" + "9" * 5000], "fit.updates: "),
        (["--config=chain", "--model=my_module.MyNetwork"], "AttributeError: "),
        (["--config=chain", "--denoiser=my_module.MyNetwork"], "denoiser: MyNetwork has no vocab_size"),
        (["--config=chain", "--data=my_module.MyNetwork"], "data: MyNetwork has no splits"),
        (["--config=chain", "--fit.anneal={guide.none: {start: 0, end: 1, updates: 2}}"], "guide.none"),
        (["--config=chain", "--out=my_module.py"], "out: my_module.py"),
        (["--config=chain", "--out=my_module.py/below"], "out: my_module.py/below"),
        (["--config=chain", f"--out={'x' * 300}"], "out: xxx"),
        (["--config=chain", "--out=/proc/none"], "out: /proc/none"),
    ],
)
def test_bad_input_of_a_fit_is_one_line(shell, arguments: list[str], message: str) -> None:
    small = ["--data.train=20", "--data.validation=4", "--data.test=4"] if "--config=chain" in arguments else []
    small = [] if "--data=my_module.MyNetwork" in arguments else small
    quick = [] if any("fit." in item for item in arguments) else ["--fit.updates=2", "--fit.progress=false"]
    assert shell.error("fit-order", *small, *quick, *arguments).startswith(message)


@pytest.mark.parametrize("command", ["evaluate", "frontier", "generate", "share", "diagnose", "report"])
@pytest.mark.parametrize("name", ["nowhere", "my_module.py", "empty", "x" * 300, "a/b/c/d", "\x1b[31m", "[bold]"])
def test_what_is_no_run_is_one_line(shell, command: str, name: str) -> None:
    Path("empty").mkdir()
    more = ["--prompt", "x"] if command == "generate" else []
    assert shell.error(command, name, *more)


def test_a_failure_that_nobody_foresaw_is_one_line_and_a_log(shell, small_chain, monkeypatch) -> None:
    Path("bad_guide.py").write_text(
        "import torch\nfrom orderppl.guides import Guide\n\nclass Bad(Guide):\n    '''Fails late.'''\n"
        "    def __init__(self, num_steps):\n        super().__init__(num_steps)\n"
        "        self.free = torch.nn.Parameter(torch.zeros(1))\n"
        "    def order(self, batch):\n        return {}['nothing\\nhere']\n"
    )
    error = shell.error("fit-order", *small_chain, "--guide=bad_guide.Bad", "--out=runs/bad")
    assert error.startswith("KeyError: ")
    assert error.endswith("the traceback is in runs/bad/error.log")
    assert "in order" in Path("runs/bad/error.log").read_text()
    assert shell("fit-order", *small_chain, "--guide=bad_guide.Bad", "--out=runs/worse", "--debug") == 2
    assert "Traceback" in shell.err
    sys.modules.pop("bad_guide", None)


def test_full_disks_and_lacking_memory_have_remedies(shell, small_chain, monkeypatch) -> None:
    import orderppl.inference.fitting

    for error, message in (
        (OSError(28, "No space left on device", "runs/x/log.jsonl"), "disk: runs/x/log.jsonl cannot be written"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "memory: cpu has none left; lower the batch size",
        ),
        (PermissionError(13, "Permission denied", "runs/x"), "out: runs/x: Permission denied"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(orderppl.inference.fitting, "fit", fail)
        assert shell.error("fit-order", *small_chain).startswith(message)


def test_an_interrupt_says_how_to_go_on(shell, small_chain, monkeypatch) -> None:
    import orderppl.inference.fitting

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(orderppl.inference.fitting, "fit", interrupted)
    assert shell("fit-order", *small_chain) == 130
    assert "--resume" in shell.err


def test_every_process_of_several_says_who_it_is(shell, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shell("fit-order", "--num_steps=x") == 2
    assert shell.err.startswith("process 1: error: num_steps: must be int")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "orderppl.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if not path.exists():
        process.kill()
        pytest.fail(process.communicate()[1])


@pytest.mark.slow
def test_one_process_at_a_time_and_a_kill_releases_the_folder(tmp_path: Path, small_chain, shell) -> None:
    fit = ["fit-order", *small_chain, "--fit.updates=100000", "--fit.checkpoint_every=5", "--out=runs/one"]
    with start(tmp_path, *fit) as process:
        wait_for(tmp_path / "runs" / "one" / "checkpoints", process)
        assert "another process writes into runs/one" in shell.error(*fit)
        process.kill()
        process.communicate()
        (tmp_path / "runs" / "one" / f".unfinished-{process.pid}-log.jsonl").write_text("half")
        done = json.loads((tmp_path / "runs" / "one" / "run.json").read_text())
        assert "weights.safetensors" not in done["digests"]
        assert "is not finished" in shell.error("evaluate", "runs/one")
        latest = max((tmp_path / "runs" / "one" / "checkpoints").glob("*.pt")).stem
        updates = int(latest.rpartition("_")[2]) + 2
        shell.fine(*fit, "--resume", f"--fit.updates={updates}")
        assert load_run("runs/one").info["updates"] == updates
        assert not list((tmp_path / "runs").rglob(".unfinished-*"))
        whole = ["fit-order", *small_chain, f"--fit.updates={updates}", "--out=runs/whole"]
        shell.fine(*whole)
        one, other = (load_run(f"runs/{name}").guide.state_dict() for name in ("one", "whole"))
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_keeps_a_checkpoint(tmp_path: Path, small_chain, number: int) -> None:
    with start(tmp_path, "fit-order", *small_chain, "--fit.updates=100000", "--out=runs/one") as process:
        wait_for(tmp_path / "runs" / "one" / "log.jsonl", process)
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (130, -number)
        assert "Traceback" not in err
        assert len(list((tmp_path / "runs" / "one" / "checkpoints").glob("update_*.pt"))) == 1


def test_the_settings_of_a_fit_are_options() -> None:
    """A field that the trainer gains is an option without a line here."""
    names = set(FitSettings.__dataclass_fields__)
    from orderppl.cli.fit_order import Config
    from orderppl.cli.parser import parse

    config = parse(Config, ["--config=chain"], "fit-order")
    assert set(config.fit) == names
    assert main is module.main


NETWORK = ["--guide.network=SequenceEncoder", "--guide.network.width=8", "--guide.network.layers=1"]
GUIDES = {
    "plan": ["--guide=PolicyGuide", "--guide.policy=Plan", "--guide.policy.network=PositionTable"],
    "mean field": ["--guide=MeanFieldGuide", *NETWORK, "--guide.network.out=3"],
    "scores": ["--guide=RenormalisedScoreGuide", *NETWORK],
    "ranking": ["--guide=PlackettLuceGuide", *NETWORK, "--guide.sizes=cosine"],
    "posterior": [
        *("--guide=PolicyGuide", "--guide.policy=LearnedPolicy", "--guide.policy.network=PolicyNetwork"),
        *("--guide.policy.network.sees_truth=true", "--guide.policy.network.width=8"),
    ],
}
OBJECTIVES = {
    "default": [],
    "particles": ["--objective=RevealTraceGraph_ELBO", "--objective.num_particles=3", "--objective.kl_weight=0.5"],
    "importance": ["--objective=ImportanceWeightedELBO", "--objective.num_particles=3"],
    "wake sleep": ["--objective=SequenceWakeSleep", "--objective.num_particles=3"],
    "Pyro's": ["--objective=pyro.infer.TraceGraph_ELBO"],
}


@pytest.mark.parametrize(
    ("guide", "objective"),
    [*((guide, "default") for guide in GUIDES), *(("scores", objective) for objective in OBJECTIVES)],
)
def test_guides_and_objectives_are_a_matter_of_options(shell, small_chain, guide: str, objective: str) -> None:
    policy = [] if guide in ("plan", "mean field") else ["--policy=LearnedPolicy", "--policy.network=PolicyNetwork"]
    exact = ["--data=Chains", "--denoiser=MarkovChainDenoiser", "--num_steps=3", *small_chain[2:]]
    shell.fine(
        "fit-order", *exact, *policy, *GUIDES[guide], *OBJECTIVES[objective], "--out=runs/one", "--dtype=float64"
    )
    run = load_run("runs/one")
    assert next(run.guide.parameters()).dtype is torch.float64
    assert run.objective is not None
    bound = "error" if run.policy is None else shell.fine("evaluate", "runs/one", "--rows=3", "--heuristics=[]")
    assert "gap_nats" in bound
