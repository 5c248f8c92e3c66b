# %% [markdown]
# # Write your own guide, in 30 lines
#
# A guide proposes orders: a distribution over `reveal_step`, the step at which each position is revealed. The base
# class `Guide` owns the call signature, the plate and the sample site. A new guide says one thing: its distribution.
#
# Run it: `python docs/tutorials/write_your_own_guide.py`.

# %%
import shlex
import tempfile
from functools import partial
from pathlib import Path

import pyro
import torch
from block_guide import BlockGuide
from torch import Tensor

from orderppl import Batch, RevealTraceGraph_ELBO, evaluate, fit, load_run
from orderppl.cli.main import main
from orderppl.data import Chains
from orderppl.evaluation import Arm, summary
from orderppl.inference.exact import all_orders, exact_elbo, exact_evidence
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan, RandomSteps

# %% [markdown]
# ## The idea
#
# Semi-autoregressive decoders write in blocks from left to right and choose freely within a block. As a guide: the T
# steps are shared out among the blocks, and every position has a distribution over the steps of its own block.
#
#     q(r | x) = prod_i Categorical(r_i; softmax of network(x)_i over the steps of block(i))
#
# `StepwiseOrder` is the distribution of independent steps; it brings sampling, log-probability, entropy, the
# closed-form KL and the enumeration that the check below needs. Steps of other blocks get log-odds of -100: they are
# never drawn, but stay finite, as every KL must. `batch.latent` says what is to be revealed: positions that are
# attended and not given. This is the whole file `block_guide.py`, from which `BlockGuide` was imported above:
#
# ```python
# --8<-- "block_guide.py"
# ```
#
# ## Look at what it draws
#
# Four steps, two blocks: the left half gets steps 0 and 1, the right half 2 and 3. The second row has two positions of
# padding, and its first token is given: these are -1.

# %%
pyro.set_rng_seed(0)
guide = BlockGuide(PositionTable(6, 4, noise=1.0), num_steps=4, num_blocks=2)
attention_mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
given = torch.tensor([[False] * 6, [True] + [False] * 5])
drawn = guide(Batch(torch.zeros(2, 6, dtype=torch.int64), attention_mask, given))["reveal_step"]
print(drawn)
assert bool((drawn[0, :3] < 2).all() and (drawn[0, 3:] >= 2).all())
assert drawn[1, 0] == drawn[1, 5] == -1
assert bool((drawn[1, 1:3] < 2).all() and (drawn[1, 3:5] >= 2).all())

# %% [markdown]
# ## Prove it on every order
#
# At four positions and four steps there are 4^4 = 256 orders: the bound can be summed exactly. Three checks, which
# every guide of the library passes too (`tests/exact`):
#
# 1. its probabilities add up to 1, and the exact bound is below the exact evidence;
# 2. the estimated bound is the exact one;
# 3. the estimated gradient is the exact one, in every coordinate.

# %%
with pyro.settings.context(module_local_params=True):
    denoiser = MarkovChainDenoiser(num_states=3, stay=0.8, length=4)
    batch = Chains(num_states=3, stay=0.8, length=4, train=3).splits()["train"].batch
    model = UnmaskingModel(denoiser, RandomSteps(), num_steps=4)
    guide = BlockGuide(PositionTable(4, 4, noise=1.0), num_steps=4, num_blocks=2)
    parameter = next(guide.parameters())  # [L, T]

    orders = all_orders(guide, batch)
    total = guide.order(batch).log_prob(orders).exp().sum(0)
    bound = exact_elbo(model, guide, orders, batch).sum()
    (exact,) = torch.autograd.grad(bound, parameter)
    assert torch.allclose(total, torch.ones(3), atol=1e-5)
    assert bound < exact_evidence(model, orders, batch).sum()

    elbo = RevealTraceGraph_ELBO(num_particles=64)
    values, gradients = [], []
    for _ in range(100):
        loss = elbo.differentiable_loss(model, guide, batch)
        values.append(-loss.detach())
        gradients.append(-torch.autograd.grad(loss, parameter)[0])


def z_score(estimates: Tensor, truth: Tensor) -> Tensor:
    """Distance of the mean estimate from the truth, in standard errors."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return (estimates.mean(0) - truth) / error.clamp(min=1e-6)


z = z_score(torch.stack(gradients), exact)
z_bound = z_score(torch.stack(values), bound.detach())
print(f"bound: exact {bound.item():.4f}, estimate at |z| = {z_bound.abs().item():.1f}")
print(f"gradient: largest |z| of {z.numel()} coordinates = {z.abs().max().item():.1f}")
assert z_bound.abs() < 5
assert z.abs().max() < 5

# %% [markdown]
# ## Fit it
#
# It fits like any other guide. The model's policy is learned too: a plan, drawn towards what the guide proposes. With
# `out` the fit leaves a run folder, which every command of `orderppl` reads.

# %%
runs = Path(tempfile.mkdtemp())
pyro.set_rng_seed(0)
data = Chains(length=12, train=500, test=200)
chain = MarkovChainDenoiser(num_states=4, stay=0.85, length=12)
model = UnmaskingModel(chain, Plan(PositionTable(12, 4)), num_steps=4)
guide = BlockGuide(PositionTable(12, 4, noise=0.1), num_steps=4, num_blocks=2)
result = fit(
    model,
    guide,
    data,
    objective=RevealTraceGraph_ELBO(num_particles=8),
    optimizer=partial(torch.optim.Adam, lr=0.1),
    updates=60,
    batch_size=16,
    validation=data.splits()["test"],
    validate_every=30,
    progress=False,
    out=runs / "from-python",
)
first, last = (record["elbo"] for record in (result.validations[0], result.validations[-1]))
print(f"held-out bound per sequence: {first:.2f} nats after 30 updates, {last:.2f} after 60")
assert last > first

# %% [markdown]
# ## The same from the command line
#
# Nothing is registered anywhere: the command takes the path of a class, here of a file in the current folder, and the
# arguments of its constructor. What the run knows (`num_steps`, the length of the table) need not be given. With
# `--guide.help block_guide.BlockGuide` it prints what the class takes, from its docstring.


# %%
def orderppl(arguments: str) -> None:
    """Run a command in this process, as `orderppl ...` does in a shell."""
    assert main(shlex.split(arguments)) == 0, arguments


orderppl(
    f"""fit-order --config chain --policy Plan --policy.network PositionTable
    --guide block_guide.BlockGuide --guide.num_blocks 2 --guide.network PositionTable --guide.network.noise 0.1
    --fit.updates 30 --fit.progress false --out {runs}/from-the-shell"""
)
run = load_run(runs / "from-the-shell")
assert type(run.guide).__name__ == "BlockGuide"

# %% [markdown]
# ## What decodes
#
# A guide may see the tokens, so it is not what decodes: the model's policy is. `run.policy` is that of the run, which
# `orderppl evaluate`, `frontier`, `generate` and `share` play. So give the model a policy that learns, as above: with
# the default one, `RandomSteps`, there would be nothing learned to decode with. This guide never looks at the tokens.
# Its idea could also be a policy: derive from `orderppl.policies.Planned`, define `plan(opening)` in the same way, and
# let `PolicyGuide` make it a guide.

# %%
arms = [
    Arm("learned", load_run(runs / "from-python").policy, 4, mode=True, training_seed=0),
    Arm("random", RandomSteps(), 4, seeds=[0, 1, 2]),
]
table = evaluate(arms, chain, data.splits()["test"], progress=False)
found = summary(table).query("metric == 'path_nats'").set_index("arm")
print(found[["value", "low", "high"]].round(3))
assert found.value["learned"] < found.value["random"]
