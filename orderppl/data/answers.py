"""Answers of texts: one parser for all arms, and functions that say whether texts are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

import torch
from torch import Tensor

from orderppl.errors import UserError

Grade = Callable[[Sequence[str], Sequence[str]], Tensor]
"""(texts, references) -> float64 [N], 1 where a text is right."""

# As LaTeX and typesetters write numbers: 9{,}500, \$5, a minus of its own.
_AS_TYPED = str.maketrans({"\u2212": "-", "\ufe63": "-", "\uff0d": "-", "\uff0b": "+"})
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_NUMBER = r"((?:[-+]\s*\$?|\$\s*[-+]?)?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+))"
# What a number must stand behind, the surest first: `#### 18 (see note #2)` is 18.
_MARKED = tuple(re.compile(mark + r"\s*" + _NUMBER) for mark in (r"#{4,}", r"\\boxed\s*\{", r"#+"))
# A sign counts when it does not follow an operand: "10-3" ends in 3, "= -3" in -3.
_ANY = re.compile(rf"(?<![\d.)])(?<![\d.)]\s)-\s*\$?\s*{_DIGITS}|{_DIGITS}")


def parse_answer(text: str, flexible: bool = False) -> Decimal | None:
    r"""Read the final answer of a response.

    Args:
        text: a full solution or an equation chain (`... #### 18`), or an executed program (`... # 18`).
        flexible: take the last number of the text, whatever stands before it.

    Returns:
        The number after the last `####`, in the last `\boxed{}` or after the last `#`, whichever is found first in this
        order (strict), or the last number (flexible); signs of dollars and thousands are dropped. None without one.
    """
    plain = text.translate(_AS_TYPED).replace("{,}", ",").replace("\\$", "$")
    for pattern in (_ANY,) if flexible else _MARKED:
        found = pattern.findall(plain)
        if found:
            return Decimal(re.sub(r"[\s,$]", "", found[-1]))
    return None


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
        expected = parse_answer(f"#### {reference}")
        if expected is None or not re.fullmatch(r"[-+\s$]*[\d.,{}]+\s*", reference.translate(_AS_TYPED)):
            raise UserError("reference", f"no answer in {reference[-60:]!r}", "end it in '#### number'")
    return parse_answer(prediction, flexible) == expected


def exact_match(predictions: Sequence[str], references: Sequence[str], flexible: bool = False) -> Tensor:
    """Compare the answers of predictions and references as numbers: float64 [N], 1 where they are equal.

    Args:
        predictions: texts.
        references: as many texts.
        flexible: the last number of a prediction is its answer; else the one behind `####`.
    """
    return graded(predictions, references, lambda text, reference: answers_match(text, reference, flexible))


def flexible_match(predictions: Sequence[str], references: Sequence[str]) -> Tensor:
    """As `exact_match`, with the last number of a prediction as its answer."""
    return exact_match(predictions, references, flexible=True)


def same_text(predictions: Sequence[str], references: Sequence[str]) -> Tensor:
    """Compare texts letter by letter, white space at both ends apart: float64 [N].

    Args:
        predictions: texts.
        references: as many texts.
    """
    return graded(predictions, references, lambda text, reference: text.strip() == reference.strip())


def graded(texts: Sequence[str], references: Sequence[str], is_right: Callable[[str, str], bool]) -> Tensor:
    """Judge texts one by one: float64 [N], 1 where one is right; refuses lists of different lengths."""
    if len(texts) != len(references):
        problem = f"{len(texts)} predictions for {len(references)} references"
        raise UserError("predictions", problem, "give one prediction per reference")
    right = [is_right(*pair) for pair in zip(texts, references, strict=True)]
    return torch.tensor(right, dtype=torch.float64)
