"""Every packaged config, built as its command builds it, with small data and a small denoiser."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orderppl.cli import fit_order, frontier, train_denoiser
from orderppl.cli.assemble import Known, fit_settings, make_data, make_denoiser
from orderppl.cli.fit_order import make_parts
from orderppl.cli.held_out import known_of
from orderppl.cli.parser import parse, presets
from orderppl.config import Builder
from orderppl.evaluation import sweep
from orderppl.evaluation.arms import standard_heuristics
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.fitting import PairLoss
from orderppl.models import UnmaskingModel
from orderppl.models.denoisers.training import DenoiserSettings, masked_diffusion_nelbo
from orderppl.policies import Ranked

from tiny_models import write_model

NAMES = {
    command: sorted(name for name, path in presets().items() if path.read_text("utf-8").startswith(f"# {command}: "))
    for command in ("train-denoiser", "fit-order", "frontier")
}
SMALL_DENOISER = ["--denoiser.width=8", "--denoiser.layers=1", "--denoiser.heads=2"]
PRETRAINED = {"antibodies": "sapiens", "reactions": "rxnmapper"}  # preset -> package with the weights
DOMAIN = "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC{}WGQGTLVTVSS"
PAPER = ["--data.max_prompt=96", "--data.max_length=40", "--data.canvas=40"]


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of problems in the format of GSM8K, of one and two equations."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, first, count in (("train", 0, 60), ("test", 100, 12)):
        rows = []
        for index in range(first, first + count):
            a, b, c = 2 + index % 7, 3 + index % 5, 1 + index % 11
            first_one = f"She has <<{a}*{b}={a * b}>>{a * b} pens"
            more = f", then <<{a * b}+{c}={a * b + c}>>{a * b + c}" if index % 3 else ""
            question = f"Problem {index}: Mia has {a} bags of {b} pens{f' and buys {c} more' * bool(more)}. How many?"
            answer = a * b + c * bool(more)
            rows.append(json.dumps({"question": question, "answer": f"{first_one}{more}.\n#### {answer}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def small_data(name: str, problems: Path) -> list[str]:
    """Options that make the data of a preset small, or say where they are."""
    text = presets()[name].read_text("utf-8")
    if "Gsm8k" in text:
        shares = ["--data.min_count=1", "--data.validation_share=0.2", f"--data.source={problems}"]
        return [*shares, *(["--data.augment=20"] if "augment" in text else [])]
    if name == "antibodies":
        residues = "ACDEFGHIKLMNPQRSTVWY"
        (problems / "heavy.fasta").write_text(
            "".join(f">row-{i}\n{DOMAIN.format(residues[i : i + 6])}\n" for i in range(14)), "utf-8"
        )
        return [f"--data.train={problems / 'heavy.fasta'}"]
    if name == "reactions":
        rows = "".join(f"{'C' * n}C(=O)Cl.NCc1ccccc1>>{'C' * n}C(=O)NCc1ccccc1\n" for n in range(1, 20))
        (problems / "reactions.csv").write_text(f"rxn\n{rows}", "utf-8")
        return [f"--data.train={problems / 'reactions.csv'}", "--data.test_share=0.3"]
    return ["--data.train=40", "--data.validation=6", "--data.test=8"]


def test_the_first_line_of_every_preset_says_which_command_reads_it() -> None:
    assert sorted(name for names in NAMES.values() for name in names) == sorted(presets())


@pytest.mark.parametrize("name", NAMES["train-denoiser"])
def test_denoisers_to_train(name: str, problems: Path, tmp_path: Path) -> None:
    options = ["--config", name, *small_data(name, problems)]
    if name == "gsm8k_paper_denoiser":
        options += [*PAPER, f"--denoiser.name_or_path={write_model(tmp_path / 'smdm', 'smdm')}"]
    else:
        options += SMALL_DENOISER
    config = parse(train_denoiser.Config, options, "train-denoiser")
    assert config is not None
    builder = Builder(Known())
    data = make_data(builder, config.data)
    denoiser = make_denoiser(builder, config.denoiser, data)
    settings = fit_settings(builder, DenoiserSettings, config)
    assert settings["updates"] >= 1000 and settings["ema_decay"] is not None
    found = masked_diffusion_nelbo(denoiser, data.splits()["train"].take(8), 8)
    assert 0 < found["nats_per_token"] < 10


def test_the_paper_in_the_form_of_smdm(problems: Path, tmp_path: Path) -> None:
    """The options of docs/paper.md: rows of 256 tokens, and a finite loss."""
    data = ["--data.form=smdm", "--data.canvas=256", "--data.max_length=256", f"--data.source={problems}"]
    model = f"--denoiser.name_or_path={write_model(tmp_path / 'smdm', 'smdm')}"
    config = parse(train_denoiser.Config, ["--config=gsm8k_paper_denoiser", *data, model], "train-denoiser")
    assert config is not None
    builder = Builder(Known())
    examples = (made := make_data(builder, config.data)).splits(make_denoiser(builder, config.denoiser, made).tokenizer)
    batch = examples["train"].batch
    assert (batch.attention_mask.sum(-1) == 256).all() and made.on_bad == "report"
    begin = examples["train"].tokenizer.bos_index
    assert begin is not None and ((batch.tokens == begin) & batch.latent).sum(-1).tolist() == [1] * len(batch)
    assert sorted(set(((batch.tokens == begin) & batch.given).sum(-1).tolist())) == [1, 2]


def order_parts(name: str, problems: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    """What `fit` is called with."""
    options = ("--config", name, *small_data(name, problems), *options)
    if name == "gsm8k_paper_order":
        sizes = [
            f"--{part}.network.{size}" for part in ("policy", "guide") for size in ("width=8", "layers=1", "heads=2")
        ]
        options += (*PAPER, *sizes, f"--denoiser.name_or_path={write_model(tmp_path / 'smdm', 'smdm')}")
    elif "load_denoiser" in presets()[name].read_text("utf-8"):
        options += ("--denoiser=TransformerDenoiser", *SMALL_DENOISER)
    config = parse(fit_order.Config, list(options), "fit-order")
    assert config is not None
    torch.manual_seed(0)
    return make_parts(config)


@pytest.mark.parametrize("name", NAMES["fit-order"])
def test_orders_to_learn(name: str, problems: Path, tmp_path: Path) -> None:
    """Everything is made, and the loss of some rows reaches all that is to be learned."""
    if name in PRETRAINED:
        try:
            importlib.metadata.version(PRETRAINED[name])
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {PRETRAINED[name]} is not installed")
    parts = order_parts(name, problems, tmp_path)
    model, guide = parts["model"], parts["guide"]
    assert isinstance(model, UnmaskingModel) and model.num_steps == guide.num_steps
    assert all(change(0) >= 0 for change in (parts["anneal"] or {}).values())
    if isinstance(model.denoiser, torch.nn.Module):
        model.denoiser.requires_grad_(False)
    loss = PairLoss(model, guide, parts["objective"] or RevealTraceGraph_ELBO())
    loss(parts["data"].splits()["train"].take(4).batch).backward()
    learned = {id(p): p for part in (model, guide) for p in part.parameters() if p.requires_grad}
    assert learned
    with_gradient = [p for p in learned.values() if p.grad is not None and bool(p.grad.isfinite().all())]
    assert len(with_gradient) == len(learned)
    assert any(bool(p.grad.any()) for p in with_gradient)


def test_the_price_of_a_model_is_what_its_policy_reads(problems: Path, tmp_path: Path) -> None:
    for name in ("mod20_order", "dual_order", "programs_order", "programs_careful", "programs_wide_order"):
        parts = order_parts(name, problems, tmp_path)
        policy, prices = parts["model"].policy, parts["model"].step_price
        assert parts["guide"].policy is policy
        for other in (policy.prices, policy.network.prices, policy.policy.network.prices):
            assert (other.low, other.high) == (prices.low, prices.high), name
        assert policy.answer.marks and parts["model"].answer.marks


def test_options_change_a_preset(problems: Path, tmp_path: Path) -> None:
    parts = order_parts("gsm8k_order", problems, tmp_path, "--model.step_price=0", "--num_steps=4", "--fit.lr=0.5")
    assert (parts["model"].step_price, parts["model"].num_steps, parts["lr"]) == (0, 4, 0.5)


@pytest.mark.parametrize("name", NAMES["frontier"])
def test_grids_of_comparisons(name: str, problems: Path) -> None:
    config = parse(frontier.Config, ["--config", name, *small_data(name, problems)], "frontier")
    assert config is not None and config.targets
    known = known_of(make_data(Builder(Known()), config.data).splits()["test"])
    arms = sweep(config.heuristics or standard_heuristics(), known=known, seeds=(0,))
    assert len(arms) >= 20 and not any(arm.kind == "learned" for arm in arms)
    learned = sweep(config.learned, known={"policy": Ranked("top_prob")}, family="learned", training_seed=0)
    assert len(learned) == sum(len(spec["price"]) for spec in config.learned)


def test_the_paper_in_small(shell, problems: Path) -> None:
    """Its three stages on a random model in the format of SMDM: everything but the sizes is as packaged."""
    torch.manual_seed(0)
    source = [f"--data.source={problems}", *PAPER]
    loop = ["--fit.updates=3", "--fit.batch_size=4", "--fit.accumulate=2", "--fit.bfloat16=false"]
    loop += ["--fit.warmup=1", "--fit.checkpoint_every=2", "--fit.validate_every=2", "--fit.progress=false"]
    write_model(Path("smdm"), "smdm")
    first = ["--config=gsm8k_paper_denoiser", "--denoiser.name_or_path=smdm", "--out=runs/denoiser"]
    shell.fine("train-denoiser", *first, *source, *loop)
    sizes = [f"--{part}.network.{size}" for part in ("policy", "guide") for size in ("width=8", "layers=1", "heads=2")]
    second = ["--config=gsm8k_paper_order", "--denoiser.name_or_path=runs/denoiser", "--objective.num_particles=2"]
    for steps in (2, 3):
        shell.fine("fit-order", *second, *source, *sizes, *loop, f"--num_steps={steps}", f"--out=runs/T{steps}")
    third = ["--config=frontier_gsm8k_paper", *source, "--rows=2", "--seeds=1", "--targets=[2.0]", "--out=runs/paper"]
    third += ["--heuristics=[{policy: Ranked, score: [random, top_prob], budgets: [2, 3], eos_aware: true}]"]
    text = shell.fine("frontier", "runs/T2", "runs/T3", *third)
    records = json.loads(Path("runs/paper/results.json").read_text("utf-8"))["records"]
    assert {"T2", "T3"} <= {record["family"] for record in records if record["metric"] == "accuracy"}, text
