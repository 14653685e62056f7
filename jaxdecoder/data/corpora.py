"""Read the text of a corpus as one stream of documents, from any source, in bounded memory.

A document may be larger than memory (a 2 GB book is one document). So the stream consists of
`Piece`s, cut where tokenizers cut anyway.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from jaxdecoder.config import DataConfig
from jaxdecoder.data import formats, hub
from jaxdecoder.data.digests import digest, file_digest
from jaxdecoder.data.formats import Documents
from jaxdecoder.data.hub import Part
from jaxdecoder.errors import UserError, first_line

PIECE = 1 << 17
"""Approximate length of a piece, in characters."""
LONGEST_PIECE = 4 * PIECE
"""Length at which a text with no safe place to cut is cut: tiktoken refuses a million spaces."""

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Piece(NamedTuple):
    """A stretch of a document. `ends`: the document ends with this piece."""

    text: str
    ends: bool


def documents(data: DataConfig) -> Iterator[str]:
    """Yield the documents of the corpus in order. The largest of them must fit in memory."""
    texts: list[str] = []
    for piece in pieces(data):
        texts.append(piece.text)
        if piece.ends:
            yield "".join(texts)
            texts.clear()


def pieces(
    data: DataConfig, part: Part = "train", say: Callable[[str], None] = lambda _: None
) -> Iterator[Piece]:
    """Yield the corpus as pieces of at most `LONGEST_PIECE` characters, without empty documents.

    `part` = "validation" is the separate split that `data.validation_split` names. `say` is told
    how many records had no text.

    Raises:
        UserError: if there is no text.
    """
    blank, without = True, 0
    for document in _SOURCES[data.source].documents(data, part):
        if document is None:
            without += 1
            continue
        numbered = split(document, data.separator, 2 if data.end_of_text else 0)
        for _, chunks in groupby(numbered, itemgetter(0)):
            last = None
            for text in cut(chunk for _, chunk in chunks):
                if last is not None:
                    yield Piece(last, ends=False)
                last = text
                blank = blank and text.isspace()
            if last is not None:
                yield Piece(last, ends=True)
    key = "path" if data.path else "source"
    named = f"data.{key} = {json.dumps(getattr(data, key))}"
    if blank:
        raise UserError(f"{named}: the corpus is empty; there is no text in it but white space")
    if without:
        say(f"{named}: {without:,} record(s) without text are left out")


def fingerprint(data: DataConfig) -> str:
    """Return a key of the corpus's content. Another text has another key."""
    return _SOURCES[data.source].fingerprint(data)


def size(data: DataConfig) -> int | None:
    """Estimate the bytes of text of the corpus; None if that needs reading it."""
    return _SOURCES[data.source].size(data)


# A place where no word of any tokenizer continues. So the tokens of the two sides are the tokens of
# the whole. It is between a visible character and a space, or after a single line break that a
# letter or digit follows. (In byte-level BPE a space begins a word. A longer run of white space is
# one word, whose length depends on what follows. Line breaks may belong to the punctuation before.)
_LAST_SAFE_CUT = re.compile(r"(?s).*(?:\S(?= )|\S\n(?=[^\W_]))")


