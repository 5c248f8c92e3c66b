import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance, track_provenance
from torch import Tensor, nn

from orderppl.decoding import decode
from orderppl.denoising import Canvas
from orderppl.distributions import SequentialReveal
from orderppl.errors import UserError
from orderppl.models import EasyFirst, PriceRange, ResidualPolicy
from orderppl.models.denoisers.markov_chain import MarkovChainDenoiser
from orderppl.models.denoisers.transformer import TransformerDenoiser
from orderppl.models.networks import (
    Backbone,
    Neighbours,
    PolicyNetwork,
    PositionTable,
    SequenceEncoder,
    attended_positions,
)
from orderppl.path import RevealPath
from orderppl.states import UnmaskingState, partial_state

V, MASK = 7, 7


def ragged(rows: int = 5, context: int = 6, length: int = 8) -> dict[str, Tensor]:
    """Rows of every length, the last one with an empty response."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([length, 5, 3, 1, 0])[:rows]
    prompts = torch.tensor([2, context, 4, 1, 3])[:rows]
    return {
        "tokens": torch.randint(0, V, (rows, length), generator=generator),
        "attention_mask": torch.arange(length) < sizes[:, None],
        "context": torch.randint(0, V, (rows, context), generator=generator),
        "context_mask": torch.arange(context) < prompts[:, None],
    }


def without_padding(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row alone, cut to its own lengths."""
    return {
        name: tensor[row][batch["attention_mask" if name in ("tokens", "attention_mask") else "context_mask"][row]][
            None
        ]
        for name, tensor in batch.items()
    }


