"""Small networks: what they read and what they must not, with padding and given positions anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orderppl import Batch, State, UserError, decode, follow
from orderppl.distributions.order_distribution import PolicyOrder
from orderppl.models import LearnedPolicy, OpeningPlan, PolicyNetwork, PositionTable, SequenceEncoder
from orderppl.models.backbone import Backbone, Neighbours, attended_positions
from orderppl.models.denoisers import MarkovChainDenoiser, TransformerDenoiser
from orderppl.policies import AtPrice, Plan, PriceRange, Threshold
from orderppl.unmasking.trajectory import Path, Trajectory, same_step

V, MASK = 7, 7
# x is to be revealed, g is given, a dot is padding; the last row has nothing to reveal
ROWS = ["ggxxxxxxxx..", "gggxxxxx....", ".gx.xg.x.x..", "x..xgg......", "g.gg........"]
PROMPTED = ["gg..xxxxxxxx", "ggggxxxxx...", ".g..xxx.....", "g...x.......", "gggg........"]


def ragged(rows: list[str] = ROWS) -> Batch:
    """Rows of every length; padding holds ids of tokens."""
    marks = torch.tensor([[ord(mark) for mark in row] for row in rows])
    tokens = torch.randint(0, V, marks.shape, generator=torch.Generator().manual_seed(0))
    return Batch(tokens, marks != ord("."), marks == ord("g"))


def without_padding(batch: Batch, row: int) -> Batch:
    """One row alone, cut to its own length."""
    here = batch.attention_mask[row]
    assert batch.given is not None
    return Batch(batch.tokens[row, here][None], batch.attention_mask[row, here][None], batch.given[row, here][None])


def with_other_padding(batch: Batch) -> tuple[Batch, Tensor]:
    """The same rows among more padding of other ids; and the columns they have there."""
    columns = torch.arange(batch.tokens.shape[1]) * 2 + 1
    wide = torch.full((len(batch), 2 * batch.tokens.shape[1] + 3), 3)
    tokens = torch.where(batch.attention_mask, batch.tokens, (batch.tokens + 3) % V)
    assert batch.given is not None
    masks = [torch.zeros_like(wide, dtype=torch.bool) for _ in range(2)]
    for mask, values in zip((wide, *masks), (tokens, batch.attention_mask, batch.given), strict=True):
        mask[:, columns] = values
    return Batch(wide, *masks), columns


def other_tokens(batch: Batch, where: Tensor) -> Batch:
    """The same canvas with every token changed in some places."""
    return replace(batch, tokens=torch.where(where, (batch.tokens + 1) % V, batch.tokens))


def every_parameter_gets_gradient(module: nn.Module, output: Tensor) -> None:
    module.zero_grad()
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


# ---- backbone


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_backbone_counts_attended_tokens_only(positions: str) -> None:
    backbone = Backbone(16, 2, 4, positions=positions, max_length=20)
    hidden = torch.randn(1, 6, 16)
    mask = torch.tensor([[True, True, False, True, False, True]])
    padded = backbone(hidden, mask)
    compact = backbone(hidden[mask][None], torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(padded[mask][None], compact, atol=1e-5, rtol=0)
    # and the order of the tokens matters
    turned = backbone(hidden[mask][None].flip(1), torch.ones(1, 4, dtype=torch.bool)).flip(1)
    assert (turned - compact).abs().max() > 1e-3


def test_positions_skip_padding() -> None:
    mask = torch.tensor([[False, True, False, True, True], [True, True, True, False, False]])
    assert attended_positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


def test_a_row_without_any_token_is_finite() -> None:
    backbone = Backbone(16, 2, 4)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    mask = torch.tensor([[True] * 5, [False] * 5])
    output = backbone(hidden, mask)
    assert output.isfinite().all()
    output.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"heads": 3}, "heads"),
        ({"positions": "sinusoidal"}, "positions"),
        ({"positions": "learned"}, "max_length"),
    ],
)
def test_backbone_refuses_bad_sizes(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as caught:
        Backbone(**{"width": 16, "layers": 1, "heads": 4, **arguments})
    assert caught.value.field == field


def test_learned_positions_refuse_a_longer_canvas() -> None:
    backbone = Backbone(16, 1, 4, positions="learned", max_length=4)
    with pytest.raises(UserError, match="a canvas of 5 exceeds the 4 learned positions"):
        backbone(torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool))


def test_convolutions_see_the_neighbours_and_nothing_beyond() -> None:
    """Two layers of three positions each: what stands up to two places away; padding takes no place."""
    network = Neighbours(width=4, kernel=3)
    hidden, attended = torch.randn(1, 8, 4, requires_grad=True), torch.ones(1, 8, dtype=torch.bool)
    attended[0, 6:] = False
    network(hidden, attended, attended)[0, 3].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.ne(0).any(-1)[0].tolist() == [False, True, True, True, True, True, False, False]
    compact = network(hidden[:, :6], attended[:, :6], attended[:, :6])
    torch.testing.assert_close(network(hidden, attended, attended)[:, :6], compact)
    spread, here = torch.zeros(1, 13, 4), torch.zeros(1, 13, dtype=torch.bool)
    spread[:, 1::2] = hidden[:, :6]
    here[:, 1::2] = True
    torch.testing.assert_close(network(spread, here, here)[:, 1::2], compact)
    seen = attended.clone()
    seen[0, 2] = False  # attended, but nothing is to be seen there: it keeps its place
    zeroed = hidden.detach().clone()
    zeroed[0, 2] = 0
    found, wanted = network(hidden, seen, attended), network(zeroed, attended, attended)
    assert not torch.allclose(found[:, 3], network(hidden[:, attended[0] & seen[0]], seen[:, :5], seen[:, :5])[:, 2])
    assert torch.allclose(found[:, 0], wanted[:, 0], atol=1e-1)


# ---- sequence networks


@pytest.fixture(params=["encoder", "learned", "table", "split", "periodic", "attended"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    made: dict[str, Callable[[], nn.Module]] = {
        "encoder": lambda: SequenceEncoder(V + 1, 3, width=16, layers=2),
        "learned": lambda: SequenceEncoder(V + 1, 3, width=16, layers=1, positions="learned", max_length=40),
        "table": lambda: PositionTable(8, 3, noise=1.0),
        "split": lambda: PositionTable(8, 3, split=2, noise=1.0),
        "periodic": lambda: PositionTable(3, 3, periodic=True, noise=1.0),
        "attended": lambda: PositionTable(10, 3, noise=1.0, counts="attended"),
    }
    return made[request.param]()


@pytest.mark.parametrize("rows", [ROWS, PROMPTED], ids=["scattered", "prompted"])
def test_sequence_networks_ignore_padding(network: nn.Module, rows: list[str]) -> None:
    batch = ragged(rows)
    full = network(batch)
    wide, columns = with_other_padding(batch)
    assert full.shape == (*batch.tokens.shape, 3)
    here = batch.latent
    torch.testing.assert_close(full[here], network(wide)[:, columns][here], atol=1e-5, rtol=0)
    for row in range(len(rows)):
        alone, single = without_padding(batch, row), batch.latent[row]
        torch.testing.assert_close(full[row][single], network(alone)[alone.latent], atol=1e-5, rtol=0)
    assert full.isfinite().all()


def test_sequence_networks_read_states_as_they_read_batches(network: nn.Module) -> None:
    """A plan's opening, and stacked states of one: the same numbers for the same canvas."""
    batch = ragged()
    opening = Path(batch, MarkovChainDenoiser(V, 0.8, 20), 3).opening()
    shown = replace(batch, tokens=opening.tokens)
    torch.testing.assert_close(network(opening), network(shown))
    masked = batch.latent.expand(2, 3, *batch.latent.shape)
    stacked = Path(batch, MarkovChainDenoiser(V, 0.8, 20), 3).state(masked, same_step(0, masked))
    torch.testing.assert_close(network(stacked)[1, 2], network(shown))


