"""Tokenisers: a small number/word vocabulary built from training texts, and any Hugging Face tokeniser."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from orderppl.errors import UserError, first_line
from orderppl.hub import TOKENIZER_FILES, fetch

PAD, MASK, EOS, UNK, JOIN = "<pad>", "<mask>", "<eos>", "<unk>", "<join>"
SPECIAL = (PAD, MASK, EOS, UNK, JOIN)  # ids 0..4
# a letter may be followed by digits (`r1` is one reference, not a number)
PIECE = re.compile(r"<<|>>|#+|[0-9]+|[^\W\d_]+[0-9]*|\s|.", re.DOTALL)

NumberMode = Literal["digits", "numbers"]


@runtime_checkable
class Tokenizer(Protocol):
    """What the data functions need of a tokeniser.

    Attributes:
        pad_index: id of the padding token.
        mask_index: id of the MASK token.
        eos_index: id of the end-of-sequence token.
        vocab_size: number of ids V.
        tokens: the V token strings, by id.
    """

    pad_index: int
    mask_index: int
    eos_index: int
    vocab_size: int
    tokens: list[str]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence; padding and MASK are left out."""
        ...

    def number_values(self) -> Tensor:
        """float [V]: the number a token stands for, nan for other tokens."""
        ...


def _kind(piece: str) -> str:
    """Class of a piece for spacing: all numerals alike, all words alike, anything else by itself."""
    if piece[0].isdecimal() and piece.isascii():
        return "0"
    return "a" if piece[0].isalpha() else piece


