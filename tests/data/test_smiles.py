import pytest

from orderppl.config import build, describe
from orderppl.data.smiles import SmilesTokenizer, smiles_problem
from orderppl.data.tokenizers import Tokenizer
from orderppl.errors import UserError

VOCABULARY = ["[PAD]", "[SEP]", "[MASK]", *"CNOcn()=1%.", "Cl", "[C@@H]", "[O-]", "%10", ">>"]


@pytest.mark.parametrize(
    "text",
    [
        "C",
        "CC(=O)NCc1ccccc1",
        "[Na+].[O-]c1ccc2c(c1)C(=O)N2",
        "C1CC2(C1)OCCO2",
        "C%10CC%10",
        "C=1CCCCC1",
        "F/C=C\\F",
        "N[C@@H](C)C(=O)[O-]",
        "[13CH4]",
        "C(C)(C)(C)C",
        "[NH4+].[Cl-]",
        "[Fe+2]",
        "*C",
        "C(.O)N",
    ],
)
def test_well_formed(text: str) -> None:
    assert smiles_problem(text) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("C1CC", "ring bond 1 left open"),
        ("CC(C", "a branch left open"),
        ("CC)C", "a branch closed that is not open"),
        ("C()C", r"\) after \("),
        ("(C)C", r"\( at the start"),
        ("C==C", "= after bond"),
        ("C=", "the end after bond"),
        ("=C", "= at the start"),
        ("C(=)C", r"\) after bond of a branch"),
        ("C(=1)C", "1 after bond of a branch"),
        ("C(C)1CC1", r"1 after \)"),
        ("C11", "a ring bond of an atom to itself"),
        ("C.", "the end after ."),
        ("C..C", r"\. after \."),
        ("[C@H", "characters"),
        ("[H2C]", "bracket atom"),
        ("CXC", "characters"),
        ("C>>C", ">> after atom"),
    ],
)
def test_problems(text: str, problem: str) -> None:
    found = smiles_problem(text)
    assert found is not None
    with pytest.raises(ValueError, match=problem):
        raise ValueError(found)


def test_tokenizer() -> None:
    tokenizer = SmilesTokenizer(VOCABULARY)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.pad_index, tokenizer.eos_index, tokenizer.mask_index, tokenizer.vocab_size) == (0, 1, 2, 19)
    text = "ClC(=O)[C@@H]C%10.[O-]>>c1nc1"
    ids = tokenizer.encode(text)
    assert [tokenizer.tokens[i] for i in ids[:6]] == ["Cl", "C", "(", "=", "O", ")"]
    assert tokenizer.decode([0, *ids, 2, 1, 3]) == text
    assert tokenizer.encode_with_spans("Cl(C%10") == (tokenizer.encode("Cl(C%10"), [(0, 2), (2, 3), (3, 4), (4, 7)])
    assert build(describe(tokenizer)).tokens == tokenizer.tokens
    with pytest.raises(UserError, match=r"F is not in the vocabulary"):
        tokenizer.encode("CF")
    with pytest.raises(UserError, match="characters that belong to no token"):
        tokenizer.encode("C C")
    with pytest.raises(UserError, match=r"it has no \[SEP\]"):
        SmilesTokenizer(["[PAD]", "[MASK]"])
