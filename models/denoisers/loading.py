"""Loading a masked model, from a folder or the hub, as a denoiser, whatever kind it is of."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from orderppl.config import recorded
from orderppl.data.tokenizers import PretrainedTokenizer, load_tokenizer
from orderppl.documents import LARGEST
from orderppl.errors import UserError, first_line, is_out_of_memory
from orderppl.files import read_tensors
from orderppl.hub import fetch
from orderppl.models.denoisers import smdm
from orderppl.models.denoisers.pretrained import PretrainedDenoiser
from orderppl.models.denoisers.remote_code import check_loads_alike, load_remote
from orderppl.models.denoisers.smdm import SmdmDenoiser, load_smdm
from orderppl.models.denoisers.transformer import TransformerDenoiser

LOGIT_SHIFT = {"llada": 0, "Dream": 1}
"""Kinds with remote code that are known: `model_type` -> by how many positions their logits lag behind."""
BLOCKWISE = ("bd3lm", "Fast_dLLM", "llada2", "sdar")
"""How the names of kinds begin that read one block after another, each by an attention mask of their own sampler."""
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = ("float32", "float64", "bfloat16", "float16")
SIZE = re.compile("layer|head|hidden_size|intermediate|d_model|n_embd|embedding_size|vocab_size|^dim$")
"""Names in a config.json that say how large a model is."""
Kind = Literal["smdm", "masked_lm", "remote"]


class Wanted(NamedTuple):
    """How a model is to be loaded; see `load_denoiser`."""

    dtype: torch.dtype
    trust: bool
    tokenizer_from: str | Path | None
    frame: bool | None
    places: dict[str, Any]
    """What accelerate is told of where the parts go; empty: all on the CPU."""


@recorded
def load_denoiser(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "float32",
    tokenizer_from: str | Path | None = None,
    read_up_to: int | None = None,
    frame: bool | None = None,
    device_map: str | dict[str, str | int] | None = None,
    offload_folder: str | Path | None = None,
) -> PretrainedDenoiser | SmdmDenoiser | TransformerDenoiser:
    """Load a masked model as a denoiser, whatever kind its files are of: frozen, in evaluation mode.

    It is on the CPU, unless a map says where its parts go. Remote code is loaded twice and must give the same logits
    both times.

    Args:
        name_or_path: a folder of a masked model of transformers, SMDM, LLaDA or Dream, or of a LoRA adapter to one; a
            hub name; a safetensors file of SMDM, such as
            `nieshen/SMDM/mdm_safetensors/mdm-170M-100e18.safetensors` on the hub; or a run folder.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run the code that comes with LLaDA or Dream.
        dtype: of the parameters, by its name in torch. A row alone and the same row in a batch agree to rounding: some
            1e-6 of the largest logit in float32, 1e-2 in bfloat16, where texts may come out differently.
        tokenizer_from: folder or hub name of another tokeniser than its own.
        read_up_to: longest canvas, tokens, of a run with rotary positions; as it was trained when left out.
        frame: put a start and an end token around every row, or neither; as its tokeniser does when left out.
        device_map: where the parts of a model go that one device cannot hold: `auto`, another name that accelerate
            knows, or devices by the names of parts, such as `cpu`, 0 or `disk`. They stay there, whatever the device
            of a fit.
        offload_folder: for what goes to the disk.

    Returns:
        A module; its `tokenizer` is None where there is none.

    Raises:
        UserError: it cannot be found, reached, read or trusted, or is no masked model.
    """
    wanted = str(dtype).removeprefix("torch.")
    if wanted not in DTYPES:
        raise UserError("dtype", f"unknown dtype {wanted!r}", f"use one of {', '.join(DTYPES)}")
    path = fetch(name_or_path, revision, field="denoiser")
    places: dict[str, Any] = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    try:
        how = Wanted(getattr(torch, wanted), trust_remote_code, tokenizer_from, frame, places)
        denoiser = _load(path, name_or_path, how)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = f"{name_or_path} in {wanted} does not fit into memory"
        raise UserError("memory", problem, "use dtype bfloat16, or device_map auto") from error
    if read_up_to is not None:
        if not isinstance(denoiser, TransformerDenoiser):
            raise UserError("read_up_to", "a public model knows its longest canvas", "leave it out")
        denoiser.read_up_to(read_up_to)
    denoiser.requires_grad_(False)
    return denoiser.eval()


def _load(path: Path, name: str | Path, how: Wanted) -> PretrainedDenoiser | SmdmDenoiser | TransformerDenoiser:
    is_run, is_adapter = (path / "run.json").is_file(), (path / ADAPTER).is_file()
    config = {} if path.is_file() or is_run or is_adapter else _read_config(path, name)
    kind = "smdm" if path.is_file() else None if is_run or is_adapter else _kind(config, name, how.trust)
    if (is_run or kind == "smdm") and (how.places or how.frame is not None):
        field = "device_map" if how.places else "frame"
        raise UserError(field, f"{name} is no model of transformers", "leave it out")
    if is_run:
        from orderppl.runs import load_run  # which builds what this module is part of

        denoiser: Any = load_run(path, trust=how.trust or None).denoiser
        if not isinstance(denoiser, nn.Module):
            raise UserError("denoiser", f"{name} is a run without a denoiser", "give one of train-denoiser")
        return denoiser.to(how.dtype)  # type: ignore[return-value]
    if is_adapter:
        return _load_adapter(path, how)
    if kind == "smdm":
        denoiser = load_smdm(path, how.dtype)
        own = path if path.is_dir() and any(path.glob("tokenizer*")) else smdm.TOKENIZER
        classes = denoiser.vocab_size
        try:
            with _without_reports():
                named = how.tokenizer_from or own
                denoiser.tokenizer = load_tokenizer(named, mask_index=classes, num_classes=classes)
        except UserError:  # of one that nobody named: texts need it, token ids do not
            if how.tokenizer_from or own == path:
                raise
        return denoiser
    return _adapt(path, config, kind, how, _pretrained_tokenizer(path, config, how))


def _read_config(path: Path, name: str | Path, file: str = "config.json") -> dict[str, Any]:
    try:
        if (path / file).stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        config = json.loads((path / file).read_text(encoding="utf-8"))
        return dict(config.items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        problem = f"{name} has no readable {file}"
        raise UserError("denoiser", problem, "give the folder or hub name of a model") from error


def _kind(config: dict[str, Any], name: str | Path, trust: bool) -> Kind:
    """Which loader reads a model with this config.json.

    Raises:
        UserError: none, or one that needs trust.
    """
    kind, auto_map = str(config.get("model_type", "")), config.get("auto_map") or {}
    if kind == smdm.MODEL_TYPE:
        return "smdm"
    if kind.startswith(BLOCKWISE):
        problem = f"{name} ({kind}) reads one block after another under an attention mask of its own sampler"
        raise UserError("denoiser", problem, "use a model that reads the whole canvas, such as LLaDA or Dream")
    if config.get("is_encoder_decoder"):
        problem = f"{name} ({kind}) has a decoder that writes from left to right"
        raise UserError("denoiser", problem, "use a masked model without a decoder")
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # slow to import

    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "masked_lm"
    if kind not in LOGIT_SHIFT and "AutoModelForMaskedLM" not in auto_map:
        known = ", ".join(("any AutoModelForMaskedLM", smdm.MODEL_TYPE, *LOGIT_SHIFT))
        raise UserError("denoiser", f"{name} ({kind or 'of no kind'}) is no masked model", f"use one of: {known}")
    if not trust:
        problem = f"{name} ({kind}) runs code that comes with its weights"
        raise UserError("trust_remote_code", problem, "read that code, then set trust_remote_code to true")
    return "remote"


def _pretrained_tokenizer(own: Path, config: dict[str, Any], how: Wanted) -> PretrainedTokenizer:
    """The tokeniser of a model, whose MASK counts where config.json names another one, as those of XLM do."""
    name = how.tokenizer_from or own
    options: dict[str, Any] = {"trust_remote_code": how.trust, "frame": how.frame}
    mask, classes = config.get("mask_token_id"), config.get("vocab_size")
    for mask_index in (mask, None):
        tokenizer = load_tokenizer(name, mask_index=mask_index, num_classes=classes, **options)
        spelt = getattr(getattr(tokenizer, "tokenizer", None), "mask_token_id", None)
        if spelt in (None, tokenizer.mask_index):
            break
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UserError("tokenizer_from", f"{name} is no tokeniser of transformers", "give a folder or hub name")
    return tokenizer


def _adapt(
    path: Path,
    config: dict[str, Any],
    kind: Kind | None,
    how: Wanted,
    tokenizer: PretrainedTokenizer,
    adapter: Path | None = None,
) -> PretrainedDenoiser:
    def load() -> PretrainedDenoiser:
        network = _load_network(path, config, kind, how, tokenizer.mask_index)
        if adapter is not None:
            add_lora(network, adapter)
        shift = LOGIT_SHIFT.get(str(config.get("model_type")), 0)
        options: dict[str, Any] = {"pad_index": tokenizer.pad_index, "logit_shift": shift}
        return PretrainedDenoiser(network, tokenizer.mask_index, tokenizer=tokenizer, **options)

    denoiser = load()
    if kind == "remote":
        logits = denoiser.probe()
        del denoiser  # one copy in memory at a time
        denoiser = load()
        check_loads_alike(logits, denoiser.probe(), str(path))
    return denoiser


def _load_network(path: Path, config: dict[str, Any], kind: Kind | None, how: Wanted, mask_index: int) -> Any:
    _check_sizes(config, *_check_weights(path))
    with _without_reports():
        if kind == "remote":
            network, info = load_remote(path, config["auto_map"], how.dtype, how.places)
        else:
            network, info = _load_masked_lm(path, how, mask_index)
    for name, *shapes in sorted(info.get("mismatched_keys") or ()):
        stored, wanted = (list(shape) for shape in shapes)
        problem = f"{name!r} of {path} has shape {stored}, its config.json wants {wanted}"
        raise UserError("denoiser", problem, "give weights and configuration of one model, or download it again")
    missing = sorted(info["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"{path} has no weights for {missing[0]!r}{others}"
        raise UserError("denoiser", problem, "use a checkpoint of a masked model, output head included")
    return network.eval()


def _check_sizes(config: dict[str, Any], tensors: int, numbers: int) -> None:
    """Refuse a config.json of more layers or wider ones than its weights can fill, before anything is made."""
    for name, value in config.items():
        most = tensors if "layer" in name else numbers
        if isinstance(value, int) and SIZE.search(name) and value > most:
            problem = f"its config.json wants {name} = {value}, its weights hold {tensors} tensors of {numbers} numbers"
            raise UserError("denoiser", problem, "give weights and configuration of one model, or download it again")


def _check_weights(folder: Path) -> tuple[int, int]:
    """Refuse pickled and damaged weights by a look at the headers; the number of tensors, and of what they hold."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        remedy = "convert them: AutoModelForMaskedLM.from_pretrained(...).save_pretrained(...) writes safetensors"
        raise UserError("denoiser", f"{folder} has no safetensors weights (pickled ones are not read)", remedy)
    sizes: list[int] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as held:
                sizes += [math.prod(held.get_slice(name).get_shape()) for name in held.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError("denoiser", f"{file} cannot be read ({error})", "download it again") from error
    return len(sizes), sum(sizes)


def _load_masked_lm(folder: Path, how: Wanted, mask_index: int) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForMaskedLM

    try:
        config = AutoConfig.from_pretrained(str(folder))
        config.mask_token_id = mask_index  # ESM looks for MASK in its input
        network, info = AutoModelForMaskedLM.from_pretrained(
            str(folder),
            config=config,
            dtype=how.dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the second result
            **how.places,
        )
    except Exception as error:  # what a wrong file leads to depends on the model
        if is_out_of_memory(error):
            raise
        problem = f"{folder} cannot be loaded ({first_line(error)})"
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


def _load_adapter(path: Path, how: Wanted) -> PretrainedDenoiser:
    """A masked model with a LoRA adapter (Hu et al. 2021) added to its weights."""
    name = str(_read_config(path, path, ADAPTER).get("base_model_name_or_path"))
    base = fetch(name, field="denoiser")
    config = _read_config(base, name)
    kind = _kind(config, name, how.trust)
    if kind == "smdm":
        raise UserError("denoiser", f"{path} adapts an SMDM", "merge it into the weights")
    own = path if any(path.glob("tokenizer*")) else base
    return _adapt(base, config, kind, how, _pretrained_tokenizer(own, config, how), path)


@torch.no_grad()
def add_lora(network: nn.Module, folder: Path) -> None:
    """Add the low-rank products of an adapter to the linear layers that they belong to: W <- W + alpha / r B A.

    Raises:
        UserError: the adapter is of another kind, or of another model.
    """
    settings = _read_config(folder, folder, ADAPTER)
    tensors = read_tensors(folder / ADAPTER_WEIGHTS)
    special = [key for key in ("use_dora", "fan_in_fan_out", "alpha_pattern", "rank_pattern") if settings.get(key)]
    special += [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    special += ["lora_alpha"] * (not isinstance(settings.get("lora_alpha"), int | float))
    if settings.get("peft_type") != "LORA" or special:
        what = special[0] if special else settings.get("peft_type")
        remedy = "merge it: PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(...)"
        raise UserError("denoiser", f"the adapter {folder} is more than low-rank products ({what})", remedy)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    for name in (name for name in tensors if name.endswith(".lora_A.weight")):
        place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer, first, second = layers.get(place), tensors[name], tensors.get(name.replace(".lora_A.", ".lora_B."))
        if layer is None or second is None or first.shape[0] != second.shape[1]:
            problem = f"the adapter {folder} changes {place!r}, which the model does not have"
            raise UserError("denoiser", problem, "load it with the model that it was trained on")
        rank = math.sqrt(len(first)) if settings.get("use_rslora") else len(first)
        change = settings["lora_alpha"] / rank * (second.double() @ first.double())
        if change.shape != layer.weight.shape:
            shapes = f"{list(change.shape)}, the model has {list(layer.weight.shape)}"
            problem = f"the adapter {folder} changes {place!r} of shape {shapes}"
            raise UserError("denoiser", problem, "load it with the model that it was trained on")
        if layer.weight.is_meta:
            raise UserError("device_map", f"{place!r} lies on the disk, where no adapter is added", "keep it elsewhere")
        layer.weight += change.to(layer.weight)
