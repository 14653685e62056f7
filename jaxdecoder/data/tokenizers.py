"""Tokenizers as values: a vocabulary of byte strings, and a rule that finds them in text.

Decoding is one rule for all (join the bytes), encoding is one function per kind (`ENCODERS`).
`vocabularies.build` makes the tokenizer that `data.tokenizer` names.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsInt

import numpy as np
from jaxtyping import Int32, Shaped

from jaxdecoder.data.corpora import PIECE, cut
from jaxdecoder.data.digests import sealed, unsealed
from jaxdecoder.errors import UserError, first_line
from jaxdecoder.files import write_atomically
from jaxdecoder.typing import Table

UNKNOWN = "\ufffd"
"""The symbol for characters outside a char tokenizer's limited vocabulary."""

Ids = Int32[np.ndarray, "length"]
AnyIds = Sequence[SupportsInt] | SupportsInt | Shaped[Any, "..."]
"""One id or several, as numbers of Python, NumPy or JAX."""
Kind = Literal["char", "byte", "bpe"]


@dataclass(frozen=True)
class Tokenizer:
    """Turn text into ids and back. `encode` adds no end token."""

    kind: Kind
    name: str
    """The value of `data.tokenizer`: char, byte, bpe, gpt2, ..."""
    vocabulary: tuple[bytes, ...]
    """The UTF-8 bytes of each id; for bpe, the ids are also the order of merges."""
    end_token: int | None = None
    unknown: int | None = None
    """For char: the id of characters outside the vocabulary."""
    pattern: str = ""
    """For bpe: the regular expression of a word. Merges never cross words."""

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> Ids:
        """Return the ids of a text. An end token written in the text stays text."""
        if len(text) <= PIECE:
            return self._encode_piece(text)
        return np.concatenate([self._encode_piece(piece) for piece in cut([text])])

    def decode(self, ids: AnyIds) -> str:
        """Return the text of ids. An incomplete character at either end becomes U+FFFD."""
        return self.to_bytes(ids).decode("utf-8", "replace")

    def to_bytes(self, ids: AnyIds) -> bytes:
        """Return the bytes of ids; U+FFFD for ids outside the vocabulary (spare rows of a head)."""
        spare = UNKNOWN.encode()
        known = self.vocabulary
        numbers = np.asarray(ids, np.int64).ravel().tolist()
        return b"".join(known[i] if i < len(known) else spare for i in numbers)

    def to_json(self) -> Table:
        """Return the whole tokenizer as plain JSON values, for `from_json`."""
        return {
            "kind": self.kind,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "end_token": self.end_token,
            "unknown": self.unknown,
            "pattern": self.pattern,
            "vocabulary": [entry.decode(_CODEC[self.kind]) for entry in self.vocabulary],
        }

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Return how many bytes of text each id stands for; 0 for the end token."""
        lengths = np.array([len(entry) for entry in self.vocabulary], np.int64)
        if self.end_token is not None:
            lengths[self.end_token] = 0
        return lengths

    @cached_property
    def _encode_piece(self) -> Callable[[str], Ids]:
        return ENCODERS[self.kind](self)


# JSON has no bytes: write characters as they are, and other entries as one Latin-1 letter per byte.
_CODEC: dict[Kind, str] = {"char": "utf-8", "byte": "latin-1", "bpe": "latin-1"}


def from_json(values: Table) -> Tokenizer:
    """Return the tokenizer that `to_json` described.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: if nothing like it is described.
    """
    kind: Kind = values["kind"]
    if not isinstance(values["name"], str) or not isinstance(values["pattern"], str):
        raise ValueError("wrong name or pattern")
    made = Tokenizer(
        kind=kind,
        name=values["name"],
        vocabulary=tuple(entry.encode(_CODEC[kind]) for entry in values["vocabulary"]),
        end_token=values["end_token"],
        unknown=values["unknown"],
        pattern=values["pattern"],
    )
    texts = [entry for i, entry in enumerate(made.vocabulary) if i != made.end_token]
    every_byte = [bytes([value]) for value in range(256)]
    ids = [i for i in (made.end_token, made.unknown) if i is not None]
    fits = {
        "entries": values.keys() == {field.name for field in fields(Tokenizer)} | {"vocab_size"},
        "vocab_size": values.get("vocab_size") == made.vocab_size,
        "end_token or unknown": all(type(i) is int and 0 <= i < made.vocab_size for i in ids),
        "vocabulary": {
            "char": lambda: all(len(entry.decode()) == 1 for entry in texts),
            "byte": lambda: texts == every_byte,
            "bpe": lambda: set(every_byte) <= set(texts),
        }[kind](),
    }
    for what, good in fits.items():
        if not good:
            raise ValueError(f"wrong {what}")
    return made


def save(tokenizer: Tokenizer, path: str | Path) -> None:
    """Write a self-contained tokenizer.json with its digest, completely or not at all."""
    values = sealed(tokenizer.to_json())
    write_atomically(Path(path), json.dumps(values, ensure_ascii=False))


def load(path: str | Path) -> Tokenizer:
    """Read what `save` wrote. A file without a digest, of an earlier version, will do.

    Raises:
        UserError: if the file cannot be read, is damaged or is not a tokenizer of this project.
    """
    try:
        values = json.loads(Path(path).read_bytes())
        return from_json(unsealed(values) if "digest" in values else values)
    except OSError as error:
        raise UserError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a tokenizer of this project, or a damaged one "
            f"({type(error).__name__}: {error}); bring a copy of the file, or if you edited it, "
            "delete its digest"
        ) from None


def stream_decoder(tokenizer: Tokenizer) -> Callable[..., str]:
    """Return a function that takes ids as they come and returns the text that is complete.

    If the bytes of a character are spread over several tokens, the function waits for the last one.
    With `final=True` it does not wait. All returned texts joined are `decode` of all ids.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(ids: AnyIds = (), final: bool = False) -> str:
        return decoder.decode(tokenizer.to_bytes(ids), final)

    return feed


