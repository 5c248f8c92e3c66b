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
from safetensors.torch import save_file
from torch import Tensor, nn

from orderppl.config import build, describe
from orderppl.data.tokenizers import PretrainedTokenizer, load_tokenizer, tokenizer_fingerprint
from orderppl.errors import UserError
from orderppl.hub import fetch
from orderppl.models.denoisers import PretrainedDenoiser, load_denoiser
from orderppl.models.denoisers.remote_code import check_loads_alike
from orderppl.models.denoisers.smdm import SmdmDenoiser
from orderppl.unmasking import Batch, Denoiser
from orderppl.unmasking.denoiser import Reader, SplitDenoiser

from tiny_models import KINDS, MASKED_LM, SPECIAL, VOCABULARY, write_model, write_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def denoisers(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: load_denoiser(folder, trust_remote_code=True) for kind, folder in folders.items()}


def rows(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """Three rows of 7, 4 and 2 tokens, MASK in places, padding at the right."""
    tokens = torch.randint(5, 40, (3, 7))
    tokens[:, ::3] = denoiser.mask_index
    return tokens, torch.arange(7) < torch.tensor([[7], [4], [2]])


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
    for row, size in enumerate((7, 4, 2)):
        alone = denoiser(tokens[row : row + 1, :size], mask[row : row + 1, :size])[0]
        torch.testing.assert_close(right[row, :size], alone, rtol=1e-4, atol=1e-4)
        for columns in (torch.arange(10)[10 - size :], torch.randperm(10)[:size].sort().values):
            places = torch.zeros(1, 10, dtype=torch.bool)
            places[0, columns] = True
            canvas = torch.randint(5, 40, (1, 10))
            canvas[places] = tokens[row, :size]
            torch.testing.assert_close(denoiser(canvas, places)[0, columns], alone, rtol=1e-4, atol=1e-4)
    assert isinstance(denoiser, SplitDenoiser)
    assert Reader(denoiser, Batch(tokens, mask))._is_split
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
    again = build(describe(denoiser))
    assert torch.equal(again(tokens, mask), denoiser(tokens, mask))
    denoiser.save_pretrained(tmp_path)
    saved = load_denoiser(tmp_path, trust_remote_code=True)
    assert torch.equal(saved(tokens, mask), denoiser(tokens, mask))
    assert saved.mask_index == denoiser.mask_index
    assert tokenizer_fingerprint(saved.tokenizer) == tokenizer_fingerprint(denoiser.tokenizer)
    assert torch.equal(again(tokens, mask), denoiser(tokens, mask))  # the head is back beside the model


def test_description_names_the_function(folders: dict[str, Path]) -> None:
    denoiser = load_denoiser(folders["bert"], dtype=torch.bfloat16)
    spec = describe(denoiser)
    assert spec["class_path"] == "orderppl.models.denoisers.load_denoiser"
    assert spec["init_args"].items() >= {"name_or_path": str(folders["bert"]), "dtype": "torch.bfloat16"}.items()
    assert next(build(json.loads(json.dumps(spec))).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_mask_gets_no_probability(denoisers: dict[str, Any], kind: str) -> None:
    denoiser = denoisers[kind]
    tokens, mask = rows(denoiser)
    reader = Reader(denoiser, Batch(tokens, mask))
    logits = reader.logits(reader.read(tokens))
    if kind == "smdm":
        assert denoiser.mask_index == denoiser.vocab_size == logits.shape[-1]  # there is no class for it
    else:
        assert (logits[..., denoiser.mask_index] == -torch.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_stores_nothing_for_a_gradient(folders: dict[str, Path], kind: str) -> None:
    """A frozen denoiser gets no gradient and stores nothing for one; a trained one does both."""
    denoiser: Any = load_denoiser(folders[kind], trust_remote_code=True)
    tokens, mask = rows(denoiser)
    stored: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: (stored.append(x.numel()), x)[1], lambda x: x)

    def score() -> Tensor:
        with hooks:
            return denoiser(tokens, mask)[mask].log_softmax(-1)[..., 7].sum()

    assert not denoiser.training
    assert not score().requires_grad
    assert not stored
    denoiser.requires_grad_(True)
    score().backward()
    assert sum(stored) > 0
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in denoiser.parameters())


def test_stays_in_evaluation_mode(denoisers: dict[str, Any]) -> None:
    denoiser = denoisers["bert"]
    nn.ModuleList([denoiser]).train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in denoiser.modules())
    assert not any(module.training for module in denoiser.modules())


