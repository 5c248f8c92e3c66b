from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from torch import Tensor, nn

from orderppl.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from orderppl.decoding import decode, make_policy
from orderppl.denoising import Canvas, Denoiser, SplitDenoiser
from orderppl.errors import UserError
from orderppl.hub import fetch
from orderppl.models import LearnedPolicy, SequentialUnmaskingModel
from orderppl.models.denoisers import PretrainedDenoiser, SplitPretrainedDenoiser, denoiser_tokenizer, load_denoiser
from orderppl.models.denoisers.remote_code import check_loads_alike
from orderppl.models.networks import PolicyNetwork
from orderppl.states import UnmaskingState

from tiny_models import KINDS, MASKED_LM, write_model, write_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def denoisers(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: load_denoiser(folder, trust_remote_code=True) for kind, folder in folders.items()}


def rows(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """Three rows of 7, 4 and 1 tokens, MASK in places, padding at the right."""
    tokens = torch.randint(5, 40, (3, 7))
    tokens[:, ::3] = denoiser.mask_index
    return tokens, torch.arange(7) < torch.tensor([[7], [4], [1]])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_protocol_and_padding(denoisers: dict[str, Any], kind: str) -> None:
    """A row alone, padded at the right, at the left, and with padding inside: the same logits."""
    denoiser = denoisers[kind]
    assert isinstance(denoiser, Denoiser)
    tokens, mask = rows(denoiser)
    right = denoiser(tokens, mask)
    assert right.shape == (3, 7, denoiser.vocab_size)
    assert right.isfinite().all()
    for row, size in enumerate((7, 4, 1)):
        alone = denoiser(tokens[row : row + 1, :size], mask[row : row + 1, :size])[0]
        torch.testing.assert_close(right[row, :size], alone, rtol=1e-4, atol=1e-4)
        for columns in (torch.arange(10)[10 - size :], torch.randperm(10)[:size].sort().values):
            places = torch.zeros(1, 10, dtype=torch.bool)
            places[0, columns] = True
            canvas = torch.randint(5, 40, (1, 10))
            canvas[places] = tokens[row, :size]
            torch.testing.assert_close(denoiser(canvas, places)[0, columns], alone, rtol=1e-4, atol=1e-4)
    assert isinstance(denoiser, SplitDenoiser)
    assert Canvas(denoiser, mask)._is_split
    hidden = denoiser.hidden_states(tokens, mask)
    assert hidden.shape == (3, 7, 16)
    assert torch.equal(denoiser.output_logits(hidden), right)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_order_and_context_matter(denoisers: dict[str, Any], kind: str) -> None:
    """Guards the tests above: a model that looked at nothing would pass them."""
    denoiser = denoisers[kind]
    tokens, mask = rows(denoiser)
    tokens, mask = tokens[:1], mask[:1]
    before = denoiser(tokens, mask)
    swapped = tokens.clone()
    swapped[:, [4, 5]] = tokens[:, [5, 4]]
    assert (denoiser(swapped, mask) - before)[:, 0].abs().max() > 1e-3
    assert (before[:, 0] - before[:, 3]).abs().max() > 1e-3  # two MASKs, told apart by their positions


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reload_is_equal(denoisers: dict[str, Any], folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    denoiser = denoisers[kind]
    tokens, mask = rows(denoiser)
    again = load_denoiser(folders[kind], trust_remote_code=True)
    assert torch.equal(again(tokens, mask), denoiser(tokens, mask))
    denoiser.save_pretrained(tmp_path)
    for file in folders[kind].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    saved = load_denoiser(tmp_path, trust_remote_code=True)
    assert torch.equal(saved(tokens, mask), denoiser(tokens, mask))
    assert saved.mask_index == denoiser.mask_index


@pytest.mark.parametrize("kind", KINDS)
def test_never_emits_mask(denoisers: dict[str, Any], kind: str) -> None:
    denoiser = denoisers[kind]
    if kind == "smdm":
        assert denoiser.mask_index == denoiser.vocab_size  # there is no class for it
        return
    eager = torch.zeros(denoiser.vocab_size)
    eager[denoiser.mask_index] = 1e3
    hook = denoiser.register_forward_hook(lambda module, inputs, logits: logits + eager)
    try:
        tokens, mask = rows(denoiser)
        assert (denoiser(tokens, mask).argmax(-1) == denoiser.mask_index).all()
        for temperature in (0.0, 1.0):
            output = decode(
                denoiser, make_policy("random"), length=torch.tensor([5, 2]), max_steps=3, temperature=temperature
            )
            assert (output.sequences[output.attention_mask] != denoiser.mask_index).all()
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_policy_alone(denoisers: dict[str, Any], kind: str) -> None:
    """A frozen denoiser gets no gradient and stores nothing for one; a trained one does both."""
    denoiser = denoisers[kind]
    prior = LearnedPolicy(PolicyNetwork(max(denoiser.vocab_size, denoiser.mask_index + 1), width=8, layers=1, heads=2))
    canvas = Canvas(denoiser, rows(denoiser)[1])
    stored: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: (stored.append(x.numel()), x)[1], lambda x: x)

    def score(policy: nn.Module) -> Tensor:
        state = torch.full_like(canvas.attention_mask, denoiser.mask_index, dtype=torch.long)
        at = UnmaskingState(state, canvas.attention_mask, torch.zeros(3, dtype=torch.long), 3, canvas)
        with hooks:
            _ = at.logits
        held = sum(stored)
        stored.clear()
        (policy.distribution(at).probs.sum() + at.log_probs[..., 0].sum()).backward()  # type: ignore[operator]
        return torch.tensor(held)

    denoiser.requires_grad_(False)
    try:
        assert score(prior) == 0
        assert all(parameter.grad is None for parameter in denoiser.parameters())
        assert all(parameter.grad is not None for parameter in prior.parameters())
        denoiser.requires_grad_(True)
        assert score(prior) > 0
        assert any(parameter.grad is not None for parameter in denoiser.parameters())
    finally:
        denoiser.zero_grad(set_to_none=True)


def test_stays_in_evaluation_mode(denoisers: dict[str, Any]) -> None:
    denoiser = denoisers["bert"]
    SequentialUnmaskingModel(denoiser, LearnedPolicy(nn.Identity()), 2).train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules())
    assert not any(module.training for module in denoiser.network.modules())


