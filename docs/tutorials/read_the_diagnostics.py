# %% [markdown]
# # Read the diagnostics of a run
#
# A learned order raises two questions. What is it like? And can it be trusted as a posterior, or is it a plan that
# was made to be followed? This script fits the same exact chain twice, once as a posterior and once as a plan, and
# reads the diagnostics of both side by side. `orderppl diagnose RUN` (or `diagnose(load_run(RUN), examples, out)`)
# writes the same numbers and figures for a run, and `orderppl report RUN` shows them beside a replay of decoding.
#
# Run it: `python docs/tutorials/read_the_diagnostics.py`.

# %%
from functools import partial

import pyro
import torch

from orderppl import Batch, RevealTraceGraph_ELBO, fit
from orderppl.data import Chains
from orderppl.diagnostics import bound_curve, importance_report, to_inference_data
from orderppl.diagnostics.statistics import alarms, summarise
from orderppl.guides import MeanFieldGuide
from orderppl.inference.exact import all_orders, exact_evidence
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import RandomSteps

# %% [markdown]
# A chain of 6 tokens in 3 steps: small enough that the evidence can be summed over all 3^6 = 729 orders, so that
# every diagnosis below can be checked against the truth.

# %%
NUM_STEPS, LENGTH, DRAWS = 3, 6, 300
data = Chains(length=LENGTH, train=500, test=4)
denoiser = MarkovChainDenoiser(num_states=4, stay=0.85, length=LENGTH)
model = UnmaskingModel(denoiser, RandomSteps(), NUM_STEPS)
held_out = data.splits()["test"].batch


def learn(kl_weight: float) -> MeanFieldGuide:
    """A guide over positions; with the KL it goes for the posterior, without it for the best order."""
    pyro.set_rng_seed(0)
    guide = MeanFieldGuide(PositionTable(LENGTH, NUM_STEPS, noise=0.1), NUM_STEPS)
    fit(
        model,
        guide,
        data.splits()["train"],
        objective=RevealTraceGraph_ELBO(num_particles=8, kl_weight=kl_weight),
        optimizer=partial(torch.optim.Adam, lr=0.15),
        updates=100,
        batch_size=16,
        progress=False,
    )
    return guide


guides = {"posterior": learn(kl_weight=1.0), "plan": learn(kl_weight=0.0)}
posterior, plan = (
    to_inference_data(model, guide, held_out, num_samples=DRAWS, num_state_draws=4) for guide in guides.values()
)
evidence = exact_evidence(model, all_orders(guides["plan"], held_out), held_out)  # [B]

# %% [markdown]
# ## The numbers
#
# Each is an arviz `InferenceData`: `posterior.reveal_step` holds the drawn orders, `sample_stats.log_weight` the
# log-weights log p(x, r) / q(r | x) whose mean is the ELBO. `summarise` makes the table of a report; every number
# names the variables that it is made of.

# %%
numbers = {"posterior": summarise(posterior), "plan": summarise(plan)}
for name in ("elbo", "log_likelihood", "kl", "log_evidence", "k_hat_largest", "step_entropy", "kendall_left_to_right"):
    entries = {kind: found[name] for kind, found in numbers.items()}
    shown = [entry.get("note") or f"{entry['value']:.3f}" for entry in entries.values()]
    print(f"{name:22s} posterior {shown[0]:>8s}   plan {shown[1]:>8s}   {entries['plan']['unit']}")
print(f"{'exact evidence':22s} {evidence.mean().item():8.3f}")

# %% [markdown]
# How to read it:
#
# - `elbo = log_likelihood - kl`. The plan has the higher log-likelihood: it is the better order to decode by. It pays
#   with a large KL, and its ELBO is worse.
# - `step_entropy` is what the guide leaves open about each position, at most log 3 = 1.10 nats. Near 0 it has one
#   order.