def test_encoder_reads_the_whole_canvas() -> None:
    network = SequenceEncoder(V, 2, width=16, layers=1)
    batch = ragged()
    assert batch.given is not None
    here = batch.latent
    for where in (batch.latent, batch.given):
        changed = (network(batch) - network(other_tokens(batch, where)))[here].abs()
        assert changed.max() > 1e-4
    assert torch.equal(network(batch), network(other_tokens(batch, ~batch.attention_mask)))
    # what is given is told apart from what is to be revealed, although both are the same tokens
    swapped = replace(batch, given=batch.latent)
    assert (network(batch) - network(swapped))[batch.attention_mask].abs().max() > 1e-4
    # positions are told apart even when nothing is seen
    alone = network(Batch(torch.zeros(1, 5, dtype=torch.int64)))
    assert torch.pdist(alone[0]).min() > 1e-3


def test_encoder_can_start_at_zero_and_trains_every_parameter() -> None:
    assert SequenceEncoder(V, 2, width=16, zero_init=True)(ragged()).abs().max() == 0
    network = SequenceEncoder(V, 2, width=16)
    every_parameter_gets_gradient(network, network(ragged()))


def test_table_aligns_rows_at_both_ends() -> None:
    """Of the positions to reveal; of all attended ones where it is told so."""
    table = PositionTable(6, 1, split=2)
    with torch.no_grad():
        table.logits[:] = torch.arange(6.0)[:, None]
    rows = ["xxxxxx", "xxxx..", "xx....", "..xxxx", "xgxgx.", "g.x.xg"]
    out = table(ragged(rows))[..., 0]
    wanted = [[0, 1, 2, 3, 4, 5], [0, 1, 4, 5], [0, 1], [0, 1, 4, 5], [0, 1, 5], [0, 1]]
    latent = ragged(rows).latent
    for row, (values, places) in enumerate(zip(out, wanted, strict=True)):
        assert values[latent[row]].tolist() == places
    everything = PositionTable(6, 1, split=2, counts="attended")
    everything.load_state_dict(table.state_dict())
    found = everything(ragged(rows))[..., 0]
    assert found[4][latent[4]].tolist() == [0, 3, 5]
    assert found[5][latent[5]].tolist() == [1, 4]