@torch.no_grad()
def test_frame_and_shift(denoisers: dict[str, Any]) -> None:
    """BERT reads [CLS] first; Dream says of a position at the one before it."""
    bert, dream = denoisers["bert"], denoisers["Dream"]
    tokens, mask = rows(bert)[0][:1], rows(bert)[1][:1]
    framed = torch.cat([torch.full((1, 1), 2), tokens], 1)
    raw = bert.output_logits(bert.network(framed).logits)
    torch.testing.assert_close(bert(tokens, mask), raw[:, 1:], rtol=1e-4, atol=1e-4)
    tokens = rows(dream)[0][:1]
    raw = dream.output_logits(dream.network(tokens).logits)
    torch.testing.assert_close(dream(tokens, mask), torch.cat([raw[:, :1], raw[:, :-1]], 1), rtol=1e-4, atol=1e-4)
    assert denoisers["llada"].logit_shift == 0


@torch.no_grad()
def test_roberta_reads_attended_padding_tokens(denoisers: dict[str, Any]) -> None:
    """Left to itself RoBERTa would give a revealed <pad> and all that follows it other positions."""
    denoiser = denoisers["roberta"]
    tokens = torch.tensor([[7, 1, 9, denoiser.mask_index]])
    position = torch.arange(2, 7)[None]
    framed = torch.cat([torch.zeros(1, 1, dtype=torch.long), tokens], 1)
    hidden = denoiser.network(framed, attention_mask=torch.ones_like(framed), position_ids=position).logits[:, 1:]
    expected = denoiser.output_logits(hidden)
    torch.testing.assert_close(denoiser(tokens, torch.ones(1, 4, dtype=torch.bool)), expected, rtol=1e-4, atol=1e-4)


