"""Every architecture that transformers loads as a masked language model, tiny and random: read as it reads itself.

`pytest -s tests/models/test_denoisers_architectures.py` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from orderppl.errors import UserError
from orderppl.models.denoisers import PretrainedDenoiser, load_denoiser

from tiny_models import MASKED_LM, VOCABULARY, write_model

REFUSED = {
    "bart": "has a decoder that writes from left to right",
    "mbart": "has a decoder that writes from left to right",
    "mvp": "has a decoder that writes from left to right",
    "mra": "do not depend on the tokens at the others",  # without a GPU kernel its attention is zero
    "reformer": "other logits at each look",  # its hashing is random
}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("\n" + f"{'architecture':22}{'padding':9}{'first':>6} {'head':26}{'raw':>9}{'rows':>9}", *lines, sep="\n")


def placed(row: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A row on a canvas [1, size] with other tokens at its padding, and where it is attended."""
    state, attended = torch.randint(5, VOCABULARY, (1, size)), torch.zeros(1, size, dtype=torch.bool)
    state[0, columns], attended[0, columns] = row, True
    return state, attended


@pytest.mark.parametrize("kind", MASKED_LM)
@torch.no_grad()
def test_equals_the_raw_model_with_padding_anywhere(kind: str, tmp_path: Path, table: list[str]) -> None:
    """Rows with given tokens at both ends and inside, against the model on each row: 1e-5 of the largest logit."""
    if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    folder = write_model(tmp_path, kind)
    if kind in REFUSED:
        with pytest.raises(UserError, match=REFUSED[kind]):
            load_denoiser(folder)
        table.append(f"{kind:22}refused: {REFUSED[kind]}")
        return
    denoiser = load_denoiser(folder)
    assert isinstance(denoiser, PretrainedDenoiser)
    assert not denoiser.training
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    assert denoiser.tokenizer is not None
    assert (denoiser.vocab_size, denoiser.mask_index) == (VOCABULARY, denoiser.tokenizer.mask_index)
    raw = AutoModelForMaskedLM.from_pretrained(folder).eval()
    rows = torch.randint(5, VOCABULARY, (3, 9))
    rows[:, [2, 3, 5]] = denoiser.mask_index
    rows[:, 0], rows[0, 6] = 0, 2  # the start token; an end token inside
    sizes = (9, 5, 3)
    rows[torch.arange(3), torch.tensor(sizes) - 1] = 2
    attended = torch.arange(9) < torch.tensor(sizes)[:, None]
    together = denoiser(rows, attended)
    hidden = denoiser.hidden_states(rows, attended)
    torch.testing.assert_close(denoiser.output_logits(hidden), together, rtol=0, atol=0)
    off = {"raw": 0.0, "rows": 0.0}
    for row, size in enumerate(sizes):
        tokens = rows[row, :size]
        alone = denoiser(tokens[None], torch.ones(1, size, dtype=torch.bool))[0]
        expected = raw(input_ids=tokens[None], attention_mask=torch.ones(1, size, dtype=torch.long)).logits[0, :size]
        scale = float(expected.abs().max())
        off["raw"] = max(off["raw"], float((alone - expected).abs().max()) / scale)
        found = [together[row, :size]]
        for columns in (torch.arange(13 - size, 13), torch.randperm(13)[:size].sort().values):
            found.append(denoiser(*placed(tokens, columns, 13))[0, columns])
        off["rows"] = max(off["rows"], *(float((other - alone).abs().max()) / scale for other in found))
    head = denoiser.place or "-"
    table.append(
        f"{kind:22}{denoiser.padding:9}{denoiser.first_position!s:>6} {head:26}{off['raw']:9.0e}{off['rows']:9.0e}"
    )
    assert off["raw"] <= 1e-5 and off["rows"] <= 1e-5
    other = rows.clone()
    other[:, 1] = torch.where(rows[:, 1] == 7, 8, 7)
    assert (denoiser(other, attended) - together)[:, 2].abs().max() > 0  # it looks at other tokens
    if kind != "funnel":  # which does not read a row of one token, such as the padding that stands for an empty one
        assert denoiser(rows, torch.zeros_like(attended)).isfinite().all()
