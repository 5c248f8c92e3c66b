"""What models and guides tell Pyro of their networks."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from orderppl import Batch, RevealTraceGraph_ELBO
from orderppl.guides import Guide, PolicyGuide
from orderppl.inference.programs import local_parameters
from orderppl.models import LearnedPolicy, PolicyNetwork, UnmaskingModel
from orderppl.models.denoisers import TransformerDenoiser

BATCH = Batch(torch.randint(0, 6, (3, 4)))


def make_pair(frozen: bool) -> tuple[UnmaskingModel, Guide]:
    denoiser = TransformerDenoiser(7, 6, width=8, layers=1, heads=2).eval().requires_grad_(not frozen)
    policy = LearnedPolicy(PolicyNetwork(7, width=8, layers=1, heads=2))
    return UnmaskingModel(denoiser, policy, 3), PolicyGuide(policy, denoiser, 3)


def announced(program: nn.Module) -> set[str]:
    nodes = poutine.trace(program).get_trace(BATCH).nodes
    return {name for name, site in nodes.items() if site["type"] == "param"}


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_trained_is_announced_by_its_name(frozen: bool) -> None:
    for program, root in zip(make_pair(frozen), ("model", "guide"), strict=True):
        parts = ("policy",) if frozen else ("policy", "denoiser")
        wanted = {f"{root}.{part}$$$" for part in parts}
        found = announced(program)
        assert {name[: name.index("$$$") + 3] for name in found} == wanted
        assert len(found) == sum(len(list(getattr(program, part).parameters())) for part in parts)


def test_in_a_fit_nothing_is_announced() -> None:
    pair = make_pair(False)
    with local_parameters(*pair):
        assert not any(announced(program) for program in pair)


def test_svi_trains_what_is_not_frozen() -> None:
    """One update by Pyro's own loop moves every parameter of the policy, and none of the denoiser."""
    model, guide = make_pair(True)
    before = [p.detach().clone() for p in model.parameters()]
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), RevealTraceGraph_ELBO(4)).step(BATCH)
    named = zip(model.named_parameters(), before, strict=True)
    moved = {name.partition(".")[0] for (name, p), old in named if not torch.equal(p, old)}
    assert moved == {"policy"}


def test_a_module_of_pyro_stays_one() -> None:
    """A Bayesian policy network still samples its weights, under its full name."""

    class Scaled(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = pyro.nn.PyroSample(pyro.distributions.Normal(0.0, 1.0))

    guide = make_pair(True)[1]
    guide.extra = Scaled()

    def program() -> None:
        with guide._pyro_context:
            assert guide.extra.scale.shape == ()

    assert "guide.extra.scale" in poutine.trace(program).get_trace().nodes
