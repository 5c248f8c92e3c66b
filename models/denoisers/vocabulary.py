"""Pretrained masked models cut to fewer tokens: a smaller output head, the same logits for what is left."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from orderppl.data.tokenizers import PretrainedTokenizer
from orderppl.errors import UserError
from orderppl.files import TEMPORARY
from orderppl.models.denoisers.pretrained import PretrainedDenoiser

IDS = tuple(f"{name}_token_id" for name in ("pad", "mask", "bos", "eos", "sep", "cls", "unk", "decoder_start"))
MARK = re.compile("^(##|\u0120|\u2581)")  # what stands before a piece inside a word, or at its begin


@torch.no_grad()
def cut_vocabulary(denoiser: Any, used: Iterable[int], folder: Path) -> None:
    """Write a pretrained masked model with fewer tokens, and its tokeniser, as a folder that `load_denoiser` reads.

    Texts made of the tokens that are kept are split as before. Letters, digits and signs are kept, so that other words
    fall into smaller pieces.

    Args:
        denoiser: of `load_denoiser`, with a fast tokeniser.
        used: ids to keep; special tokens are kept, too.
        folder: appears complete; must not be there.

    Raises:
        UserError: a model or a tokeniser that cannot be cut.
    """
    if not isinstance(denoiser, PretrainedDenoiser) or not isinstance(denoiser.tokenizer, PretrainedTokenizer):
        problem = f"{type(denoiser).__name__} is no pretrained masked model with a tokeniser of its own"
        raise UserError("vocabulary", problem, "leave it whole, or use load_denoiser")
    tokenizer = denoiser.tokenizer.tokenizer
    if not tokenizer.is_fast:
        raise UserError("vocabulary", "a slow tokeniser cannot be cut", "use one with a tokenizer.json")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = _kept(spec, denoiser, used)
    new = {old: index for index, old in enumerate(kept)}
    small = _cut_network(denoiser, kept, new)
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    small.save_pretrained(temporary)
    _cut_tokenizer(tokenizer, spec, new).save_pretrained(str(temporary))
    temporary.rename(folder)


def _kept(spec: dict[str, Any], denoiser: PretrainedDenoiser, used: Iterable[int]) -> list[int]:
    """What is left, in order: what is used, what that is merged from, special tokens and single letters."""
    assert isinstance(denoiser.tokenizer, PretrainedTokenizer)
    own, is_bpe = denoiser.tokenizer.tokenizer, spec["model"]["type"] == "BPE"
    kept = {int(token) for token in used} | {*own.all_special_ids, denoiser.mask_index, denoiser.pad_index}
    kept |= set(range(denoiser.first_position or 0))  # positions are counted from behind the id of padding
    pieces = ((index, MARK.sub("", token)) for index, token in enumerate(denoiser.tokenizer.tokens[: len(own)]))
    kept |= {index for index, piece in pieces if len(piece) < 2 and (is_bpe or piece.isascii())}
    if is_bpe:
        vocabulary = spec["model"]["vocab"]
        for left, right in reversed(_merges(spec["model"])):
            if vocabulary.get(left + right) in kept:
                kept |= {vocabulary[left], vocabulary[right]}
    return sorted(kept)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _cut_network(denoiser: PretrainedDenoiser, kept: list[int], new: Mapping[int, int]) -> PretrainedDenoiser:
    """The same network with the rows of these ids alone, compared with the whole one on some of them."""
    with denoiser.whole() as network:
        config, size = copy.deepcopy(network.config), network.config.vocab_size
        config.vocab_size = len(kept)
        for name in IDS:
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, new.get(getattr(config, name)))
        tensors = network.state_dict()
        dtype = next(network.parameters()).dtype
        small = type(network)(config).to(dtype).eval()
        try:
            small.load_state_dict({name: t[kept] if t.shape[:1] == (size,) else t for name, t in tensors.items()})
            other = PretrainedDenoiser(small, new[denoiser.mask_index], pad_index=new[denoiser.pad_index])
        except (RuntimeError, UserError) as error:
            problem = f"{type(network).__name__} cannot be made with fewer tokens"
            raise UserError("vocabulary", problem, "leave it whole") from error
    place = torch.linspace(0, len(kept) - 1, 16).long()[None]
    ids, seen = torch.tensor(kept), torch.ones_like(place, dtype=torch.bool)
    whole, found = denoiser(ids[place], seen)[..., ids].float(), other(place, seen).float()
    if not torch.allclose(whole, found, atol=1e-4 * float(whole.abs().max())):
        problem = f"{type(small).__name__} gives other logits with fewer tokens"
        raise UserError("vocabulary", problem, "leave it whole")
    return other


def _cut_tokenizer(tokenizer: Any, spec: dict[str, Any], new: Mapping[int, int]) -> Any:
    """The tokeniser with these ids alone, which get new numbers."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    model = spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    if model["type"] == "BPE":
        left = model["vocab"]
        model["merges"] = [[a, b] for a, b in _merges(model) if {a, b, a + b} <= set(left)]
    spec["added_tokens"] = [token | {"id": new[token["id"]]} for token in spec["added_tokens"] if token["id"] in new]
    spec["post_processor"] = _renumbered(spec["post_processor"], new)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        **tokenizer.special_tokens_map,
    )


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """What is put around texts, with other ids: `ids` of templates, and pairs of a token and its id."""
    if isinstance(part, list):
        is_pair = len(part) == 2 and isinstance(part[0], str) and isinstance(part[1], int)
        return [part[0], new[part[1]]] if is_pair else [_renumbered(item, new) for item in part]
    if not isinstance(part, dict):
        return part
    return {key: [new[i] for i in v] if key == "ids" else _renumbered(v, new) for key, v in part.items()}