def test_periodic_table_repeats_for_rows_of_any_length() -> None:
    table = PositionTable(3, 2, periodic=True)
    table.set_steps(torch.tensor([1, 0, 1]))
    batch = ragged(["xxxxxxx", ".xxxx..", "xgx.gxx"])
    steps = table(batch).argmax(-1)
    assert steps[0].tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert steps[1, 1:5].tolist() == [1, 0, 1, 1]
    assert steps[2][batch.latent[2]].tolist() == [1, 0, 1, 1]
    with pytest.raises(UserError, match="no right end"):
        PositionTable(3, 2, split=1, periodic=True)


def test_table_refuses_longer_rows_but_not_wider_padding() -> None:
    table = PositionTable(4, 2)
    assert table(ragged(["xxxx...", "xx....."])).shape == (2, 7, 2)
    assert table(ragged(["gggxxxx"])).shape == (1, 7, 2)  # what is given needs no place
    with pytest.raises(UserError, match="a row of 5 positions exceeds the table of 4"):
        table(ragged(["xxxxx"]))
    with pytest.raises(UserError, match="a row of 5 positions exceeds the table of 4"):
        PositionTable(4, 2, counts="attended")(ragged(["gxxxx"]))
    with pytest.raises(UserError, match="split"):
        PositionTable(4, 2, split=5)
    with pytest.raises(UserError, match="counts"):
        PositionTable(4, 2, counts="all")


# ---- plans from the opening


def opening_plan(**options: Any) -> OpeningPlan:
    plan = OpeningPlan(3, V, width=8, **options)
    nn.init.normal_(plan.head.weight)
    return plan.eval()


def opening_of(batch: Batch, denoiser: nn.Module | None = None) -> State:
    return Path(batch, transformer() if denoiser is None else denoiser, 3).opening()


def transformer() -> TransformerDenoiser:
    torch.manual_seed(0)
    return TransformerDenoiser(V, MASK, width=16, layers=1, heads=2, max_length=40).eval().requires_grad_(False)


@torch.no_grad()
def test_an_opening_plan_reads_what_is_given_and_not_what_is_hidden() -> None:
    batch, plan = ragged(), opening_plan()
    assert batch.given is not None
    first = plan(opening_of(batch))
    assert first.shape == (*batch.tokens.shape, 3) and first.isfinite().all()
    torch.testing.assert_close(plan(opening_of(other_tokens(batch, batch.latent))), first)
    changed = other_tokens(batch, batch.given)
    assert (plan(opening_of(changed)) - first)[batch.latent].abs().max() > 1e-4
    blind = OpeningPlan(3, V, width=8, reads_opening=False)
    torch.testing.assert_close(blind(opening_of(batch)), blind(opening_of(changed)))