class WordTokenizer:
    """Words, operators and numbers, with a vocabulary built from training texts.

    The spaces between two kinds of pieces (numeral, word, each operator) are learnt as the most frequent gap in the
    training texts and cost no token; any other gap is spelt out by white-space tokens or JOIN. Texts whose words are
    in the vocabulary therefore survive `decode(encode(text))` unchanged.

    Args:
        vocabulary: pieces that follow the special tokens (pad 0, mask 1, eos 2, unk 3, join 4), in id order.
        number_mode: "digits" (each digit a token) or "numbers" (one token per numeral 0..max_number; others in digits).
        max_number: largest numeral with a token of its own.
        gaps: usual gap between two kinds of pieces; `("", "")` holds the gap of pairs that were never seen.
    """

    pad_index, mask_index, eos_index, unk_index, join_index = range(5)

    def __init__(
        self,
        vocabulary: Sequence[str],
        number_mode: NumberMode,
        max_number: int,
        gaps: dict[tuple[str, str], str],
    ) -> None:
        if number_mode not in ("digits", "numbers"):
            raise UserError("number_mode", f"{number_mode!r} is unknown", "use 'digits' or 'numbers'")
        if max_number < 9:
            raise UserError(
                "max_number", f"{max_number} is below 9", "numerals fall back to digits, so 0..9 are needed"
            )
        self.tokens: list[str] = [*SPECIAL, *vocabulary]
        self.vocab_size = len(self.tokens)
        self.number_mode: NumberMode = number_mode
        self.max_number = max_number
        self.gaps = gaps
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        self._known: dict[str, tuple[str, list[int]]] = {}
        if len(self._ids) != self.vocab_size:
            raise UserError("vocabulary", "a token occurs twice", "give each piece once")

    @classmethod
    def build(
        cls,
        texts: Iterable[str],
        number_mode: NumberMode = "numbers",
        max_number: int = 99,
        min_count: int = 1,
    ) -> WordTokenizer:
        """Collect the vocabulary and the usual gaps of `texts` (training texts only).

        Args:
            texts: prompts and responses, each a text of its own.
            number_mode: see the class.
            max_number: see the class; only numbers up to it get a token, whether seen or not.
            min_count: pieces seen less often become unk (white space and digits are always kept).
        """
        numbers = [str(n) for n in range(10 if number_mode == "digits" else max_number + 1)]
        counts: Counter[str] = Counter()
        seen_gaps: dict[tuple[str, str], Counter[str]] = {}
        for text in texts:
            previous, gap = "", ""
            for piece in PIECE.findall(text):
                if piece.isspace():
                    gap += piece
                    counts[piece] += min_count
                    continue
                kind = _kind(piece)
                if kind != "0":
                    counts[piece] += 1
                if previous:
                    seen_gaps.setdefault((previous, kind), Counter())[gap] += 1
                previous, gap = kind, ""
        # the most frequent gap; of equally frequent ones the shortest, so that the order of the texts does not matter
        gaps = {pair: min(found, key=lambda gap: (-found[gap], gap)) for pair, found in seen_gaps.items()}
        overall = sum(seen_gaps.values(), Counter[str]())
        gaps["", ""] = min(overall, key=lambda gap: (-overall[gap], gap), default="")
        gaps["0", "0"] = ""  # numerals in digits must join whatever the texts do
        gaps = {pair: gap for pair, gap in sorted(gaps.items()) if gap in ("", " ")}
        vocabulary = numbers + sorted(piece for piece, n in counts.items() if n >= min_count)
        if " " not in vocabulary:
            vocabulary.append(" ")
        return cls(vocabulary, number_mode, max_number, gaps)

    def _numeral(self, digits: str) -> list[str]:
        """Split a numeral into the tokens that spell it."""
        short = len(digits) <= len(str(self.max_number)) and (digits == "0" or digits[0] != "0")
        if self.number_mode == "numbers" and short and int(digits) <= self.max_number:
            return [digits]
        return list(digits)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; pieces outside the vocabulary become unk."""
        ids: list[int] = []
        previous, gap = "", ""
        for piece in PIECE.findall(text):
            if piece.isspace():
                gap += piece
                continue
            if piece not in self._known:
                kind = _kind(piece)
                parts = self._numeral(piece) if kind == "0" else [piece]
                if len(self._known) >= 100_000:  # a memory of pieces, not of the whole corpus
                    self._known.clear()
                self._known[piece] = kind, [self._id(part) for part in parts]
            kind, spelt = self._known[piece]
            if gap != (self._gap(previous, kind) if previous else ""):
                ids += [self._id(space) for space in gap] or [self.join_index]
            ids += spelt
            previous, gap = kind, ""
        return ids + [self._id(space) for space in gap]

    def _gap(self, left: str, right: str) -> str:
        return self.gaps.get((left, right), self.gaps.get(("", ""), ""))

    def _id(self, piece: str) -> int:
        return self._ids.get(piece, self.unk_index)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos; pad and mask are left out.

        Numeral tokens that the encoder would not have put side by side (`2`, `0` where `20` is a token) stay apart, so
        that a malformed number is never read as a right answer.
        """
        kept: list[str] = []
        for index in ids:
            if index == self.eos_index:
                break
            if index not in (self.pad_index, self.mask_index):
                kept.append(self.tokens[index])
        pieces: list[str] = []
        for numeral, run in groupby(kept, key=lambda piece: _kind(piece) == "0"):
            parts = list(run)
            if numeral and self._numeral("".join(parts)) != parts:
                parts = [part for number in parts for part in (" ", number)][1:]
            elif numeral:
                parts = ["".join(parts)]
            pieces += parts
        text, previous, spelt = "", "", False
        for piece in pieces:
            if piece == JOIN or piece.isspace():
                text += "" if piece == JOIN else piece
                spelt = True
                continue
            kind = _kind(piece)
            text += piece if spelt or not previous else self._gap(previous, kind) + piece
            previous, spelt = kind, False
        return text

    def number_values(self) -> Tensor:
        """float [V]: the value of number tokens (digits in digit mode), nan elsewhere."""
        return torch.tensor([float(t) if _kind(t) == "0" else float("nan") for t in self.tokens])  # [V]

    def save(self, path: str | Path) -> None:
        """Write the tokeniser as JSON (to a temporary name, then renamed)."""
        content = {
            "type": "WordTokenizer",
            "number_mode": self.number_mode,
            "max_number": self.max_number,
            "vocabulary": self.tokens[len(SPECIAL) :],
            "gaps": [[left, right, gap] for (left, right), gap in self.gaps.items()],
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> WordTokenizer:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or is not a saved tokeniser.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            gaps = {(left, right): gap for left, right, gap in content["gaps"]}
            return cls(content["vocabulary"], content["number_mode"], content["max_number"], gaps)
        except FileNotFoundError as error:
            raise UserError("tokenizer", f"{path} does not exist", "give the JSON file written by save()") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                "tokenizer", f"{path} is not a saved tokeniser ({error})", "write it again by save()"
            ) from error


