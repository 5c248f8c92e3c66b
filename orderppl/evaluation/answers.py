"""Answer parsing for GSM8K: one parser for all arms, compared as numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

import torch
from torch import Tensor

from orderppl.errors import UserError

# A sign counts when it does not follow an operand: "10-3" ends in 3, "= -3" in -3.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(r"#+\s*(-?\s*\$?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+))")
_ANY = re.compile(rf"(?<![\d.)])(?<![\d.)]\s)-\s*\$?\s*{_DIGITS}|{_DIGITS}")


def _to_number(text: str) -> Decimal:
    return Decimal(re.sub(r"[\s,$]", "", text))


def parse_answer(text: str, flexible: bool = False) -> Decimal | None:
    """Read the final answer of a response.

    Args:
        text: a full solution or an equation chain (`... #### 18`), or an executed program (`... # 18`).
        flexible: take the last number of the text, whatever stands before it.

    Returns:
        The number after the last `####` or `#` that a number follows (strict), or the last number (flexible); thousands
        separators and a dollar sign are dropped. None when there is none.
    """
    found = (_ANY if flexible else _MARKED).findall(text)
    return _to_number(found[-1]) if found else None


def answers_match(prediction: str, reference: str, flexible: bool = False) -> bool:
    """Whether a prediction's answer equals the reference's as a number.

    Args:
        prediction: decoded response; one without an answer is wrong.
        reference: reference response, always read strictly, or the bare answer.
        flexible: parse the prediction by its last number.

    Raises:
        UserError: when the reference has no answer.
    """
    expected = parse_answer(reference)
    if expected is None:
        bare = re.sub(r"[\s,$]", "", reference)
        if not re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)", bare):
            raise UserError("reference", f"no answer in {reference[-60:]!r}", "end it in '#### number'")
        expected = Decimal(bare)
    return parse_answer(prediction, flexible) == expected


def exact_match(predictions: Sequence[str], references: Sequence[str], flexible: bool = False) -> Tensor:
    """Compare the answers of predictions and references.

    Returns:
        float64 [N], 1 where the numbers are equal.

    Raises:
        UserError: for lists of different lengths, or a reference without an answer.
    """
    if len(predictions) != len(references):
        problem = f"{len(predictions)} predictions for {len(references)} references"
        raise UserError("predictions", problem, "give one prediction per reference")
    matches = [answers_match(p, r, flexible) for p, r in zip(predictions, references, strict=True)]
    return torch.tensor(matches, dtype=torch.float64)
