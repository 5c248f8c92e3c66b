"""The order of an exact chain, learned by the call a user makes; nothing else is touched."""

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from orderppl.data import Chains
from orderppl.errors import UserError
from orderppl.guides import MeanFieldGuide, PolicyGuide, RenormalisedScoreGuide
from orderppl.inference.annealing import Anneal
from orderppl.inference.fitting import FitSettings, PairLoss, fit, held_out
from orderppl.inference.reveal_elbo import RevealTraceGraph_ELBO
from orderppl.inference.trainer import FitResult
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable, SequenceEncoder, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser, TransformerDenoiser
from orderppl.policies import Plan, RandomSteps
from orderppl.runs import load_run
from orderppl.unmasking import Batch

L, V = 6, 3


def chains(rows: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (rows, L), generator=generator)
    keep = torch.rand(rows, L, generator=generator) < 0.8
    for i in range(1, L):
        tokens[:, i] = torch.where(keep[:, i], tokens[:, i - 1], tokens[:, i])
    return Batch(tokens)


def tied_pair(steps: int = 2) -> tuple[UnmaskingModel, PolicyGuide]:
    """A plan that is prior and guide."""
    torch.manual_seed(0)
    denoiser, plan = MarkovChainDenoiser(V, 0.85, L), Plan(PositionTable(L, steps))
    return UnmaskingModel(denoiser, plan, steps), PolicyGuide(plan, denoiser, steps)


def run(model: nn.Module, guide: nn.Module, data: Any = None, particles: int = 4, **changes: Any) -> FitResult:
    chosen: dict[str, Any] = {
        "objective": RevealTraceGraph_ELBO(num_particles=particles),
        "updates": 3,
        "batch_size": 16,
        "optimizer": partial(torch.optim.Adam, lr=0.01),
        "progress": False,
    }
    return fit(model, guide, chains() if data is None else data, **(chosen | changes))


def test_a_pair_without_parameters_leaves_no_folder(tmp_path: Path) -> None:
    denoiser = MarkovChainDenoiser(V, 0.85, L)
    model, guide = UnmaskingModel(denoiser, RandomSteps(), 2), PolicyGuide(RandomSteps(), denoiser, 2)
    with pytest.raises(UserError, match="no parameter that requires a gradient"):
        run(model, guide, out=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "config.yaml").exists()


def test_learns_a_better_order_than_a_random_one() -> None:
    model, guide = tied_pair()
    result = run(model, guide, particles=8, updates=40, lr=0.3)
    elbos = [record["elbo"] for record in result.trace]
    assert sum(elbos[-10:]) / 10 > sum(elbos[:5]) / 5 + 0.4
    assert result.losses[0] == pytest.approx(-elbos[0], rel=1e-4)
    assert 1 <= result.trace[-1]["steps"] <= 2


def test_help_shows_what_matters() -> None:
    shown = str(inspect.signature(fit))
    for name in (
        "data",
        "objective",
        "optimizer",
        "updates",
        "batch_size",
        "out",
        "resume",
        "train_denoiser",
        "anneal",
    ):
        assert name in shown
    documented = inspect.getdoc(fit)
    assert documented is not None
    for name in FitSettings.__dataclass_fields__:
        assert name in documented
    with pytest.raises(TypeError, match="updats"):
        run(*tied_pair(), updats=3)


@pytest.mark.parametrize("local", [False, True])
def test_loss_is_per_sequence_and_leaves_pyro_alone(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        model, guide = tied_pair()
    batch = chains(16)
    before = pyro.settings.get("module_local_params")
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO(num_particles=4))
    torch.manual_seed(1)
    once = loss(batch)
    torch.manual_seed(1)
    total = RevealTraceGraph_ELBO(num_particles=4).differentiable_loss(model, guide, batch)  # the global setting
    assert once.item() == pytest.approx(total.item() / 16, rel=1e-5)
    assert loss.metrics["elbo"].item() == pytest.approx(-once.item(), rel=1e-4)
    assert pyro.settings.get("module_local_params") == before
    once.backward()
    assert model.policy.network.logits.grad.abs().sum() > 0