def test_ways_to_pad(denoisers: dict[str, Any], tmp_path: Path) -> None:
    ways = {kind: denoisers[kind].padding for kind in KINDS if kind != "smdm"}
    assert ways == {**dict.fromkeys(MASKED_LM, "mask"), "llada": "lengths", "Dream": "square"}
    reads = load_denoiser(write_model(tmp_path / "llada", "llada", reads_mask=True), trust_remote_code=True)
    assert reads.padding == "mask"  # type: ignore[attr-defined]


@torch.no_grad()
def test_logits_that_are_changed_behind_the_head(tmp_path: Path, denoisers: dict[str, Any]) -> None:
    """Then the head is no part by itself, and stays in the model."""
    torch.manual_seed(0)
    capped = load_denoiser(write_model(tmp_path / "llada", "llada", flaw="caps"), trust_remote_code=True)
    torch.manual_seed(0)
    plain = load_denoiser(write_model(tmp_path / "plain", "llada"), trust_remote_code=True)
    assert type(capped) is PretrainedDenoiser
    tokens, mask = rows(plain)
    torch.testing.assert_close(capped(tokens, mask), plain(tokens, mask).tanh())


def test_dream_frequencies_are_recomputed(denoisers: dict[str, Any]) -> None:
    expected = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    for layer in denoisers["Dream"].network.model.layers:
        torch.testing.assert_close(layer.rotary_emb.inv_freq, expected)


def test_bfloat16(folders: dict[str, Path], denoisers: dict[str, Any]) -> None:
    for kind in ("modernbert", "Dream", "smdm"):
        coarse = load_denoiser(folders[kind], trust_remote_code=True, dtype=torch.bfloat16)
        tokens, mask = rows(coarse)
        logits = coarse(tokens, mask)
        assert logits.dtype == torch.bfloat16
        exact = denoisers[kind](tokens, mask)
        assert (logits.float() - exact)[0].abs().mean() < 0.05 * exact[0].abs().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_a_model(folders: dict[str, Path], denoisers: dict[str, Any], kind: str) -> None:
    tokenizer, denoiser = denoiser_tokenizer(folders[kind], trust_remote_code=True), denoisers[kind]
    assert tokenizer.mask_index == denoiser.mask_index
    assert tokenizer.vocab_size == max(denoiser.vocab_size, denoiser.mask_index + 1) == len(tokenizer.tokens)
    ids = tokenizer.encode("3 + 20")
    unused = [tokenizer.vocab_size - 1] if kind in ("llada", "Dream") else []
    assert tokenizer.decode([*ids, tokenizer.mask_index, *unused, tokenizer.eos_index, 7]) == "3 + 20"


# ---- what users meet


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy
    return message


def test_remote_code_is_asked_for(folders: dict[str, Path]) -> None:
    for kind in ("llada", "Dream"):
        assert "set trust_remote_code to true" in refusal(lambda kind=kind: load_denoiser(folders[kind]))


def test_remote_code_that_fails(tmp_path: Path) -> None:
    random = write_model(tmp_path / "random", "llada", flaw="random")
    assert "give different logits" in refusal(lambda: load_denoiser(random, trust_remote_code=True))
    raising = write_model(tmp_path / "raises", "llada", flaw="raises")
    assert "does not read a row" in refusal(lambda: load_denoiser(raising, trust_remote_code=True))
    (tmp_path / "raises" / "modeling_llada.py").write_text("import torch.no_such_module\n")
    assert "fails under transformers" in refusal(lambda: load_denoiser(raising, trust_remote_code=True))
    with pytest.raises(UserError, match="different logits"):
        check_loads_alike(torch.full((1, 1, 2), torch.nan), torch.full((1, 1, 2), torch.nan), "x")


def test_tied_weights_of_remote_code(tmp_path: Path) -> None:
    tied = load_denoiser(write_model(tmp_path / "dream", "Dream", tie_word_embeddings=True), trust_remote_code=True)
    assert isinstance(tied, SplitPretrainedDenoiser)
    network: Any = tied.network
    assert tied.head.weight is network.model.embed_tokens.weight


