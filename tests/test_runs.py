"""Run folders: what a fit leaves is loaded again, whole or refused, and shared."""

import json
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from orderppl import decode, fit, load_order, load_run
from orderppl.data import Chains
from orderppl.errors import UserError
from orderppl.guides import Guide, PolicyGuide
from orderppl.identity import check_denoiser, identity_of, weights_digest
from orderppl.inference import Anneal
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser, TransformerDenoiser, load_denoiser, train_denoiser
from orderppl.policies import AtPrice, Plan, PriceRange, RandomSteps, Threshold
from orderppl.runs import CONFIG, INFO, WEIGHTS, policy_of, start_run
from orderppl.sharing import share_run
from orderppl.unmasking import Batch

DATA = Chains(length=6, train=40, validation=8, test=8)
QUICK = {"updates": 2, "batch_size": 8, "progress": False, "seed": 1}


def plan_pair() -> tuple[UnmaskingModel, PolicyGuide]:
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    model = UnmaskingModel(denoiser, RandomSteps(), 3, step_price=0.1)
    return model, PolicyGuide(Plan(PositionTable(6, 3, noise=0.5)), denoiser, 3)


def learned_pair(denoiser: nn.Module) -> tuple[UnmaskingModel, PolicyGuide]:
    policy = LearnedPolicy(PolicyNetwork(5, 8, 1, 2), base=Threshold(0.5, temperature=1.0))
    return UnmaskingModel(denoiser, policy, 3), PolicyGuide(policy, denoiser, 3)


def transformer() -> TransformerDenoiser:
    return TransformerDenoiser(5, 4, width=8, layers=1, heads=2, max_length=6)


