"""A pretrained masked model of human antibody variable domains, read from a package that ships its weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from orderppl.config import Configurable
from orderppl.data.tokenizers import LetterTokenizer
from orderppl.errors import UserError
from orderppl.models.denoisers.pretrained import PretrainedDenoiser
from orderppl.wheels import load_wheel_tensors, wheel_file

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
PACKAGE, VERSION, WHAT = "sapiens", "1.0.5", "the antibody model"
NAMES = {  # of fairseq's RoBERTa -> of that of transformers, parts replaced in this order
    "decoder.sentence_encoder.": "roberta.",
    "decoder.lm_head.weight": "lm_head.decoder.weight",
    "decoder.lm_head.": "lm_head.",
    "roberta.embed_tokens.": "roberta.embeddings.word_embeddings.",
    "roberta.embed_positions.": "roberta.embeddings.position_embeddings.",
    "roberta.emb_layer_norm.": "roberta.embeddings.LayerNorm.",
    "roberta.layers.": "roberta.encoder.layer.",
    ".self_attn_layer_norm.": ".attention.output.LayerNorm.",
    ".self_attn.out_proj.": ".attention.output.dense.",
    ".self_attn.q_proj.": ".attention.self.query.",
    ".self_attn.k_proj.": ".attention.self.key.",
    ".self_attn.v_proj.": ".attention.self.value.",
    ".final_layer_norm.": ".output.LayerNorm.",
    ".fc1.": ".intermediate.dense.",
    ".fc2.": ".output.dense.",
}


class AntibodyDenoiser(Configurable, PretrainedDenoiser):
    """Sapiens (Prihoda et al., mAbs 2022): RoBERTa with 4 layers x 128, trained on human antibody domains.

    The canvas holds residues only; the start and end tokens of the pretrained model are put around every row here.
    Tokens that are not residues get -inf. The package is only searched for its files; its code is not imported.

    Args:
        chain: heavy (`H`) or light (`L`) chains.

    Raises:
        UserError: the package is missing or has other contents.
    """

    loads_weights = True  # of a package: no run has to keep them

    def __init__(self, chain: Literal["H", "L"] = "H") -> None:
        from transformers import RobertaConfig, RobertaForMaskedLM  # slow to import

        if chain not in ("H", "L"):
            raise UserError("chain", f"unknown antibody chain {chain!r}", "use H or L")
        path = wheel_file(PACKAGE, VERSION, f"checkpoint_v{chain.lower()}.pt", WHAT)
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(path, map_location="cpu", weights_only=True)["model"]
        tensors, tokenizer = _renamed(weights), LetterTokenizer(RESIDUES)  # whose ids are those of the model
        positions, width = tensors["roberta.embeddings.position_embeddings.weight"].shape
        network = RobertaForMaskedLM(
            RobertaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=width,
                num_hidden_layers=4,
                num_attention_heads=8,
                intermediate_size=256,
                max_position_embeddings=positions,  # those of <s> and </s>, and fairseq's offset of 2, are among them
                type_vocab_size=1,
                layer_norm_eps=1e-5,
                pad_token_id=tokenizer.pad_index,
            )
        )
        load_wheel_tensors(network, tensors, PACKAGE, VERSION, WHAT)
        super().__init__(
            network,
            tokenizer.mask_index,
            tokenizer=tokenizer,
            pad_index=tokenizer.pad_index,
            frame=(tokenizer.tokens.index("<s>"), tokenizer.eos_index),
            impossible=[index for index, token in enumerate(tokenizer.tokens) if token not in RESIDUES],
        )


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a fairseq checkpoint by the names of transformers."""
    renamed = {}
    for name, tensor in weights.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    width = renamed["lm_head.dense.weight"].shape[0]
    renamed["lm_head.decoder.bias"] = renamed["lm_head.bias"]
    return renamed | {"roberta.embeddings.token_type_embeddings.weight": torch.zeros(1, width)}  # it knows no segments