def with_other_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with more padding on both sides of the boundary, and other ids under the padding."""
    new = {}
    for tokens, mask in (("tokens", "attention_mask"), ("context", "context_mask")):
        padded = torch.where(batch[mask], batch[tokens], (batch[tokens] + 3) % V)
        new[tokens] = torch.nn.functional.pad(padded, (0, 4), value=1)
        new[mask] = torch.nn.functional.pad(batch[mask], (0, 4))
    return new


def every_parameter_gets_gradient(module: nn.Module, output: Tensor) -> None:
    module.zero_grad()
    (output * torch.randn_like(output)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


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
def test_backbone_refuses_bad_sizes(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as caught:
        Backbone(**{"width": 16, "layers": 1, "heads": 4, **arguments})
    assert caught.value.field == field


def test_learned_positions_refuse_a_longer_canvas() -> None:
    backbone = Backbone(16, 1, 4, positions="learned", max_length=4)
    with pytest.raises(UserError, match="a canvas of 5 exceeds the 4 learned positions"):
        backbone(torch.randn(1, 5, 16), torch.ones(1, 5, dtype=torch.bool))


Network = Callable[..., Tensor]


@pytest.fixture(params=["encoder", "learned", "table", "split"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == "encoder":
        return SequenceEncoder(V, 3, width=16, layers=2)
    if request.param == "learned":
        return SequenceEncoder(V, 3, width=16, layers=1, positions="learned", max_length=40)
    return PositionTable(8, 3, split=2 if request.param == "split" else None, noise=1.0)


@pytest.mark.parametrize("blind", [False, True])
def test_sequence_networks_ignore_padding(network: nn.Module, blind: bool) -> None:
    batch = ragged()

    def run(rows: dict[str, Tensor]) -> Tensor:
        return network(**(rows | {"tokens": None} if blind else rows))

    full, other = run(batch), run(with_other_padding(batch))
    assert full.shape == (5, 8, 3)
    mask = batch["attention_mask"]
    torch.testing.assert_close(full[mask], other[:, :8][mask], atol=1e-5, rtol=0)
    for row in range(4):
        alone = run(without_padding(batch, row))
        torch.testing.assert_close(full[row][mask[row]], alone[0], atol=1e-5, rtol=0)
    assert full.isfinite().all()


def test_encoder_reads_what_it_may_and_nothing_else() -> None:
    network = SequenceEncoder(V, 2, width=16, layers=1)
    batch = ragged()
    changed = batch | {"tokens": (batch["tokens"] + 1) % V}
    prompted = batch | {"context": (batch["context"] + 1) % V}
    mask = batch["attention_mask"]
    assert (network(**batch) - network(**changed))[mask].abs().max() > 1e-4
    assert (network(**batch) - network(**prompted))[mask].abs().max() > 1e-4
    blind = network(None, mask, batch["context"], batch["context_mask"])
    assert torch.equal(blind, network(None, mask, batch["context"], batch["context_mask"]))
    assert (blind - network(None, mask, prompted["context"], batch["context_mask"]))[mask].abs().max() > 1e-4
    # positions are told apart even when nothing is seen
    alone = network(None, torch.ones(1, 5, dtype=torch.bool))
    assert torch.pdist(alone[0]).min() > 1e-3


def test_encoder_can_start_at_zero_and_trains_every_parameter() -> None:
    assert SequenceEncoder(V, 2, width=16, zero_init=True)(**ragged()).abs().max() == 0
    network = SequenceEncoder(V, 2, width=16)
    batch = ragged()
    every_parameter_gets_gradient(network, network(**batch) + network(**(batch | {"tokens": None})))


def test_table_aligns_rows_at_both_ends() -> None:
    table = PositionTable(6, 1, split=2)
    with torch.no_grad():
        table.logits[:] = torch.arange(6.0)[:, None]
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    out = table(None, mask)[..., 0]
    assert out[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert out[1, :4].tolist() == [0, 1, 4, 5]
    assert out[2, :2].tolist() == [0, 1]
    left_padded = torch.tensor([[False, False, True, True, True, True]])
    assert table(None, left_padded)[0, 2:, 0].tolist() == [0, 1, 4, 5]


def test_periodic_table_repeats_for_rows_of_any_length() -> None:
    table = PositionTable(3, 2, periodic=True)
    table.set_steps(torch.tensor([1, 0, 1]))
    mask = torch.tensor([[True] * 7, [False, True, True, True, True, False, False]])
    steps = table(None, mask).argmax(-1)
    assert steps[0].tolist() == [1, 0, 1, 1, 0, 1, 1]
    assert steps[1, 1:5].tolist() == [1, 0, 1, 1]
    assert PositionTable(**table.config).index(mask).tolist() == table.index(mask).tolist()
    with pytest.raises(UserError, match="no right end"):
        PositionTable(3, 2, split=1, periodic=True)


def test_table_refuses_longer_rows_but_not_wider_padding() -> None:
    table = PositionTable(4, 2)
    mask = torch.arange(7) < torch.tensor([[4], [2]])
    assert table(None, mask).shape == (2, 7, 2)
    with pytest.raises(UserError, match="a row of 5 tokens exceeds the table of 4 positions"):
        table(None, torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(UserError, match="split"):
        PositionTable(4, 2, split=5)


def state_of(batch: dict[str, Tensor], denoiser: nn.Module, mask_index: int, steps: int = 3) -> UnmaskingState:
    """Two stacked states of every row, with different parts masked."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, *batch["tokens"].shape)
    masked = (torch.rand(shape, generator=generator) < 0.6) & batch["attention_mask"]
    canvas = Canvas(denoiser, batch["attention_mask"], batch.get("context"), batch.get("context_mask"))
    step = torch.arange(2)[:, None].expand(2, shape[1])
    return UnmaskingState(partial_state(batch["tokens"], masked, mask_index), masked, step, steps, canvas)