# %%
value = {kind: {name: entry["value"] for name, entry in found.items()} for kind, found in numbers.items()}
assert value["plan"]["log_likelihood"] > value["posterior"]["log_likelihood"]
assert value["plan"]["elbo"] < value["posterior"]["elbo"] < evidence.mean().item()
assert value["plan"]["step_entropy"] < value["posterior"]["step_entropy"]

# %% [markdown]
# ## The alarms
#
# `alarms` names a collapse in words. For a plan that is to be deployed a collapse onto one order is what was asked
# for; in a posterior it would be a fault. (By default the alarm waits until the entropy is below 1% of log T. This plan
# is young, and positions that it is indifferent about stay open: ask from 25%.)

# %%
for kind, draws in (("posterior", posterior), ("plan", plan)):
    print(f"{kind}: {'; '.join(alarms(draws, entropy=0.25)) or 'no alarm'}")
assert alarms(posterior, entropy=0.25) == []
assert "collapse onto one order" in alarms(plan, entropy=0.25)[0]

# %% [markdown]
# ## Is the guide the posterior?
#
# k-hat is the tail index of the importance weights: below its threshold (0.6 at 300 draws) their mean can be trusted.
# But k-hat sees only orders that the guide draws. A guide that always draws one order has constant weights and looks
# perfect; therefore the evidence is compared with that of draws from the prior: `missed` says by how many nats they
# find more.

# %%
reports = {
    kind: importance_report(draws["sample_stats"]["log_weight"], draws["sample_stats_prior"]["log_weight"])
    for kind, draws in (("posterior", posterior), ("plan", plan))
}
for kind, report in reports.items():
    print(f"{kind}: {report.attrs['summary']}")
exact = evidence.numpy()
assert bool(reports["posterior"]["trusted"].all())
assert abs(reports["posterior"]["log_evidence"].values - exact).max() < 0.3
assert not bool(reports["plan"]["trusted"].all())
assert (exact - reports["plan"]["log_evidence"].values).mean() > 1

# %% [markdown]
# ## How far is the bound from the evidence?
#
# With K draws the importance-weighted bound L_K rises towards log p(x). For the posterior the gap closes within a few
# dozen draws; for the plan more draws of the same order change nothing.

# %%
curves = {
    kind: bound_curve(draws["sample_stats"]["log_weight"], exact, sizes=[1, 10, 100])
    for kind, draws in (("posterior", posterior), ("plan", plan))
}
for kind, curve in curves.items():
    gaps = ", ".join(
        f"{gap:.3f} with K={size}" for size, gap in zip(curve["K"].values, curve["mean_gap"].values, strict=True)
    )
    print(f"{kind}: gap to the evidence {gaps}")
assert float(curves["posterior"]["mean_gap"].sel(K=100)) < 0.1 < float(curves["plan"]["mean_gap"].sel(K=100))

# %% [markdown]
# ## Some positions given
#
# Given positions are no part of an order: their step is missing, as that of padding is. With the first token and the
# fourth given, four are left to reveal; all numbers are about these.

# %%
given = torch.zeros_like(held_out.latent)
given[:, [0, 3]] = True
filled = to_inference_data(
    model, guides["posterior"], Batch(held_out.tokens, given=given), num_samples=DRAWS, num_state_draws=4
)
steps = filled["posterior"]["reveal_step"]
print(f"orders of {int(steps.isel(chain=0, draw=0, sequence=0).notnull().sum())} tokens, given: 0 and 3")
assert steps.isel(position=[0, 3]).isnull().all()
assert steps.isel(position=[1, 2, 4, 5]).notnull().all()
assert summarise(filled)["log_likelihood"]["value"] > value["posterior"]["log_likelihood"]  # fewer to guess

# %% [markdown]
# ## Look at it
#
# `orderppl.diagnostics.plots` has a figure for each of these: `plot_order(posterior)` shows P(step | position),
# `plot_precedence` which position comes before which, `plot_bound_curve` the curves above.
