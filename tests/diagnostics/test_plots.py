"""Every figure shows the numbers of its data, on the caller's axes or on its own."""

from __future__ import annotations

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from orderppl import RevealTraceGraph_ELBO, fit
from orderppl.diagnostics import bound_curve, calibrate, plots, to_inference_data
from orderppl.diagnostics.backend import InferenceData, add_groups
from orderppl.diagnostics.training import training_trace
from orderppl.errors import UserError
from orderppl.figures import WIDTH

from chain_programs import chain_batch, chain_programs, plan_guide, with_holes


@pytest.fixture(scope="module")
def data() -> InferenceData:
    """The first sequence is padded, the last has a given position in the middle."""
    torch.manual_seed(0)
    model, _ = chain_programs(6, 3)
    guide = plan_guide(6, 3, noise=1.0)
    adam = partial(torch.optim.Adam, lr=0.1)
    settings = {"objective": RevealTraceGraph_ELBO(2), "batch_size": 8, "updates": 12, "log_every": 3}
    result = fit(model, guide, chain_batch(32, 6), optimizer=adam, progress=False, **settings)
    batch = with_holes(chain_batch(4, 6), [[3, 2]], [[0, 4], [0, 5]])
    made = to_inference_data(model, guide, batch, num_samples=60)
    add_groups(made, {"training": training_trace(result.trace)})
    return made


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


FUNCTIONS = (
    plots.plot_order,
    plots.plot_precedence,
    plots.plot_steps_used,
    plots.plot_set_sizes,
    plots.plot_token_types,
    plots.plot_pareto_k,
    plots.plot_elbo_parts,
    plots.plot_gradient,
)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_figures_take_an_ax_or_make_one(data, function):
    own = function(data)
    assert own.figure.get_size_inches()[0] == WIDTH
    own.figure.canvas.draw()
    assert own.get_xlabel()
    assert own.get_ylabel() or function is plots.plot_token_types
    _, ax = plt.subplots()
    before = plt.get_fignums()
    assert function(data, ax=ax) is ax
    assert plt.get_fignums() == before


def test_heat_maps_show_the_positions_to_reveal_of_one_sequence(data):
    stats = data["order_statistics"]
    assert plots.plot_order(data).get_title() == "sequence 1"  # sequence 0 is shorter
    shown = plots.plot_order(data, sequence=0).images[0].get_array()
    assert shown.shape == (3, 4)
    assert np.allclose(shown, stats["step_probs"].values[0, :4].T)
    matrix = plots.plot_precedence(data, sequence=0).images[0].get_array()
    assert np.allclose(matrix, stats["precedence"].values[0, :4, :4])
    labels = [text.get_text() for text in plots.plot_order(data, sequence=0).get_xticklabels()]
    assert labels == data["posterior"]["token"].values[0, :4].tolist()
    places = [0, 1, 3, 4, 5]  # without the given one
    shown = plots.plot_precedence(data, sequence=3).images[0].get_array()
    assert np.allclose(shown, stats["precedence"].values[3][np.ix_(places, places)])
    labels = [text.get_text() for text in plots.plot_order(data, sequence=3).get_xticklabels()]
    assert labels == data["posterior"]["token"].values[3, places].tolist()
    with pytest.raises(UserError, match="no sequence 9"):
        plots.plot_order(data, sequence=9)


def test_bars_and_lines_are_the_numbers(data):
    heights = [bar.get_height() for bar in plots.plot_set_sizes(data).patches]
    assert heights == pytest.approx(data["order_statistics"]["set_sizes"].mean(("chain", "draw", "sequence")).values)
    shares = [bar.get_height() for bar in plots.plot_steps_used(data).patches]
    used = data["sample_stats"]["steps_used"].values
    assert shares == pytest.approx([(used == step).mean() for step in (1, 2, 3)])
    lines = plots.plot_elbo_parts(data).lines
    assert np.allclose(lines[0].get_ydata(), data["training"]["elbo"])


def test_bound_and_ranks(data):
    curve = bound_curve(data["sample_stats"]["log_weight"], np.zeros(4))
    ax = plots.plot_bound_curve(curve)
    assert np.allclose(ax.lines[0].get_ydata(), curve["mean_bound"])
    model, sequential = chain_programs(4, 2)
    ranks = calibrate(model, plan_guide(4, 2), sequential, chain_batch(2, 4), num_simulations=80, num_draws=15)
    ax = plots.plot_ranks(ranks, "first_step")
    assert ax.patches[0].get_data().values.sum() == 80


def test_missing_groups_are_named(data):
    bare = InferenceData(posterior=data["posterior"], sample_stats=data["sample_stats"])
    for function, name in (
        (plots.plot_order, "order_statistics"),
        (plots.plot_pareto_k, "sample_stats_prior"),
        (plots.plot_elbo_parts, "training"),
    ):
        with pytest.raises(UserError, match=f"{name}: no such group"):
            function(bare)
    sgd = InferenceData(training=data["training"][["loss"]])
    with pytest.raises(UserError, match="grad_variance"):
        plots.plot_gradient(sgd)
    with pytest.raises(UserError, match="none of elbo"):
        plots.plot_elbo_parts(sgd)
    assert not plt.get_fignums()