def cut(state: UnmaskingState, batch: dict[str, Tensor], row: int) -> UnmaskingState:
    alone = without_padding(batch, row)
    n = alone["tokens"].shape[1]
    canvas = Canvas(state.canvas.denoiser, alone["attention_mask"], alone["context"], alone["context_mask"])
    rows = slice(row, row + 1)
    return UnmaskingState(
        state.tokens[:, rows, :n], state.masked[:, rows, :n], state.step[:, rows], state.num_steps, canvas
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reads_tokens": False},
        {"features": ("prediction", "margin")},
        {"features": ("before", "chance")},
        {"features": ("confidence", "hidden"), "hidden": 16},
        {"places": 8},
        {"kernel": 3},
    ],
    ids=["tokens", "blind", "expected", "sums", "hidden", "places", "kernel"],
)
def test_policy_ignores_padding_and_other_rows(options: dict[str, Any]) -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1).requires_grad_(False)
    network = PolicyNetwork(V + 1, width=16, layers=2, **options)
    batch = ragged()
    state = state_of(batch, denoiser, MASK)
    logits = network(state)
    assert logits.shape == (2, 5, 8)
    assert logits.isfinite().all()
    for row in range(4):
        alone = network(cut(state, batch, row))
        mask = batch["attention_mask"][row]
        torch.testing.assert_close(logits[:, row][:, mask], alone[:, 0], atol=1e-5, rtol=0)


def test_policy_learns_about_the_places_that_rows_have() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1).requires_grad_(False)
    network = PolicyNetwork(V + 1, width=16, layers=1, places=8)
    batch = {name: tensor[1:2] for name, tensor in ragged().items()}  # 5 of 8 positions
    logits = network(state_of(batch, denoiser, MASK))
    logits[:, batch["attention_mask"]].sum().backward()
    assert network.embed_place is not None
    touched = network.embed_place.weight.grad.ne(0).any(-1)
    assert touched.tolist() == [True] * 5 + [False] * 3


def test_convolutions_see_the_neighbours_and_nothing_beyond() -> None:
    """Two layers of three positions each: what stands up to two places away, padding being zero."""
    network = Neighbours(width=4, kernel=3)
    hidden, attended = torch.randn(1, 8, 4, requires_grad=True), torch.ones(1, 8, dtype=torch.bool)
    attended[0, 6:] = False
    network(hidden, attended)[0, 3].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.ne(0).any(-1)[0].tolist() == [False, True, True, True, True, True, False, False]
    torch.testing.assert_close(network(hidden, attended)[:, :6], network(hidden[:, :6], attended[:, :6]))


@pytest.mark.parametrize("features", [("confidence",), ("prediction",), ("before",), ("chance",), ("hidden",)])
def test_policy_never_sees_hidden_tokens(features: tuple[str, ...]) -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1)
    network = PolicyNetwork(V + 1, width=16, features=features, hidden=16 if "hidden" in features else None)
    batch = ragged()
    state = state_of(batch, denoiser, MASK)
    # every hidden token replaced: the partial states stay the same, and so must the logits
    tokens = torch.where(state.masked, (batch["tokens"] + 1) % V, batch["tokens"])
    other = UnmaskingState(partial_state(tokens, state.masked, MASK), state.masked, state.step, 3, state.canvas)
    assert torch.equal(network(state), network(other))
    revealed = UnmaskingState(
        torch.where(state.masked, MASK, (batch["tokens"] + 1) % V), state.masked, state.step, 3, state.canvas
    )
    assert (network(state) - network(revealed)).abs().max() > 1e-4


@pytest.mark.parametrize("features", [("hidden",), ("confidence", "hidden")])
@pytest.mark.parametrize("kind", ["split", "whole"])
def test_a_policy_that_reads_hidden_states_calls_the_denoiser_once(kind: str, features: tuple[str, ...]) -> None:
    """With logits that are those of the denoiser; where it offers no head by itself, its logits are what is read."""
    torch.manual_seed(0)
    calls: list[int] = []

    class Counting(TransformerDenoiser):
        def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            calls.append(len(state))
            return super().hidden_states(state, attention_mask)

    inner = Counting(V, MASK, width=16, layers=1).requires_grad_(False)
    denoiser = inner if kind == "split" else Whole(inner)
    network = PolicyNetwork(V + 1, width=16, features=features, hidden=16 if kind == "split" else V)
    policy = ResidualPolicy(EasyFirst(), network)
    state, fresh = (state_of(ragged(), denoiser, MASK) for _ in range(2))
    assert policy.logits(state).isfinite().all()
    assert len(calls) == 1
    torch.testing.assert_close(state.log_probs, fresh.log_probs)
    torch.testing.assert_close(policy.logits(fresh), policy.logits(state))  # logits first: a call more, nothing else
    part = state.part(1)
    torch.testing.assert_close(policy.logits(part), policy.logits(state)[1])
    wrong = PolicyNetwork(V + 1, width=16, features=features, hidden=5)
    with pytest.raises(UserError, match="^hidden: "):
        wrong(state)