@pytest.fixture(scope="module")
def plan_run(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("runs") / "plan"
    options = {**QUICK, "optimizer": partial(torch.optim.Adam, lr=0.1), "out": out}
    fit(*plan_pair(), DATA, anneal={"objective.kl_weight": Anneal(0.5, 0.1, 2)}, **options)
    return out


@pytest.fixture(scope="module")
def denoiser_run(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("runs") / "denoiser"
    train_denoiser(transformer(), DATA, out=out, **QUICK)
    return out


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_fit_is_loaded_as_it_ended(tmp_path: Path) -> None:
    denoiser = transformer().requires_grad_(False)  # of a script: nothing but the run could give its weights
    model, guide = learned_pair(denoiser)
    fit(model, guide, DATA, out=tmp_path / "run", **QUICK)
    run = load_run(tmp_path / "run")
    assert run.kind == "order"
    assert run.num_steps == 3
    assert same_tensors(run.model, model)
    assert run.policy is run.model.policy is run.guide.policy
    assert run.denoiser is run.model.denoiser is run.guide.denoiser
    assert not run.denoiser.training
    batch = DATA.splits()["test"].batch
    options = {"max_steps": 3, "mode": True}
    hidden = Batch(torch.full_like(batch.tokens, 4))
    ours, theirs = (
        decode(denoiser, model.policy, hidden, **options),
        decode(run.denoiser, run.policy, hidden, **options),
    )
    assert torch.equal(ours.reveal_step, theirs.reveal_step)


def test_the_config_is_complete_and_readable(plan_run: Path) -> None:
    config = yaml.safe_load((plan_run / CONFIG).read_text())
    assert list(config) == ["model", "guide", "objective", "data", "fit"]
    assert config["model"]["init_args"]["step_price"] == 0.1
    assert config["model"]["init_args"]["denoiser"] is config["guide"]["init_args"]["denoiser"]
    assert config["data"] == {"class_path": "orderppl.data.Chains", "init_args": config["data"]["init_args"]}
    assert config["fit"]["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.1}}
    assert config["fit"]["anneal"]["objective.kl_weight"]["init_args"] == {"start": 0.5, "end": 0.1, "updates": 2}
    info = json.loads((plan_run / INFO).read_text())
    assert (info["kind"], info["updates"]) == ("order", 2)
    assert set(info["digests"]) == {CONFIG, WEIGHTS}


def test_a_plan_is_the_policy_of_its_run(plan_run: Path) -> None:
    run = load_run(plan_run)
    assert isinstance(run.policy, Plan)
    assert run.policy is run.guide.policy
    assert repr(run) == f"Run({str(plan_run)!r}: order, Plan for 3 steps, 2 updates)"
    assert run.data.length == 6
    assert torch.equal(run.data.splits()["test"].batch.tokens, DATA.splits()["test"].batch.tokens)


def test_what_decodes() -> None:
    model, guide = plan_pair()
    assert policy_of(model, guide) is guide.policy
    model, guide = learned_pair(MarkovChainDenoiser(4, 0.85, 6))
    assert policy_of(model, guide) is model.policy
    sees = PolicyGuide(LearnedPolicy(PolicyNetwork(5, 8, 1, 2, sees_truth=True)), model.denoiser, 3)
    heuristic = UnmaskingModel(model.denoiser, Threshold(0.5, temperature=1.0), 3)
    assert policy_of(heuristic, sees) is heuristic.policy  # a posterior does not decode
    assert policy_of(model, Guide(3)) is model.policy


def test_weights_of_a_denoiser_that_is_loaded_are_not_copied(denoiser_run: Path, tmp_path: Path) -> None:
    model, guide = learned_pair(load_denoiser(denoiser_run))
    fit(model, guide, DATA, out=tmp_path / "frozen", **QUICK)
    fit(model, guide, DATA, out=tmp_path / "trained", train_denoiser=True, **QUICK)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("frozen", "trained")]
    assert sizes[0] < sizes[1]
    assert same_tensors(load_run(tmp_path / "trained").denoiser, model.denoiser)
    assert same_tensors(load_run(tmp_path / "frozen").denoiser, load_denoiser(denoiser_run))


def test_a_denoiser_that_has_changed_since_is_refused(denoiser_run: Path, tmp_path: Path) -> None:
    own = tmp_path / "denoiser"
    shutil.copytree(denoiser_run, own)
    fit(*learned_pair(load_denoiser(own)), DATA, out=tmp_path / "run", **QUICK)
    shutil.rmtree(own)
    train_denoiser(transformer(), DATA, out=own, **{**QUICK, "updates": 3})
    with pytest.raises(UserError, match=r"^denoiser: its weights are not those that .*run was learned with"):
        load_run(tmp_path / "run")
    load_run(tmp_path / "run", denoiser=load_denoiser(own))  # on purpose


def test_a_denoiser_of_another_vocabulary_is_refused(plan_run: Path) -> None:
    with pytest.raises(UserError, match=r"^denoiser: has 3 token classes, .* was learned for 4"):
        load_run(plan_run, denoiser=MarkovChainDenoiser(3, 0.85, 6))


def test_identities_tell_weights_apart() -> None:
    one, other = transformer(), transformer()
    assert weights_digest(one) != weights_digest(other)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other)
    assert weights_digest(one.double()) != weights_digest(other)
    check_denoiser(identity_of(one), other, "a run")
    check_denoiser(None, other, "a run")


def test_a_denoiser_run_is_trained_on_without_the_first(denoiser_run: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(denoiser_run, first)
    train_denoiser(load_denoiser(first), DATA, out=tmp_path / "second", **QUICK)
    shutil.rmtree(first)
    second = load_run(tmp_path / "second")
    assert second.kind == "denoiser"
    assert second.policy is None
    assert not same_tensors(second.denoiser, load_denoiser(denoiser_run))


def test_double_precision_is_kept(tmp_path: Path) -> None:
    model, guide = plan_pair()
    fit(model.double(), guide.double(), DATA, out=tmp_path / "run", **QUICK)
    run = load_run(tmp_path / "run")
    assert run.policy.network.logits.dtype is torch.float64
    assert same_tensors(run.guide, guide)
    assert torch.get_default_dtype() is torch.float32


# ---- damage


@pytest.mark.parametrize("name", [CONFIG, INFO, WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe", b"{", b"[" * 100_000, b"{}", b"null", b"a: 1"])
def test_a_damaged_file_is_one_line_that_names_it(plan_run: Path, tmp_path: Path, name: str, content: bytes) -> None:
    copy = tmp_path / "run"
    shutil.copytree(plan_run, copy)
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        load_run(copy)
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), name=st.sampled_from([CONFIG, INFO, WEIGHTS]))
def test_no_changed_byte_goes_unnoticed(plan_run: Path, tmp_path: Path, place: int, byte: int, name: str) -> None:
    content = bytearray((plan_run / name).read_bytes())
    place %= len(content)
    if content[place] == byte:
        return
    content[place] = byte
    copy = tmp_path / "run"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(plan_run, copy)
    (copy / name).write_bytes(bytes(content))
    if name != INFO:
        with pytest.raises(UserError, match=f"{name} is not the file that {INFO} was written for"):
            load_run(copy)
        return
    with suppress(UserError):  # a digit of a version may change, nothing that was learned
        assert same_tensors(load_run(copy).guide, load_run(plan_run).guide)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_may_not_be_missing(plan_run: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(plan_run, copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"^run: .*{name} is not the file that run.json was written for"):
        load_run(copy)


def test_other_folders_are_no_runs(tmp_path: Path, plan_run: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing", plan_run / CONFIG):
        with pytest.raises(UserError, match=r"^run: .* holds no run.json"):
            load_run(folder)
    copy = tmp_path / "new"
    shutil.copytree(plan_run, copy)
    info = json.loads((copy / INFO).read_text())
    (copy / INFO).write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1; update orderppl"):
        load_run(copy)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    model, guide = plan_pair()
    start_run(tmp_path / "run", "order", {"model": model, "guide": guide, "objective": None, "data": None, "fit": None})
    with pytest.raises(UserError, match="is not finished: it has no weights.safetensors; go on with it by --resume"):
        load_run(tmp_path / "run")


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    left = [folder / ".unfinished-1-config.yaml", folder / "checkpoints" / ".unfinished-1-update_1.pt"]
    for path in left:
        path.write_text("half")
    (folder / ".unfinished-2-shared").mkdir()
    fit(*plan_pair(), DATA, out=folder, **QUICK)
    assert not list(folder.rglob(".unfinished-*"))


def test_a_run_goes_on_with_the_same_objects_only(tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(*plan_pair(), DATA, out=out, **QUICK)
    model, guide = plan_pair()
    fit(model, guide, DATA, out=out, resume=True, **{**QUICK, "updates": 3})
    assert load_run(out).info["updates"] == 3
    other = UnmaskingModel(model.denoiser, RandomSteps("cosine"), 3, step_price=0.1)
    with pytest.raises(UserError, match=r"^model\.policy\.schedule: is 'cosine', the interrupted run has 'uniform'"):
        fit(other, guide, DATA, out=out, resume=True, **{**QUICK, "updates": 4})
    with pytest.raises(UserError, match=r"^fit\.batch_size: is 4, the interrupted run has 8"):
        fit(model, guide, DATA, out=out, resume=True, **{**QUICK, "batch_size": 4})


def test_a_guide_that_cannot_be_described_is_refused_before_training(tmp_path: Path) -> None:
    class Local(Guide):
        def __init__(self, num_steps: int) -> None:
            super().__init__(num_steps)
            self.free = nn.Parameter(torch.zeros(num_steps))

    model, _ = plan_pair()
    with pytest.raises(UserError, match=r"^guide: .*Local' cannot be imported by a name"):
        fit(model, Local(3), DATA, out=tmp_path / "run", **QUICK)


# ---- sharing


def test_a_shared_order_is_the_policy_alone(plan_run: Path, tmp_path: Path) -> None:
    run = load_run(plan_run)
    folder = share_run(run, tmp_path / "order", mode=False, results={"path_nats": 0.5})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, INFO, WEIGHTS]
    text = (folder / CONFIG).read_text()
    assert "Chains" not in text
    assert "guide" not in text
    order = load_order(folder)
    assert (order.kind, order.num_steps, order.mode) == ("policy", 3, False)
    assert same_tensors(order.policy, run.policy)
    assert isinstance(order.denoiser, MarkovChainDenoiser)
    assert order.info["results"] == {"path_nats": 0.5}
    with pytest.raises(UserError, match=r"^out: .* exists"):
        share_run(run, folder)


def test_a_whole_run_is_an_order_too(plan_run: Path) -> None:
    assert same_tensors(load_order(plan_run).policy, load_run(plan_run).policy)


def test_a_denoiser_that_nobody_else_has_goes_along(denoiser_run: Path, tmp_path: Path) -> None:
    fit(*learned_pair(load_denoiser(denoiser_run)), DATA, out=tmp_path / "run", **QUICK)
    run = load_run(tmp_path / "run")
    folder = share_run(run, tmp_path / "order")
    written = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(written) == 5
    assert not any(str(denoiser_run) in path.read_text() for path in written)
    order = load_order(folder)
    assert same_tensors(order.denoiser, run.denoiser)
    assert same_tensors(order.policy, run.policy)
    again = share_run(order, tmp_path / "again")
    assert same_tensors(load_order(again).denoiser, run.denoiser)


def test_a_wrapped_policy_is_shared_as_it_is(tmp_path: Path) -> None:
    prices = PriceRange(0.1, 1.0)
    denoiser = MarkovChainDenoiser(4, 0.85, 6)
    policy = LearnedPolicy(PolicyNetwork(5, 8, 1, 2, features=["confidence", "price"], prices=prices))
    model = UnmaskingModel(denoiser, policy, 3, step_price=prices)
    fit(model, PolicyGuide(policy, denoiser, 3), DATA, out=tmp_path / "run", **QUICK)
    run = load_run(tmp_path / "run")
    folder = share_run(run, tmp_path / "order", policy=AtPrice(run.policy, 0.2))
    order = load_order(folder)
    assert isinstance(order.policy, AtPrice)
    assert order.policy.price == 0.2
    assert same_tensors(order.policy.policy, run.policy)


def test_code_of_a_shared_order_needs_trust(plan_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = share_run(load_run(plan_run), tmp_path / "order")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign_plan.py").write_text(
        "from orderppl.policies import Plan\n\nclass Foreign(Plan):\n    '''A plan.'''\n"
    )
    config = (folder / CONFIG).read_text().replace("orderppl.policies.Plan", "foreign_plan.Foreign")
    (folder / CONFIG).write_text(config)
    info = json.loads((folder / INFO).read_text())
    from orderppl.files import file_digest

    info["digests"][CONFIG] = file_digest(folder / CONFIG)
    (folder / INFO).write_text(json.dumps(info))
    with pytest.raises(
        UserError, match=r"^policy: foreign_plan.Foreign would run code of its own; allow it by trust_rem"
    ):
        load_order(folder)
    assert type(load_order(folder, trust_remote_code=True).policy).__name__ == "Foreign"
