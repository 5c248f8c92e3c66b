"""A pretrained masked model of T-cell receptors, read from a package that ships its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orderppl.config import Configurable
from orderppl.data.tokenizers import ClosedTokenizer
from orderppl.wheels import load_wheel_tensors, wheel_file

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
PACKAGE, VERSION, WHAT = "sceptr", "1.2.0", "the model of T-cell receptors"
FILE = "SCEPTR_CDR3_only_MLM_only/state_dict.pt"
NAMES = {  # of the package -> of the module below, parts replaced in this order
    "_self_attention_stack._initial_projector.": "project.",
    "_self_attention_stack._standard_stack._self_attention_stack.": "encoder.",
    "_mlm_token_prediction_projector.projector.": "head.",
}


class ReceptorTokenizer(ClosedTokenizer):
    """One token per residue, and `:` between the two chains; ids are those of the pretrained model."""

    pad_index, mask_index, between_index = 0, 1, 2
    eos_index = 0  # chains have no end of their own

    def __init__(self) -> None:
        super().__init__(["<pad>", "<mask>", ":", *RESIDUES])


class ReceptorDenoiser(Configurable, nn.Module):
    """SCEPTR's masked model (Nagano et al., Cell Systems 2025) of the CDR3 loops of T-cell receptors: 3 layers x 64.

    A canvas is `alpha:beta`, the colon given. A residue is read as itself, its place in its chain from 0 to 1, and its
    chain; the model knows no other order, so that its start token may stand between the chains. Tokens that are no
    residues get -inf. The package is only searched for its files; its code is not imported.

    Raises:
        UserError: the package is missing or has other contents.
    """

    loads_weights = True  # of a package: no run has to keep them
    mask_index = ReceptorTokenizer.mask_index

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = ReceptorTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        found = torch.load(wheel_file(PACKAGE, VERSION, FILE, WHAT), map_location="cpu", weights_only=True)
        tensors = {name: tensor for name, tensor in found.items() if not name.startswith("_token_embedder.")}
        for old, new in NAMES.items():
            tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
        width = tensors["project.weight"].shape[0]
        self.project = nn.Linear(self.vocab_size - 1 + 3, width, bias=False)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(RESIDUES))
        load_wheel_tensors(self, tensors, PACKAGE, VERSION, WHAT)
        self.requires_grad_(False).eval()

    def forward(self, state: Tensor, attention_mask: Tensor) -> Tensor:
        """Score every position; see `orderppl.unmasking.Denoiser`."""
        attended = attention_mask.bool()
        is_between = (state == self.tokenizer.between_index) & attended
        is_second = is_between.cumsum(-1) > 0
        chains = torch.stack([~is_second, is_second], -1) & (attended & ~is_between)[..., None]  # [N, S, 2]
        place, size = (chains.cumsum(-2) - 1).clamp(min=0), chains.sum(-2, keepdim=True)
        share = torch.where(size > 1, place / (size - 1).clamp(min=1), 0.5)  # [N, S, 2]
        share = torch.where(chains, share, 0.0).sum(-1, keepdim=True)
        kind = F.one_hot(state.masked_fill(~attended, 0), self.vocab_size)[..., 1:]
        features = torch.cat([kind, share, chains], -1).to(self.project.weight.dtype)  # [N, S, V + 2]
        ignored = ~attended & attended.any(-1, keepdim=True)  # no softmax over nothing
        logits = self.head(self.encoder(self.project(features), src_key_padding_mask=ignored))
        return F.pad(logits, (self.vocab_size - len(RESIDUES), 0), value=-torch.inf)
