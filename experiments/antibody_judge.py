"""An independent model's opinion of antibody sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from orderppl.wheels import load_wheel_tensors, wheel_file

PACKAGE, VERSION, WHAT = "antiberty", "0.1.3", "the judge of antibodies"


class AntibodyJudge:
    """AntiBERTy (Ruffolo et al., arXiv 2112.07782): BERT, 8 layers x 512, trained on 558M natural antibody sequences.

    Its weights are read from the package; no code of it runs.

    Raises:
        UserError: the package is missing or has other contents.
    """

    def __init__(self) -> None:
        from transformers import BertConfig, BertForMaskedLM

        folder = "AntiBERTy_md_smooth"
        config, weights = (
            wheel_file(PACKAGE, VERSION, f"{folder}/{name}", WHAT, "judge")
            for name in ("config.json", "pytorch_model.bin")
        )
        vocabulary = wheel_file(PACKAGE, VERSION, "trained_models/vocab.txt", WHAT, "judge").read_text().split()
        self.ids = {token: index for index, token in enumerate(vocabulary)}
        known = {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"}
        known |= {"max_position_embeddings", "type_vocab_size", "layer_norm_eps", "hidden_act", "pad_token_id"}
        settings = json.loads(config.read_text(encoding="utf-8"))
        self.model = BertForMaskedLM(BertConfig(**{name: settings[name] for name in known})).eval()
        found = torch.load(weights, map_location="cpu", weights_only=True)
        own = set(self.model.state_dict())  # the checkpoint has further heads, too
        used = {name: tensor for name, tensor in found.items() if name in own}
        load_wheel_tensors(self.model, used, PACKAGE, VERSION, WHAT, "judge")

    @torch.no_grad()
    def nats(self, sequences: Sequence[str], every: int = 8) -> Tensor:
        """Negative pseudo-log-likelihood per residue, every residue predicted with seven in eight visible.

        Args:
            sequences: one-letter residues.
            every: residues i, i + every, ... are hidden together, for all i: so many forwards per sequence.

        Returns:
            float64 [N], nats per residue.
        """
        start, end, mask = (self.ids[token] for token in ("[CLS]", "[SEP]", "[MASK]"))
        special = [self.ids[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
        means = []
        for sequence in sequences:
            tokens = torch.tensor([self.ids[residue] for residue in sequence])  # [L]
            place = torch.arange(len(tokens))
            hidden = place % every == torch.arange(every)[:, None]  # [E, L]
            framed = F.pad(F.pad(torch.where(hidden, mask, tokens), (1, 0), value=start), (0, 1), value=end)
            logits = self.model(framed, torch.ones_like(framed)).logits[:, 1:-1]  # [E, L, V]
            logits[..., special] = -torch.inf
            log_prob = logits.log_softmax(-1).gather(-1, tokens.expand(every, -1)[..., None])[..., 0]
            means.append(-log_prob[place % every, place].double().mean())
        return torch.stack(means)
