"""Decoding with the output head at the positions that need it, and with prompts that are read once, against neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orderppl import Batch, Policy, UserError, decode, follow
from orderppl.decoding.decode import DecodeOutput
from orderppl.models import LearnedPolicy, PolicyNetwork
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.policies import Blocks, EntropyBound, EosAware, Factor, Klass, Ranked, Threshold
from orderppl.unmasking.denoiser import Reader, SplitDenoiser, TailDenoiser
from orderppl.unmasking.predictions import MaskedOnly, Window

VOCAB, MASK, SEPARATOR = 12, 11, 10
POLICIES: dict[str, Policy] = {
    "left_to_right": Ranked("left_to_right"),
    "random": Ranked("random", 1.5),
    "top_prob": Ranked("top_prob"),
    "margin": Ranked("margin", "cosine"),
    "entropy": Ranked("entropy"),
    "threshold": Threshold(0.3),
    "factor": Factor(2.5),
    "entropy_bound": EntropyBound(3.0),
    "klass": Klass(0.2, 0.05),
    "eos_aware": EosAware(Ranked("top_prob"), [0, 1, 2]),
    "block": Blocks(Ranked("margin"), 3),
    "learned": LearnedPolicy(PolicyNetwork(VOCAB, width=8, layers=1, heads=2)),
}


class Whole:
    """A denoiser that only scores whole sequences, as any foreign one does."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser, self.mask_index, self.vocab_size = denoiser, MASK, VOCAB

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.denoiser(state, attention_mask)
        return logits


