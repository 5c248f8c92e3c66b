"""Runs to report on: an exact chain learned with two seeds, and word problems."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from orderppl import RevealTraceGraph_ELBO, fit
from orderppl.data import Arithmetic, Chains
from orderppl.guides import PolicyGuide
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser, TransformerDenoiser
from orderppl.policies import Plan, RandomSteps
from orderppl.unmasking import Denoiser


def fit_plan(out: Path, data: object, denoiser: Denoiser, places: int, num_steps: int, seed: int = 0) -> None:
    """A few updates of a plan."""
    torch.manual_seed(seed)
    guide = PolicyGuide(Plan(PositionTable(places, num_steps, noise=1.0)), denoiser, num_steps)
    settings = {"objective": RevealTraceGraph_ELBO(2), "optimizer": partial(torch.optim.Adam, lr=0.1)}
    model = UnmaskingModel(denoiser, RandomSteps(), num_steps)
    fit(model, guide, data, updates=2, batch_size=4, seed=seed, out=out, progress=False, **settings)


@pytest.fixture(scope="session")
def chain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on the same chains."""
    folder = tmp_path_factory.mktemp("runs") / "chain"
    data = Chains(num_states=4, length=7, train=40, validation=8, test=9)
    for seed in (0, 1):
        fit_plan(folder / f"seed-{seed}", data, MarkovChainDenoiser(4, 0.85, 7), 7, 3, seed)
    return folder


@pytest.fixture(scope="session")
def word_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on word problems, with prompts and answers; its denoiser knows nothing."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    data = Arithmetic(train=30, validation=4, test=4, num_operations=2)
    tokenizer = data.splits()["train"].tokenizer
    assert tokenizer is not None
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(
        tokenizer.vocab_size, tokenizer.mask_index, width=8, layers=1, heads=1, tokenizer=tokenizer
    )
    fit_plan(folder, data, denoiser, 40, 4)
    return folder