class PretrainedTokenizer:
    """A Hugging Face tokeniser behind the interface of `Tokenizer`.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`; it needs an eos (or sep) token and, without `mask_index`, a mask token.
        mask_index: id of MASK in the model it belongs to; may lie behind the vocabulary.
        num_classes: token classes of the model's output head, often more than there are tokens. The ids that stand for
            no token decode to nothing.

    Raises:
        UserError: one of these tokens is missing, or there are fewer classes than tokens.
    """

    def __init__(self, tokenizer: Any, mask_index: int | None = None, num_classes: int | None = None) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        mask_index = tokenizer.mask_token_id if mask_index is None else mask_index
        if mask_index is None:
            raise UserError(
                "tokenizer",
                f"{name} has no mask token",
                "use the tokeniser of a masked model, or add one by "
                "tokenizer.add_special_tokens({'mask_token': '<mask>'}) and save_pretrained",
            )
        if eos is None:
            raise UserError(
                "tokenizer",
                f"{name} has neither an eos nor a sep token",
                "add one by tokenizer.add_special_tokens({'eos_token': '<eos>'}) and save_pretrained",
            )
        spelt = len(tokenizer)
        if num_classes is not None and any(token != mask_index for token in range(num_classes, spelt)):
            problem = f"{name} has {spelt} tokens, the model has classes for {num_classes}"
            raise UserError("tokenizer", problem, "use the tokeniser that the model was trained with")
        self.tokenizer = tokenizer
        self.pad_index, self.mask_index, self.eos_index = int(pad), int(mask_index), int(eos)
        self.vocab_size = max(spelt, num_classes or 0, self.mask_index + 1)
        unused = [MASK if token == self.mask_index else f"<unused{token}>" for token in range(spelt, self.vocab_size)]
        self.tokens: list[str] = [str(t) for t in tokenizer.convert_ids_to_tokens(list(range(spelt)))] + unused

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence; special tokens are left out."""
        kept: list[int] = []
        for index in ids:
            if index == self.eos_index:
                break
            if index not in (self.pad_index, self.mask_index) and index < len(self.tokenizer):
                kept.append(int(index))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def number_values(self) -> Tensor:
        """float [V]: the value of tokens that are whole numerals (leading-space marks ignored), nan elsewhere."""
        plain = [re.sub("^(##|\u0120|\u2581| )", "", token) for token in self.tokens]
        return torch.tensor([float(t) if t.isascii() and t.isdecimal() else float("nan") for t in plain])  # [V]


def load_tokenizer(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    mask_index: int | None = None,
    num_classes: int | None = None,
    trust_remote_code: bool = False,
) -> Tokenizer:
    """Load a saved `WordTokenizer` (a `.json` file) or any Hugging Face tokeniser (hub name or local folder).

    Args:
        name_or_path: the file, folder or hub name.
        revision: branch, tag or commit on the hub.
        mask_index: see `PretrainedTokenizer`.
        num_classes: see `PretrainedTokenizer`.
        trust_remote_code: run the code that comes with it.

    Raises:
        UserError: it cannot be loaded, or a special token is missing.
    """
    if str(name_or_path).endswith(".json"):
        return WordTokenizer.load(name_or_path)
    from transformers import AutoTokenizer  # heavy, and not needed for the small vocabulary

    folder = fetch(name_or_path, revision, files=TOKENIZER_FILES, field="tokenizer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of old names in the configuration of remote code
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # what a wrong file leads to depends on the tokeniser
        reason = first_line(error)
        raise UserError(
            "tokenizer",
            f"{name_or_path} cannot be loaded ({reason})",
            "give a saved WordTokenizer (.json), or a folder or hub name with a tokeniser",
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # without its files transformers makes an empty one
        problem = f"{name_or_path} cannot be loaded (no vocabulary)"
        raise UserError("tokenizer", problem, "give a folder or hub name with the files of a tokeniser")
    return PretrainedTokenizer(tokenizer, mask_index, num_classes)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Sixteen hexadecimal digits that two tokenisers share if they spell every token alike and have the same MASK."""
    content = json.dumps([tokenizer.mask_index, tokenizer.tokens], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
