"""Loading a masked model, from a folder or the hub, as a denoiser, whatever kind it is of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orderppl.data.tokenizers import PretrainedTokenizer, Tokenizer, load_tokenizer
from orderppl.denoising import Denoiser
from orderppl.errors import UserError, first_line, is_out_of_memory
from orderppl.hub import fetch
from orderppl.inference.checkpoints import load_weights, read_config
from orderppl.models.denoisers import smdm
from orderppl.models.denoisers.pretrained import Padding, PretrainedDenoiser, SplitPretrainedDenoiser
from orderppl.models.denoisers.remote_code import check_loads_alike, load_remote
from orderppl.models.denoisers.smdm import SmdmDenoiser
from orderppl.models.denoisers.transformer import TransformerDenoiser

LOGIT_SHIFT = {"llada": 0, "Dream": 1}
"""Kinds with remote code that are known: `model_type` -> by how many positions their logits lag behind."""
TRAINED = "denoiser.safetensors"  # of a run of train-denoiser
TOKENIZER_FILE, TOKENIZER_FOLDER = "tokenizer.json", "tokenizer"  # beside it: a WordTokenizer, or one of transformers


@dataclass(frozen=True)
class Source:
    """What the files of a model say before any weight is read.

    Attributes:
        path: its folder or file.
        config: content of config.json.
        kind: "smdm", "trained" (by train-denoiser), "masked_lm" (in transformers) or "remote" (its own code).
    """

    path: Path
    config: dict[str, Any]
    kind: Literal["smdm", "trained", "masked_lm", "remote"]


def load_denoiser(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Load a masked model as a denoiser, whatever kind its files are of.

    Remote code is loaded twice and must give the same logits both times.

    Args:
        name_or_path: a folder, a hub name, an SMDM safetensors file (see `SmdmDenoiser.from_pretrained`) or a run of
            train-denoiser.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run the code that comes with LLaDA or Dream.
        dtype: of the parameters.
        device: where it goes.

    Returns:
        A module in evaluation mode: `SmdmDenoiser`, `TransformerDenoiser` or `PretrainedDenoiser`.

    Raises:
        UserError: it cannot be found, reached, read or trusted, or is no masked model.
    """
    source = find_source(name_or_path, revision, trust_remote_code)
    with memory_hint(f"{name_or_path} in {str(dtype).removeprefix('torch.')}", device):
        denoiser: nn.Module
        if source.kind == "smdm":
            denoiser = SmdmDenoiser.from_pretrained(source.path, dtype=dtype)
        elif source.kind == "trained":
            denoiser = load_trained(source.path).to(dtype).eval()
        else:
            denoiser = _adapt(source, dtype)
        denoiser = denoiser.to(device)
    assert isinstance(denoiser, Denoiser)
    return denoiser


