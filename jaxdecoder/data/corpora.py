"""Read the text of a corpus as one stream of documents, from any source, in bounded memory.

A document may be larger than memory (a 2 GB book is one document). So the stream consists of
`Piece`s, cut where tokenizers cut anyway.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxdecoder.config import DataConfig
from jaxdecoder.errors import UserError, first_line
from jaxdecoder.files import write_atomically

PIECE = 1 << 17
"""Approximate length of a piece, in characters."""
LONGEST_PIECE = 8 * PIECE
"""Greatest length of a piece. A text with no safe place to cut is cut here."""

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

Part = Literal["train", "validation"]


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


def pieces(data: DataConfig, part: Part = "train") -> Iterator[Piece]:
    """Yield the corpus as pieces of at most `LONGEST_PIECE` characters, without empty documents.

    `part` = "validation" is the separate split that `data.validation_split` names.

    Raises:
        UserError: if there is no text.
    """
    empty = True
    for chunks in _SOURCES[data.source].chunks(data, part):
        last = None
        for text in cut(chunks):
            if last is not None:
                yield Piece(last, ends=False)
            last = text
        if last is not None:
            empty = False
            yield Piece(last, ends=True)
    if empty:
        key = "path" if data.path else "source"
        named = f"data.{key} = {json.dumps(getattr(data, key))}"
        raise UserError(f"{named}: the corpus is empty; there is no text in it")


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


# Sources: stream the text of each document in chunks, name the content, tell its size.


class Source(NamedTuple):
    chunks: Callable[[DataConfig, Part], Iterator[Iterable[str]]]
    fingerprint: Callable[[DataConfig], str]
    size: Callable[[DataConfig], int | None]


def _story_chunks(data: DataConfig, part: Part) -> Iterator[Iterable[str]]:
    from jaxdecoder.data.stories import stories, world_of

    for story in stories(data.stories_bytes, data.seed, world_of(data)):
        yield (story,)


def _story_fingerprint(data: DataConfig) -> str:
    from jaxdecoder.data import stories

    world = stories.world_of(data)
    smaller = () if world == stories.EVERYTHING else world
    return _digest("stories", stories.VERSION, data.stories_bytes, data.seed, *smaller)


def _text_files(path: str) -> list[Path]:
    """Return the files of `data.path`: itself, the *.txt files below it, or those a glob finds."""
    root = Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(p for p in root.rglob("*.txt") if p.is_file())
        if not found:
            raise UserError(f"data.path = {json.dumps(path)}: no *.txt file in this folder")
        return found
    found = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
    if not found:
        what = "no file matches" if glob.has_magic(path) else "no such file or folder"
        raise UserError(f"data.path = {json.dumps(path)}: {what} (seen from {Path.cwd()})")
    return found


def _read(path: Path, block: int = 1 << 20) -> Iterator[str]:
    """Read a UTF-8 file block by block, as it is (line ends too), less a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    try:
        with path.open("rb") as file:
            while True:
                raw = file.read(block)
                if not offset and raw.startswith(codecs.BOM_UTF8):
                    offset = len(codecs.BOM_UTF8)  # a byte order mark is not text
                    raw = raw[offset:] or file.read(block)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(raw, final=not raw)
                except UnicodeDecodeError as error:
                    at = offset - pending + error.start
                    raise UserError(
                        f"{path}: not UTF-8 text: byte {at:,} (0x{error.object[error.start]:02x}) "
                        "does not belong there; convert the file to UTF-8"
                    ) from None
                if text:
                    yield text
                if not raw:
                    return
                offset += len(raw)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _huggingface_chunks(data: DataConfig, part: Part) -> Iterator[Iterable[str]]:
    dataset = _huggingface_split(data, part)
    for rows in dataset.iter(batch_size=64):
        if data.text_column not in rows:
            raise UserError(
                f"data.text_column = {json.dumps(data.text_column)}: {data.path} has no such "
                f"column; it has {', '.join(sorted(rows))}"
            )
        for text in rows[data.text_column]:
            if text is None:
                continue
            if not isinstance(text, str):
                raise UserError(
                    f"data.text_column = {json.dumps(data.text_column)}: {data.path} holds "
                    f"{type(text).__name__} there, not text; name a column of text"
                )
            yield (text,)