@torch.no_grad()
def test_start_and_end_tokens_are_tokens_of_the_canvas(denoisers: dict[str, Any]) -> None:
    """The tokeniser says which they are; the model reads exactly what stands on the canvas."""
    bert = denoisers["bert"]
    assert bert.tokenizer.frame == ((0,), (2,))
    begin, end = bert.tokenizer.frame
    tokens = torch.tensor([[*begin, *bert.tokenizer.encode("3 + 4"), *end]])
    whole = torch.tensor([bert.tokenizer.tokenizer("3 + 4")["input_ids"]])
    assert torch.equal(tokens, whole)
    with bert.whole() as network:
        raw = network(whole).logits
    torch.testing.assert_close(bert(tokens, torch.ones_like(tokens)), raw, rtol=1e-5, atol=1e-5)
    assert all(denoisers[kind].tokenizer.frame == ((), ()) for kind in ("smdm", "llada", "Dream"))


@torch.no_grad()
def test_logits_that_lag_behind(denoisers: dict[str, Any]) -> None:
    """Dream says of a position at the one before it."""
    dream = denoisers["Dream"]
    tokens = rows(dream)[0][:1]
    raw = dream.output_logits(dream.network(tokens).logits)
    expected = torch.cat([raw[:, :1], raw[:, :-1]], 1)
    torch.testing.assert_close(dream(tokens, torch.ones_like(tokens)), expected, rtol=1e-4, atol=1e-4)
    assert denoisers["llada"].logit_shift == 0


@torch.no_grad()
def test_attended_tokens_that_equal_padding(denoisers: dict[str, Any]) -> None:
    """Left to itself RoBERTa would give a revealed <pad> and all that follows it other positions."""
    denoiser = denoisers["roberta"]
    tokens = torch.tensor([[0, 7, 1, 9, denoiser.mask_index]])
    position = torch.arange(2, 7)[None]
    hidden = denoiser.network(tokens, attention_mask=torch.ones_like(tokens), position_ids=position).logits
    expected = denoiser.output_logits(hidden)
    torch.testing.assert_close(denoiser(tokens, torch.ones(1, 5, dtype=torch.bool)), expected, rtol=1e-4, atol=1e-4)


def test_ways_to_pad(denoisers: dict[str, Any], tmp_path: Path) -> None:
    ways = {kind: denoisers[kind].padding for kind in KINDS if kind != "smdm"}
    masked = [kind for kind in KINDS if kind in MASKED_LM]
    assert ways == {**dict.fromkeys(masked, "mask"), "llada": "lengths", "Dream": "square"}
    reads = load_denoiser(write_model(tmp_path / "llada", "llada", reads_mask=True), trust_remote_code=True)
    assert reads.padding == "mask"  # type: ignore[union-attr]


@torch.no_grad()
def test_logits_that_are_changed_behind_the_head(tmp_path: Path) -> None:
    """Then the head is no part by itself, and stays in the model."""
    torch.manual_seed(0)
    capped = load_denoiser(write_model(tmp_path / "llada", "llada", flaw="caps"), trust_remote_code=True)
    torch.manual_seed(0)
    plain = load_denoiser(write_model(tmp_path / "plain", "llada"), trust_remote_code=True)
    assert isinstance(capped, PretrainedDenoiser)
    assert isinstance(plain, PretrainedDenoiser)
    assert (capped.place, plain.place) == ("", "model.transformer.ff_out")
    tokens, mask = rows(plain)
    torch.testing.assert_close(capped(tokens, mask), plain(tokens, mask).tanh())
    hidden = capped.hidden_states(tokens, mask)
    assert capped.output_logits(hidden).data_ptr() != hidden.data_ptr()  # a copy of its own, to be written over


def test_dream_frequencies_are_recomputed(denoisers: dict[str, Any]) -> None:
    expected = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    for layer in denoisers["Dream"].network.model.layers:
        torch.testing.assert_close(layer.rotary_emb.inv_freq, expected)


@torch.no_grad()
def test_what_bfloat16_keeps(folders: dict[str, Path], denoisers: dict[str, Any]) -> None:
    """A row alone and the row in a batch agree to rounding: 1e-5 in float32, no more than some 3e-2 in bfloat16."""
    for kind in ("bert", "modernbert", "Dream", "smdm"):
        coarse: Any = load_denoiser(folders[kind], trust_remote_code=True, dtype="bfloat16")
        tokens = torch.randint(5, 40, (24, 30))
        tokens[:, ::3] = coarse.mask_index
        mask = torch.arange(30) < torch.randint(5, 31, (24, 1))
        for denoiser, close in ((denoisers[kind], 1e-5), (coarse, 3e-2)):
            together = denoiser(tokens, mask).float()
            scale = together[mask].abs().max()
            for row in range(24):
                alone = denoiser(tokens[row][mask[row]][None], torch.ones(1, int(mask[row].sum()), dtype=torch.bool))
                assert (together[row][mask[row]] - alone[0].float()).abs().max() <= close * scale
        logits = coarse(tokens, mask)
        assert logits.dtype == torch.bfloat16
        exact = denoisers[kind](tokens, mask)
        assert (logits.float() - exact)[mask].abs().mean() < 0.05 * exact[mask].abs().mean()
        reader = Reader(coarse, Batch(tokens, mask))
        assert reader.logits(reader.read(tokens)).dtype == torch.float32  # log-probabilities are summed


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_of_a_model(denoisers: dict[str, Any], kind: str) -> None:
    denoiser = denoisers[kind]
    tokenizer = denoiser.tokenizer
    assert tokenizer.mask_index == denoiser.mask_index
    assert tokenizer.vocab_size == max(denoiser.vocab_size, denoiser.mask_index + 1) == len(tokenizer.tokens)
    ids = tokenizer.encode("3 + 20")
    unused = [tokenizer.vocab_size - 1] if kind in ("llada", "Dream") else []
    assert tokenizer.decode([*ids, tokenizer.mask_index, *unused, tokenizer.eos_index, 7]) == "3 + 20"


