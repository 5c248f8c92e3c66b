# %% [markdown]
# # Swap a guide and a prior
#
# An order is learned by a pair of Pyro programs: a model, whose prior says what orders are like before the tokens are
# seen, and a guide, which proposes orders. Both are chosen by one constructor argument. This script learns the order
# of an exact Markov chain with several pairs, and measures each by what matters when decoding.
#
# Run it: `python docs/tutorials/swap_guide_and_prior.py`.

# %%
import pyro
import torch

from orderppl import RevealTraceGraph_ELBO, fit, follow, make_policy
from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.decoding import NetworkPlan, PlannedOrder, StochasticDecision
from orderppl.denoising import Canvas
from orderppl.guides import MeanFieldGuide, PolicyGuide
from orderppl.inference import Anneal, BatchStream
from orderppl.models import CosineSteps, LearnedPolicy, LearnedSteps, UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.models.networks import PolicyNetwork, PositionTable

# %% [markdown]
# The problem: chains of 12 tokens that repeat their state with probability 0.85, to be written in 3 parallel steps.
# The denoiser knows the exact conditionals, so the log evidence of a sequence is known too. Neighbours depend on each
# other; a good order does not reveal neighbours in one step.

# %%
NUM_STEPS, LENGTH = 3, 12
denoiser = MarkovChainDenoiser(num_states=4, stay=0.85, length=LENGTH)
held_out = tensors(sample_chains(500, length=LENGTH, seed=1))["tokens"]
canvas = Canvas(denoiser, torch.ones_like(held_out, dtype=torch.bool))
evidence = denoiser.log_evidence(held_out)  # [B]


def gap(policy) -> float:
    """Log evidence minus the log-likelihood along the policy's own order, nats per sequence; 0 is perfect."""
    return float((follow(policy, canvas, held_out, NUM_STEPS).nats + evidence).mean())


def learn(prior, guide, updates: int = 80, lr: float = 0.1, kl_weight=None):
    """Fit one pair; the training data, the bound and the optimiser are the same for all."""
    model = UnmaskingModel(denoiser, prior, NUM_STEPS)
    return fit(
        model,
        guide,
        BatchStream(tensors(sample_chains(1000, length=LENGTH, seed=0)), batch_size=16),
        elbo=RevealTraceGraph_ELBO(num_particles=4),
        kl_weight=kl_weight,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        updates=updates,
    )


gaps = {name: gap(make_policy(name)) for name in ("random", "left_to_right")}

# %% [markdown]
# ## One guide, two priors
#
# `MeanFieldGuide` gives every position a step of its own. With `sees_tokens=False` it knows positions only; such a
# guide is a plan that a decoder can follow. The prior asks for set sizes: `UniformSteps` for equal ones,
# `CosineSteps` for few positions early and many late. `kl_weight` falls to 0: the prior spreads the plan out while it
# is young, and then lets go of it.

# %%
FADING = Anneal(0.1, 0.0, updates=40)

for prior in (UniformSteps(), CosineSteps()):
    pyro.set_rng_seed(0)
    guide = MeanFieldGuide(PositionTable(LENGTH, NUM_STEPS), NUM_STEPS, sees_tokens=False)
    learn(prior, guide, kl_weight=FADING)
    plan = PlannedOrder(NetworkPlan(guide.network), decision="mode")
    gaps[f"{type(prior).__name__} and a plan"] = gap(plan)

# %% [markdown]
# ## The prior learns too
#
# `LearnedSteps` is a prior with the plan inside. Sharing one network between prior and guide ties the two: the KL is
# 0 in value and gradient, and the bound is the expected log-likelihood along the plan.

# %%
pyro.set_rng_seed(0)
network = PositionTable(LENGTH, NUM_STEPS, noise=0.1)
tied = MeanFieldGuide(network, NUM_STEPS, sees_tokens=False)
result = learn(LearnedSteps(network), tied)
gaps["LearnedSteps, tied"] = gap(PlannedOrder(NetworkPlan(network), decision="mode"))
assert result.losses[-1] < result.losses[0]

# %% [markdown]
# ## A policy instead of a plan
#
# `LearnedPolicy` looks at what is visible, at every step. Its guide is itself (`PolicyGuide`), played out along the
# true tokens. Nothing else changes: the same bound, the same loop. A policy has a network to train and needs many
# more updates than a plan of 36 numbers: 25 of them show the swap, not what it can become.

# %%
pyro.set_rng_seed(0)
policy = LearnedPolicy(PolicyNetwork(5, width=16, layers=1, heads=2, bias=-1.0))
learn(policy, PolicyGuide(policy, denoiser, NUM_STEPS), updates=25, lr=0.03)
gaps["LearnedPolicy, its own guide"] = gap(StochasticDecision(policy, "sample"))

# %% [markdown]
# ## A pair that does not fit
#
# A guide must stay inside the support of its prior. `LearnedPolicy` never reveals an empty set; a mean-field guide
# may leave a step empty, so the KL between them is infinite. The bound says so at once.

# %%
model = UnmaskingModel(denoiser, policy, NUM_STEPS)
wanders = MeanFieldGuide(PositionTable(LENGTH, NUM_STEPS), NUM_STEPS)
elbo = RevealTraceGraph_ELBO(num_particles=64)
with torch.no_grad():
    elbo(model, wanders)(held_out[:8])
assert elbo.metrics["elbo"] == -torch.inf
print(f"a guide outside the prior's support has a bound of {float(elbo.metrics['elbo'])} nats")

# %% [markdown]
# ## What came out
#
# The same swaps are one line of YAML or of the command line, where a pair that does not fit is refused before it
# runs:
#
#     orderppl fit-order --config chain --set prior=cosine_steps
#     orderppl fit-order --config chain --set prior=learned_steps --set guide.tied=true

# %%
for name, value in sorted(gaps.items(), key=lambda item: item[1]):
    print(f"{value:6.3f} nats from the evidence   {name}")
