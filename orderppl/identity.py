"""What a denoiser is: what must be the same of one that a learned order is used with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.config import describe
from orderppl.data.tokenizers import tokenizer_fingerprint
from orderppl.errors import UserError


def tensors_of(thing: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a module's state, the tensors themselves; none of anything else."""
    if isinstance(thing, nn.Module):
        yield from thing.state_dict(keep_vars=True).items()


def is_loaded(denoiser: Any) -> bool:
    """Whether its weights are kept elsewhere: a function has loaded it, or its class says `loads_weights`."""
    maker = getattr(denoiser, "__dict__", {}).get("_made_by", (type(denoiser),))[0]
    return not isinstance(maker, type) or bool(getattr(denoiser, "loads_weights", False))


def identity_of(denoiser: Any) -> dict[str, Any]:
    """What must be the same of a denoiser that an order is used with: vocabulary, MASK, tokens; and its weights."""
    tokenizer = getattr(denoiser, "tokenizer", None)
    given = describe(denoiser).get("init_args", {}) if is_loaded(denoiser) else {}
    return {
        "name": given.get("name_or_path"),
        "vocab_size": int(denoiser.vocab_size),
        "mask_index": int(denoiser.mask_index),
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "weights": weights_digest(denoiser) if is_loaded(denoiser) else None,
    }


def weights_digest(module: Any) -> str:
    """Sixteen hexadecimal digits that tell other weights apart: of the sums of the bit patterns, on any device."""
    sums = {name: bit_sum(module, name, tensor) for name, tensor in tensors_of(module)}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def bit_sum(module: nn.Module, name: str, tensor: Tensor) -> int:
    """The sum of the bit patterns of a named tensor of a module, exact on any device."""
    if tensor.is_meta:  # it lies on the disk, and is read for a moment
        from accelerate.utils.modeling import align_module_device

        place, _, own = name.rpartition(".")
        with align_module_device(module.get_submodule(place)):
            return bit_sum(module, name, getattr(module.get_submodule(place), own))
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(tensor.detach().contiguous().view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def check_denoiser(known: Mapping[str, Any] | None, denoiser: Any, source: object, weights: bool = True) -> None:
    """Refuse another denoiser than a run was learned for.

    Args:
        known: the run's `identity_of` it.
        denoiser: what is there.
        source: the run, for messages.
        weights: compare the weights too.

    Raises:
        UserError: another vocabulary, MASK or tokeniser, or other weights.
    """
    if known is None:
        return
    found = identity_of(denoiser)
    words = {"vocab_size": "token classes", "mask_index": "as MASK", "tokenizer": "as fingerprint of its tokens"}
    remedy = f"use {known['name'] or 'the one it was learned for'}, or learn an order for this one"
    for name, word in words.items():
        if known[name] is not None and found[name] is not None and known[name] != found[name]:
            problem = f"has {found[name]} {word}, {source} was learned for {known[name]}"
            raise UserError("denoiser", problem, remedy)
    if weights and known["weights"] is not None and found["weights"] != known["weights"]:
        raise UserError("denoiser", f"its weights are not those that {source} was learned with", remedy)