def cut(chunks: Iterable[str], piece: int = PIECE, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """Regroup one document into pieces whose tokens together are the tokens of the document.

    Only a run of `longest` characters without a space or line break is cut inside a word. It still
    decodes to the same text; at worst the tokens around the cut differ.
    """
    rest = ""
    for chunk in chunks:
        for start in range(0, len(chunk), piece):
            rest += chunk[start : start + piece]
            if len(rest) <= piece:
                continue
            safe = _LAST_SAFE_CUT.match(rest)
            if safe or len(rest) >= longest:
                end = safe.end() if safe else longest
                yield rest[:end]
                rest = rest[end:]
    if rest:
        yield rest


def split(chunks: Iterable[str], separator: str, breaks: int = 2) -> Iterator[tuple[int, str]]:
    """Divide a text at each separator into documents: yield parts of them, with their numbers.

    As many as `breaks` line breaks on each side belong to the separator, because it mostly stands
    on a line of its own. They do not count if `separator` is "", which occurs nowhere.
    """
    if not separator:
        yield from ((0, chunk) for chunk in chunks)
        return
    around = rf"(?:\r?\n){{0,{breaks}}}"
    pattern = re.compile(around + re.escape(separator) + around)
    longest = len(separator) + 4 * breaks
    number, rest = 0, ""
    for chunk in chunks:
        rest += chunk
        done = 0
        known = len(rest) - longest  # a separator that starts later may be longer than it seems
        if separator in rest:
            for found in pattern.finditer(rest):
                if found.start() > known:
                    break
                yield number, rest[done : found.start()]
                number, done = number + 1, found.end()
        kept = max(done, known + 1)
        yield number, rest[done:kept]
        rest = rest[kept:]
    for later, text in enumerate(pattern.split(rest)):
        yield number + later, text


# Sources: stream the text of each document in chunks, name the content, tell its size.


class Source(NamedTuple):
    documents: Callable[[DataConfig, Part], Documents]
    fingerprint: Callable[[DataConfig], str]
    size: Callable[[DataConfig], int | None]


def _stories(data: DataConfig, part: Part) -> Documents:
    from jaxdecoder.data.stories import stories, world_of

    for story in stories(data.stories_bytes, data.seed, world_of(data)):
        yield (story,)


def _story_fingerprint(data: DataConfig) -> str:
    from jaxdecoder.data import stories

    world = stories.world_of(data)
    smaller = () if world == stories.EVERYTHING else world
    return digest("stories", stories.VERSION, data.stories_bytes, data.seed, *smaller)


def _shakespeare_fingerprint(data: DataConfig) -> str:
    if data.path:
        tiny_shakespeare(data)  # refuses another text
    return digest("text", TINY_SHAKESPEARE_SHA256)


def tiny_shakespeare(data: DataConfig) -> Path:
    """Return the file of Tiny Shakespeare: `data.path` if given, else a cached or new download.

    Raises:
        UserError: if the file is missing, is another text, or cannot be downloaded.
    """
    if data.path:
        named = formats.local("data.path", data.path)
        if not os.path.isfile(named):
            raise UserError(f"data.path = {json.dumps(data.path[:200])}: no such file")
        if file_digest(named) != TINY_SHAKESPEARE_SHA256:
            raise UserError(
                f"data.path = {named}: this is not Tiny Shakespeare (its SHA-256 should be "
                f"{TINY_SHAKESPEARE_SHA256}); get it from {TINY_SHAKESPEARE_URL}, or use "
                'data.source = "text" for a text of your own'
            )
        return named
    cached = Path(data.cache) / "tinyshakespeare.txt"
    if cached.is_file() and file_digest(cached) == TINY_SHAKESPEARE_SHA256:
        return cached
    if cached.exists():
        print(f"{cached}: not Tiny Shakespeare, or damaged; getting it anew", file=sys.stderr)
    hub.keep(cached, _download_shakespeare(cached))
    return cached


def _download_shakespeare(destination: Path) -> bytes:
    import requests

    try:
        response = requests.get(TINY_SHAKESPEARE_URL, timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        raise UserError(
            f"Tiny Shakespeare cannot be downloaded ({first_line(error)}); fetch "
            f"{TINY_SHAKESPEARE_URL} where there is a network and put it at {destination}, or "
            "name a copy with data.path"
        ) from None
    if hashlib.sha256(response.content).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise UserError(
            f"{TINY_SHAKESPEARE_URL}: what came back is not Tiny Shakespeare (a login page or a "
            f"proxy, perhaps); put the right file at {destination}"
        )
    return response.content


def _text_documents(data: DataConfig, part: Part) -> Documents:
    for path in formats.text_files(data.path):
        yield from formats.documents(path, data.text_column)


def _text_fingerprint(data: DataConfig) -> str:
    files = formats.text_files(data.path)
    return digest("text", *(formats.fingerprint_of(path, data.text_column) for path in files))


_SOURCES: dict[str, Source] = {
    "stories": Source(_stories, _story_fingerprint, lambda data: data.stories_bytes),
    "text": Source(
        _text_documents,
        _text_fingerprint,
        lambda data: formats.size(formats.text_files(data.path)),
    ),
    "huggingface": Source(hub.documents_of, hub.fingerprint, lambda data: None),
    "tiny_shakespeare": Source(
        lambda data, part: iter([formats.chunks(tiny_shakespeare(data))]),
        _shakespeare_fingerprint,
        lambda data: 1_115_394,
    ),
}
