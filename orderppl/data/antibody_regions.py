"""Framework and complementarity-determining regions of heavy variable domains, found by their conserved residues."""

from __future__ import annotations

import re

REGIONS = ("FR1", "CDR1", "FR2", "CDR2", "FR3", "CDR3", "FR4")
# After the rules by which loops are found by eye (A. C. R. Martin, "How to identify the CDRs by looking at a
# sequence"): CDR1 four residues behind a cysteine and before a tryptophan, CDR2 fifteen behind CDR1, CDR3 three behind
# the second cysteine and before W-G-x-G.
_DOMAIN = re.compile(
    r"(?P<FR1>.{16,24}C.{3})(?P<CDR1>.{8,14}?)(?P<FR2>[WV][VIFALY].{12})(?P<CDR2>.{13,20}?)"
    r"(?P<FR3>[KRQTHSN][VFLAIST][TSIAVMP].{25,29}C.{2})(?P<CDR3>.{1,32}?)(?P<FR4>[A-Z]G.G.{4,8})$"
)


def antibody_regions(sequence: str) -> list[str] | None:
    """Region of every residue of a heavy variable domain; None where its landmarks are not found.

    Args:
        sequence: one-letter residues.
    """
    found = _DOMAIN.match(sequence)
    return None if found is None else [name for name in REGIONS for _ in found[name]]
