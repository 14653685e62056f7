"""Make tokenizers: from the characters of a corpus, trained on it, or from files.

`build` makes the tokenizer that `data.tokenizer` names. Each entry of `BUILDERS` makes one kind;
all other names are tiktoken's.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxdecoder.config import DataConfig
from jaxdecoder.data.corpora import cut
from jaxdecoder.data.tokenizers import UNKNOWN, Kind, Tokenizer, load
from jaxdecoder.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""The spelling of the end token. In text these are ordinary characters: only the id `end_token`
ends a document."""
BPE_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's words
)
BPE_VOCAB_SIZE = 4096
BPE_SAMPLE_BYTES = 100_000_000
"""Bytes at the start of the corpus that a tokenizer is trained on. More change little."""
BPE_LONGEST_WORD = 1000
"""Characters of a word that a tokenizer is trained on; longer ones (no spaces: genes, base64) are
divided. Training on a word takes time in proportion to the square of its length."""


def build(data: DataConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Make the tokenizer that `data.tokenizer` names; `texts()` streams the corpus to train on.

    If `data.tokenizer_path` is a tokenizer.json, such as that of another run, load it unchanged.

    Raises:
        UserError: for an unknown name, a `data.vocab_size` that the tokenizer cannot have, or files
            that are missing or wrong.
    """
    if data.tokenizer_path.endswith(".json"):
        return load(data.tokenizer_path)
    if data.tokenizer in BUILDERS:
        return BUILDERS[data.tokenizer](data, texts)
    return _check_fixed_size(data, _tiktoken(data))


def _build_char(data: DataConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Take every character of the corpus, sorted; or only the most frequent `data.vocab_size`."""
    counts = _count_characters(texts())
    extra = 1 if data.end_of_text else 0
    characters = sorted(counts)
    if data.vocab_size is not None:
        if data.vocab_size < extra + 2:
            raise UserError(
                f"data.vocab_size = {data.vocab_size}: at least {extra + 2} are needed for one "
                "character and the unknown symbol" + (" and the end token" if extra else "")
            )
        counts.pop(UNKNOWN, None)
        common = sorted(counts, key=lambda character: (-counts[character], character))
        characters = sorted([*common[: data.vocab_size - extra - 1], UNKNOWN])
    unknown = None if data.vocab_size is None else characters.index(UNKNOWN)
    vocabulary = [character.encode() for character in characters]
    return _with_end("char", vocabulary, data.end_of_text, unknown=unknown)


def _count_characters(texts: Iterable[str]) -> Counter[str]:
    total = np.zeros(0x110000, np.int64)
    for text in cut(texts):  # short documents are counted together
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        counted = np.bincount(points)
        total[: len(counted)] += counted
    return Counter({chr(i): int(total[i]) for i in np.flatnonzero(total)})


def _build_byte(data: DataConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    vocabulary = [bytes([value]) for value in range(256)]
    return _check_fixed_size(data, _with_end("byte", vocabulary, data.end_of_text))


def _build_bpe(data: DataConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Train byte-level BPE on the corpus: the 256 bytes, the merges in order, the end token.

    If the corpus has fewer merges than asked for (every word is then one token), the vocabulary is
    smaller; `vocab_size` of the result is the true count.
    """
    size = data.vocab_size or BPE_VOCAB_SIZE
    extra = 1 if data.end_of_text else 0
    if size < 256 + extra:
        raise UserError(
            f"data.vocab_size = {size}: bpe starts from the 256 bytes"
            + (" and the end token" if extra else "")
            + f", so give at least {256 + extra}"
        )
    return from_trained(
        train_bpe(_sample(texts(), BPE_SAMPLE_BYTES), size - extra), data.end_of_text
    )


def from_trained(trained: Any, end_of_text: bool) -> Tokenizer:
    """Turn the result of `train_bpe` into a `Tokenizer`. Its ids are in the order of the merges."""
    byte_of = _byte_of_character()
    vocabulary: list[bytes] = [b""] * trained.get_vocab_size()
    for entry, i in trained.get_vocab().items():
        vocabulary[i] = bytes(byte_of[character] for character in entry)
    return _with_end("bpe", vocabulary, end_of_text, pattern=BPE_PATTERN)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a Hugging Face tokenizer with at most `vocab_size` entries, the 256 bytes included."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(BPE_PATTERN), "isolated")
    bounded = pre_tokenizers.FixedLength(length=BPE_LONGEST_WORD)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([words, bounded, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return trained


def _sample(texts: Iterable[str], most: int) -> Iterator[str]:
    """Yield texts until they have `most` bytes.

    Text without white space counts ten times: hardly a word of it occurs twice, so it takes ten
    times the memory and time.
    """
    for text in texts:
        yield text
        endless = sum(len(word) for word in text.split() if len(word) > BPE_LONGEST_WORD)
        most -= len(text.encode()) + 9 * endless
        if most <= 0:
            return


def _tiktoken(data: DataConfig) -> Tokenizer:
    import tiktoken

    names = tiktoken.list_encoding_names()
    if data.tokenizer not in names:
        known = [*BUILDERS, *names]
        near = difflib.get_close_matches(data.tokenizer, known, n=1, cutoff=0.5)
        raise UserError(
            f"data.tokenizer = {json.dumps(data.tokenizer)}: should be one of {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if data.tokenizer_path:
        if data.tokenizer not in ("gpt2", "r50k_base"):
            raise UserError(
                f"data.tokenizer_path = {json.dumps(data.tokenizer_path)}: vocab.json and "
                f"merges.txt describe gpt2, not {data.tokenizer}; leave it out, or set "
                'data.tokenizer = "gpt2"'
            )
        return from_gpt2_files(Path(data.tokenizer_path))
    try:
        encoding = tiktoken.get_encoding(data.tokenizer)
    except OSError as error:
        folder = (
            ", or set data.tokenizer_path to a folder with GPT-2's vocab.json and merges.txt"
            if data.tokenizer in ("gpt2", "r50k_base")
            else ', or use data.tokenizer = "bpe", which is trained here'
        )
        raise UserError(
            f"data.tokenizer = {json.dumps(data.tokenizer)} must be downloaded once and the "
            f"network does not answer ({type(error).__name__}); run once with a network (and set "
            f"TIKTOKEN_CACHE_DIR to keep the file){folder}"
        ) from None
    return from_tiktoken(encoding)


def from_tiktoken(encoding: Any) -> Tokenizer:
    """Turn a tiktoken encoding into a `Tokenizer`. Of its special tokens it keeps only the end."""
    vocabulary: list[bytes] = [b""] * encoding.n_vocab
    for entry in encoding.token_byte_values():
        vocabulary[encoding.encode_single_token(entry)] = entry
    vocabulary[encoding.eot_token] = END_OF_TEXT.encode()
    end, pattern = encoding.eot_token, encoding._pat_str
    return Tokenizer("bpe", encoding.name, tuple(vocabulary), end, pattern=pattern)


def from_gpt2_files(folder: Path) -> Tokenizer:
    """Read GPT-2's tokenizer from the vocab.json and merges.txt that come with its weights.

    Raises:
        UserError: if the files are missing, or are not a pair in GPT-2's format and order.
    """
    try:
        ids = json.loads((folder / "vocab.json").read_bytes())
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        merged = [ids[left + right] for left, right in merges]
        byte_of = _byte_of_character()
        end = ids.pop(END_OF_TEXT, None)
        vocabulary: list[bytes] = [b""] * (max(ids.values(), default=-1) + 1)
        for entry, i in ids.items():
            vocabulary[i] = bytes(byte_of[character] for character in entry)
    except OSError as error:
        raise UserError(
            f"data.tokenizer_path = {folder}: {error.filename}: {error.strerror}; it should be a "
            "folder with GPT-2's vocab.json and merges.txt"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.tokenizer_path = {folder}: vocab.json and merges.txt are not a pair in GPT-2's "
            f"format ({type(error).__name__}: {error})"
        ) from None
    has_bytes = {bytes([value]) for value in range(256)} <= set(vocabulary[:256])
    if not has_bytes or merged != sorted(merged):
        raise UserError(
            f"data.tokenizer_path = {folder}: this vocabulary is not numbered as GPT-2's is, the "
            "256 bytes first and then the merges in order"
        )
    if end is not None:
        vocabulary.extend([b""] * (end + 1 - len(vocabulary)))
        vocabulary[end] = END_OF_TEXT.encode()
    from tiktoken_ext.openai_public import r50k_pat_str

    return Tokenizer("bpe", "gpt2", tuple(vocabulary), end, pattern=r50k_pat_str)


def _byte_of_character() -> dict[str, int]:
    """Return the byte of each character of the alphabet in which GPT-2's files write bytes.

    Bytes that are printable in Latin-1 stand for themselves. The others are, in order, the
    characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {
        chr(0x100 + rank): value for rank, value in enumerate(others)
    }


def _with_end(kind: Kind, vocabulary: list[bytes], end_of_text: bool, **rest: Any) -> Tokenizer:
    """Return the tokenizer that is named after its kind; its end token, if any, is the last."""
    if not end_of_text:
        return Tokenizer(kind, kind, tuple(vocabulary), **rest)
    whole = (*vocabulary, END_OF_TEXT.encode())
    return Tokenizer(kind, kind, whole, end_token=len(vocabulary), **rest)


def _check_fixed_size(data: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    if data.vocab_size not in (None, tokenizer.vocab_size):
        raise UserError(
            f"data.vocab_size = {data.vocab_size}: the tokenizer {tokenizer.name} always has "
            f"{tokenizer.vocab_size:,} entries; leave data.vocab_size out (it is for char and bpe)"
        )
    return tokenizer


BUILDERS: dict[str, Callable[[DataConfig, Callable[[], Iterable[str]]], Tokenizer]] = {
    "char": _build_char,
    "byte": _build_byte,
    "bpe": _build_bpe,
}