@torch.no_grad()
@pytest.mark.parametrize("rows", [ROWS, PROMPTED], ids=["scattered", "prompted"])
@pytest.mark.parametrize("options", [{}, {"period": 2}, {"reads_opening": False}, {"kernel": 3, "periods": (2, 5)}])
def test_padding_changes_nothing_in_a_plan(options: dict[str, Any], rows: list[str]) -> None:
    batch, plan = ragged(rows), opening_plan(**options)
    together = plan(opening_of(batch))
    for row in range(len(rows)):
        alone = without_padding(batch, row)
        found = plan(opening_of(alone))
        torch.testing.assert_close(together[row][batch.latent[row]], found[alone.latent], atol=1e-5, rtol=1e-5)


class Counting(nn.Module):
    """A denoiser that counts the rows it reads."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, 0
        self.mask_index, self.vocab_size = MASK, V

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.rows += len(state)
        logits: Tensor = self.inner(state, attention_mask)
        return logits


@torch.no_grad()
def test_following_an_opening_plan_costs_no_further_forward() -> None:
    batch, counting = ragged(), Counting(transformer())
    policy = Plan(opening_plan())
    expected = policy.network(opening_of(batch, counting)).argmax(-1)
    counting.rows = 0
    path = follow(policy, counting, batch, 3, mode=True)
    assert counting.rows == int(path.nfe.sum())
    for row in range(len(batch)):  # steps without a position are left out
        steps = expected[row][batch.latent[row]].tolist()
        order = sorted(set(steps))
        assert path.reveal_step[row][batch.latent[row]].tolist() == [order.index(step) for step in steps]


def test_the_denoiser_is_no_part_of_the_plan() -> None:
    plan = opening_plan()
    assert not any("denoiser" in name for name in plan.state_dict())
    denoiser = transformer().requires_grad_(True)
    plan(opening_of(ragged(), denoiser)).sum().backward()
    assert all(parameter.grad is not None for parameter in plan.parameters())
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def test_a_pattern_is_what_a_plan_begins_with() -> None:
    plan = OpeningPlan(3, V, width=8, period=2, noise=0.0)
    assert plan.pattern is not None
    plan.pattern.set_steps(torch.tensor([2, 0]))
    batch = ragged()
    steps = plan(opening_of(batch)).argmax(-1)
    for row in range(len(batch)):
        found = steps[row][batch.latent[row]].tolist()
        assert found == [[2, 0][place % 2] for place in range(len(found))]


# ---- networks of policies


def state_of(batch: Batch, denoiser: nn.Module, steps: int = 3) -> State:
    """Two stacked states of every row, with different parts masked."""
    generator = torch.Generator().manual_seed(1)
    masked = (torch.rand((2, *batch.tokens.shape), generator=generator) < 0.6) & batch.latent
    step = torch.arange(2)[:, None].expand(2, len(batch))
    return Path(batch, denoiser, steps).state(masked, step)


def cut(state: State, row: int) -> State:
    """One row of states, without its padding."""
    batch = state.batch
    here = batch.attention_mask[row]
    return Path(without_padding(batch, row), state.denoiser, 3).state(
        state.masked[:, row, here][:, None], state.step[:, row : row + 1]
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "tokens": {},
    "blind": {"reads_tokens": False},
    "expected": {"features": ("prediction", "margin")},
    "sums": {"features": ("before", "chance")},
    "hidden": {"features": ("confidence", "hidden"), "hidden": 16},
    "places": {"places": 8},
}


@pytest.mark.parametrize("rows", [ROWS, PROMPTED], ids=["scattered", "prompted"])
@pytest.mark.parametrize("name", OPTIONS)
def test_policy_ignores_padding_and_other_rows(name: str, rows: list[str]) -> None:
    network = PolicyNetwork(V + 1, width=16, layers=2, **OPTIONS[name])
    batch = ragged(rows)
    state = state_of(batch, transformer())
    logits = network(state)
    assert logits.shape == (2, *batch.tokens.shape)
    assert logits.isfinite().all()
    for row in range(len(rows)):
        alone = cut(state, row)
        found = network(alone)
        torch.testing.assert_close(
            logits[:, row][:, batch.latent[row]], found[:, 0, alone.latent[0, 0]], atol=1e-5, rtol=0
        )


def test_policy_learns_about_the_places_that_rows_have() -> None:
    network = PolicyNetwork(V + 1, width=16, layers=1, places=8)
    batch = ragged(["gxx.xgxx"])  # 5 of 8 positions
    logits = network(state_of(batch, transformer()))
    logits[:, batch.latent].sum().backward()
    assert network.embed_place is not None
    touched = network.embed_place.weight.grad.ne(0).any(-1)
    assert touched.tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("features", [("confidence",), ("prediction",), ("before",), ("chance",), ("hidden",)])
def test_policy_never_sees_hidden_tokens(features: tuple[str, ...]) -> None:
    denoiser = transformer()
    network = PolicyNetwork(V + 1, width=16, features=features, hidden=16 if "hidden" in features else None)
    batch = ragged()
    state = state_of(batch, denoiser)
    tokens = torch.where(state.masked[0] & state.masked[1], (batch.tokens + 1) % V, batch.tokens)
    hidden = state_of(replace(batch, tokens=tokens), denoiser)  # hidden in both states
    assert torch.equal(hidden.tokens, state.tokens)
    assert torch.equal(network(state), network(hidden))
    for where in (batch.latent & ~state.masked[0], batch.given):
        assert where is not None
        revealed = state_of(other_tokens(batch, where), denoiser)
        assert (network(state) - network(revealed)).abs().max() > 1e-4


class Whole(nn.Module):
    """A denoiser that offers no more than its logits."""

    mask_index, vocab_size = MASK, V

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.inner(state, attention_mask)
        return logits


@pytest.mark.parametrize("features", [("hidden",), ("confidence", "hidden")])
@pytest.mark.parametrize("kind", ["split", "whole"])
def test_a_policy_that_reads_hidden_states_calls_the_denoiser_once(kind: str, features: tuple[str, ...]) -> None:
    """With logits that are those of the denoiser; where it offers no head by itself, its logits are what is read."""
    torch.manual_seed(0)
    calls: list[int] = []

    class Recording(TransformerDenoiser):
        def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            calls.append(len(state))
            return super().hidden_states(state, attention_mask)

    inner = Recording(V, MASK, width=16, layers=1).requires_grad_(False)
    denoiser = inner if kind == "split" else Whole(inner)
    network = PolicyNetwork(V + 1, width=16, features=features, hidden=16 if kind == "split" else V)
    policy = LearnedPolicy(network, Threshold(0.9, temperature=1.0))
    state, fresh = (state_of(ragged(), denoiser) for _ in range(2))
    first = policy.logits(state)
    assert first.isfinite().all()
    assert len(calls) == 1
    fresh.per_position(lambda log_probs: log_probs.amax(-1))  # the other way round
    torch.testing.assert_close(policy.logits(fresh), first)
    assert len(calls) == 2
    wrong = PolicyNetwork(V + 1, width=16, features=features, hidden=5)
    with pytest.raises(UserError, match="^hidden: "):
        wrong(state)


def test_hidden_states_are_the_same_along_an_order_and_in_the_decoder() -> None:
    """Followed step by step, in the stack of an order and while decoding; and their size and name need each other."""
    denoiser, batch = transformer(), ragged()
    network = PolicyNetwork(V + 1, width=16, features=("confidence", "hidden"), hidden=16)
    policy = LearnedPolicy(network, Threshold(0.5, temperature=1.0))
    path = Path(batch, denoiser, 3)
    q = PolicyOrder(policy, path).expand((4, len(batch)))
    order = q.sample()
    met = q.met_sets()
    assert met is not None
    steps = torch.arange(3).reshape(3, 1, 1, 1)
    afresh = q.sets(order, Trajectory(path, order)).log_prob(order == steps)
    torch.testing.assert_close(met.log_prob(order == steps), afresh)
    hidden = replace(batch, tokens=torch.where(batch.latent, MASK, batch.tokens))
    together = decode(denoiser, policy, hidden, max_steps=3, mode=True)
    for row in range(len(batch)):
        alone = without_padding(hidden, row)
        single = decode(denoiser, policy, alone, max_steps=3, mode=True)
        assert torch.equal(together.reveal_step[row, batch.attention_mask[row]], single.reveal_step[0])
    for options in ({"features": ("hidden",)}, {"hidden": 16}):
        with pytest.raises(UserError, match="^features: "):
            PolicyNetwork(V + 1, width=16, **options)


@pytest.mark.parametrize("options", [{}, {"features": ()}, {"features": ("likelihood",), "reads_tokens": False}])
def test_posterior_sees_hidden_tokens_of_its_own_row_only(options: dict[str, Any]) -> None:
    """One network for both places: with `sees_truth` hidden tokens count, whatever stands at padding does not."""
    denoiser, batch = transformer(), ragged()
    state = state_of(batch, denoiser)
    network = PolicyNetwork(V + 1, width=16, sees_truth=True, **options)
    logits = network(state)
    changed = other_tokens(batch, batch.latent & (torch.arange(len(batch)) == 0)[:, None])
    assert changed.tokens[0].ne(batch.tokens[0]).any()
    seen = state.replace(truth=changed.readable)  # the same states, of another sequence
    other = network(seen)
    assert (logits[:, 0] - other[:, 0]).abs().max() > 1e-4
    assert torch.equal(logits[:, 1:], other[:, 1:])
    padding = state_of(replace(batch, tokens=torch.where(batch.attention_mask, batch.tokens, 10_000)), denoiser)
    assert torch.equal(network(padding), logits)
    for row in range(len(batch)):
        alone = cut(state, row)
        found = network(alone)[:, 0, alone.latent[0, 0]]
        torch.testing.assert_close(logits[:, row][:, batch.latent[row]], found, atol=1e-5, rtol=0)
    every_parameter_gets_gradient(network, logits)


def test_a_network_sees_the_truth_only_where_it_was_built_to() -> None:
    state = state_of(ragged(), MarkovChainDenoiser(V, 0.8, 40))
    other = state.replace(truth=torch.zeros_like(state.batch.tokens))
    blind = PolicyNetwork(V + 1, width=16)
    assert torch.equal(blind(state), blind(other))
    with pytest.raises(UserError, match="^sees_truth: the true tokens are not known here"):
        PolicyNetwork(V + 1, width=16, sees_truth=True)(state.replace(truth=None))
    with pytest.raises(UserError, match="unknown feature 'likelihood'"):
        PolicyNetwork(V + 1, features=("likelihood",))


def test_policy_starts_at_its_bias_or_at_zero_and_has_the_size_it_says() -> None:
    state = state_of(ragged(), MarkovChainDenoiser(V, 0.8, 40))
    assert PolicyNetwork(V + 1, zero_init=True)(state).abs().max() == 0
    assert PolicyNetwork(V + 1)(state).mean().item() == pytest.approx(-2.0, abs=0.5)
    assert 50_000 < sum(p.numel() for p in PolicyNetwork(26).parameters()) < 150_000
    with pytest.raises(UserError, match="unknown feature 'nothing'"):
        PolicyNetwork(V + 1, features=("nothing",))


@pytest.mark.parametrize("name", OPTIONS)
def test_policy_trains_every_parameter_and_the_denoiser_behind_its_features(name: str) -> None:
    denoiser = transformer().requires_grad_(True)
    network = PolicyNetwork(V + 1, width=16, **OPTIONS[name])
    every_parameter_gets_gradient(network, network(state_of(ragged(), denoiser)))
    assert denoiser.embed.weight.grad is not None
    assert denoiser.embed.weight.grad.abs().sum() > 0


def test_policy_reads_what_the_denoiser_expects() -> None:
    """The feature `prediction` is sum_v p(v) e_v at masked positions: it tells two equally sure predictions apart."""

    class Sure(nn.Module):
        mask_index, vocab_size = MASK, V

        def __init__(self, token: int) -> None:
            super().__init__()
            self.logits = 3.0 * torch.nn.functional.one_hot(torch.tensor(token), V)

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            return self.logits.expand(*state.shape, V)

    torch.manual_seed(0)
    batch = ragged()
    for features, differs in ((("confidence", "margin", "entropy"), False), (("prediction",), True)):
        network = PolicyNetwork(V + 1, width=16, features=features)
        one, other = (network(state_of(batch, Sure(token))) for token in (1, 2))
        assert ((one - other).abs().max() > 1e-4) == differs
    with pytest.raises(UserError, match="prediction"):
        PolicyNetwork(V + 1, features=("prediction",), reads_tokens=False)


class Even(nn.Module):
    """Four equally likely tokens everywhere."""

    mask_index, vocab_size = MASK, V

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.zeros(*state.shape, V).masked_fill(torch.arange(V) >= 4, -torch.inf)


def test_chance_is_that_of_the_top_tokens_of_all_masked_positions() -> None:
    """One number per state, prod_{i masked} c_i: with four equal tokens and n positions masked it is n log(1 / 4)."""
    network = PolicyNetwork(V + 1, width=16, features=("chance",))
    state = state_of(ragged(), Even())
    column = network._numbers(state)[..., 0]
    expected = -state.masked.sum(-1, keepdim=True) * math.log(4) / 8
    torch.testing.assert_close(column, expected.expand_as(column))


def test_before_tells_equally_uncertain_positions_apart() -> None:
    """With four equal tokens everywhere the k-th masked position has k log 4 before it."""
    network = PolicyNetwork(V + 1, width=16, features=("before",))
    state = state_of(ragged(), Even())
    column = network._numbers(state)[..., 0]
    expected = (state.masked.cumsum(-1) - 1) * math.log(4) / 8
    torch.testing.assert_close(column[state.masked], expected[state.masked])


def test_policy_reads_the_price_of_each_sequence() -> None:
    """A sequence reads its own price only; a range without the feature, and the reverse, are refused."""
    torch.manual_seed(0)
    denoiser, prices = transformer(), PriceRange(0.1, 10.0)
    network = PolicyNetwork(V + 1, width=16, features=("confidence", "price"), prices=prices)
    state = state_of(ragged(), denoiser)
    spread = network(state)
    policy = LearnedPolicy(network)
    for row, price in enumerate(prices.spread(5, torch.device("cpu"))):
        one = network(state.replace(price=float(price)))
        torch.testing.assert_close(one[:, row], spread[:, row], atol=1e-5, rtol=0)
    assert (one[:, 0] - spread[:, 0]).abs().max() > 1e-4
    torch.testing.assert_close(AtPrice(policy, float(price))(state).probs[:, -1], policy(state).probs[:, -1])
    for options in ({"features": ("price",)}, {"prices": prices}):
        with pytest.raises(UserError, match="price"):
            PolicyNetwork(V + 1, **options)


def test_policy_without_features_does_not_call_the_denoiser() -> None:
    class Untouchable(nn.Module):
        mask_index, vocab_size = MASK, V

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            raise AssertionError("called")

    network = PolicyNetwork(V + 1, width=16, features=())
    assert network(state_of(ragged(), Untouchable())).isfinite().all()


@pytest.mark.parametrize("certain", [0.0, 40.0, 500.0])
def test_policy_features_stay_finite_at_any_confidence(certain: float) -> None:
    class Sure(nn.Module):
        """All mass on one token; MASK is inside the vocabulary and impossible."""

        mask_index, vocab_size = 0, V

        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(V))

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            logits = self.logits + certain * torch.nn.functional.one_hot(torch.tensor(2), V)
            return logits.expand(*state.shape, V)

    denoiser = Sure()
    network = PolicyNetwork(V, width=16, features=("confidence", "margin", "entropy", "chance", "before"))
    logits = network(state_of(ragged(), denoiser))
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert denoiser.logits.grad is not None
    assert denoiser.logits.grad.isfinite().all()


def test_rows_that_agree_are_worked_out_once() -> None:
    """Of many particles in the same state the backbone sees one, and all get its logits."""
    network = PolicyNetwork(V + 1, width=16, layers=1)
    batch = ragged()
    state = state_of(batch, transformer())
    masked, step = state.masked[:1].repeat(60, 1, 1), state.step[:1].repeat(60, 1)
    seen: list[int] = []
    network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    many = network(Path(batch, state.denoiser, 3).state(masked, step))
    assert seen == [len(batch)]
    torch.testing.assert_close(many, network(state)[:1].expand_as(many), atol=1e-5, rtol=0)
