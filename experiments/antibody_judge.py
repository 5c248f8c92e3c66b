"""What to say of antibody sequences: the opinion of an independent model, and how far apart their loops are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

from orderppl.data.sequences import antibody_regions
from orderppl.evaluation.intervals import bootstrap_mean
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
    def nats(self, sequences: Sequence[str], counted: Sequence[Tensor], every: int = 8) -> Tensor:
        """Negative pseudo-log-likelihood per residue, every residue predicted with seven in eight visible.

        Args:
            sequences: one-letter residues.
            counted: those that the mean is over, bool [L] of every sequence.
            every: residues i, i + every, ... are hidden together, for all i: so many forwards per sequence.

        Returns:
            float64 [N], nats per residue.
        """
        start, end, mask = (self.ids[token] for token in ("[CLS]", "[SEP]", "[MASK]"))
        special = [self.ids[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
        means = []
        for sequence, wanted in zip(sequences, counted, strict=True):
            tokens = torch.tensor([self.ids[residue] for residue in sequence])  # [L]
            place = torch.arange(len(tokens))
            hidden = place % every == torch.arange(every)[:, None]  # [E, L]
            framed = F.pad(F.pad(torch.where(hidden, mask, tokens), (1, 0), value=start), (0, 1), value=end)
            logits = self.model(framed, torch.ones_like(framed)).logits[:, 1:-1]  # [E, L, V]
            logits[..., special] = -torch.inf
            log_prob = logits.log_softmax(-1).gather(-1, tokens.expand(every, -1)[..., None])[..., 0]
            means.append(-log_prob[place % every, place][wanted].double().mean())
        return torch.stack(means)

    def records(
        self,
        arm: str,
        written: Sequence[str],
        wanted: Sequence[Tensor],
        regions: Sequence[Sequence[str]],
        natural: Sequence[str],
    ) -> list[dict[str, object]]:
        """What there is to say of domains.

        Args:
            arm: who wrote them.
            written: the domains.
            wanted: the residues that were written, bool [L] of every domain; the others were given.
            regions: of every residue.
            natural: domains to compare loops with.

        Returns:
            `judge_nats` per written residue. Per loop `natural_edits` and `edits_apart`, see `novelty`.
        """
        nats = self.nats(written, wanted)
        found: list[dict[str, object]] = [{"metric": "judge_nats", "n": len(nats), **vars(bootstrap_mean(nats))}]
        parts = [(domain, part) for domain in natural if (part := antibody_regions(domain)) is not None]
        for region in ("CDR1", "CDR2", "CDR3"):
            own = [_part(*row, region) for row in zip(written, regions, strict=False)]
            if all(own) and not all(bool(row.all()) for row in wanted):
                nearest, apart = novelty(own, [_part(*row, region) for row in parts])
                for metric, values in (("natural_edits", nearest), ("edits_apart", apart)):
                    found.append({"metric": metric, "region": region, "n": len(values), "value": mean(values)})
        return [{"arm": arm, **record} for record in found]


def _part(domain: str, regions: Sequence[str], region: str) -> str:
    return "".join(letter for letter, name in zip(domain, regions, strict=True) if name == region)


def edits(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements between two sequences (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def novelty(written: Sequence[str], natural: Sequence[str]) -> tuple[list[float], list[float]]:
    """Edits per residue of every written loop to the nearest natural one, and of every pair of written loops."""
    known = sorted(set(natural))
    nearest = {loop: min(edits(loop, other) for other in known) / len(loop) for loop in set(written)}
    pairs = {(a, b): 2 * edits(a, b) / (len(a) + len(b)) for a, b in combinations(sorted(set(written)), 2)}
    apart = [pairs.get((min(a, b), max(a, b)), 0.0) for a, b in combinations(written, 2)]
    return [nearest[loop] for loop in written], apart