class Whole(nn.Module):
    """A denoiser that offers no more than its logits."""

    mask_index, vocab_size = MASK, V

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.inner(state, attention_mask)
        return logits


def test_hidden_states_are_the_same_along_an_order_and_in_the_decoder() -> None:
    """Followed step by step, in the stack of an order and while decoding; and their size and name need each other."""
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1).requires_grad_(False)
    batch = ragged()
    network = PolicyNetwork(V + 1, width=16, features=("confidence", "hidden"), hidden=16)
    policy = ResidualPolicy(EasyFirst(0.5), network)
    canvas = Canvas(denoiser, batch["attention_mask"], batch.get("context"), batch.get("context_mask"))
    drawn = SequentialReveal(RevealPath(canvas, batch["tokens"], 3), policy.distribution)
    order = drawn.sample(torch.Size([4]))
    afresh = SequentialReveal(RevealPath(canvas, batch["tokens"], 3), policy.distribution).log_prob(order.clone())
    torch.testing.assert_close(drawn.log_prob(order), afresh)
    path = RevealPath(canvas, batch["tokens"], 3)
    stacked = path(order.clone())
    torch.testing.assert_close(canvas.scores(stacked.hidden.clone()), stacked.logits)
    outputs = []
    for rows in (slice(None), slice(2, 3)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        context = {name: part[name] for name in ("context", "context_mask") if name in part}
        outputs.append(decode(denoiser, policy, **context, length=part["attention_mask"].sum(-1), max_steps=3))
    length = int(batch["attention_mask"][2].sum())
    assert torch.equal(outputs[0].reveal_step[2, :length], outputs[1].reveal_step[0, :length])
    for options in ({"features": ("hidden",)}, {"hidden": 16}):
        with pytest.raises(UserError, match="^features: "):
            PolicyNetwork(V + 1, width=16, **options)


def test_posterior_sees_hidden_tokens_of_its_own_row_only() -> None:
    """One network for both places: with `sees_truth` hidden tokens count, whatever stands at padding does not."""
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1).requires_grad_(False)
    batch = ragged()
    state = state_of(batch, denoiser, MASK)
    for options in ({}, {"features": ()}, {"features": ("likelihood",), "reads_tokens": False}):
        network = PolicyNetwork(V + 1, width=16, sees_truth=True, **options)
        logits = network(state, batch["tokens"])
        changed = batch["tokens"].clone()
        changed[0] = (changed[0] + 1) % V
        other = network(state, changed)
        assert (logits[:, 0] - other[:, 0]).abs().max() > 1e-4
        assert torch.equal(logits[:, 1:], other[:, 1:])
        padding = torch.where(batch["attention_mask"], batch["tokens"], 10_000)
        assert torch.equal(network(state, padding), logits)
        for row in range(4):
            alone = network(cut(state, batch, row), without_padding(batch, row)["tokens"])
            mask = batch["attention_mask"][row]
            torch.testing.assert_close(logits[:, row][:, mask], alone[:, 0], atol=1e-5, rtol=0)
        every_parameter_gets_gradient(network, logits)


def test_a_network_sees_the_truth_only_where_it_was_built_to() -> None:
    denoiser = MarkovChainDenoiser(V, 0.8, 20)
    batch = ragged()
    state = state_of(batch, denoiser, V)
    with pytest.raises(ValueError, match="^tokens: "):
        PolicyNetwork(V + 1, width=16)(state, batch["tokens"])
    with pytest.raises(ValueError, match="^tokens: "):
        PolicyNetwork(V + 1, width=16, sees_truth=True)(state)
    with pytest.raises(UserError, match="unknown feature 'likelihood'"):
        PolicyNetwork(V + 1, features=("likelihood",))


