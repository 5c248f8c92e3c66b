"""What a new user brings: a module, rows and a masked model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULE = '''"""A user's own guide, policy and network; nothing of orderppl knows them."""

import torch
from torch import nn

from orderppl.distributions import IndependentSet, StepwiseOrder
from orderppl.guides import Guide
from orderppl.policies import LogitPolicy, Policy


class MyGuide(Guide):
    """Step logits from an embedding of the tokens.

    Args:
        num_steps: T.
        num_tokens: ids there are.
        width: of the embedding.
    """

    def __init__(self, num_steps: int, num_tokens: int, width: int = 8) -> None:
        super().__init__(num_steps)
        self.network = nn.Sequential(nn.Embedding(num_tokens, width), nn.Linear(width, num_steps))

    def order(self, batch):
        return StepwiseOrder(self.network(batch.readable), batch.latent)


class MyPlan(MyGuide):
    """The same, blind to what is to be revealed, so that it can decode."""

    sees_tokens = False


class MyNetwork(nn.Module):
    """One logit per position, from how many are hidden; records nothing of its arguments."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([bias, 0.1]))

    def forward(self, state, tokens=None):
        share = state.masked.float().mean(-1, keepdim=True)
        return self.weight[0] + self.weight[1] * share.expand_as(state.masked.float())


class MyPolicy(LogitPolicy):
    """Reveals left positions with higher odds.

    Args:
        slope: log-odds per position.
    """

    def __init__(self, slope: float = -0.5) -> None:
        super().__init__()
        self.slope = slope

    def logits(self, state):
        place = torch.arange(state.masked.shape[-1], dtype=torch.get_default_dtype())
        return (self.slope * place).expand(state.masked.shape)
'''


TEXT = "paris is the capital of france tom has three and buys more apples red green two one five"
WORDS = TEXT.split()


def write_rows(path: Path, count: int = 12) -> Path:
    """JSON lines with prompts and responses of words."""
    rows = [
        {
            "prompt": f"tom has {WORDS[index % 3 + 14]} apples",
            "response": f"buys {WORDS[index % 5]} more {WORDS[index % 7]}",
        }
        for index in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def save_bert(folder: Path) -> Path:
    """A masked model of transformers with random weights and a tokeniser of its own."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer: Any = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder
