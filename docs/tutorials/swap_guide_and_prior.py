# %% [markdown]
# # Swap a guide and a prior
#
# An order is learned by a pair of Pyro programs: a model, whose policy is the prior of the order, and a guide, which
# proposes orders. Both are chosen by one constructor argument. This script learns the order of an exact Markov chain
# with several pairs, and measures each by what matters when decoding.
#
# Run it: `python docs/tutorials/swap_guide_and_prior.py`.

# %%
from functools import partial

import pyro
import torch

from orderppl import Policy, RevealTraceGraph_ELBO, State, fit, follow
from orderppl.data import Chains
from orderppl.distributions import DecidedSet, SetDistribution
from orderppl.guides import Guide, MeanFieldGuide, PolicyGuide
from orderppl.inference import Anneal
from orderppl.models import LearnedPolicy, PolicyNetwork, PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan, RandomSteps, Ranked

# %% [markdown]
# The problem: chains of 12 tokens that repeat their state with probability 0.85, to be written in 3 parallel steps.
# The denoiser knows the exact conditionals, so the log evidence of a sequence is known too. Neighbours depend on each
# other; a good order does not reveal neighbours in one step.

# %%
NUM_STEPS, LENGTH = 3, 12
data = Chains(length=LENGTH, train=1000, test=500)
denoiser = MarkovChainDenoiser(num_states=4, stay=0.85, length=LENGTH)
held_out = data.splits()["test"].batch
evidence = denoiser.log_evidence(held_out.tokens)  # [B]


def gap(policy: Policy, mode: bool = False) -> float:
    """Log evidence minus the log-likelihood along the policy's own order, nats per sequence; 0 is perfect."""
    return float((follow(policy, denoiser, held_out, NUM_STEPS, mode=mode).nats + evidence).mean())


def learn(policy: Policy, guide: Guide, updates: int = 80, lr: float = 0.1, anneal: dict[str, Anneal] | None = None):
    """Fit one pair; the training data, the bound and the optimiser are the same for all."""
    return fit(
        UnmaskingModel(denoiser, policy, NUM_STEPS),
        guide,
        data,
        objective=RevealTraceGraph_ELBO(num_particles=4),
        optimizer=partial(torch.optim.Adam, lr=lr),
        updates=updates,
        batch_size=16,
        anneal=anneal,
        progress=False,
    )


gaps = {name: gap(Ranked(name)) for name in ("random", "left_to_right")}

# %% [markdown]
# ## One guide, two priors
#
# `Plan` gives every position a step of its own, from what is known at the start; over a table of positions it knows
# nothing else. `PolicyGuide` makes it a guide, and it decodes as it is. The model's policy asks for set sizes:
# `RandomSteps("uniform")` for equal ones, `RandomSteps("cosine")` for few positions early and many late. The weight of
# the KL falls to 0: the prior spreads the plan out while it is young, and then lets go of it.

# %%
FADING = {"objective.kl_weight": Anneal(0.1, 0.0, updates=40)}

for schedule in ("uniform", "cosine"):
    pyro.set_rng_seed(0)
    plan = Plan(PositionTable(LENGTH, NUM_STEPS))
    learn(RandomSteps(schedule), PolicyGuide(plan, denoiser, NUM_STEPS), anneal=FADING)
    gaps[f"a plan, {schedule} steps as prior"] = gap(plan, mode=True)

# %% [markdown]
# ## The prior learns too
#
# Give one plan to both programs, and the KL is 0 in value and gradient: the bound is the expected log-likelihood along
# the plan.

# %%
pyro.set_rng_seed(0)
plan = Plan(PositionTable(LENGTH, NUM_STEPS, noise=0.1))
result = learn(plan, PolicyGuide(plan, denoiser, NUM_STEPS))
gaps["a plan, its own prior"] = gap(plan, mode=True)
assert result.losses[-1] < result.losses[0]

# %% [markdown]
# ## A policy that looks at what is visible
#
# `LearnedPolicy` reads the state before every step. It is its own guide too, played out along the true tokens. Nothing
# else changes: the same bound, the same loop. A policy has a network to train and needs many more updates than a plan
# of 36 numbers: 25 of them show the swap, not what it can become.

# %%
pyro.set_rng_seed(0)
policy = LearnedPolicy(PolicyNetwork(5, width=16, layers=1, heads=2, bias=-1.0))
learn(policy, PolicyGuide(policy, denoiser, NUM_STEPS), updates=25, lr=0.03)
gaps["a learned policy, its own guide"] = gap(policy)

# %% [markdown]
# ## A policy of your own
#
# A policy is one class with one method: from a state to a distribution over the next reveal set. This one always
# reveals every third of the positions that are left, so that no two neighbours go together while others can. It is a
# rule, so its distribution is a point mass. It decodes, and takes part in every comparison (`orderppl evaluate RUN
# --heuristics '[{policy: my_module.Apart, stride: [2, 3]}]'`). With a smooth distribution, such as that of a
# `LogitPolicy`, it could be a prior as well.


# %%
class Apart(Policy):
    """Every `stride`-th of the masked positions, from the left."""

    non_empty = True

    def __init__(self, stride: int = 3) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, state: State) -> SetDistribution:
        """The positions of this step."""
        place = state.masked.cumsum(-1) - 1  # [*, S], among the masked ones
        return DecidedSet(state.masked & (place % self.stride == 0), state.masked, non_empty=True)


gaps["my own policy"] = gap(Apart())
assert gaps["my own policy"] < gaps["random"]

# %% [markdown]
# ## A pair that does not fit
#
# A guide must stay inside the support of its prior. `LearnedPolicy` never reveals an empty set; a mean-field guide
# may leave a step empty, so the KL between them is infinite. A fit refuses the pair at its first update, and says why.

# %%
model = UnmaskingModel(denoiser, policy, NUM_STEPS)
wanders = MeanFieldGuide(PositionTable(LENGTH, NUM_STEPS), NUM_STEPS)
elbo = RevealTraceGraph_ELBO(num_particles=64)
elbo.loss(model, wanders, held_out.rows(slice(8)))
assert elbo.metrics["elbo"] == -torch.inf
print(f"a bound of {float(elbo.metrics['elbo'])} nats: {elbo.explain(model, wanders, held_out.rows(slice(8)))}")

# %% [markdown]
# ## What came out
#
# The same swaps are options of the command line, or lines of YAML. In the config `chain` the guide plays a plan of its
# own; `--guide.policy null` takes that out, and it plays the model's policy:
#
#     orderppl fit-order --config chain --policy RandomSteps --policy.schedule cosine
#     orderppl fit-order --config chain --guide.policy null --policy LearnedPolicy --policy.network PolicyNetwork

# %%
for name, value in sorted(gaps.items(), key=lambda item: item[1]):
    print(f"{value:6.3f} nats from the evidence   {name}")
