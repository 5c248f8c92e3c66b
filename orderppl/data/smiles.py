"""SMILES strings: tokens of a given vocabulary, and a check of the syntax."""

from __future__ import annotations

import re
from collections.abc import Sequence

from orderppl.data.tokenizers import ClosedTokenizer
from orderppl.errors import UserError

# Atom-level tokens (Schwaller et al., ACS Cent. Sci. 2019): one per bracket atom, element, bond, branch, ring digit.
TOKEN = re.compile(r"\[[^\]]+]|Br?|Cl?|[NOSPFIbcnosp]|[().=#\-+\\/:~@?*$]|>>?|%[0-9]{2}|[0-9]")
BRACKET_ATOM = re.compile(
    r"\[[0-9]*([A-Z][a-z]?|[a-z]{1,2}|\*)(@[A-Z]*[0-9]*|@@)?(H[0-9]*)?([+-]+|[+-][0-9]+)?(:[0-9]+)?]"
)
BONDS = tuple("-=#:/\\~$")
_ATOM = {"atom", "bond", "ring bond", "(", ")", ".", "end"}
MAY_FOLLOW = {
    "start": {"atom"},
    "atom": _ATOM,
    "ring bond": _ATOM,
    ")": {"atom", "bond of a branch", "(", ")", ".", "end"},
    "(": {"atom", "bond of a branch", "."},
    "bond": {"atom", "ring bond"},
    "bond of a branch": {"atom"},
    ".": {"atom"},
}


class SmilesTokenizer(ClosedTokenizer):
    """Atom-level tokens of SMILES.

    Args:
        vocabulary: the tokens by id, `[PAD]`, `[MASK]` and `[SEP]` (which ends a sequence) among them.

    Raises:
        UserError: one of the three is missing.
    """

    piece = TOKEN

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__(vocabulary)
        missing = {"[PAD]", "[MASK]", "[SEP]"} - set(self._ids)
        if missing:
            raise UserError("vocabulary", f"it has no {', '.join(sorted(missing))}", "give that of a BERT-like model")
        self.pad_index, self.mask_index, self.eos_index = (self._ids[t] for t in ("[PAD]", "[MASK]", "[SEP]"))


def smiles_problem(text: str) -> str | None:
    """What is wrong with the syntax of a SMILES string; None for a well-formed one.

    Checked by the grammar of OpenSMILES: tokens and what may follow what, bracket atoms, branches that close, ring
    bonds that open and close between two atoms. Valences, aromaticity and elements are not.
    """
    pieces = TOKEN.findall(text)
    if "".join(pieces) != text:
        return "characters that are none of SMILES"
    branches: list[int] = []  # the atom that each open branch hangs on
    rings: dict[str, int] = {}  # the atom that each open ring bond starts from
    atoms, here, previous = 0, 0, "start"
    for piece in pieces:
        kind = _kind(piece, previous)
        if kind not in MAY_FOLLOW[previous]:
            return f"{piece} {'at the start' if previous == 'start' else 'after ' + previous}"
        if kind == "atom":
            if piece[0] == "[" and not BRACKET_ATOM.fullmatch(piece):
                return f"bracket atom {piece}"
            atoms += 1
            here = atoms
        elif kind == "(":
            branches.append(here)
        elif kind == ")":
            if not branches:
                return "a branch closed that is not open"
            here = branches.pop()
        elif kind == "ring bond":
            number = piece.lstrip("%").lstrip("0") or "0"
            opened = rings.pop(number, None)
            if opened is None:
                rings[number] = here
            elif opened == here:
                return "a ring bond of an atom to itself"
        previous = kind
    if "end" not in MAY_FOLLOW[previous]:
        return f"the end after {previous}" if pieces else "empty"
    if branches:
        return "a branch left open"
    return f"ring bond {next(iter(rings))} left open" if rings else None


def _kind(piece: str, previous: str) -> str:
    """Name of a token in the grammar; a bond that a branch begins or ends with cannot be one of a ring."""
    if piece in BONDS:
        return "bond" if previous in ("atom", "ring bond") else "bond of a branch"
    if piece[-1].isdigit() and piece[0] != "[":
        return "ring bond"
    return piece if piece in "().>@+?" or piece == ">>" else "atom"
