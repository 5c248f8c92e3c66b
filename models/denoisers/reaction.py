"""A pretrained masked model of chemical reactions, read from a package that ships its weights."""

from __future__ import annotations

import json

import torch

from orderppl.config import Configurable
from orderppl.data.smiles import SmilesTokenizer
from orderppl.models.denoisers.pretrained import PretrainedDenoiser
from orderppl.wheels import load_wheel_tensors, wheel_file

PACKAGE, VERSION = "rxnmapper", "0.4.3"
FOLDER = "albert_heads_8_uspto_all_1310k"
WHAT = "the reaction model"
IMPOSSIBLE = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ">>")  # the last stands between reactants and product


class ReactionDenoiser(Configurable, PretrainedDenoiser):
    """RXNMapper's language model (Schwaller et al., Science Advances 2021): ALBERT, 12 shared layers x 256.

    A canvas is `reactants>>product`; the prompt is `reactants>>`. The pretrained model's start and end tokens are put
    around every row here. Special tokens and the arrow get -inf. The package is only searched for its files; its code
    is not imported.

    Raises:
        UserError: the package is missing or has other contents.
    """

    loads_weights = True  # of a package: no run has to keep them

    def __init__(self) -> None:
        from transformers import AlbertConfig, AlbertForMaskedLM  # slow to import

        config, weights, vocabulary = (
            wheel_file(PACKAGE, VERSION, f"{FOLDER}/{name}", WHAT)
            for name in ("config.json", "pytorch_model.bin", "vocab.txt")
        )
        tokenizer = SmilesTokenizer(vocabulary.read_text(encoding="utf-8").splitlines())
        settings = json.loads(config.read_text(encoding="utf-8")) | {"vocab_size": tokenizer.vocab_size}
        network = AlbertForMaskedLM(AlbertConfig(**settings))
        found = torch.load(weights, map_location="cpu", weights_only=True)
        # Of a pooler the checkpoint has weights that no masked model uses.
        used = {name: tensor for name, tensor in found.items() if ".pooler." not in name}
        load_wheel_tensors(network, used, PACKAGE, VERSION, WHAT)
        start, end = (tokenizer.tokens.index(token) for token in ("[CLS]", "[SEP]"))
        super().__init__(
            network,
            tokenizer.mask_index,
            tokenizer=tokenizer,
            pad_index=tokenizer.pad_index,
            padding="square",  # of a mask [N, S] transformers asks whether it hides anything: a device has to wait
            frame=(start, end),
            impossible=[i for i, t in enumerate(tokenizer.tokens) if t in IMPOSSIBLE or t.startswith("[unused")],
        )
