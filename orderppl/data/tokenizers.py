"""Tokenisers: words and numbers, single letters, and any of Hugging Face."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from orderppl.config import Configurable, recorded
from orderppl.errors import UserError, first_line
from orderppl.hub import TOKENIZER_FILES, fetch

PAD, MASK, EOS, UNK, JOIN = "<pad>", "<mask>", "<eos>", "<unk>", "<join>"
SPECIAL = (PAD, MASK, EOS, UNK, JOIN)  # ids 0..4
# a letter may be followed by digits (`r1` is one reference, not a number)
PIECE = re.compile(r"<<|>>|#+|[0-9]+|[^\W\d_]+[0-9]*|\s|.", re.DOTALL)
WORD_MARK = re.compile("^(##|\u0120|\u2581| )")  # of a token's place in a word

NumberMode = Literal["digits", "numbers"]
Span = tuple[int, int]  # characters start..end - 1


class Tokenizer(Configurable):
    """Between texts and token ids.

    Attributes:
        pad_index: id of the padding token.
        mask_index: id of the MASK token.
        eos_index: id of the end-of-sequence token.
        bos_index: id of the begin token, if there is one.
        tokens: the V token strings, by id.
        vocab_size: number of ids V.
        frame: ids that a model expects before and after every row, which data put there as given tokens.
    """

    pad_index: int
    mask_index: int
    eos_index: int
    bos_index: int | None = None
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = list(tokens)
        self.vocab_size = len(self.tokens)
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self._ids) != self.vocab_size:
            raise UserError("vocabulary", "a token occurs twice", "give each piece once")

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters that each stands for."""
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self.encode_with_spans(text)[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence; padding and MASK are left out."""
        return "".join(self.tokens[index] for index in self._kept(ids))

    def _kept(self, ids: Iterable[int]) -> Iterator[int]:
        before_end = takewhile(lambda index: index != self.eos_index, ids)
        return (index for index in before_end if index not in (self.pad_index, self.mask_index))

    def number_values(self) -> Tensor:
        """float [V]: the number a token stands for, nan for other tokens."""
        return torch.full((self.vocab_size,), float("nan"))


def _kind(piece: str) -> str:
    """Class of a piece for spacing: all numerals alike, all words alike, anything else by itself."""
    if piece[0].isdecimal() and piece.isascii():
        return "0"
    return "a" if piece[0].isalpha() else piece


class WordTokenizer(Tokenizer):
    """Words, operators and numbers, with a vocabulary built from training texts.

    The spaces between two kinds of pieces (numeral, word, each operator) are learnt as the most frequent gap in the
    training texts and cost no token; any other gap is spelt out by white-space tokens or JOIN. Texts whose words are
    in the vocabulary therefore survive `decode(encode(text))` unchanged.

    Args:
        vocabulary: pieces that follow the special tokens (pad 0, mask 1, eos 2, unk 3, join 4), in id order.
        number_mode: "digits" (each digit a token) or "numbers" (one token per numeral 0..max_number; others in digits).
        max_number: largest numeral with a token of its own.
        gaps: (kind, next kind, usual gap between them); kinds `""`, `""` hold the gap of pairs that were never seen.
    """

    pad_index, mask_index, eos_index, unk_index, join_index = range(5)

    def __init__(
        self, vocabulary: Sequence[str], number_mode: NumberMode, max_number: int, gaps: Sequence[Sequence[str]]
    ) -> None:
        super().__init__([*SPECIAL, *vocabulary])
        if number_mode not in ("digits", "numbers"):
            raise UserError("number_mode", f"{number_mode!r} is unknown", "use 'digits' or 'numbers'")
        if max_number < 9:
            problem = f"{max_number} is below 9"
            raise UserError("max_number", problem, "numerals fall back to digits, so 0..9 are needed")
        self.vocabulary = list(vocabulary)
        self.number_mode: NumberMode = number_mode
        self.max_number = max_number
        self.gaps = [list(gap) for gap in gaps]
        self._gaps = {(left, right): gap for left, right, gap in gaps}
        self._known: dict[str, tuple[str, list[tuple[int, int]]]] = {}  # kind, and tokens with their lengths

    @classmethod
    def build(
        cls, texts: Iterable[str], number_mode: NumberMode = "numbers", max_number: int = 99, min_count: int = 1
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
        usual = [(*pair, gap) for pair, gap in sorted(gaps.items()) if gap in ("", " ")]
        vocabulary = numbers + sorted(piece for piece, n in counts.items() if n >= min_count)
        if " " not in vocabulary:
            vocabulary.append(" ")
        return cls(vocabulary, number_mode, max_number, usual)

    def _numeral(self, digits: str) -> list[str]:
        """Split a numeral into the tokens that spell it."""
        short = len(digits) <= len(str(self.max_number)) and (digits == "0" or digits[0] != "0")
        if self.number_mode == "numbers" and short and int(digits) <= self.max_number:
            return [digits]
        return list(digits)

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters that each stands for; pieces outside the vocabulary become unk."""
        ids: list[int] = []
        spans: list[Span] = []
        previous, gap, place = "", "", 0

        def spell(space: str) -> None:
            ids.extend(self._id(letter) for letter in space)
            spans.extend((start, start + 1) for start in range(place - len(space), place))

        for piece in PIECE.findall(text):
            if piece.isspace():
                gap += piece
                place += 1
                continue
            kind, parts = self._known.get(piece) or self._look_up(piece)
            if gap != (self._gap(previous, kind) if previous else ""):
                spell(gap)
                if not gap:
                    ids.append(self.join_index)
                    spans.append((place, place))
            for index, size in parts:
                ids.append(index)
                spans.append((place, place + size))
                place += size
            previous, gap = kind, ""
        spell(gap)
        return ids, spans

    def _look_up(self, piece: str) -> tuple[str, list[tuple[int, int]]]:
        kind = _kind(piece)
        parts = self._numeral(piece) if kind == "0" else [piece]
        if len(self._known) >= 100_000:  # a memory of pieces, not of the whole corpus
            self._known.clear()
        self._known[piece] = kind, [(self._id(part), len(part)) for part in parts]
        return self._known[piece]

    def _gap(self, left: str, right: str) -> str:
        return self._gaps.get((left, right), self._gaps.get(("", ""), ""))

    def _id(self, piece: str) -> int:
        return self._ids.get(piece, self.unk_index)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first eos; pad and mask are left out.

        Numeral tokens that the encoder would not have put side by side (`2`, `0` where `20` is a token) stay apart, so
        that a malformed number is never read as a right answer.
        """
        pieces: list[str] = []
        for numeral, run in groupby(
            (self.tokens[index] for index in self._kept(ids)), key=lambda piece: _kind(piece) == "0"
        ):
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


class ClosedTokenizer(Tokenizer):
    """Pieces of a fixed vocabulary; a text with any other has no tokens."""

    piece = re.compile(".", re.DOTALL)

    def problem(self, text: str) -> str | None:
        """Why a text has no tokens here; None if it has."""
        pieces = self.piece.findall(text)
        if "".join(pieces) != text:
            return "characters that belong to no token"
        foreign = [piece for piece in pieces if piece not in self._ids]
        return f"{foreign[0]} is not in the vocabulary" if foreign else None

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters that each stands for; refuses a text with a problem."""
        problem = self.problem(text)
        if problem is not None:
            raise UserError("text", f"{problem}: {text}", "correct or remove it")
        found = list(self.piece.finditer(text))
        return [self._ids[piece[0]] for piece in found], [piece.span() for piece in found]


class LetterTokenizer(ClosedTokenizer):
    """One token per letter, such as the residues of a protein; ids as in fairseq (the antibody model has them too).

    Args:
        letters: all that may occur; they follow `<s>` 0, `<pad>` 1, `</s>` 2 and `<unk>` 3, and precede `<mask>`.
    """

    pad_index, eos_index = 1, 2

    def __init__(self, letters: str) -> None:
        super().__init__(["<s>", PAD, "</s>", UNK, *letters, MASK])
        self.mask_index = self.vocab_size - 1


class PretrainedTokenizer(Tokenizer):
    """A Hugging Face tokeniser behind the interface of `Tokenizer`.

    Args:
        tokenizer: a `PreTrainedTokenizerBase`; it needs an eos (or sep) token and, without `mask_index`, a mask token.
        mask_index: id of MASK in the model it belongs to; may lie behind the vocabulary.
        num_classes: token classes of the model's output head, often more than there are tokens. The ids that stand for
            no token decode to nothing.
        frame: put a start and an end token around every row, or neither; None: as the tokeniser does.

    Raises:
        UserError: one of these tokens is missing, or there are fewer classes than tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        mask_index: int | None = None,
        num_classes: int | None = None,
        frame: bool | None = None,
    ) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        mask_index = tokenizer.mask_token_id if mask_index is None else mask_index
        for kind, index in (("mask", mask_index), ("eos", eos)):
            if index is None:
                problem = f"{name} has {'no mask token' if kind == 'mask' else 'neither an eos nor a sep token'}"
                remedy = f"add one by tokenizer.add_special_tokens({{'{kind}_token': '<{kind}>'}}) and save_pretrained"
                raise UserError("tokenizer", problem, remedy)
        spelt = len(tokenizer)
        if num_classes is not None and any(token != mask_index for token in range(num_classes, spelt)):
            problem = f"{name} has {spelt} tokens, the model has classes for {num_classes}"
            raise UserError("tokenizer", problem, "use the tokeniser that the model was trained with")
        self.tokenizer = tokenizer
        self.pad_index, self.mask_index, self.eos_index = int(pad), int(mask_index), int(eos)
        self.bos_index = tokenizer.bos_token_id
        size = max(spelt, num_classes or 0, self.mask_index + 1)
        unused = (MASK if token == self.mask_index else f"<unused{token}>" for token in range(spelt, size))
        super().__init__([*map(str, tokenizer.convert_ids_to_tokens(list(range(spelt)))), *unused])
        self.frame = self._find_frame() if frame is None else self.both_ends() if frame else ((), ())

    def both_ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A frame of the start and the end token.

        Raises:
            UserError: one of them is missing.
        """
        own = self.tokenizer
        first = own.cls_token_id if own.cls_token_id is not None else own.bos_token_id
        last = own.sep_token_id if own.sep_token_id is not None else own.eos_token_id
        if first is None or last is None:
            raise UserError("frame", "the tokeniser has no start or no end token", "leave frame out")
        return (int(first),), (int(last),)

    def _find_frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What a masked model's tokeniser puts around a text; those of others keep begin tokens for themselves."""
        if self.tokenizer.cls_token_id is None:
            return (), ()
        plain, whole = self.encode("a"), self.tokenizer.encode("a", add_special_tokens=True)
        starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
        start = next(starts, 0)
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters that each stands for, white space before them left out.

        Raises:
            UserError: it is one of the slow ones, which do not know, and its tokens are not the letters of the text.
        """
        if not self.tokenizer.is_fast:
            return self._find_spans(text)
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        skipped = ((start, end, text[start:end]) for start, end in found["offset_mapping"])
        spans = [(end - len(piece.lstrip() or piece), end) for start, end, piece in skipped]
        return list(found["input_ids"]), spans

    def _find_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Look the tokens up in the text, one after another; that of ESM, for one, is slow and spells letters."""
        ids, spans, end = self.encode(text), list[Span](), 0
        for token in ids:
            piece = WORD_MARK.sub("", self.tokens[token])
            start = text.find(piece, end)
            if start < 0 or text[end:start].strip():
                problem = f"does not say which characters {self.tokens[token]!r} stands for"
                raise UserError("tokenizer", problem, "use a fast tokeniser (with a tokenizer.json)")
            end = start + len(piece)
            spans.append((start, end))
        return ids, spans

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end of sequence; special tokens are left out."""
        kept = [int(index) for index in self._kept(ids) if index < len(self.tokenizer)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def number_values(self) -> Tensor:
        """float [V]: the value of tokens that are whole numerals (leading-space marks ignored), nan elsewhere."""
        plain = [WORD_MARK.sub("", token) for token in self.tokens]
        return torch.tensor([float(t) if t.isascii() and t.isdecimal() else float("nan") for t in plain])  # [V]


@recorded
def load_tokenizer(
    name_or_path: str | Path,
    revision: str | None = None,
    *,
    mask_index: int | None = None,
    num_classes: int | None = None,
    frame: bool | None = None,
    trust_remote_code: bool = False,
) -> PretrainedTokenizer:
    """Load a tokeniser of Hugging Face.

    Args:
        name_or_path: folder or hub name.
        revision: branch, tag or commit on the hub.
        mask_index: see `PretrainedTokenizer`.
        num_classes: see `PretrainedTokenizer`.
        frame: see `PretrainedTokenizer`.
        trust_remote_code: run the code that comes with it.

    Raises:
        UserError: it cannot be loaded, or a special token is missing.
    """
    from transformers import AutoTokenizer  # heavy, and not needed for small vocabularies

    folder = fetch(name_or_path, revision, files=TOKENIZER_FILES, field="tokenizer")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of old names in the configuration of remote code
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # what a wrong file leads to depends on the tokeniser
        problem = f"{name_or_path} cannot be loaded ({first_line(error)})"
        raise UserError("tokenizer", problem, "give a folder or hub name with a tokeniser") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # without its files transformers makes an empty one
        problem = f"{name_or_path} cannot be loaded (no vocabulary)"
        raise UserError("tokenizer", problem, "give a folder or hub name with the files of a tokeniser")
    return PretrainedTokenizer(tokenizer, mask_index, num_classes, frame)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Sixteen hexadecimal digits that two tokenisers share if they spell every token alike and have the same MASK."""
    content = json.dumps([tokenizer.mask_index, tokenizer.tokens], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
