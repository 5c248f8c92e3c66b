"""Rewards of what a policy writes against sums over all orders and all texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor

from orderppl import Batch, Denoiser, Policy, RevealTraceGraph_ELBO, UserError, decode, fit
from orderppl.data import Sudoku
from orderppl.data.answer_tokens import AnswerTokens
from orderppl.data.sudoku import all_grids, completions
from orderppl.guides import MeanFieldGuide, PolicyGuide
from orderppl.inference import AnswerReward, LikelihoodReward, Rollout
from orderppl.inference.rollouts import Reward, Rollouts, roll_out
from orderppl.models import UnmaskingModel
from orderppl.policies import FixedOrder, RandomSteps, Ranked
from orderppl.unmasking.trajectory import Path, Trajectory, steps_used

from programs import VOCAB, TokenTable, copies, flat_gradient, largest_z, learned, make_batch, make_pair

FAMILIES = ["learned", "may_wait", "blocks", "early_commit", "ranked", "renormalised", "plan", "scan", "grouped"]


def own_reward(rollouts: Rollouts) -> Tensor:
    """Some function of all that was written, and of how."""
    at = torch.arange(rollouts.tokens.shape[-1])
    value = ((rollouts.tokens + 1) * (at + 1) * rollouts.batch.latent).sum(-1) % 5 + rollouts.order.clamp(min=0).sum(-1)
    return value.double()


def all_texts(batch: Batch) -> Batch:
    """Every text at the positions to reveal, one after another: V^n copies of every row of n of these."""
    rows: list[Batch] = []
    for at in range(len(batch)):
        places = batch.latent[at].nonzero()[:, 0]
        texts = torch.tensor(list(product(range(VOCAB), repeat=len(places))), dtype=torch.int64)
        many = batch.rows(torch.full((len(texts),), at))
        tokens = many.tokens.clone()
        tokens[:, places] = texts
        rows.append(replace(many, tokens=tokens, given=~many.latent & many.attention_mask))
    joined = {name: torch.cat([getattr(part, name) for part in rows]) for name in ("tokens", "attention_mask", "given")}
    return Batch(**joined)


def expected_reward(
    policy: Policy,
    denoiser: Denoiser,
    batch: Batch,
    steps: int,
    temperature: float,
    reward: Reward,
) -> Tensor:
    """E[ R(x, r) ] summed over the batch, over all orders and texts."""
    written = all_texts(batch)
    orders = policy.order(written, denoiser, steps).enumerate_support()  # [N, M, S]
    trajectory = Trajectory(Path(written, denoiser, steps), orders)
    log_probs = trajectory.states.per_position(lambda own: own).detach()  # [T, N, M, S, V]
    chances = (log_probs / temperature).softmax(-1) if temperature else log_probs == log_probs.amax(-1, keepdim=True)
    index = written.readable.expand(log_probs.shape[:-1])[..., None]
    chance, said = (x.gather(-1, index)[..., 0].double() for x in (chances, log_probs))
    chance = torch.where(trajectory.revealed, chance, 1.0).prod(-1).prod(0)  # p(x | r), [N, M]
    said = said.masked_fill(~trajectory.revealed, 0.0).sum(0)
    log_q = policy.order(written, denoiser, steps).log_prob(orders)
    possible = log_q > -torch.inf
    earned = reward(Rollouts(written, steps, orders, written.readable.expand(orders.shape), said))
    return torch.where(possible, log_q.masked_fill(~possible, 0.0).exp() * chance * earned, 0.0).sum()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_exact_expectation(family: str, temperature: float):
    """30 calls of three rollouts on 60 copies of the batch, |z| < 5 in every coordinate."""
    program, guide = make_pair(family, "policy", num_steps=3 if family in ("learned", "plan") else 2, frozen=True)
    canvas, count, over = make_batch("scattered" if family != "blocks" else "padded"), 60, learned(program, guide)
    exact = expected_reward(program.policy, program.denoiser, canvas, guide.num_steps, temperature, own_reward)
    objective, many = Rollout(own_reward, 3, temperature=temperature), copies(canvas, count)
    losses = [objective.differentiable_loss(program, guide, many) / count for _ in range(30)]
    draws = torch.stack([flat_gradient(-loss, over) for loss in losses])
    assert largest_z(draws, flat_gradient(exact, over)) < 5
    values = -torch.stack(losses).detach()
    assert abs(values.mean() - exact.detach()) < 5 * values.std() / len(values) ** 0.5 + 1e-3
    assert objective.metrics["reward"] * len(canvas) == pytest.approx(values[-1].item(), rel=1e-4)


@pytest.mark.parametrize("family", ["learned", "blocks", "plan", "grouped"])
def test_writes_what_the_decoder_writes(family: str):
    """The same texts as `decode` along the same orders, greedy tokens; the score is that of the order on this text."""
    program, _ = make_pair(family, "policy", num_steps=3, frozen=True)
    batch = make_batch("padded" if family == "blocks" else "scattered")
    other = replace(batch, tokens=torch.where(batch.latent, 0, batch.tokens))
    for seen in (batch, other):  # of what is to be revealed nothing is read
        torch.manual_seed(0)
        rollouts, log_q = roll_out(program.policy, program.denoiser, seen, 3, 4)
        if seen is batch:
            first = rollouts.tokens
    torch.testing.assert_close(rollouts.tokens, first)
    for order, tokens, said, score in zip(rollouts.order, rollouts.tokens, rollouts.token_log_prob, log_q, strict=True):
        for row in range(len(batch)):
            one = batch.rows(slice(row, row + 1))
            one = replace(one, given=one.attention_mask & ~one.latent)
            played = FixedOrder(order[row][batch.latent[row]].tolist() or [0])
            output = decode(program.denoiser, played, one, max_steps=3)
            assert output.sequences[0][one.attention_mask[0]].tolist() == tokens[row][one.attention_mask[0]].tolist()
            torch.testing.assert_close(output.token_log_prob[0].float(), said[row])
        written = replace(batch, tokens=tokens)
        again = program.policy.order(written, program.denoiser, 3).log_prob(order)
        torch.testing.assert_close(again, score)
    assert rollouts.steps.equal(steps_used(rollouts.order))


def test_rewards_by_hand():
    """Two rollouts of one sequence `# 2 0`, whose answer is the mark and the 2."""
    batch = Batch(torch.tensor([[3, 2, 0]]))
    order, tokens = torch.tensor([[[0, 0, 1]], [[0, 1, 2]]]), torch.tensor([[[3, 2, 1]], [[3, 2, 0]]])
    rollouts = Rollouts(batch, 4, order, tokens, torch.tensor([[[-1.0, -2.0, -0.5]], [[-1.0, 0.0, 0.0]]]))
    assert AnswerReward()(rollouts).tolist() == [[0.0], [1.0]]
    answer = AnswerTokens(marks=[3], ends=[0, 1])
    assert AnswerReward(answer)(rollouts).tolist() == [[1.0], [1.0]]
    assert AnswerReward(answer, speed=2.0)(rollouts).tolist() == [[0.25], [0.0625]]
    assert AnswerReward(price=0.5)(rollouts).tolist() == [[-1.0], [-0.5]]
    assert LikelihoodReward(price=0.25)(rollouts).tolist() == [[-4.0], [-1.75]]


def test_a_text_is_right_when_its_data_say_so():
    """Another completion of a puzzle counts, a row with the same number twice does not."""
    data = Sudoku(train=8, validation=2, test=2, min_clues=2, max_clues=4)
    examples = data.splits()["train"]
    batch = examples.batch.rows(slice(1))
    reader, true = examples.tokenizer, examples.batch.tokens[:1]
    ways = ["".join(map(str, grid)) for grid in all_grids()[completions(examples.references[0])]]
    other = next(grid for grid in ways if grid != examples.texts(true, batch)[0])
    swapped, wrong = true.clone(), true.clone()
    swapped[batch.latent] = torch.tensor(reader.encode(other))
    wrong[0, -1] = wrong[0, -2]
    tokens = torch.stack([true, swapped, wrong])
    rollouts = Rollouts(batch, 4, torch.zeros_like(tokens), tokens, torch.zeros(tokens.shape))
    assert AnswerReward(graded_by=data, speed=1.0)(rollouts).tolist() == [[0.75], [0.75], [0.0]]
    assert AnswerReward()(rollouts).tolist() == [[1.0], [0.0], [0.0]]
    with pytest.raises(UserError, match="graded_by: a row of the batch is none of Sudoku"):
        AnswerReward(graded_by=Sudoku(train=2, validation=0, test=0, seed=1))(rollouts)


def test_the_likelihood_of_the_data_as_reward_is_the_plain_bound():
    """Its group baseline is leave-one-out, so that no rollout is needed: value of a certain order, both ways."""
    program, _ = make_pair("learned", "policy", num_steps=2, frozen=True)
    batch, policy = make_batch("plain"), FixedOrder([0, 1, 0])
    rollouts, log_q = roll_out(policy, program.denoiser, batch, 2, 2)
    written = replace(batch, tokens=rollouts.tokens[0])
    guide = PolicyGuide(policy, program.denoiser, 2)
    model = UnmaskingModel(program.denoiser, policy, 2)
    bound = -RevealTraceGraph_ELBO(2, control_variate="none").loss(model, guide, written)
    assert LikelihoodReward()(rollouts).sum().item() / 2 == pytest.approx(bound, rel=1e-5)
    assert not log_q.any()


def test_fit_learns_what_is_rewarded():
    """A policy that is paid for reaching the end in one step learns to."""
    program, guide = make_pair("learned", "policy", num_steps=3, frozen=True)
    batch = copies(make_batch("plain"), 8)
    result = fit(
        program,
        guide,
        batch,
        objective=Rollout(AnswerReward(price=1.0), 8),
        updates=150,
        batch_size=16,
        lr=0.1,
        seed=0,
        progress=False,
    )
    assert result.trace[0]["steps"] > 1.3 and result.trace[-1]["steps"] < 1.1
    assert result.trace[-1]["loss"] == pytest.approx(-result.trace[-1]["reward"], rel=1e-4)


def test_pyro_trains_the_policy_by_it():
    """SVI finds the parameters of the policy, and one step moves them."""
    pyro.clear_param_store()
    program, guide = make_pair("learned", "policy", num_steps=3, frozen=True)
    before = [parameter.detach().clone() for parameter in learned(guide)]
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.1}), Rollout(AnswerReward(price=1.0), 8))
    assert svi.step(make_batch("plain")) > 0
    assert not any(old.equal(new) for old, new in zip(before, learned(guide), strict=True))


def test_what_cannot_be_rolled_out_is_refused():
    program, guide = make_pair("learned", "policy", num_steps=2)
    batch = make_batch("plain")
    with pytest.raises(UserError, match="num_particles: 1 rollout per sequence has no baseline"):
        Rollout(AnswerReward(), 1)
    with pytest.raises(UserError, match=r"temperature: -1.* negative"):
        Rollout(AnswerReward(), temperature=-1)
    with pytest.raises(UserError, match="guide: MeanFieldGuide sees the tokens"):
        Rollout(AnswerReward()).loss(program, MeanFieldGuide(TokenTable(2), 2), batch)
    with pytest.raises(UserError, match=r"reward: shape \(8,\) for \(8, 4\) rollouts"):
        Rollout(lambda rollouts: rollouts.steps.sum(-1)).loss(program, guide, batch)
    assert Rollout(AnswerReward()).loss(program, PolicyGuide(Ranked("top_prob"), program.denoiser, 2), batch) <= 0
    assert Rollout(AnswerReward()).loss(program, PolicyGuide(RandomSteps(), program.denoiser, 2), batch) <= 0