def test_policy_starts_at_its_bias_or_at_zero_and_has_the_size_it_says() -> None:
    denoiser = MarkovChainDenoiser(V, 0.8, 20)
    state = state_of(ragged(), denoiser, V)
    assert PolicyNetwork(V + 1, zero_init=True)(state).abs().max() == 0
    assert PolicyNetwork(V + 1)(state).mean().item() == pytest.approx(-2.0, abs=0.5)
    assert 50_000 < sum(p.numel() for p in PolicyNetwork(26).parameters()) < 150_000
    with pytest.raises(UserError, match="unknown feature 'nothing'"):
        PolicyNetwork(V + 1, features=("nothing",))


def test_policy_trains_every_parameter_and_the_denoiser_behind_its_features() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1)
    network = PolicyNetwork(V + 1, width=16)
    state = state_of(ragged(), denoiser, MASK)
    every_parameter_gets_gradient(network, network(state))
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
        one, other = (network(state_of(batch, Sure(token), MASK)) for token in (1, 2))
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
    state = state_of(ragged(), Even(), MASK)
    column = network._describe(state.masked, state.steps_left, 3, state.log_probs, None)[..., 0]
    expected = -state.masked.sum(-1, keepdim=True) * math.log(4) / 8
    torch.testing.assert_close(column, expected.expand_as(column))


def test_before_tells_equally_uncertain_positions_apart() -> None:
    """With four equal tokens everywhere the k-th masked position has k log 4 before it."""
    network = PolicyNetwork(V + 1, width=16, features=("before",))
    state = state_of(ragged(), Even(), MASK)
    column = network._describe(state.masked, state.steps_left, 3, state.log_probs, None)[..., 0]
    expected = (state.masked.cumsum(-1) - 1) * math.log(4) / 8
    torch.testing.assert_close(column[state.masked], expected[state.masked])


def test_policy_reads_the_price_of_each_sequence() -> None:
    """A sequence reads its own price only; a range without the feature, and the reverse, are refused."""
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1).requires_grad_(False)
    prices = PriceRange(0.1, 10.0)
    network = PolicyNetwork(V + 1, width=16, features=("confidence", "price"), prices=prices)
    batch = ragged()
    state = state_of(batch, denoiser, MASK)
    spread = network(state)
    for row, price in enumerate(prices.prices(5, torch.device("cpu"))[:4]):
        prices.chosen = float(price)
        torch.testing.assert_close(network(state)[:, row], spread[:, row], atol=1e-5, rtol=0)
    assert (network(state)[:, 0] - spread[:, 0]).abs().max() > 1e-4
    for options in ({"features": ("price",)}, {"prices": prices}):
        with pytest.raises(UserError, match="price"):
            PolicyNetwork(V + 1, **options)


def test_policy_without_features_does_not_call_the_denoiser() -> None:
    class Untouchable(nn.Module):
        mask_index, vocab_size = MASK, V

        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            raise AssertionError("called")

    network = PolicyNetwork(V + 1, width=16, features=())
    assert network(state_of(ragged(), Untouchable(), MASK)).isfinite().all()


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
    network = PolicyNetwork(V, width=16, features=("confidence", "margin", "entropy", "chance"))
    logits = network(state_of(ragged(), denoiser, 0))
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert denoiser.logits.grad is not None
    assert denoiser.logits.grad.isfinite().all()


def test_policy_carries_provenance_and_gradients_through_its_boundary() -> None:
    denoiser = TransformerDenoiser(V, MASK, width=16, layers=1)
    network = PolicyNetwork(V + 1, width=16)
    state = state_of(ragged(), denoiser, MASK)
    plain = network(state)
    tracked = UnmaskingState(
        track_provenance(state.tokens, frozenset({"reveal_step"})),
        track_provenance(state.masked, frozenset({"reveal_step"})),
        state.step,
        3,
        state.canvas,
    )
    logits = network(tracked)
    assert isinstance(logits, ProvenanceTensor)
    assert get_provenance(logits) == frozenset({"reveal_step"})
    assert torch.equal(detach_provenance(logits), plain)
    detach_provenance(logits.sum()).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert denoiser.bias.grad is not None