def test_the_same_call_gives_the_same_fit_and_a_seed_another() -> None:
    def losses(seed: int) -> list[float]:
        pair = tied_pair()
        torch.manual_seed(torch.initial_seed() + 1)
        return run(*pair, seed=seed).losses

    assert losses(1) == losses(1) != losses(2)


def test_anneals_kl_weight_temperature_and_step_price() -> None:
    model = UnmaskingModel(MarkovChainDenoiser(V, 0.85, L), RandomSteps(), 3, step_price=0.5)
    guide = RenormalisedScoreGuide(SequenceEncoder(V + 1, width=16, layers=1), 3, temperature=1.0)
    result = run(
        model,
        guide,
        updates=4,
        anneal={
            "objective.kl_weight": Anneal(0.0, 1.0, 2),
            "guide.temperature": Anneal(1.0, 0.1, 3),
            "model.step_price": Anneal(0.25, 0.25, 0),
        },
    )
    assert [record["objective.kl_weight"] for record in result.trace] == [0.0, 0.5, 1.0, 1.0]
    assert result.trace[-1]["guide.temperature"] == 0.1
    assert guide.temperature == 0.1
    assert model.step_price == 0.25
    with pytest.raises(UserError, match=r"guide.temperature: guide \(PolicyGuide\) has no attribute"):
        run(*tied_pair(), anneal={"guide.temperature": Anneal(1.0, 0.1, 3)})


def test_trains_a_state_dependent_policy_and_its_guide() -> None:
    policy = LearnedPolicy(PolicyNetwork(V + 1, width=16, layers=1), non_empty=False)  # mean-field sets may be empty
    model = UnmaskingModel(MarkovChainDenoiser(V, 0.85, L), policy, 2)
    guide = MeanFieldGuide(SequenceEncoder(V + 1, 2, width=16, layers=1), 2)
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO())
    start = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    run(model, guide)
    moved = {name for name, tensor in loss.state_dict().items() if not torch.equal(tensor, start[name])}
    parameters = {name for name, _ in loss.named_parameters()}
    # a blind placeholder is not read: everything else must move
    assert not {name for name in parameters - moved if "placeholder" not in name}


class Noisy(nn.Module):
    """A user's own denoiser, with dropout and in training mode, as it comes from its constructor."""

    mask_index, vocab_size = V, V

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(V + 1, 8), nn.Dropout(0.5), nn.Linear(8, V))
        self.modes: set[bool] = set()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.modes.add(self.net[1].training)
        return self.net(state)


def noisy_pair() -> tuple[UnmaskingModel, MeanFieldGuide, Noisy]:
    torch.manual_seed(2)
    denoiser = Noisy()
    model = UnmaskingModel(denoiser, RandomSteps(), 2)
    return model, MeanFieldGuide(PositionTable(L, 2), 2), denoiser


def test_the_denoiser_is_frozen_and_in_evaluation_mode_and_comes_back_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, guide, denoiser = noisy_pair()
    denoiser.net[2].bias.requires_grad_(False)
    denoiser.net[0].eval()
    before = [p.detach().clone() for p in denoiser.parameters()]
    run(model, guide, validation=chains(8), progress=True)
    assert denoiser.modes == {False}
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), before, strict=True))
    assert [p.requires_grad for p in denoiser.parameters()] == [True, True, False]
    assert [part.training for part in denoiser.net] == [False, True, True]
    assert guide.network.logits.abs().sum() > 0
    assert capsys.readouterr().err.count("fit: training guide (12); frozen: model.denoiser (59)") == 1


