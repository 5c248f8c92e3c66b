"""One batch in every form that users hold, wherever a batch is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from orderppl import Batch, RevealTraceGraph_ELBO, UserError, decode, fit
from orderppl.guides import PolicyGuide
from orderppl.inference.batches import BatchStream
from orderppl.models import PositionTable, UnmaskingModel
from orderppl.models.denoisers import MarkovChainDenoiser
from orderppl.policies import Plan, RandomSteps, Threshold

ROWS = [[0, 1, 1, 2, 3, 3], [3, 3, 3, 0, 0, 1], [2, 2, 2, 2, 1, 1], [1, 1, 0, 0, 0, 2]]
DENOISER = MarkovChainDenoiser(4, 0.85, 6)
FORMS: dict[str, Callable[[list[list[int]]], Any]] = {
    "list": list,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "list of tensors": lambda rows: [torch.tensor(row) for row in rows],
    "list of arrays": lambda rows: [np.array(row) for row in rows],
    "tensor": torch.tensor,
    "numpy": np.array,
    "numpy int32": lambda rows: np.array(rows, dtype=np.int32),
    "dict": lambda rows: {"tokens": rows},
    "BatchEncoding": lambda rows: BatchEncoding({"input_ids": rows, "token_type_ids": rows}),
    "datasets": lambda rows: datasets.Dataset.from_dict({"input_ids": rows}),
}
NO_BATCH: dict[str, Any] = {
    "loader": torch.utils.data.DataLoader(torch.tensor(ROWS)),
    "text": "2 + 3",
    "nothing": None,
    "ragged": [[1, 2], [1]],
    "huge": [[10**30]],
    "one row": [1, 2, 3],
    "unknown": {"tokens": ROWS, "attn_mask": ROWS},
}


@pytest.mark.parametrize("form", [*FORMS, "loader"])
def test_data_of_every_form(form: str) -> None:
    data = torch.utils.data.DataLoader(torch.tensor(ROWS), batch_size=3) if form == "loader" else FORMS[form](ROWS)
    assert BatchStream(data, 2).data.tokens.tolist() == ROWS
    model = UnmaskingModel(DENOISER, RandomSteps(), 3)
    guide = PolicyGuide(Plan(PositionTable(6, 3)), DENOISER, 3)
    assert fit(model, guide, data, updates=1, batch_size=2, progress=False).updates == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_every_form(form: str) -> None:
    model = UnmaskingModel(DENOISER, RandomSteps(), 3)
    guide = PolicyGuide(Plan(PositionTable(6, 3)), DENOISER, 3)
    torch.manual_seed(0)
    wanted = RevealTraceGraph_ELBO(2).loss(model, guide, Batch(torch.tensor(ROWS)))
    torch.manual_seed(0)
    assert RevealTraceGraph_ELBO(2).loss(model, guide, FORMS[form](ROWS)) == wanted
    hidden = [[4] * 6] * 2
    assert decode(DENOISER, Threshold(0.5), FORMS[form](hidden), max_steps=3).sequences.shape == (2, 6)


@pytest.mark.parametrize("form", NO_BATCH)
def test_what_is_no_batch_is_one_line(form: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(DENOISER, Threshold(0.5), NO_BATCH[form], max_steps=3)
    assert "\n" not in str(caught.value)


def test_a_batch_is_shown_in_one_line() -> None:
    assert repr(Batch(torch.tensor(ROWS))) == "Batch(4 x 6 tokens, nothing said of what is given)"
    assert repr(Batch(torch.tensor(ROWS), given=torch.tensor(ROWS) == 1)) == "Batch(4 x 6 tokens, 17 to reveal)"