# Encoders: take a tokenizer, return its function from text to ids.


def _char_encoder(tokenizer: Tokenizer) -> Callable[[str], Ids]:
    end = tokenizer.end_token
    characters = [entry.decode() for i, entry in enumerate(tokenizer.vocabulary) if i != end]
    codes = np.array([ord(character) for character in characters], np.int64)
    absent = -1 if tokenizer.unknown is None else tokenizer.unknown
    table = np.full(0x110000, absent, np.int32)  # one row for every possible code point
    table[codes] = np.arange(len(codes))

    def encode(text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = table[points]
        if absent < 0 and np.any(ids < 0):
            strange = "".join(map(chr, np.unique(points[ids < 0])))
            raise UserError(_unknown_characters(strange, "".join(characters)))
        return ids

    return encode


def _unknown_characters(strange: str, known: str) -> str:
    def shown(characters: str, most: int) -> str:
        some = json.dumps(characters[:most], ensure_ascii=False)
        return some + (f" and {len(characters) - most:,} more" if len(characters) > most else "")

    return (
        f"the tokenizer does not know {shown(strange, 20)}: its characters are "
        f"{shown(known, 200)}; leave the others out, or train with data.tokenizer = "
        '"byte", which knows every text'
    )


def _byte_encoder(tokenizer: Tokenizer) -> Callable[[str], Ids]:
    return lambda text: np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32)


def _bpe_encoder(tokenizer: Tokenizer) -> Callable[[str], Ids]:
    import tiktoken

    end = tokenizer.end_token
    ranks = {entry: i for i, entry in enumerate(tokenizer.vocabulary) if entry and i != end}
    try:
        encoding = tiktoken.Encoding(
            tokenizer.name, pat_str=tokenizer.pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError as error:
        why = f"its pattern is not a regular expression: {first_line(error)}"
        raise UserError(f"the tokenizer {tokenizer.name}: {why}") from None

    def encode(text: str) -> Ids:
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode()  # half surrogates, from a terminal
        return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    return encode


ENCODERS: dict[Kind, Callable[[Tokenizer], Callable[[str], Ids]]] = {
    "char": _char_encoder,
    "byte": _byte_encoder,
    "bpe": _bpe_encoder,
}