def test_an_error_leaves_the_denoiser_as_it_was() -> None:
    model, guide, denoiser = noisy_pair()
    with pytest.raises(UserError):
        run(model, guide, anneal={"guide.nothing": Anneal(1.0, 0.0, 3)})
    assert denoiser.training
    assert all(p.requires_grad for p in denoiser.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_denoiser_is_trained_when_asked_for(frozen: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, guide, denoiser = noisy_pair()
    denoiser.eval().requires_grad_(not frozen)  # frozen: as `load_denoiser` gives it
    before = [p.detach().clone() for p in denoiser.parameters()]
    run(model, guide, train_denoiser=True, progress=True)
    assert not any(torch.equal(a, b) for a, b in zip(denoiser.parameters(), before, strict=True))
    assert {p.requires_grad for p in denoiser.parameters()} == {not frozen}
    assert not denoiser.training
    assert "training model.denoiser (59), guide (12)\n" in capsys.readouterr().err


def test_validates_the_plain_bound_on_the_same_orders() -> None:
    model, guide = tied_pair()
    result = run(
        model,
        guide,
        updates=6,
        validation=chains(20),
        validate_every=3,
        anneal={"objective.kl_weight": Anneal(0, 0, 0)},
    )
    assert [record["update"] for record in result.validations] == [3, 6]
    assert set(result.validations[0]) == {"update", "elbo", "log_likelihood", "kl", "steps"}
    objective = RevealTraceGraph_ELBO(num_particles=4)
    for size in (20, 7, 1):  # a row alone is a row in a batch
        again = held_out(model, guide, chains(20), objective, batch_size=size)()
        assert again == pytest.approx({k: v for k, v in result.validations[1].items() if k != "update"}, rel=1e-5)


def test_a_fit_makes_a_run_folder_that_can_be_loaded_and_resumed(tmp_path: Path) -> None:
    def pair() -> tuple[UnmaskingModel, RenormalisedScoreGuide]:
        torch.manual_seed(4)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            denoiser = TransformerDenoiser(V + 1, V, width=8, layers=1, heads=2)
        policy = LearnedPolicy(PolicyNetwork(V + 1, width=8, layers=1, heads=2))
        scores = SequenceEncoder(V + 1, width=8, layers=1, heads=2)
        return UnmaskingModel(denoiser, policy, 3), RenormalisedScoreGuide(scores, 3)

    out = tmp_path / "whole"
    model, guide = pair()
    result = run(model, guide, updates=6, out=str(out), ema_decay=0.9, lr={"guide": 0.05})
    assert result.out == out
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "run.json", "weights.safetensors", "log.jsonl", "checkpoints",
    }  # fmt: skip
    assert json.loads((out / "run.json").read_text())["updates"] == 6
    found = load_run(out)
    for mine, theirs in ((model, found.model), (guide, found.guide)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    batch = chains(8)
    expected, measured = (held_out(m, g, batch)() for m, g in ((model, guide), (found.model, found.guide)))
    assert measured == expected
    # interrupted after half of the updates, as far as the folder can tell
    half, broken = tmp_path / "half", pair()
    stop_after(broken[1], 3)
    with pytest.raises(StopError):
        run(*broken, updates=6, out=half, ema_decay=0.9, lr={"guide": 0.05}, checkpoint_every=3)
    with pytest.raises(UserError, match="not finished"):
        load_run(half)
    again = run(*pair(), updates=6, out=half, ema_decay=0.9, lr={"guide": 0.05}, checkpoint_every=3, resume=True)
    assert again.losses == result.losses
    assert (half / "weights.safetensors").read_bytes() == (out / "weights.safetensors").read_bytes()
    objective = RevealTraceGraph_ELBO(num_particles=4, kl_weight=0.5)
    with pytest.raises(UserError, match="kl_weight: is 0.5"):
        run(*pair(), updates=6, out=half, ema_decay=0.9, lr={"guide": 0.05}, resume=True, objective=objective)


class StopError(Exception):
    """Stands for a kill signal."""


def stop_after(guide: RenormalisedScoreGuide, calls: int) -> None:
    done: list[int] = []

    def count(module: nn.Module, arguments: Any) -> None:
        done.append(1)
        if len(done) > calls:
            raise StopError

    guide.network.register_forward_pre_hook(count)


def test_an_object_that_no_config_can_describe_is_refused_before_training(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(size, 2))

        def forward(self, batch: Batch) -> Tensor:
            return self.table.expand(len(batch), -1, -1)

    model = UnmaskingModel(MarkovChainDenoiser(V, 0.85, L), RandomSteps(), 2)
    with pytest.raises(UserError, match="size|Own"):
        run(model, MeanFieldGuide(Own(L), 2), out=tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert run(model, MeanFieldGuide(Own(L), 2)).updates == 3


def test_a_pair_without_a_finite_bound_is_refused_with_the_reason() -> None:
    """The guide may draw empty sets, which the policy excludes: the bound does not exist."""
    model = UnmaskingModel(MarkovChainDenoiser(V, 0.85, L), LearnedPolicy(PolicyNetwork(V + 1, width=16, layers=1)), 2)
    guide = MeanFieldGuide(SequenceEncoder(V + 1, 2, width=16, layers=1), 2)
    with pytest.raises(
        UserError, match=r"loss: the loss is .* at update 1: row \d+ of the data: the guide reveals sets"
    ):
        run(model, guide, updates=5, log_every=5)


@pytest.mark.parametrize(("token", "what"), [(V, "MASK"), (-1, "no token"), (V + 5, "no token")])
def test_tokens_that_nothing_can_reveal_are_refused_at_the_start(token: int, what: str) -> None:
    data = chains()
    data.tokens[37, 2] = token
    with pytest.raises(UserError, match=rf"data: row 37 has {what} \(id {token}\) at position 2"):
        run(*tied_pair(), data=data)
    given = torch.zeros_like(data.attention_mask)
    given[37, 2] = True
    if token == V:  # a given one is no matter of the loss
        assert run(*tied_pair(), data=Batch(data.tokens, given=given)).updates == 3


@pytest.mark.parametrize(
    ("logits", "cause"), [([torch.nan] * 3, "denoiser gives NaN"), ([0, 0, -torch.inf], "token 2")]
)
def test_what_a_denoiser_does_to_the_loss_is_named(logits: list[float], cause: str) -> None:
    class Constant(Noisy):
        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.tensor(logits).expand(*state.shape, V)

    model = UnmaskingModel(Constant(), RandomSteps(), 2)
    with pyro.validation_enabled(False), pytest.raises(UserError, match=rf"row \d+ of the data: .*{cause}"):
        run(model, MeanFieldGuide(PositionTable(L, 2), 2))


def test_given_positions_are_no_part_of_the_loss() -> None:
    data = chains(8)
    given = torch.zeros_like(data.tokens, dtype=torch.bool)
    given[:, [1, 4]] = True
    model, guide = tied_pair()
    loss = PairLoss(model, guide, RevealTraceGraph_ELBO(num_particles=200))
    torch.manual_seed(0)
    with torch.no_grad():
        loss(Batch(data.tokens, given=given))
        fewer = loss.metrics["log_likelihood"]
        loss(data)
    assert fewer > loss.metrics["log_likelihood"] + 1  # two tokens less to explain
    assert run(model, guide, data=Batch(data.tokens, given=given)).updates == 3


@pytest.mark.parametrize("stock", [pyro.infer.TraceGraph_ELBO, pyro.infer.Trace_ELBO])
def test_takes_pyros_own_bounds(stock: Any) -> None:
    model, guide = tied_pair()
    objective = stock(num_particles=3, max_plate_nesting=1, vectorize_particles=True)
    assert all(map(torch.isfinite, torch.tensor(run(model, guide, objective=objective).losses)))


def test_a_data_set_brings_its_splits_and_a_folder_remembers_it(tmp_path: Path) -> None:
    data = Chains(num_states=V, length=L, train=40, validation=10, test=10)
    model, guide = tied_pair()
    result = run(model, guide, data=data, updates=4, validate_every=2, out=tmp_path / "run")
    assert [record["update"] for record in result.validations] == [2, 4]
    found = load_run(tmp_path / "run")
    assert torch.equal(found.data.splits()["train"].batch.tokens, data.splits()["train"].batch.tokens)
    assert run(*tied_pair(), data=data).validations == []
    assert run(*tied_pair(), data=data.splits()["test"]).updates == 3
