# %% [markdown]
# # Write your own guide, in 30 lines
#
# A guide proposes orders: a distribution over `reveal_step`, the step at which each position is revealed. The base
# class `RevealGuide` owns the call signature, the plate and the sample site. A new guide says one thing: its
# distribution.
#
# Run it: `python docs/tutorials/write_your_own_guide.py`.

# %%
import pyro
import torch
from torch import Tensor, nn

from orderppl import RevealTraceGraph_ELBO, fit
from orderppl.data.chains import sample_chains
from orderppl.data.collate import tensors
from orderppl.distributions import OrderedPartition, StepwiseReveal
from orderppl.guides import RevealGuide
from orderppl.inference import BatchStream, all_orders, exact_elbo, exact_evidence
from orderppl.models import UniformSteps, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.models.networks import PositionTable

# %% [markdown]
# ## The idea
#
# Semi-autoregressive decoders write in blocks from left to right and choose freely within a block. As a guide: the T
# steps are shared out among the blocks, and every position has a distribution over the steps of its own block.
#
#     q(r | x, c) = prod_i Categorical(r_i; softmax of network(c)_i over the steps of block(i))
#
# `StepwiseReveal` is the distribution of independent steps; it brings sampling, log-probability, entropy, the
# closed-form KL and the enumeration that the check below needs. Steps of other blocks get log-odds of -100, which is
# never drawn but stays finite, as every KL must.

# %%


class BlockGuide(RevealGuide):
    """Blocks from left to right; within its block, each position has a step of its own.

        q(r | x, c) = prod_i Categorical(r_i; softmax of network(c)_i over the steps of block(i))

    Args:
        network: (None, attention_mask, context, context_mask) -> step logits, float [B, L, T].
        num_steps: step budget T, a multiple of `num_blocks`.
        num_blocks: blocks of equal length, counted from the row's own start.
    """

    def __init__(self, network: nn.Module, num_steps: int, num_blocks: int) -> None:
        super().__init__(num_steps)
        if num_steps % num_blocks:
            raise ValueError(f"num_blocks: {num_blocks} does not divide {num_steps} steps; use a divisor")
        self.network = network
        self.num_blocks = num_blocks

    def order_distribution(
        self, tokens: Tensor, attention_mask: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> OrderedPartition:
        """One categorical per position, over the steps of its block."""
        place = (attention_mask.cumsum(-1) - 1).clamp_min(0)  # [B, L]
        block = place * self.num_blocks // attention_mask.sum(-1, keepdim=True).clamp_min(1)  # [B, L]
        step = torch.arange(self.num_steps, device=attention_mask.device)
        elsewhere = block.unsqueeze(-1) != step * self.num_blocks // self.num_steps  # [B, L, T]
        logits = self.network(None, attention_mask, context, context_mask)  # [B, L, T]
        return StepwiseReveal(logits.masked_fill(elsewhere, -100.0), attention_mask)


# %% [markdown]
# ## Look at what it draws
#
# Six positions and a row of four, four steps, two blocks: the left half gets steps 0 and 1, the right half 2 and 3.
# Padding is -1.

# %%
pyro.set_rng_seed(0)
guide = BlockGuide(PositionTable(6, 4, noise=1.0), num_steps=4, num_blocks=2)
attention_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
drawn = guide(torch.zeros(2, 6, dtype=torch.int64), attention_mask)["reveal_step"]
print(drawn)
assert bool((drawn[0, :3] < 2).all() and (drawn[0, 3:] >= 2).all())
assert bool((drawn[1, :2] < 2).all() and (drawn[1, 2:4] >= 2).all() and (drawn[1, 4:] == -1).all())

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
tokens = tensors(sample_chains(3, num_states=3, length=4, seed=2))["tokens"]
denoiser = MarkovChainDenoiser(num_states=3, stay=0.8, length=4)
with pyro.settings.context(module_local_params=True):
    model = UnmaskingModel(denoiser, UniformSteps(), num_steps=4)
    guide = BlockGuide(PositionTable(4, 4, noise=1.0), num_steps=4, num_blocks=2)
parameter = next(guide.parameters())  # [L, T]

with pyro.settings.context(module_local_params=True):
    orders = all_orders(guide, tokens=tokens)
    distribution = guide.order_distribution(tokens, torch.ones_like(tokens, dtype=torch.bool), None, None)
    total = distribution.log_prob(orders).exp().sum(0)
    bound = exact_elbo(model, guide, orders, tokens=tokens).sum()
    (exact,) = torch.autograd.grad(bound, parameter)
    assert torch.allclose(total, torch.ones(3), atol=1e-5)
    assert bound < exact_evidence(model, orders, tokens=tokens).sum()

    elbo = RevealTraceGraph_ELBO(num_particles=64)(model, guide)
    values, gradients = [], []
    for _ in range(100):
        loss = elbo(tokens)
        values.append(-loss.detach())
        gradients.append(-torch.autograd.grad(loss, parameter)[0])


def z_score(estimates: Tensor, truth: Tensor) -> Tensor:
    """Distance of the mean estimate from the truth, in standard errors."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return (estimates.mean(0) - truth) / error.clamp_min(1e-6)


z = z_score(torch.stack(gradients), exact)
z_bound = z_score(torch.stack(values), bound.detach())
print(f"bound: exact {bound.item():.4f}, estimate at |z| = {z_bound.abs().item():.1f}")
print(f"gradient: largest |z| of {z.numel()} coordinates = {z.abs().max().item():.1f}")
assert z_bound.abs() < 5
assert z.abs().max() < 5

# %% [markdown]
# ## Use it
#
# That is all: it fits like any other guide, and because it does not look at the tokens it is a plan to decode by.

# %%
pyro.set_rng_seed(0)
chain = MarkovChainDenoiser(num_states=4, stay=0.85, length=12)
model = UnmaskingModel(chain, UniformSteps(), num_steps=4)
guide = BlockGuide(PositionTable(12, 4, noise=0.1), num_steps=4, num_blocks=2)
stream = BatchStream(tensors(sample_chains(500, length=12, seed=0)), batch_size=16)
held_out = tensors(sample_chains(500, length=12, seed=1))["tokens"]


def held_out_bound() -> float:
    """Mean bound of the held-out sequences, nats per sequence."""
    elbo = RevealTraceGraph_ELBO(num_particles=8)
    with torch.no_grad():
        elbo(model, guide)(held_out)
    return elbo.metrics["elbo"].item()


before = held_out_bound()
fit(
    model,
    guide,
    stream,
    elbo=RevealTraceGraph_ELBO(num_particles=8),
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    updates=60,
)
after = held_out_bound()
print(f"held-out bound per sequence: {before:.2f} nats before, {after:.2f} after 60 updates")
assert after > before
