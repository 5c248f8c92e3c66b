"""Exact denoisers of trigram models: of any table, and of English pronunciations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.data.pronunciations import PACKAGE, PHONES, VERSION, PhoneTokenizer
from orderppl.errors import UserError
from orderppl.models.denoisers.evidence import evidence_by_place
from orderppl.wheels import wheel_file


class TrigramDenoiser(nn.Module):
    """Exact conditionals p(x_i | the revealed tokens) of a trigram model of rows of known length.

        p(x) = p(x_0) p(x_1 | x_0) prod_{i >= 2} p(x_i | x_{i-2}, x_{i-1})

    Forward-backward over pairs of neighbours, with e_i(b) = 1 where x_i is hidden and [b = x_i] where it is revealed:

        alpha_i(a, b) = e_i(b) sum_z p(b | z, a) alpha_{i-1}(z, a)
        beta_i(a, b)  = sum_c p(c | a, b) e_{i+1}(c) beta_{i+1}(b, c)
        p(x_i = b | revealed)  ~  sum_a alpha_i(a, b) beta_i(a, b)

    One token at a time, every order has the same likelihood. MASK is the class behind the V tokens and gets no logit.

    Args:
        first: float [V], p(x_0).
        second: float [V, V], p(x_1 | x_0), rows sum to 1.
        third: float [V, V, V], p(c | a, b) at [a, b, c], the last dimension sums to 1.

    Raises:
        UserError: tables of other shapes, or a probability that is not positive.
    """

    first: Tensor
    second: Tensor
    after: Tensor
    before: Tensor

    def __init__(self, first: Tensor, second: Tensor, third: Tensor) -> None:
        super().__init__()
        size = len(first)
        if second.shape != (size, size) or third.shape != (size, size, size):
            raise UserError("third", f"tables of {size} tokens do not fit together", "give [V], [V, V] and [V, V, V]")
        if not all(bool((table > 0).all()) for table in (first, second, third)):
            raise UserError("third", "some probability is not positive", "smooth the counts")
        self.vocab_size = self.mask_index = size
        tables = {
            "first": first,
            "second": second,
            "after": third.permute(1, 0, 2),  # [previous, the one before, V]: a batch of matrices for alpha
            "before": third.permute(1, 2, 0),  # [previous, V, the one before]: for beta
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float().contiguous(), persistent=False)
        self.eval()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`. Padding, wherever it stands, takes no place."""
        attended = attention_mask.bool()
        length = state.shape[-1]
        evidence, place = evidence_by_place(state, attended, self.mask_index, length, self.first.dtype)
        said = self._posterior(evidence).log()  # [N, places, V]
        return said.gather(1, place.clamp(max=length - 1))

    def _posterior(self, evidence: Tensor) -> Tensor:
        """p(x_i | revealed) of every place up to a factor, float [N, places, V], from e of the same shape."""
        own = list(evidence.unbind(1))  # [N, V] each
        alone = self.first * own[0]
        if len(own) == 1:
            return alone.unsqueeze(1)
        # Pairs are kept as [V of the left one, N, V of the right one], so that a step is one batch of matrix products.
        alpha = [_scaled(alone.T.unsqueeze(-1) * self.second.unsqueeze(1) * own[1])]
        for here in own[2:]:
            alpha.append(_scaled(torch.bmm(alpha[-1].permute(2, 1, 0), self.after) * here))
        beta = torch.ones_like(alpha[-1])
        found = [(alpha[-1] * beta).sum(0)]
        for place in range(len(own) - 1, 1, -1):
            beta = _scaled(torch.bmm(own[place] * beta, self.before).permute(2, 1, 0))
            found.append((alpha[place - 2] * beta).sum(0))
        found.append((alpha[0] * beta).sum(-1).T)
        return torch.stack(found[::-1], 1)

    def log_evidence(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log-probability of whole rows, int64 [N, S] -> float [N], nats."""
        attended = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        total = torch.zeros(len(tokens))
        state = torch.where(attended, self.mask_index, tokens)
        for place in range(tokens.shape[-1]):
            said = self(state, attended)[:, place].log_softmax(-1)
            own = said.gather(-1, tokens[:, place : place + 1].clamp(max=self.vocab_size - 1))[:, 0]
            total = total + own.masked_fill(~attended[:, place], 0.0)
            state[:, place] = tokens[:, place]
        return total


def _scaled(pairs: Tensor) -> Tensor:
    """Pairs [V, N, V] that sum to 1 for every row: only their ratios matter."""
    return pairs / pairs.sum((0, 2), keepdim=True)


class PhoneDenoiser(Configurable, TrigramDenoiser):
    """English pronunciations: the trigram model of 39 phones that comes with PocketSphinx.

    Words of known length: what the model gives to the end of a word is spread over the phones.

    Raises:
        UserError: the package is missing.
    """

    loads_weights = True  # of a package: no run has to keep them

    def __init__(self) -> None:
        path = wheel_file(PACKAGE, VERSION, "en-us-phone.lm.bin", "the phone model")
        from pocketsphinx import Config, LogMath, NGramModel

        logarithm = LogMath()
        model = NGramModel(Config(), logarithm, str(path))

        def table(*context: str) -> list[float]:
            return [math.exp(logarithm.log_to_ln(model.prob([phone, *context]))) for phone in PHONES]

        first = torch.tensor(table("<s>"))
        second = torch.tensor([table(a, "<s>") for a in PHONES])
        third = torch.tensor([[table(b, a) for b in PHONES] for a in PHONES])
        super().__init__(*(each / each.sum(-1, keepdim=True) for each in (first, second, third)))
        self.tokenizer = PhoneTokenizer()
