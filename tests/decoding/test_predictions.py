"""Decoding with the output head at the positions that need it, and with prompts that are read once, against neither."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orderppl.decoding import EosAware, StochasticDecision, decode, follow, make_policy
from orderppl.decoding.predictions import DecodingState, Predictions
from orderppl.denoising import Canvas, PromptDenoiser, SplitDenoiser, TailDenoiser
from orderppl.errors import UserError
from orderppl.models import LearnedPolicy
from orderppl.models.denoisers import TransformerDenoiser
from orderppl.models.networks import PolicyNetwork
from orderppl.states import UnmaskingState

VOCAB, MASK, SEPARATOR = 12, 11, 10
POLICIES = {
    "left_to_right": make_policy("left_to_right"),
    "random": make_policy("random", sizes=1.5),
    "top_prob": make_policy("top_prob"),
    "margin": make_policy("margin", sizes="cosine"),
    "entropy": make_policy("entropy"),
    "threshold": make_policy("threshold", tau=0.3),
    "factor": make_policy("factor", factor=2.5),
    "entropy_bound": make_policy("entropy_bound", gamma=3.0),
    "klass": make_policy("klass", tau=0.2, eps=0.05),
    "eos_aware": EosAware(make_policy("top_prob"), [0, 1, 2]),
    "block": make_policy("block", policy="margin", size=3),
    "learned": StochasticDecision(LearnedPolicy(PolicyNetwork(VOCAB, width=8, layers=1, heads=2)), "sample"),
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
    """Counts the sequences through the backbone, the positions through the head, and the prompts encoded."""

    def __init__(self, **options: object) -> None:
        torch.manual_seed(3)
        super().__init__(VOCAB, MASK, width=16, layers=2, heads=2, max_length=40, **options)  # type: ignore[arg-type]
        nn.init.normal_(self.embed.weight)
        self.eval().double()
        self.forget()

    def forget(self) -> None:
        self.sequences, self.positions, self.prompts = [], [], []

    def hidden_states(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        self.sequences.append(len(state))
        return super().hidden_states(state, attention_mask)

    def tail_states(self, state: Tensor, attention_mask: Tensor, start: int) -> Tensor:
        self.sequences.append(len(state))
        return super().tail_states(state, attention_mask, start)

    def response_states(self, tokens: Tensor, attention_mask: Tensor, prompt: Tensor, context_mask: Tensor) -> Tensor:
        self.sequences.append(len(tokens))
        return super().response_states(tokens, attention_mask, prompt, context_mask)

    def output_logits(self, hidden: Tensor) -> Tensor:
        self.positions.append(hidden[..., 0].numel())
        return super().output_logits(hidden)

    def encode_prompt(self, context: Tensor, context_mask: Tensor) -> Tensor | None:
        self.prompts.append(len(context))
        return super().encode_prompt(context, context_mask)


def problem(left: bool = False) -> dict[str, Tensor]:
    """Four prompts that end with a separator, padded on one side, and responses of four lengths."""
    generator = torch.Generator().manual_seed(1)
    context, context_mask = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.bool)
    for row, size in enumerate((3, 6, 1, 4)):
        place = slice(6 - size, 6) if left else slice(0, size)
        prompt = torch.randint(0, 10, (size,), generator=generator)
        prompt[-1] = SEPARATOR
        context[row, place], context_mask[row, place] = prompt, True
    return {"context": context, "context_mask": context_mask, "length": torch.tensor([7, 2, 9, 0])}


def assert_same(first, second) -> None:
    for name in ("sequences", "nfe", "reveal_step", "fallback"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    torch.testing.assert_close(first.token_log_prob, second.token_log_prob)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("options", [{}, {"separator_index": SEPARATOR, "prompt_reads_response": False}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_results_are_those_of_whole_sequences(name, options, temperature):
    torch.manual_seed(0)
    denoiser = Counting(**options)
    for left in (False, True):
        runs = [
            decode(each, POLICIES[name], **problem(left), max_steps=4, temperature=temperature)
            for each in (denoiser, Whole(denoiser))
        ]
        assert_same(*runs)
        canvas = Canvas(denoiser, runs[0].attention_mask, problem(left)["context"], problem(left)["context_mask"])
        whole = Canvas(Whole(denoiser), canvas.attention_mask, canvas.context, canvas.context_mask)
        paths = [follow(POLICIES[name], each, runs[0].sequences, 4) for each in (canvas, whole)]
        assert torch.equal(paths[0].reveal_step, paths[1].reveal_step)
        torch.testing.assert_close(paths[0].token_log_prob, paths[1].token_log_prob)


def test_the_head_runs_where_it_is_needed():
    """Masked positions for policies that rank by the denoiser, revealed ones for others, all for learned networks."""
    denoiser = Counting()
    lengths = problem()["length"]
    for name, policy in POLICIES.items():
        denoiser.forget()
        out = decode(denoiser, policy, **problem(), max_steps=4)
        steps = range(int(out.nfe.max()))
        rows = [int((out.nfe > step).sum()) for step in steps]
        assert denoiser.sequences == rows, name
        masked = [int((out.reveal_step >= step).sum()) for step in steps]
        revealed = [int((out.reveal_step == step).sum()) for step in steps]
        if name in ("left_to_right", "random"):
            assert denoiser.positions == revealed
        elif name == "learned":  # its network sees what the denoiser thinks of visible positions, too
            assert denoiser.positions[0] == rows[0] * int(lengths.max())
        else:  # the last step reveals all that is left, whoever decides
            assert denoiser.positions == masked, name
            assert sum(masked) < sum(rows) * int(lengths.max())


def test_prompts_are_read_once():
    denoiser = Counting(separator_index=SEPARATOR, prompt_reads_response=False)
    out = decode(denoiser, POLICIES["top_prob"], **problem(), max_steps=4)
    assert denoiser.prompts == [3]  # the row without a response never asks
    assert denoiser.sequences == [int((out.nfe > step).sum()) for step in range(4)]
    assert Counting(separator_index=SEPARATOR).encode_prompt(**_prompt(problem())) is None  # it reads the response
    several = problem()
    several["context"][1, 2] = SEPARATOR
    assert denoiser.encode_prompt(**_prompt(several)) is None
    assert_same(
        decode(denoiser, POLICIES["entropy"], **several, max_steps=3),
        decode(Whole(denoiser), POLICIES["entropy"], **several, max_steps=3),
    )


def _prompt(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"context": batch["context"], "context_mask": batch["context_mask"]}


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_prompt_that_does_not_read_its_response(positions):
    """Its hidden states do not depend on the response; responses behind the encoded prompt are as in whole rows."""
    denoiser = Counting(separator_index=SEPARATOR, prompt_reads_response=False, positions=positions, prompt_room=8)
    batch = problem(left=True)
    context, mask = batch["context"], batch["context_mask"]
    attention = torch.cat([mask, torch.arange(9) < batch["length"][:, None]], -1)
    responses = [torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = [denoiser.hidden_states(torch.cat([context, tokens], -1), attention) for tokens in responses]
    torch.testing.assert_close(whole[0][:, :6][mask], whole[1][:, :6][mask])
    prompt = denoiser.encode_prompt(context, mask)
    for tokens, hidden in zip(responses, whole, strict=True):
        behind = denoiser.response_states(tokens, attention[:, 6:], prompt, mask)
        torch.testing.assert_close(behind[attention[:, 6:]], hidden[:, 6:][attention[:, 6:]])
    open_prompt = Counting(separator_index=SEPARATOR, positions=positions, prompt_room=8)
    open_prompt.load_state_dict(denoiser.state_dict())
    read = [open_prompt.hidden_states(torch.cat([context, tokens], -1), attention) for tokens in responses]
    assert not torch.allclose(read[0][:, :6][mask], read[1][:, :6][mask])
    with pytest.raises(UserError, match="max_length"):
        denoiser.response_states(torch.zeros(4, 35, dtype=torch.int64), torch.ones(4, 35).bool(), prompt, mask)
    with pytest.raises(UserError, match="separator_index"):
        TransformerDenoiser(VOCAB, MASK, width=16, layers=1, heads=2, prompt_reads_response=False)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_block_leaves_the_prompt_out(positions, layers):
    """Hidden states, logits and gradients at the responses are those of the whole rows; the MLP sees no prompt."""
    torch.manual_seed(3)
    denoiser = TransformerDenoiser(
        VOCAB, MASK, width=16, layers=layers, heads=2, positions=positions, separator_index=SEPARATOR
    ).double()
    batch = problem()
    attended = torch.arange(9) < batch["length"][:, None]
    canvas = Canvas(denoiser, attended, batch["context"], batch["context_mask"])
    tokens = torch.randint(0, VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    rows, attention = torch.cat([batch["context"], tokens], -1), torch.cat([batch["context_mask"], attended], -1)
    whole = denoiser.hidden_states(rows, attention)[:, 6:]
    torch.testing.assert_close(canvas.hidden(tokens), whole)
    torch.testing.assert_close(canvas.hidden_states(tokens), whole)
    seen = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
        for block in denoiser.backbone.blocks
    ]
    logits = canvas.logits(tokens)
    assert seen == [15] * (layers - 1) + [9]
    for handle in handles:
        handle.remove()
    expected = denoiser(rows, attention)[:, 6:]
    real = [index for index in range(logits.shape[-1]) if index != MASK]
    torch.testing.assert_close(logits[..., real], expected[..., real])
    parameters = list(denoiser.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(logits[..., real].square().sum(), parameters),
        torch.autograd.grad(expected[..., real].square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_wrapper_is_called_itself():
    """What a compiled or distributed module passes on is not what it runs."""
    denoiser = Passing(Counting())
    out = decode(denoiser, POLICIES["top_prob"], **problem(), max_steps=4)
    assert denoiser.calls == 4
    assert_same(out, decode(denoiser.denoiser, POLICIES["top_prob"], **problem(), max_steps=4))


def test_a_compiled_call_is_not_left_out():
    """`Module.compile` leaves the class as it is; a fit goes through what it compiled."""
    denoiser, batch, graphs = Counting(separator_index=SEPARATOR), problem(), []
    attended = torch.arange(9) < batch["length"][:, None]
    tokens = torch.where(attended, MASK, 0)
    eager = Canvas(denoiser, attended, batch["context"], batch["context_mask"]).logits(tokens)
    denoiser.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    again = Canvas(denoiser, attended, batch["context"], batch["context_mask"]).logits(tokens)
    assert graphs
    torch.testing.assert_close(again, eager)


def test_a_changed_call_is_not_left_out():
    """A subclass that changes the call alone, and a hook on the call."""

    class Shifted(Counting):
        def forward(self, state, attention_mask):
            return super().forward(state, attention_mask) + 5.0 * torch.nn.functional.one_hot(state * 0 + 4, VOCAB)

    plain = decode(Counting(), POLICIES["top_prob"], **problem(), max_steps=4)
    shifted = decode(Shifted(), POLICIES["top_prob"], **problem(), max_steps=4)
    assert not torch.equal(plain.sequences, shifted.sequences)

    class Blank(Counting):
        def hidden_states(self, state, attention_mask):
            return 0 * super().hidden_states(state, attention_mask)

    blank = Blank(separator_index=SEPARATOR, prompt_reads_response=False)
    decode(blank, POLICIES["top_prob"], **problem(), max_steps=4)
    assert blank.prompts == []
    batch = problem()
    canvas = Canvas(blank, torch.ones(4, 2, dtype=torch.bool), batch["context"], batch["context_mask"])
    assert not canvas.hidden(torch.full((4, 2), 3)).any()
    calls = []
    counted = Counting()
    counted.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    decode(counted, POLICIES["top_prob"], **problem(), max_steps=4)
    assert len(calls) == 4


def test_packed_numbers_are_those_of_the_masked_positions(monkeypatch):
    """Logits, log-probabilities and numbers per position, in chunks of any size; full logits on demand."""
    denoiser = Counting()
    assert isinstance(denoiser, SplitDenoiser)
    assert isinstance(denoiser, TailDenoiser)
    assert isinstance(denoiser, PromptDenoiser)
    batch = problem()
    attention = torch.arange(9) < batch["length"][:, None]
    masked = attention & (torch.rand(4, 9, generator=torch.Generator().manual_seed(2)) < 0.6)
    tokens = torch.where(masked, MASK, 3)
    canvas = Canvas(denoiser, attention, batch["context"], batch["context_mask"])
    whole = UnmaskingState(tokens, masked, torch.zeros(4, dtype=torch.int64), 4, canvas)
    for chunk in (1, 30, 10**6):
        monkeypatch.setattr("orderppl.decoding.predictions._CHUNK", chunk)
        predictions = Predictions(canvas, tokens, masked, int(masked.sum()))
        state = DecodingState(predictions, tokens, 0, 4, None, {})
        torch.testing.assert_close(state.packed_log_probs, whole.log_probs[masked])
        assert torch.isneginf(predictions.masked_logits[:, MASK]).all()
        best = state.per_position(lambda log_probs: log_probs.amax(-1))
        torch.testing.assert_close(best, whole.log_probs.amax(-1).masked_fill(~masked, 0.0))
        assert torch.equal(state.pack(state.unpack(state.pack(tokens))), tokens[masked])
        truth = torch.randint(0, 10, (4, 9), generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(state.token_log_prob(truth), whole.token_log_prob(truth))
        some = masked.flatten().nonzero()[1::2, 0]
        torch.testing.assert_close(predictions.at(some), whole.logits.flatten(0, 1)[some])
    torch.testing.assert_close(state.logits, whole.logits)
    torch.testing.assert_close(state.log_probs, whole.log_probs)
    fresh = Predictions(canvas, tokens, masked, int(masked.sum()))
    torch.testing.assert_close(fresh.at(some), whole.logits.flatten(0, 1)[some])