class Passing:
    """A wrapper that hands on every attribute, as compiled modules do; what it does itself must not be left out."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser, self.calls = denoiser, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.denoiser, name)

    def __call__(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.denoiser(state, attention_mask)
        return logits


class Counting(TransformerDenoiser):
    """Counts the sequences through the backbone, the positions behind its last attention and through the head, and the
    prompts encoded.
    """

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(3)
        super().__init__(VOCAB, MASK, width=16, layers=2, heads=2, max_length=40, **options)
        nn.init.normal_(self.embed.weight)
        self.eval().double()
        self.forget()

    def forget(self) -> None:
        self.sequences, self.finished, self.positions, self.prompts = [], [], [], []

    def mixed_states(self, state: Tensor, attention_mask: Tensor, start: int, layout: Any = None) -> Tensor:
        self.sequences.append(len(state))
        return super().mixed_states(state, attention_mask, start, layout)

    def finish(self, mixed: Tensor) -> Tensor:
        self.finished.append(mixed[..., 0].numel())
        return super().finish(mixed)

    def output_logits(self, hidden: Tensor) -> Tensor:
        self.positions.append(hidden[..., 0].numel())
        return super().output_logits(hidden)

    def lay_out(self, state: Tensor, attention_mask: Tensor, start: int) -> Any:
        self.prompts.append(len(state))
        return super().lay_out(state, attention_mask, start)


LENGTHS = torch.tensor([7, 2, 9, 0])
PROMPT = 6  # columns


def problem(kind: str = "right") -> Batch:
    """Four prompts that end with a separator, padded on one side, and responses of four lengths.

    Or "given": the same with tokens given inside of the responses. Or "infilling": holes anywhere, and no separator.
    """
    generator = torch.Generator().manual_seed(1)
    prompt, prompt_mask = torch.zeros(4, PROMPT, dtype=torch.int64), torch.zeros(4, PROMPT, dtype=torch.bool)
    for row, size in enumerate((3, 6, 1, 4)):
        place = slice(PROMPT - size, PROMPT) if kind == "left" else slice(0, size)
        tokens = torch.randint(0, 10, (size,), generator=generator)
        tokens[-1] = SEPARATOR
        prompt[row, place], prompt_mask[row, place] = tokens, True
    attended = torch.cat([prompt_mask, torch.arange(9) < LENGTHS[:, None]], -1)
    tokens = torch.cat([prompt, torch.randint(0, 10, (4, 9), generator=generator)], -1)
    given = (torch.arange(15) < PROMPT).expand(4, 15)
    if kind == "given":
        given = given | ((torch.arange(15) > PROMPT) & (torch.rand(4, 15, generator=generator) < 0.4))
    if kind == "infilling":
        tokens = torch.where(tokens == SEPARATOR, 3, tokens)
        given = torch.rand(4, 15, generator=generator) < 0.5
    return Batch(torch.where(given | ~attended, tokens, MASK), attended, given)


def assert_same(first: DecodeOutput, second: DecodeOutput) -> None:
    for name in ("sequences", "nfe", "reveal_step", "fallback"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    torch.testing.assert_close(first.token_log_prob, second.token_log_prob)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("options", [{}, {"separator_index": SEPARATOR, "prompt_reads_response": False}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_results_are_those_of_whole_sequences(name: str, options: dict[str, Any], temperature: float):
    torch.manual_seed(0)
    denoiser = Counting(**options)
    for kind in ("left", "right", "given", "infilling"):
        batch = problem(kind)
        runs = [
            decode(each, POLICIES[name], batch, max_steps=4, temperature=temperature)
            for each in (denoiser, Whole(denoiser))
        ]
        assert_same(*runs)
        truth = replace(batch, tokens=runs[0].sequences)
        paths = [follow(POLICIES[name], each, truth, 4) for each in (denoiser, Whole(denoiser))]
        assert torch.equal(paths[0].reveal_step, paths[1].reveal_step)
        torch.testing.assert_close(paths[0].token_log_prob, paths[1].token_log_prob)


@pytest.mark.parametrize("kind", ["right", "given", "infilling"])
def test_the_head_runs_where_it_is_needed(kind: str):
    """Masked positions for policies that read the denoiser, revealed ones for others; never at given ones."""
    denoiser, batch = Counting(), problem(kind)
    for name, policy in POLICIES.items():
        denoiser.forget()
        out = decode(denoiser, policy, batch, max_steps=4)
        steps = range(int(out.nfe.max()))
        rows = [int((out.nfe > step).sum()) for step in steps]
        assert denoiser.sequences == rows, name
        masked = [int((out.reveal_step >= step).sum()) for step in steps]
        revealed = [int((out.reveal_step == step).sum()) for step in steps]
        if name in ("left_to_right", "random"):
            assert denoiser.positions == revealed
        else:  # the last step reveals all that is left, whoever decides
            assert denoiser.positions == masked, name
            assert sum(masked) < sum(rows) * batch.tokens.shape[1]
        assert denoiser.finished == denoiser.positions, name  # nor does what comes between attention and head


def test_prompts_are_read_once():
    denoiser = Counting(separator_index=SEPARATOR, prompt_reads_response=False)
    out = decode(denoiser, POLICIES["top_prob"], problem(), max_steps=4)
    assert denoiser.prompts == [3]  # the row without a response never asks
    assert denoiser.sequences == [int((out.nfe > step).sum()) for step in range(4)]
    whole = problem().tokens, problem().attention_mask, PROMPT
    assert denoiser.lay_out(*whole).past is not None
    assert Counting(separator_index=SEPARATOR).lay_out(*whole).past is None  # it reads the response
    several = problem()
    several.tokens[1, 2] = SEPARATOR
    assert denoiser.lay_out(several.tokens, *whole[1:]).past is None
    assert_same(
        decode(denoiser, POLICIES["entropy"], several, max_steps=3),
        decode(Whole(denoiser), POLICIES["entropy"], several, max_steps=3),
    )


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_prompt_that_does_not_read_its_response(positions: str):
    """Its hidden states do not depend on the response; responses behind the encoded prompt are as in whole rows."""
    denoiser = Counting(separator_index=SEPARATOR, prompt_reads_response=False, positions=positions, prompt_room=8)
    batch = problem("left")
    prompt, mask, attention = batch.tokens[:, :PROMPT], batch.attention_mask[:, :PROMPT], batch.attention_mask
    responses = [torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = [denoiser.hidden_states(torch.cat([prompt, tokens], -1), attention) for tokens in responses]
    torch.testing.assert_close(whole[0][:, :PROMPT][mask], whole[1][:, :PROMPT][mask])
    layout = denoiser.lay_out(batch.tokens, attention, PROMPT)
    for tokens, hidden in zip(responses, whole, strict=True):
        blank = torch.cat([0 * prompt, tokens], -1)  # the prompt is not read again
        behind = denoiser.finish(denoiser.mixed_states(blank, attention, PROMPT, layout))
        torch.testing.assert_close(behind[attention[:, PROMPT:]], hidden[:, PROMPT:][attention[:, PROMPT:]])
    open_prompt = Counting(separator_index=SEPARATOR, positions=positions, prompt_room=8)
    open_prompt.load_state_dict(denoiser.state_dict())
    read = [open_prompt.hidden_states(torch.cat([prompt, tokens], -1), attention) for tokens in responses]
    assert not torch.allclose(read[0][:, :PROMPT][mask], read[1][:, :PROMPT][mask])
    with pytest.raises(UserError, match="max_length"):
        denoiser.mixed_states(torch.zeros(4, 41, dtype=torch.int64), torch.ones(4, 41).bool(), PROMPT, layout)
    with pytest.raises(UserError, match="separator_index"):
        TransformerDenoiser(VOCAB, MASK, width=16, layers=1, heads=2, prompt_reads_response=False)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_block_leaves_the_prefix_out(positions: str, layers: int):
    """Hidden states, logits and gradients behind it are those of the whole rows; the last MLP sees no prompt."""
    torch.manual_seed(3)
    denoiser = TransformerDenoiser(
        VOCAB, MASK, width=16, layers=layers, heads=2, positions=positions, separator_index=SEPARATOR
    ).double()
    batch = problem()
    reader = Reader(denoiser, batch)
    assert reader.start == batch.prefix == PROMPT
    rows, attention = batch.tokens, batch.attention_mask
    torch.testing.assert_close(reader.read(rows), denoiser.hidden_states(rows, attention)[:, PROMPT:])
    seen: list[int] = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        for block in denoiser.backbone.blocks
    ]
    logits = reader.logits(reader.read(rows))
    assert seen == [15] * (layers - 1) + [9]
    for handle in handles:
        handle.remove()
    expected = denoiser(rows, attention)[:, PROMPT:]
    real = [index for index in range(logits.shape[-1]) if index != MASK]
    torch.testing.assert_close(logits[..., real], expected[..., real])
    parameters = list(denoiser.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(logits[..., real].square().sum(), parameters),
        torch.autograd.grad(expected[..., real].square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["left", "right", "given", "infilling"])
@pytest.mark.parametrize("options", [{}, {"positions": "learned"}, {"separator_index": 10}, {"layers": 1}])
@pytest.mark.parametrize("classes", [VOCAB, 70])
def test_places_that_are_asked_for_are_as_in_whole_rows(kind: str, options: dict[str, Any], classes: int):
    """Hidden states and logits of some masked positions, of all rows and of one, whatever else stands there."""
    torch.manual_seed(4)
    settings: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2} | options
    denoiser = TransformerDenoiser(classes, MASK, **settings).double().requires_grad_(False)
    masked = problem(kind).latent & (torch.rand(4, 15) < 0.7)
    for rows in (torch.arange(4), torch.tensor([2])):
        batch, hidden = problem(kind).rows(rows), masked[rows]
        tokens = torch.where(hidden, MASK, batch.tokens.masked_fill(batch.latent, 3))
        whole = denoiser.hidden_states(tokens, batch.attention_mask)
        packed = MaskedOnly(Reader(denoiser, batch), tokens, hidden, int(hidden.sum()))
        torch.testing.assert_close(packed.states, whole[hidden])
        some = hidden & (torch.rand(hidden.shape) < 0.5)
        fresh = MaskedOnly(Reader(denoiser, batch), tokens, hidden, int(hidden.sum()))
        places, logits = fresh.logits_of(some, int(some.sum()))
        assert torch.equal(places, some.flatten().nonzero()[:, 0])
        expected = denoiser.output_logits(whole[some])
        expected[:, MASK] = -torch.inf
        torch.testing.assert_close(logits, expected)


def test_a_wrapper_is_called_itself():
    """What a compiled or distributed module passes on is not what it runs."""
    denoiser = Passing(Counting())
    out = decode(denoiser, POLICIES["top_prob"], problem(), max_steps=4)
    assert denoiser.calls == 4
    assert_same(out, decode(denoiser.denoiser, POLICIES["top_prob"], problem(), max_steps=4))


def test_what_is_compiled_inside_of_a_denoiser_is_run():
    """Decoding calls the parts of a denoiser, and so what is compiled of them."""

    class Norm(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    denoiser, batch, graphs = Counting(separator_index=SEPARATOR), problem(), []
    denoiser.backbone.norm = Norm(16).double()
    eager = decode(denoiser, POLICIES["top_prob"], batch, max_steps=4)
    denoiser.backbone.norm.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert_same(decode(denoiser, POLICIES["top_prob"], batch, max_steps=4), eager)
    assert graphs


def test_a_changed_call_is_not_left_out():
    """A subclass that changes the call alone, and a hook on the call."""

    class Shifted(Counting):
        def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(state, attention_mask) + 5.0 * nn.functional.one_hot(state * 0 + 4, VOCAB)

    plain = decode(Counting(), POLICIES["top_prob"], problem(), max_steps=4)
    shifted = decode(Shifted(), POLICIES["top_prob"], problem(), max_steps=4)
    assert not torch.equal(plain.sequences, shifted.sequences)

    class Blank(Counting):
        def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
            return 0 * super().hidden_states(state, attention_mask)

    blank = Blank(separator_index=SEPARATOR, prompt_reads_response=False)
    decode(blank, POLICIES["top_prob"], problem(), max_steps=4)
    assert blank.prompts == []
    assert not Reader(blank, problem()).read(problem().tokens).any()
    calls: list[int] = []
    counted = Counting()
    counted.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    decode(counted, POLICIES["top_prob"], problem(), max_steps=4)
    assert len(calls) == 4


@pytest.mark.parametrize("kind", ["right", "given", "infilling"])
def test_packed_numbers_are_those_of_the_masked_positions(monkeypatch: pytest.MonkeyPatch, kind: str):
    """Logits, log-probabilities and numbers per position, in chunks of any size."""
    denoiser, batch = Counting(), problem(kind)
    for protocol in (SplitDenoiser, TailDenoiser):
        assert isinstance(denoiser, protocol)
    masked = batch.latent & (torch.rand(4, 15, generator=torch.Generator().manual_seed(2)) < 0.6)
    tokens = torch.where(masked, MASK, batch.tokens.masked_fill(batch.latent, 3))
    reader, count = Reader(denoiser, batch), int(masked.sum())
    whole = Window(reader, tokens)
    everywhere = torch.cat([torch.zeros(4, reader.start, VOCAB).double(), reader.logits(whole.states)], 1)
    truth = torch.randint(0, 10, (4, 15), generator=torch.Generator().manual_seed(5))
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda log_probs: log_probs.amax(-1),
        lambda log_probs: log_probs,
        lambda log_probs: log_probs.topk(2, -1).indices,
    ]
    for chunk in (1, 30, 10**6):
        monkeypatch.setattr("orderppl.unmasking.predictions._CHUNK", chunk)
        packed = MaskedOnly(reader, tokens, masked, count)
        assert torch.isneginf(packed.logits[:, MASK]).all()
        for function in functions:
            found, wanted = packed.per_position(function), whole.per_position(function)
            torch.testing.assert_close(found[masked], wanted[masked])
            assert not found[~masked].any()
        inside = packed.hidden(lambda hidden: hidden[..., :3])
        torch.testing.assert_close(inside[masked], whole.hidden(lambda hidden: hidden[..., :3])[masked])
        for temperature in (1.0, 0.3):
            scored = packed.token_log_prob(truth, temperature)
            torch.testing.assert_close(scored[masked], whole.token_log_prob(truth, temperature)[masked])
        for some in (masked & (torch.arange(masked.numel()).view_as(masked) % 2 == 0), masked):
            places, logits = packed.logits_of(some, int(some.sum()))
            assert places.tolist() == some.flatten().nonzero()[:, 0].tolist()
            torch.testing.assert_close(logits, everywhere.flatten(0, 1)[places])
    fresh = MaskedOnly(reader, tokens, masked, count)
    places, logits = fresh.logits_of(some, int(some.sum()))
    torch.testing.assert_close(logits, everywhere.flatten(0, 1)[places])
    assert "logits" not in vars(fresh)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_looked_up_in_parts_where_all_logits_would_be_too_many(
    whole: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, and never more logits at a time; a denoiser that is trained keeps all of them."""
    denoiser = Counting()
    tokens = torch.randint(0, 9, (3, 2, 7))
    batch = Batch(tokens[0], given=(torch.arange(7) < 2).expand(2, 7))
    reader = Reader(Whole(denoiser) if whole else denoiser, batch)
    once = Window(reader, tokens.masked_fill(tokens > 4, MASK)).token_log_prob(batch.tokens, temperature)
    monkeypatch.setattr("orderppl.unmasking.predictions._AT_ONCE", 4 * VOCAB)
    for trained in (False, True):
        denoiser.requires_grad_(trained)
        denoiser.forget()
        window = Window(reader, tokens.masked_fill(tokens > 4, MASK))
        torch.testing.assert_close(window.token_log_prob(batch.tokens, temperature).detach(), once.detach())
        assert ("logits" in window.__dict__) == trained
        assert whole or (max(denoiser.positions) <= 4) != trained


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_canvas_that_is_too_long_is_refused(positions: str, reads: bool):
    """In words, also where positions are looked up before anything is read."""
    options = {"separator_index": SEPARATOR, "prompt_room": 8, "positions": positions, "prompt_reads_response": reads}
    denoiser = Counting(**options)
    tokens = torch.full((1, 41), MASK)
    tokens[0, 0] = SEPARATOR
    with pytest.raises(UserError, match="a canvas of 41 tokens exceeds 40"):
        decode(denoiser, POLICIES["top_prob"], Batch(tokens, given=tokens != MASK), max_steps=2)