def test_not_a_masked_model(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "gpt2) is no masked model" in refusal(lambda: load_denoiser(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "no readable config.json" in refusal(lambda: load_denoiser(tmp_path))
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    assert "cannot be loaded" in refusal(lambda: load_denoiser(tmp_path))  # no tokeniser
    for file in folders["bert"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "no safetensors weights" in refusal(lambda: load_denoiser(tmp_path))


def test_a_missing_output_head(folders: dict[str, Path], tmp_path: Path) -> None:
    denoiser = load_denoiser(folders["bert"])
    denoiser.network.bert.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    for file in folders["bert"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "has no weights for 'cls.predictions" in refusal(lambda: load_denoiser(tmp_path))


def test_no_mask_token(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    write_tokenizer(tmp_path, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], sep_token="[SEP]", pad_token="[PAD]")
    assert "has no mask token" in refusal(lambda: load_denoiser(tmp_path))


def test_vocabulary_mismatch(folders: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, [f"<{n}>" for n in range(40)], mask_token="<1>", eos_token="<2>")
    problem = refusal(lambda: denoiser_tokenizer(folders["bert"], tokenizer=tmp_path))
    assert "has 79 tokens, the model has classes for 44" in problem


def test_canvas_too_long(denoisers: dict[str, Any]) -> None:
    denoiser: PretrainedDenoiser = denoisers["roberta"]
    longest = torch.full((1, 127), 7)
    denoiser(longest, longest > 0)
    longer = torch.full((1, 128), 7)
    assert "a canvas of 128 tokens exceeds the model's 127" in refusal(lambda: denoiser(longer, longer > 0))


def test_out_of_memory(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def to(self: nn.Module, *args: Any) -> nn.Module:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB\nmore")

    monkeypatch.setattr(nn.Module, "to", to)
    assert "does not fit into the memory of cuda:0" in refusal(lambda: load_denoiser(folders["bert"], device="cuda:0"))


def test_offline() -> None:
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: load_denoiser("nobody/no-such-model-here"))
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: load_tokenizer("nobody/no-such-model-here"))
    file = "nobody/no-such-model-here/weights/some.safetensors"
    assert "HF_HUB_OFFLINE is set" in refusal(lambda: load_denoiser(file))
    assert "neither a folder here nor a hub name" in refusal(lambda: load_denoiser("./no/such/folder"))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "is gated; accept its terms at https://huggingface.co/a/b, then log in"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a public model on the hub; check the spelling"),
        (errors.RevisionNotFoundError, "a/b has no revision 'v2'; choose a branch, tag or commit of https"),
        (errors.RemoteEntryNotFoundError, "a/b has no such file"),
        (errors.HfHubHTTPError, "a/b cannot be downloaded (503 over capacity); try again, or download it where"),
        (errors.LocalEntryNotFoundError, "and the hub cannot be reached; download it where"),
        (OSError(28, "No space left on device"), "no space left on the disk for a/b; free some"),
    ],
)
def test_failures_of_the_hub(monkeypatch: pytest.MonkeyPatch, kind: Any, message: str) -> None:
    def fail(*args: Any, **options: Any) -> str:
        if isinstance(kind, OSError):
            raise kind
        if issubclass(kind, errors.HfHubHTTPError):
            raise kind("503 over capacity\nRequest ID: x", response=SimpleNamespace(headers={}, request=None))
        raise kind("nothing cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = refusal(lambda: fetch("a/b", "v2", field="denoiser"))
    assert found.startswith("denoiser: ")
    assert message in found


def test_a_program_error_is_no_failure_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise TypeError("a bug")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TypeError):
        fetch("a/b")


def test_fetch_asks_for_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, file: str | None = None, **options: Any) -> str:
        asked.update(name=name, file=file, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("a/b", "v2") == tmp_path
    assert asked["revision"] == "v2"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])
    fetch("a/b/c/d.safetensors")
    assert (asked["name"], asked["file"]) == ("a/b", "c/d.safetensors")
    assert fetch(tmp_path) == tmp_path


def test_fingerprint_of_a_tokenizer(folders: dict[str, Path]) -> None:
    found = {kind: tokenizer_fingerprint(denoiser_tokenizer(folders[kind], trust_remote_code=True)) for kind in KINDS}
    assert found["bert"] == found["distilbert"] == found["modernbert"]
    assert len(set(found.values())) == len(KINDS) - 2
