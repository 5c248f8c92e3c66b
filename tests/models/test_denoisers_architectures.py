"""Every architecture that transformers loads as a masked language model, tiny and random: read as it reads itself.

`pytest -s tests/models/test_denoisers_architectures.py` prints the table of `docs/public_models.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
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


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in MASKED_LM},
    "esm, absolute positions": ("esm", {"position_embedding_type": "absolute"}),
    "esm, an output head of its own": ("esm", {"tie_word_embeddings": False}),
    "modernbert, no bias in its output head": ("modernbert", {"decoder_bias": False}),
    "bert, an output head of its own": ("bert", {"tie_word_embeddings": False}),
}
PAGE = (Path(__file__).parents[2] / "docs" / "public_models.md").read_text("utf-8")
SHOWN_FOR = re.search(r"transformers (\d\S+), random weights", PAGE)
HEADER = "| architecture | told of padding by | positions from | output head | off the raw model | alone / in batch |"


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    print("\n" + HEADER, "|---|---|---|---|---|---|", *lines, sep="\n")


def check_line(line: str, table: list[str]) -> None:
    """The page shows the line, up to its measured numbers, if it was made with this version of transformers."""
    table.append(line)
    assert SHOWN_FOR is not None
    start = line if "refused" in line else " | ".join(line.split(" | ")[:4])
    assert SHOWN_FOR[1] != transformers.__version__ or f"\n{start} |" in PAGE or f"\n{start}\n" in PAGE, line


def test_every_architecture_of_this_transformers_is_here() -> None:
    """A new one needs a line in `MASKED_LM`, and is then read, or refused with a reason."""
    assert set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) <= set(MASKED_LM)
    assert set(REFUSED) <= set(MASKED_LM)
    rows = PAGE[PAGE.index(HEADER) :].split("\n\n")[0]
    shown = re.findall(r"^\| ([a-zA-Z_0-9-]+)(?: \||, )", rows, flags=re.MULTILINE)
    assert set(shown) - {"architecture"} == set(MASKED_LM)


def placed(row: Tensor, columns: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A row on a canvas [1, size] with other tokens at its padding, and where it is attended."""
    state, attended = torch.randint(5, VOCABULARY, (1, size)), torch.zeros(1, size, dtype=torch.bool)
    state[0, columns], attended[0, columns] = row, True
    return state, attended


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_the_raw_model_with_padding_anywhere(variant: str, tmp_path: Path, table: list[str]) -> None:
    """Rows with given tokens at both ends and inside, against the model on each row: 1e-5 of the largest logit."""
    kind, settings = VARIANTS[variant]
    if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {kind}")
    torch.manual_seed(0)
    folder = write_model(tmp_path, kind, **settings)
    if kind in REFUSED:
        with pytest.raises(UserError, match=REFUSED[kind]):
            load_denoiser(folder)
        check_line(f"| {kind} | refused: {REFUSED[kind]} | | | | |", table)
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
    first = "-" if denoiser.first_position is None else denoiser.first_position
    found_out = f"{denoiser.padding} | {first} | {denoiser.place or '-'}"
    check_line(f"| {variant} | {found_out} | {off['raw']:.0e} | {off['rows']:.0e} |", table)
    assert off["raw"] <= 1e-5 and off["rows"] <= 1e-5
    other = rows.clone()
    other[:, 1] = torch.where(rows[:, 1] == 7, 8, 7)
    assert (denoiser(other, attended) - together)[:, 2].abs().max() > 0  # it looks at other tokens
    if kind != "funnel":  # which does not read a row of one token, such as the padding that stands for an empty one
        assert denoiser(rows, torch.zeros_like(attended)).isfinite().all()
