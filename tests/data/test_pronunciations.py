"""Words of a pronouncing dictionary, and their phones."""

from pathlib import Path

import pytest

from orderppl.data import Pronunciations
from orderppl.data.pronunciations import PHONES, PhoneTokenizer
from orderppl.errors import UserError

LINES = ["book B UH K", "book(2) B UW K", "a AH", *(f"w{i} {PHONES[i]} AH {PHONES[-i - 1]}" for i in range(30))]


def test_words_of_one_length_and_first_pronunciations_only(tmp_path: Path) -> None:
    file = tmp_path / "words.dict"
    file.write_text("\n".join(LINES))
    data = Pronunciations(str(file), length=3)
    splits = data.splits()
    names = [name for part in splits.values() for name in part.names]
    assert sorted(names) == sorted(["book", *(f"w{i}" for i in range(30))])
    train = splits["train"]
    assert train.batch.tokens.shape == (len(train), 3) and train.batch.latent.all()
    assert train.references[0] == next(line for line in LINES if line.startswith(train.names[0] + " ")).split(" ", 1)[1]


def test_what_is_no_phone_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "words.dict"
    file.write_text("book B UH K\ncat K AE1 T\n")
    with pytest.raises(UserError, match=r":2: not a phone of ARPAbet: cat: AE1"):
        Pronunciations(str(file), length=3).splits()
    with pytest.raises(UserError, match="length"):
        Pronunciations(str(file), length=0)


def test_phones_come_and_go_through_the_tokeniser() -> None:
    tokenizer = PhoneTokenizer()
    ids = tokenizer.encode("B UH K")
    assert tokenizer.decode([*ids, tokenizer.mask_index, tokenizer.pad_index]) == "B UH K"
    assert (tokenizer.mask_index, tokenizer.vocab_size) == (39, 42)
    with pytest.raises(UserError, match="Q is no phone"):
        tokenizer.encode("B Q")


def test_the_packaged_dictionary_has_many_words() -> None:
    splits = Pronunciations(length=8).splits()
    assert len(splits["train"]) > 10_000 and "aardvarks" in splits["test"].names