@pytest.mark.parametrize("kind", ["xlm", "flaubert", "esm"])
@torch.no_grad()
def test_the_mask_of_the_tokeniser_counts(tmp_path: Path, kind: str) -> None:
    """XLM's config.json names another one, which means nothing; ESM looks for it in its input."""
    torch.manual_seed(0)
    folder = write_model(tmp_path, kind)
    right = load_denoiser(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mask_token_id": 9}))
    denoiser = load_denoiser(folder)
    assert denoiser.mask_index == SPECIAL.index("[MASK]") == denoiser.tokenizer.mask_index  # type: ignore[union-attr]
    tokens = torch.tensor([[0, 9, denoiser.mask_index, 11, 2]])
    assert torch.equal(denoiser(tokens, torch.ones_like(tokens)), right(tokens, torch.ones_like(tokens)))


@torch.no_grad()
def test_another_tokeniser(folders: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path, [*SPECIAL[:4], "[HOLE]"], mask_token="[HOLE]", eos_token="[SEP]", pad_token="[PAD]")
    denoiser = load_denoiser(folders["bert"], tokenizer_from=tmp_path)
    assert isinstance(denoiser.tokenizer, PretrainedTokenizer)
    assert denoiser.tokenizer.tokens[denoiser.mask_index] == "[HOLE]"
    write_tokenizer(tmp_path, [f"<{n}>" for n in range(40)], mask_token="<1>", eos_token="<2>")
    problem = refusal(lambda: load_denoiser(folders["bert"], tokenizer_from=tmp_path))
    assert f"has 79 tokens, the model has classes for {VOCABULARY}" in problem


def test_fingerprint_of_a_tokenizer(denoisers: dict[str, Any]) -> None:
    found = {kind: tokenizer_fingerprint(denoisers[kind].tokenizer) for kind in KINDS}
    masked = [kind for kind in KINDS if kind in MASKED_LM]
    assert len({found[kind] for kind in masked}) == 1
    assert len(set(found.values())) == len(KINDS) - len(masked) + 1


# ---- adapters


def write_lora(folder: Path, base: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 6, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def low_rank(place: str) -> dict[str, Tensor]:
    name = f"base_model.model.{place}"
    return {f"{name}.lora_A.weight": torch.randn(2, 16), f"{name}.lora_B.weight": torch.randn(16, 2)}


@torch.no_grad()
@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_a_lora_adapter_is_added(folders: dict[str, Path], tmp_path: Path, rslora: bool, scale: float) -> None:
    """Against the definition: every adapted layer gives W x + scale B (A x)."""
    place = "bert.encoder.layer.1.attention.self.query"
    tensors = low_rank(place)
    adapted = load_denoiser(write_lora(tmp_path / "lora", folders["bert"], tensors, use_rslora=rslora))
    plain: Any = load_denoiser(folders["bert"])
    tokens, mask = rows(plain)
    assert not torch.allclose(adapted(tokens, mask), plain(tokens, mask), atol=1e-2)
    first, second = tensors.values()
    layer = plain.network.get_submodule(place)
    hook = layer.register_forward_hook(lambda module, inputs, out: out + scale * (inputs[0] @ first.T) @ second.T)
    torch.testing.assert_close(adapted(tokens, mask), plain(tokens, mask), rtol=1e-4, atol=1e-4)
    hook.remove()


def test_other_adapters_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    place, base = "bert.encoder.layer.1.attention.self.query", folders["bert"]
    message = "more than low-rank products"
    for tensors, settings in (
        (low_rank(place), {"use_dora": True}),
        (low_rank(place), {"peft_type": "IA3"}),
        (low_rank(place), {"lora_alpha": None}),
        (low_rank(place) | {"base_model.model.bert.pooler.weight": torch.zeros(1)}, {}),
    ):
        assert message in refusal(lambda t=tensors, s=settings: load_denoiser(write_lora(tmp_path / "a", base, t, **s)))
    foreign = low_rank("bert.encoder.layer.7.attention.self.query")
    assert "'bert.encoder.layer.7.attention.self.query', which the model does not have" in refusal(
        lambda: load_denoiser(write_lora(tmp_path / "b", base, foreign))
    )
    wide = low_rank(place) | {f"base_model.model.{place}.lora_A.weight": torch.randn(2, 17)}
    assert "of shape [16, 17], the model has [16, 16]" in refusal(
        lambda: load_denoiser(write_lora(tmp_path / "b", base, wide))
    )
    (tmp_path / "b" / "adapter_config.json").write_text("[")
    assert "no readable adapter_config.json" in refusal(lambda: load_denoiser(tmp_path / "b"))
    assert "adapts an SMDM" in refusal(
        lambda: load_denoiser(write_lora(tmp_path / "c", folders["smdm"], low_rank(place)))
    )


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
    assert isinstance(tied, PretrainedDenoiser)
    network: Any = tied.network
    assert tied.head.weight is network.model.embed_tokens.weight


def test_not_a_masked_model(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "gpt2) is no masked model" in refusal(lambda: load_denoiser(tmp_path))
    for kind in ("sdar_moe", "llada2_moe", "bd3lm", "Fast_dLLM_Qwen"):
        auto_map = {"AutoModelForMaskedLM": "modeling.Model"}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": auto_map}))
        assert f"({kind}) reads one block after another" in refusal(
            lambda: load_denoiser(tmp_path, trust_remote_code=True)
        )
    for damaged in ("{", "[]", "3", "[" * 100_000):
        (tmp_path / "config.json").write_text(damaged)
        assert "no readable config.json" in refusal(lambda: load_denoiser(tmp_path))
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    assert "cannot be loaded" in refusal(lambda: load_denoiser(tmp_path))  # no tokeniser
    for file in folders["bert"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "no safetensors weights" in refusal(lambda: load_denoiser(tmp_path))


@torch.no_grad()
def test_rows_of_nothing_but_mask(denoisers: dict[str, Any]) -> None:
    """ESM divides by the share of visible tokens: without its start and end tokens there may be none."""
    for kind in KINDS:
        denoiser, mask = denoisers[kind], torch.ones(2, 4, dtype=torch.bool)
        state = torch.full((2, 4), denoiser.mask_index)
        if kind == "esm":
            assert "EsmForMaskedLM reads no row of nothing but MASK" in refusal(
                lambda denoiser=denoiser, state=state, mask=mask: denoiser(state, mask)
            )
            state[:, 0], state[:, -1] = 0, 2
        assert denoiser(state, mask).isfinite().all()
        assert denoiser(state, torch.zeros_like(mask)).isfinite().all()


def test_a_missing_output_head(folders: dict[str, Path], tmp_path: Path) -> None:
    denoiser = load_denoiser(folders["bert"])
    denoiser.network.bert.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    for file in folders["bert"].glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert "has no weights for 'cls.predictions" in refusal(lambda: load_denoiser(tmp_path))


def test_no_mask_token(tmp_path: Path) -> None:
    write_model(tmp_path, "bert")
    write_tokenizer(tmp_path, SPECIAL, sep_token="[SEP]", pad_token="[PAD]")
    assert "has no mask token" in refusal(lambda: load_denoiser(tmp_path))


def test_canvas_too_long(denoisers: dict[str, Any]) -> None:
    denoiser: PretrainedDenoiser = denoisers["roberta"]
    longest = torch.full((1, 128), 7)
    denoiser(longest, longest > 0)
    longer = torch.full((1, 129), 7)
    assert "a canvas of 129 tokens exceeds the model's 128" in refusal(lambda: denoiser(longer, longer > 0))


def test_settings_that_do_not_fit(folders: dict[str, Path]) -> None:
    assert "unknown dtype 'int7'" in refusal(lambda: load_denoiser(folders["bert"], dtype="int7"))
    assert "a public model knows its longest canvas" in refusal(lambda: load_denoiser(folders["bert"], read_up_to=9))


def test_out_of_memory(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: Any) -> SmdmDenoiser:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB\nmore")

    monkeypatch.setattr("orderppl.models.denoisers.loading.load_smdm", read)
    assert "in bfloat16 does not fit into memory" in refusal(lambda: load_denoiser(folders["smdm"], dtype="bfloat16"))


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


@pytest.mark.parametrize("path", ["a" * 5000, "\0", "README.md/x/y"])
def test_paths_that_cannot_be(path: str) -> None:
    assert refusal(lambda: fetch(path)).startswith("model: ")


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
