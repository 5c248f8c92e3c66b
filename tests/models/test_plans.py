from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.decoding import NetworkPlan, PlannedOrder, follow
from orderppl.denoising import Canvas
from orderppl.errors import UserError
from orderppl.evaluation import path_likelihood
from orderppl.experiments.build import build_problem
from orderppl.experiments.config import load_config
from orderppl.experiments.fit_order import Config, alternating_steps, fit_problem, refine_problem
from orderppl.guides import MeanFieldGuide
from orderppl.inference import RevealTraceGraph_ELBO
from orderppl.inference.annealing import Anneal
from orderppl.inference.batches import BatchStream
from orderppl.inference.fitting import fit
from orderppl.models import UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser, TransformerDenoiser
from orderppl.models.plans import OpeningPlan


def denoiser() -> TransformerDenoiser:
    torch.manual_seed(0)
    made = TransformerDenoiser(9, 8, width=16, layers=1, heads=2, max_length=24).eval()
    return made.requires_grad_(False)


def opening_plan(network: nn.Module, out: int = 3) -> OpeningPlan:
    plan = OpeningPlan(network, out, width=8)  # type: ignore[arg-type]
    nn.init.normal_(plan.head.weight)
    return plan.eval()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    attention = torch.arange(10) < torch.tensor([10, 7, 3])[:, None]
    context = torch.randint(0, 8, (3, 4), generator=generator)
    tokens = torch.randint(0, 8, (3, 10), generator=generator)
    return tokens, attention, context


@torch.no_grad()
def test_reads_the_prompt_and_not_the_response() -> None:
    tokens, attention, context = batch()
    plan = opening_plan(denoiser())
    first = plan(tokens, attention, context)
    assert first.shape == (3, 10, 3) and first.isfinite().all()
    torch.testing.assert_close(plan(None, attention, context), first)
    assert (plan(None, attention, (context + 1) % 8) - first)[attention].abs().max() > 1e-3
    blind = OpeningPlan(denoiser(), 3, reads_opening=False)
    torch.testing.assert_close(blind(None, attention, context), blind(None, attention, (context + 1) % 8))


@torch.no_grad()
def test_padding_changes_nothing() -> None:
    _, attention, context = batch()
    plan = opening_plan(denoiser())
    together = plan(None, attention, context)
    for row, size in enumerate((10, 7, 3)):
        alone = plan(None, attention[row : row + 1, :size], context[row : row + 1])
        torch.testing.assert_close(together[row, :size], alone[0], atol=1e-5, rtol=1e-5)


class Counting(nn.Module):
    """A denoiser that counts the rows it reads."""

    def __init__(self, inner: TransformerDenoiser) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0
        self.mask_index, self.vocab_size = inner.mask_index, inner.vocab_size

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.rows += len(state)
        logits: Tensor = self.inner(state, attention_mask)
        return logits


@torch.no_grad()
def test_following_the_plan_costs_no_further_forward() -> None:
    tokens, attention, context = batch()
    counting = Counting(denoiser())
    plan = NetworkPlan(opening_plan(counting))
    expected = plan(Canvas(counting, attention, context)).argmax(-1)
    counting.rows = 0
    path = follow(PlannedOrder(plan, "mode"), Canvas(counting, attention, context), tokens, 3)
    assert counting.rows == int(path.nfe.sum())
    ranks = [sorted(set(row[size].tolist())) for row, size in zip(expected, attention, strict=True)]
    for row, order in enumerate(ranks):  # steps without a position are left out
        assert path.reveal_step[row][attention[row]].tolist() == [
            order.index(step) for step in expected[row][attention[row]].tolist()
        ]


def test_the_denoiser_is_no_part_of_the_plan() -> None:
    plan = opening_plan(denoiser())
    assert not any("denoiser" in name for name in plan.state_dict())
    plan(None, *batch()[1:]).sum().backward()
    assert all(parameter.grad is not None for parameter in plan.parameters())


def test_learns_to_space_out_what_a_step_reveals() -> None:
    """On a chain, where neighbours depend on each other: far below random order (3.2 nats), towards the best (0.46)."""
    torch.manual_seed(0)
    chain = MarkovChainDenoiser(4, 0.85, 16)
    rows = tensors(sample_chains(400, num_states=4, stay=0.85, length=16, seed=0))
    guide = MeanFieldGuide(OpeningPlan(chain, 3, width=8), 3, sees_tokens=False)
    model = UnmaskingModel(chain, UniformSteps(), 3)
    options = {"updates": 150, "log_every": 50, "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.05)}
    fit(
        model,
        guide,
        BatchStream(rows, 16, seed=0),
        elbo=RevealTraceGraph_ELBO(num_particles=8),
        kl_weight=Anneal(0.1, 0.0, 100),
        **options,
    )
    found = path_likelihood(chain, PlannedOrder(NetworkPlan(guide.network), "mode"), [rows], 3)
    gap = (found.nats - chain.log_evidence(rows["tokens"], rows["attention_mask"]).double().neg()).mean()
    assert 0.4 < gap < 1.2


def test_begins_as_the_pattern_that_a_search_finds(tmp_path: Path) -> None:
    """On a chain of 7 the best pattern of period 2 for two steps keeps every other position for the end."""
    network = "{name: opening, width: 8, period: 2, noise: 0}"
    settings = [f"guide={{name: mean_field, network: {network}}}", "num_steps=2", "fit.updates=1", "task.length=7"]
    search = "refine={first: true, start: alternating, margin: 20, rows: 60, longest: 7}"
    config = load_config(Config, "chain", [*settings, search, "task.train=100", "optimizer.lr=1e-6"])
    problem = build_problem(config)
    refinement = fit_problem(config, problem, tmp_path)
    assert refinement is not None and refinement.finished
    plan = problem.guide.network
    assert isinstance(plan, OpeningPlan)
    steps = plan(None, torch.ones(1, 7, dtype=torch.bool))[0].argmax(-1)
    assert steps.tolist() == [*refinement.steps.tolist() * 3, int(refinement.steps[0])]
    assert sorted(refinement.steps.tolist()) == [0, 1]
    with pytest.raises(UserError, match="no training sequence has at most 3 tokens"):
        refine_problem(replace(config.refine, longest=3), problem, 0)  # type: ignore[type-var]
    with pytest.raises(UserError, match="has no plan to search on"):
        load_config(Config, "chain", [*settings, "refine={first: false}"])


def test_alternating_steps_keep_every_other_place_for_the_end() -> None:
    assert alternating_steps(6, 4).tolist() == [0, 3, 1, 3, 2, 3]
    assert alternating_steps(5, 8).tolist() == [0, 7, 1, 7, 2]
    assert alternating_steps(3, 2).tolist() == [0, 1, 0]
    assert alternating_steps(3, 1).tolist() == [0, 0, 0]


def test_config_builds_it_for_guides_only() -> None:
    plan = "guide={name: mean_field, network: {name: opening, width: 8}}"
    config = load_config(Config, "chain", [plan])
    assert isinstance(build_problem(config).guide.network, OpeningPlan)
    with pytest.raises(UserError, match="opening reads the denoiser"):
        build_problem(load_config(Config, "chain", ["prior={name: learned_steps, network: opening}"]))
    with pytest.raises(UserError, match="4 is even"):
        load_config(Config, "chain", ["guide={name: mean_field, network: {name: opening, kernel: 4}}"])
