"""The order of an exact chain, learned by the loop a user calls."""

import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch

from orderppl.errors import UserError
from orderppl.guides import MeanFieldGuide, RenormalisedScoreGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.fit import OrderLoss, fit
from orderppl.models import LearnedPolicy, LearnedSteps, StepPrice, UniformSteps, UnmaskingModel
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.networks import PolicyNetwork, PositionTable, SequenceEncoder


def chains(rows: int = 64, length: int = 6) -> BatchStream:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (rows, length), generator=generator)
    keep = torch.rand(rows, length, generator=generator) < 0.8
    for i in range(1, length):
        tokens[:, i] = torch.where(keep[:, i], tokens[:, i - 1], tokens[:, i])
    return BatchStream({"tokens": tokens, "attention_mask": torch.ones_like(tokens, dtype=torch.bool)}, 16, seed=0)


def tied_pair(steps: int = 2) -> tuple[UnmaskingModel, MeanFieldGuide]:
    torch.manual_seed(0)
    table = PositionTable(6, steps)
    model = UnmaskingModel(MarkovChainDenoiser(3, 0.85, 6), LearnedSteps(table), steps)
    return model, MeanFieldGuide(table, steps, sees_tokens=False)


def test_learns_a_better_order_than_a_random_one() -> None:
    model, guide = tied_pair()
    result = fit(
        model,
        guide,
        chains(),
        elbo=RevealTraceGraph_ELBO(num_particles=8),
        updates=40,
        optimizer=partial(torch.optim.Adam, lr=0.3),
        progress=False,
    )
    elbos = [record["elbo"] for record in result.trace]
    assert sum(elbos[-10:]) / 10 > sum(elbos[:5]) / 5 + 0.4
    assert result.losses[0] == pytest.approx(-elbos[0], rel=1e-4)
    assert 1 <= result.trace[-1]["steps"] <= 2


@pytest.mark.parametrize("local", [False, True])
def test_loss_is_per_sequence_and_leaves_pyro_alone(local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        model, guide = tied_pair()
    batch = next(chains())
    before = pyro.settings.get("module_local_params")
    loss = OrderLoss(model, guide, RevealTraceGraph_ELBO(num_particles=4))
    torch.manual_seed(1)
    once = loss(**batch)
    torch.manual_seed(1)
    total = RevealTraceGraph_ELBO(num_particles=4).differentiable_loss(model, guide, **batch)  # the global setting
    assert once.item() == pytest.approx(total.item() / 16, rel=1e-5)
    assert loss.metrics["elbo"].item() == pytest.approx(-once.item(), rel=1e-4)
    assert pyro.settings.get("module_local_params") == before
    once.backward()
    assert model.prior.network.logits.grad.abs().sum() > 0


def test_anneals_kl_weight_temperature_and_step_price() -> None:
    steps = 3
    denoiser = MarkovChainDenoiser(3, 0.85, 6)
    model = UnmaskingModel(denoiser, StepPrice(UniformSteps(), 0.5), steps)
    guide = RenormalisedScoreGuide(SequenceEncoder(4, 1, width=16, layers=1), steps, temperature=1.0)
    elbo = RevealTraceGraph_ELBO(num_particles=4)
    result = fit(
        model,
        guide,
        chains(),
        elbo=elbo,
        updates=4,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        kl_weight=Anneal(0.0, 1.0, 2),
        temperature=Anneal(1.0, 0.1, 3, "exponential"),
        step_price=0.25,
        progress=False,
    )
    assert [record["elbo.kl_weight"] for record in result.trace] == [0.0, 0.5, 1.0, 1.0]
    assert result.trace[-1]["guide.temperature"] == 0.1
    assert guide.temperature == 0.1
    assert model.prior.price == 0.25
    with pytest.raises(UserError, match=r"guide.temperature: guide \(MeanFieldGuide\) has no attribute"):
        fit(
            *tied_pair(),
            chains(),
            elbo=elbo,
            temperature=0.1,
            updates=1,
            optimizer=partial(torch.optim.Adam, lr=0.1),
            progress=False,
        )


def test_trains_a_state_dependent_policy_with_a_frozen_denoiser() -> None:
    steps = 2
    policy = LearnedPolicy(PolicyNetwork(4, width=16, layers=1), non_empty=False)  # mean-field sets may be empty
    model = UnmaskingModel(MarkovChainDenoiser(3, 0.85, 6), policy, steps)
    guide = MeanFieldGuide(SequenceEncoder(4, steps, width=16, layers=1), steps)
    start = {
        name: tensor.clone() for name, tensor in OrderLoss(model, guide, RevealTraceGraph_ELBO()).state_dict().items()
    }
    loss = OrderLoss(model, guide, RevealTraceGraph_ELBO())
    fit(
        model,
        guide,
        chains(),
        elbo=RevealTraceGraph_ELBO(num_particles=4),
        updates=3,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        progress=False,
    )
    moved = {name for name, tensor in loss.state_dict().items() if not torch.equal(tensor, start[name])}
    parameters = {name for name, _ in loss.named_parameters()}
    # a key bias shifts all logits of a softmax alike, and a blind placeholder is not read: everything else must move
    still = {name for name in parameters - moved if "placeholder" not in name}
    assert not still


SCRIPT = textwrap.dedent(
    """
    import sys
    from functools import partial
    import pyro, torch
    torch.set_num_threads(1)
    from test_fit import chains, tied_pair
    from orderppl.inference import RevealTraceGraph_ELBO
    from orderppl.inference.fit import fit
    pyro.set_rng_seed(3)
    model, guide = tied_pair()
    pyro.set_rng_seed(3)
    result = fit(model, guide, chains(), elbo=RevealTraceGraph_ELBO(num_particles=4), updates=60,
                 optimizer=partial(torch.optim.Adam, lr=0.1), out=sys.argv[1], checkpoint_every=7, log_every=1,
                 resume=True, progress=False)
    print(result.losses)
    """
)


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_trace(tmp_path: Path) -> None:
    def start(out: Path) -> subprocess.Popen[str]:
        here = Path(__file__).parent
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], cwd=here, stdout=subprocess.PIPE, text=True)

    whole, _ = start(tmp_path / "whole").communicate(timeout=120)
    process = start(tmp_path / "parts")
    log = tmp_path / "parts" / "log.jsonl"
    for _ in range(2000):
        if log.exists() and log.read_text().count("\n") > 20:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert log.read_text().count("\n") < 60
    parts, _ = start(tmp_path / "parts").communicate(timeout=120)
    assert whole.strip()
    assert parts == whole
    newest = "checkpoints/update_00000060/weights.safetensors"
    assert (tmp_path / "parts" / newest).read_bytes() == (tmp_path / "whole" / newest).read_bytes()


def test_a_pair_without_a_finite_bound_is_refused_in_one_line() -> None:
    """The guide may draw empty sets, which the policy excludes: the bound does not exist."""
    model = UnmaskingModel(MarkovChainDenoiser(3, 0.85, 6), LearnedPolicy(PolicyNetwork(4, width=16, layers=1)), 2)
    guide = MeanFieldGuide(SequenceEncoder(4, 2, width=16, layers=1), 2)
    with pytest.raises(UserError, match=r"loss: the loss is .* at update 1"):
        fit(
            model,
            guide,
            chains(),
            elbo=RevealTraceGraph_ELBO(num_particles=4),
            updates=5,
            optimizer=partial(torch.optim.Adam, lr=0.01),
            log_every=5,
            progress=False,
        )