def _huggingface_split(data: DataConfig, part: Part) -> Any:
    """Stream one split of a Hub repository, or of a local folder of parquet or jsonl files."""
    import datasets

    folder = _huggingface_folder(data)
    revision = None if folder else _revision(data)
    try:
        splits = datasets.load_dataset(
            str(folder or data.path),
            revision=revision,
            streaming=True,
            cache_dir=str(Path(data.cache) / "huggingface"),
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data.path = {json.dumps(data.path)}: this is not a data set that can be read "
            f"({first_line(error)}); give a hub id such as roneneldan/TinyStories, or a folder "
            "of parquet or jsonl files"
        ) from None
    names = list(splits)
    if data.validation_split and data.validation_split not in names:
        raise UserError(
            f"data.validation_split = {json.dumps(data.validation_split)}: {data.path} has no "
            f"such split; it has {', '.join(names)}"
        )
    if part == "validation":
        return splits[data.validation_split]
    others = [name for name in names if name != data.validation_split]
    if "train" not in others and len(others) != 1:
        raise UserError(
            f"data.path = {json.dumps(data.path)}: there is no split to train on besides "
            f"data.validation_split = {json.dumps(data.validation_split)}; the splits are "
            f"{', '.join(names)}, and the one to train on is called train"
        )
    return splits["train" if "train" in others else others[0]]


def _huggingface_folder(data: DataConfig) -> Path | None:
    path = Path(data.path)
    if path.is_dir():
        if glob.has_magic(str(path.resolve())):  # of others, too, their files would be read
            raise UserError(
                f"data.path = {json.dumps(data.path)}: *, ? and [ in the name of a folder of data "
                "files would be a pattern; rename it"
            )
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.path):
        raise UserError(
            f"data.path = {json.dumps(data.path)}: neither a folder nor a hub id such as "
            "roneneldan/TinyStories"
        )
    return None


def _revision(data: DataConfig) -> str:
    """Return the commit that a hub id means now; without a network, the one it meant last."""
    import huggingface_hub

    note = Path(data.cache) / "huggingface" / f"{data.path.replace('/', '--')}.revision"
    try:
        revision = huggingface_hub.HfApi().dataset_info(data.path, timeout=30).sha
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise UserError(
            f"data.path = {json.dumps(data.path)}: the Hugging Face Hub has no such data set, or "
            "you may not read it; check the name, or log in with `hf auth login`"
        ) from None
    except Exception as error:  # the client's errors for "no network" have no common base
        if note.is_file():
            return note.read_text().strip()
        raise UserError(
            f"data.path = {json.dumps(data.path)}: the Hugging Face Hub cannot be reached "
            f"({first_line(error)}); where there is a network, run `hf download {data.path} "
            "--repo-type dataset --local-dir FOLDER`, bring FOLDER here and set "
            'data.path = "FOLDER"'
        ) from None
    _cache(note, f"{revision}\n".encode())
    return str(revision)


def _huggingface_fingerprint(data: DataConfig) -> str:
    folder = _huggingface_folder(data)
    if folder is None:
        content: tuple[object, ...] = (data.path, _revision(data))
    else:
        files = [(p.relative_to(folder), p) for p in sorted(folder.rglob("*")) if p.is_file()]
        seen = [(name, p) for name, p in files if not any(x.startswith(".") for x in name.parts)]
        # File names are part of it: they say which split a file belongs to.
        content = tuple(part for name, p in seen for part in (name.as_posix(), _file_digest(p)))
    return _digest("huggingface", data.text_column, data.validation_split, *content)


def _shakespeare_fingerprint(data: DataConfig) -> str:
    if data.path:
        tiny_shakespeare(data)  # refuses another text
    return _digest("text", TINY_SHAKESPEARE_SHA256)


def tiny_shakespeare(data: DataConfig) -> Path:
    """Return the file of Tiny Shakespeare: `data.path` if given, else a cached or new download.

    Raises:
        UserError: if the file is missing, is another text, or cannot be downloaded.
    """
    if data.path:
        local = Path(data.path)
        if not local.is_file():
            raise UserError(f"data.path = {json.dumps(data.path)}: no such file")
        _check_shakespeare(local, "data.path")
        return local
    cached = Path(data.cache) / "tinyshakespeare.txt"
    if not cached.is_file():
        _cache(cached, _download_shakespeare(cached))
    _check_shakespeare(cached, "the cached Tiny Shakespeare")
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


def _check_shakespeare(path: Path, what: str) -> None:
    if _file_digest(path) != TINY_SHAKESPEARE_SHA256:
        raise UserError(
            f"{what} = {path}: this is not Tiny Shakespeare (its SHA-256 should be "
            f"{TINY_SHAKESPEARE_SHA256}); get it from {TINY_SHAKESPEARE_URL}, or use "
            'data.source = "text" for a text of your own'
        )


_SOURCES: dict[str, Source] = {
    "stories": Source(_story_chunks, _story_fingerprint, lambda data: data.stories_bytes),
    "text": Source(
        lambda data, part: map(_read, _text_files(data.path)),
        lambda data: _digest("text", *map(_file_digest, _text_files(data.path))),
        lambda data: sum(path.stat().st_size for path in _text_files(data.path)),
    ),
    "huggingface": Source(_huggingface_chunks, _huggingface_fingerprint, lambda data: None),
    "tiny_shakespeare": Source(
        lambda data, part: iter([_read(tiny_shakespeare(data))]),
        _shakespeare_fingerprint,
        lambda data: 1_115_394,
    ),
}


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _cache(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