def load_trained(run: str | Path) -> SmdmDenoiser | TransformerDenoiser:
    """Load what train-denoiser wrote into its run folder.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    weights = Path(run) / TRAINED
    config = read_config(weights)
    denoiser: SmdmDenoiser | TransformerDenoiser
    if config.pop("model_type", None) == smdm.MODEL_TYPE:
        denoiser = SmdmDenoiser(smdm.SmdmConfig(**config))
    else:
        denoiser = TransformerDenoiser(**config)
    load_weights(denoiser, weights)
    return denoiser


def find_source(name_or_path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Find the files of a model and what kind they are of; arguments and errors as of `load_denoiser`."""
    path = fetch(name_or_path, revision, field="denoiser")
    if path.is_file():
        return Source(path, {}, "smdm")
    if (path / TRAINED).is_file():
        return Source(path, {}, "trained")
    config_file = path / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        kind = str(config.get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        problem = f"{name_or_path} has no readable config.json"
        raise UserError("denoiser", problem, "give the folder or hub name of a model") from error
    if kind == smdm.MODEL_TYPE:
        return Source(path, config, "smdm")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # slow to import

    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_encoder_decoder", False):
        return Source(path, config, "masked_lm")
    if kind not in LOGIT_SHIFT and "AutoModelForMaskedLM" not in config.get("auto_map", {}):
        known = ", ".join(("any AutoModelForMaskedLM", smdm.MODEL_TYPE, *LOGIT_SHIFT))
        raise UserError(
            "denoiser", f"{name_or_path} ({kind or 'of no kind'}) is no masked model", f"use one of: {known}"
        )
    if not trust_remote_code:
        problem = f"{name_or_path} ({kind}) runs code that comes with its weights"
        raise UserError("trust_remote_code", problem, "read that code, then set trust_remote_code to true")
    return Source(path, config, "remote")


def denoiser_tokenizer(
    name_or_path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """The tokeniser of a model that `load_denoiser` loads, with the model's MASK and number of classes.

    Args:
        name_or_path: the model.
        tokenizer: of another folder or hub name; the one that comes with the model when left out.
        revision: branch, tag or commit of the model on the hub.
        trust_remote_code: run the code that comes with it.

    Raises:
        UserError: as `load_denoiser`, or there is no tokeniser, no mask token, or they do not fit each other.
    """
    source = find_source(name_or_path, revision, trust_remote_code)
    if source.kind == "trained":
        return trained_tokenizer(source.path) if tokenizer is None else load_tokenizer(tokenizer)
    if source.kind == "smdm":
        classes = source.config.get("vocab_size", smdm.SmdmConfig.vocab_size)
        has_own = source.path.is_dir() and any(source.path.glob("tokenizer*"))
        found = tokenizer or (source.path if has_own else smdm.TOKENIZER)
        return load_tokenizer(found, mask_index=classes, num_classes=classes)
    return load_tokenizer(
        tokenizer or source.path,
        mask_index=source.config.get("mask_token_id"),
        num_classes=source.config.get("vocab_size"),
        trust_remote_code=trust_remote_code,
    )


def trained_tokenizer(run: Path) -> Tokenizer:
    """The tokeniser that train-denoiser put beside a denoiser, with the denoiser's MASK.

    Raises:
        UserError: there is none.
    """
    if (run / TOKENIZER_FILE).is_file():
        return load_tokenizer(run / TOKENIZER_FILE)
    config = read_config(run / TRAINED)
    classes = int(config["vocab_size"]) if config.get("model_type") == smdm.MODEL_TYPE else None
    return load_tokenizer(run / TOKENIZER_FOLDER, mask_index=classes, num_classes=classes)


def _adapt(source: Source, dtype: torch.dtype) -> PretrainedDenoiser:
    """Load a model of transformers, find out how to tell it of padding, and check it."""
    trust = source.kind == "remote"
    tokenizer = denoiser_tokenizer(source.path, trust_remote_code=trust)
    network = _load_network(source, dtype)
    inner: Any = tokenizer.tokenizer if isinstance(tokenizer, PretrainedTokenizer) else None
    config: Any = network.config
    embeddings = next((m for m in network.modules() if hasattr(m, "create_position_ids_from_input_ids")), None)
    first = None if embeddings is None else int(embeddings.padding_idx) + 1  # RoBERTa counts from behind the padding
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "max_sequence_length", None)
    known = tokenizer.mask_index, len(network.get_output_embeddings().weight)
    options: dict[str, Any] = {
        "begin_index": inner.cls_token_id if source.kind == "masked_lm" else None,
        "pad_index": tokenizer.pad_index,
        "logit_shift": LOGIT_SHIFT.get(str(source.config.get("model_type")), 0),
        "first_position": first,
        "max_length": None if longest is None else int(longest) - (first or 0),
    }
    whole = PretrainedDenoiser(network, *known, **options)
    options["padding"] = whole.padding = _way_to_pad(whole, dtype)
    logits = _probe(whole)
    if trust:
        whole.network = nn.Module()  # one copy in memory at a time
        del network
        whole.network = network = _load_network(source, dtype)
        check_loads_alike(logits, _probe(whole), str(source.path))
    if not isinstance(network.get_output_embeddings(), nn.Linear):
        return whole
    split = SplitPretrainedDenoiser(network, *known, **options)
    if torch.equal(_probe(split), logits):
        return split
    split.rejoin()  # something happens to the logits behind the head
    return whole


def _load_network(source: Source, dtype: torch.dtype) -> Any:
    _check_weights(source.path)
    with _without_reports():
        if source.kind == "remote":
            network, info = load_remote(source.path, source.config["auto_map"], dtype)
        else:
            network, info = _load_masked_lm(source.path, dtype)
    for name, *shapes in sorted(info.get("mismatched_keys") or ()):
        stored, wanted = (list(shape) for shape in shapes)
        problem = f"{name!r} of {source.path} has shape {stored}, its config.json wants {wanted}"
        raise UserError("denoiser", problem, "give weights and configuration of one model, or download it again")
    missing = sorted(info["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"{source.path} has no weights for {missing[0]!r}{others}"
        raise UserError("denoiser", problem, "use a checkpoint of a masked model, output head included")
    return network.eval()


def _check_weights(folder: Path) -> None:
    """Refuse pickled and damaged weights by a look at the headers, before anything is made for them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "convert them: AutoModelForMaskedLM.from_pretrained(...).save_pretrained(...) writes safetensors"
        raise UserError("denoiser", f"{folder} has no safetensors weights (pickled ones are not read)", remedy)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError("denoiser", f"{file} cannot be read ({error})", "download it again") from error


def _load_masked_lm(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForMaskedLM

    try:
        network, info = AutoModelForMaskedLM.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # what a wrong file leads to depends on the model
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        problem = f"{folder} cannot be loaded ({reason})"
        raise UserError("denoiser", problem, "give a complete folder, or download it again") from error
    return network, info


@contextmanager
def _without_reports() -> Iterator[None]:
    """Keep transformers from printing tables about weights: what matters of them is raised."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


PROBE = 6  # tokens


@torch.no_grad()
def _probe(denoiser: PretrainedDenoiser) -> Tensor:
    """Logits of one row of some tokens and MASK, float [1, S, V]."""
    return denoiser(*_probe_row(denoiser)).float().cpu()


def _probe_row(denoiser: PretrainedDenoiser) -> tuple[Tensor, Tensor]:
    tokens = torch.linspace(0, denoiser.vocab_size - 1, PROBE).long()[None]  # [1, S]
    tokens[:, 1::2] = denoiser.mask_index
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


@torch.no_grad()
def _way_to_pad(denoiser: PretrainedDenoiser, dtype: torch.dtype) -> Padding:
    """The first way to tell the model of padding under which padding changes nothing.

    Raises:
        UserError: it cannot even read a row without padding.
    """
    tokens, attended = _probe_row(denoiser)
    denoiser.padding = "lengths"
    try:
        alone = denoiser(tokens, attended).float()
    except Exception as error:  # foreign code
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        problem = f"the model does not read a row of tokens ({reason})"
        raise UserError("denoiser", problem, "use the transformers_version of its config.json") from error
    allowed = alone.abs().max() * (1e-4 if dtype in (torch.float32, torch.float64) else 3e-2)
    rows = torch.cat([tokens.expand(2, -1), tokens.expand(2, -1)], -1)  # [2, 2 S], the second row has no padding
    keys = torch.stack([torch.arange(2 * PROBE) < PROBE, torch.ones(2 * PROBE, dtype=torch.bool)])
    for way in ("mask", "square"):
        denoiser.padding = way
        try:
            padded = denoiser(rows, keys)[:1, :PROBE].float()
        except Exception:  # it takes no mask of this shape
            continue
        if bool((padded - alone).abs().max() <= allowed):
            return way
    return "lengths"


@contextmanager
def memory_hint(what: str, device: torch.device | str) -> Iterator[None]:
    """Turn a device that runs out of memory into one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{what} does not fit into the memory of {device}"
        raise UserError("memory", problem, "use dtype bfloat16, a smaller model, or device cpu") from error
