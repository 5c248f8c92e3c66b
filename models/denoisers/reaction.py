"""A pretrained masked model of chemical reactions, read from a package that ships its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orderppl.errors import UserError
from orderppl.models.denoisers.framing import Framed, frame
from orderppl.models.denoisers.wheels import load_wheel_tensors, wheel_file

PACKAGE, VERSION = "rxnmapper", "0.4.3"
FOLDER = "albert_heads_8_uspto_all_1310k"
WHAT = "the reaction model"
ARROW = ">>"  # between reactants and product


class ReactionDenoiser(nn.Module):
    """RXNMapper's language model (Schwaller et al., Science Advances 2021): ALBERT, 12 shared layers x 256.

    A canvas is `reactants>>product` in the tokens of `vocabulary`; the prompt is `reactants>>`. The pretrained model's
    start and end tokens are put around the attended tokens here. Special tokens and the arrow get -inf.

    Args:
        config: settings of the architecture, as `transformers.AlbertConfig` reads them.
        vocabulary: the tokens by id.
    """

    def __init__(self, config: Mapping[str, Any], vocabulary: Sequence[str]) -> None:
        super().__init__()
        from transformers import AlbertConfig, AlbertForMaskedLM  # heavy, and needed for this denoiser alone

        self.vocabulary = list(vocabulary)
        self.vocab_size, self.mask_index = len(self.vocabulary), self.vocabulary.index("[MASK]")
        self.frame_tokens = tuple(self.vocabulary.index(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
        self.albert = AlbertForMaskedLM(AlbertConfig(**{**config, "vocab_size": self.vocab_size}))
        self.max_tokens = self.albert.config.max_position_embeddings - 2
        special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ARROW}
        impossible = [token in special or token.startswith("[unused") for token in self.vocabulary]
        self.impossible: Tensor
        self.register_buffer("impossible", torch.tensor(impossible), persistent=False)

    @classmethod
    def from_wheel(cls) -> ReactionDenoiser:
        """The published weights, trainable, in evaluation mode.

        The package is only searched for its files; its code is not imported.

        Raises:
            UserError: the package is missing or has other contents.
        """
        files = (
            wheel_file(PACKAGE, VERSION, f"{FOLDER}/{name}", WHAT) for name in ("config.json", "pytorch_model.bin")
        )
        config, weights = files
        denoiser = cls(json.loads(config.read_text(encoding="utf-8")), reaction_vocabulary())
        found = torch.load(weights, map_location="cpu", weights_only=True)
        # Of a pooler the checkpoint has weights that no masked model uses.
        used = {name: tensor for name, tensor in found.items() if ".pooler." not in name}
        load_wheel_tensors(denoiser.albert, used, PACKAGE, VERSION, WHAT)
        return denoiser.eval()

    def _framed(self, state: Tensor, attention_mask: Tensor) -> Framed:
        framed = frame(state, attention_mask, *self.frame_tokens)
        if framed.tokens.shape[-1] > self.max_tokens + 2:
            raise UserError(
                "tokens",
                f"a reaction of {framed.tokens.shape[-1] - 2} tokens exceeds the model's {self.max_tokens}",
                "lower task.max_context or task.max_length",
            )
        return framed

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.denoising.Denoiser`.

        Raises:
            UserError: the canvas is longer than the position table.
        """
        framed = self._framed(state, attention_mask)
        # Of a mask [N, F] transformers asks whether it hides anything, which waits for the device.
        keys = framed.keys[:, None, None].expand(-1, 1, framed.keys.shape[-1], -1)  # [N, 1, F, F]
        hidden = self.albert.albert(framed.tokens, keys).last_hidden_state  # [N, F, W]
        logits: Tensor = self.albert.predictions(framed.unframe(hidden))
        return logits.masked_fill(self.impossible, -torch.inf)


def reaction_vocabulary() -> list[str]:
    """Tokens of the published model, by id.

    Raises:
        UserError: the package is missing.
    """
    path = wheel_file(PACKAGE, VERSION, f"{FOLDER}/vocab.txt", WHAT)
    return path.read_text(encoding="utf-8").splitlines()
