"""Tokenise a corpus once, into memory-mapped files that later runs open in milliseconds.

The files are in `<data.cache>/tokens/<key>`. The key stands for the text, the tokenizer and the
split. The files are written to a sibling folder, under a lock, and the folder is renamed when it is
complete. So a crash never leaves half a corpus, and a second process never sees one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import filelock
import numpy as np
from jaxtyping import Int64

from jaxdecoder.config import DataConfig
from jaxdecoder.data import corpora, formats, tokenizers, vocabularies
from jaxdecoder.data.corpora import Part
from jaxdecoder.data.digests import check_of, file_digest, sealed, unsealed
from jaxdecoder.data.encoding import Encoded, Stream, dtype_of, encode_all, jobs_of
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.errors import UserError
from jaxdecoder.files import disk_is_full

FORMAT = 1
"""Part of every key. Raise it when the files change, or the meaning of their content."""


@dataclass(frozen=True, eq=False)
class Split:
    """A part of the corpus as tokens, in a memory map: a slice loads only what it holds."""

    tokens: Stream
    starts: Int64[np.ndarray, "documents"]
    """Where in `tokens` each document starts; the first is 0."""
    n_bytes: int
    """UTF-8 bytes of the text in `tokens`. Nats per token times tokens / n_bytes / ln 2 gives
    bits per byte."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """The text that a run learns from and is evaluated on, as tokens."""

    tokenizer: Tokenizer
    train: Split
    validation: Split
    key: str = ""
    """The key of its text, tokenizer and split (`cache_key`)."""


def prepare(data: DataConfig) -> Corpus:
    """Return the corpus of a config as tokens: from the cache, or tokenised into it now.

    Raises:
        UserError: if the text cannot be read, is too short, or the tokens cannot be written.
    """
    key = cache_key(data)  # it may read the whole text
    folder = Path(data.cache) / "tokens" / key
    corpus = _open(folder)
    if corpus is None:
        with _lock(folder):
            corpus = _open(folder)  # another process may have been faster
            if corpus is None:
                if folder.exists():
                    print(f"{folder}: these tokens are damaged; making them anew", file=sys.stderr)
                _write(data, folder)
                corpus = _open(folder)
    if corpus is None:
        raise UserError(f"{folder}: the disk gave back other tokens than were written; check it")
    return replace(corpus, train=first(corpus.train, data.train_fraction), key=key)


def cache_key(data: DataConfig) -> str:
    """Return the name of the folder for this corpus, tokenizer and split."""
    folder = formats.local("data.tokenizer_path", data.tokenizer_path)
    names = [] if folder.suffix == ".json" else ["vocab.json", "merges.txt"]
    files = [folder / name for name in names] or [folder]
    settings = {
        "format": FORMAT,
        "corpus": corpora.fingerprint(data),
        "tokenizer": data.tokenizer,
        "tokenizer_files": [file_digest(p) for p in files if p.is_file()],
        "vocab_size": data.vocab_size,
        "end_of_text": data.end_of_text,
        "validation": _validation_split(data) or data.validation_fraction,
    }
    if data.separator != DataConfig.separator:  # left out, so that older runs know their corpus
        settings["separator"] = data.separator
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def first(split: Split, fraction: float) -> Split:
    """Return this fraction of a split, from its start; it ends with a document if one ends near."""
    if fraction == 1.0:
        return split
    n = len(split.tokens)
    kept = place_to_split(split.starts, n, 1 - Fraction(str(fraction)))
    # The bytes of single tokens are not stored, so the bytes of a part are in proportion.
    return Split(
        split.tokens[:kept], split.starts[split.starts < kept], round(split.n_bytes * kept / n)
    )


def place_to_split(
    starts: Int64[np.ndarray, "documents"], n: int, fraction: float | Fraction
) -> int:
    """Return how many of `n` tokens to train on, when the last `fraction` is for validation.

    That is the start of the nearest document. If this would make the validation part wrong by more
    than half of its size, or if there is only one document, it is exactly int(n (1 - fraction)).
    """
    # The fraction is taken as a decimal number: in binary, 1 - 0.9 is less than 0.1.
    exact = int(n * (1 - Fraction(str(fraction))))
    exact = min(max(exact, 1), n - 1)
    inner = starts[(starts > 0) & (starts < n)]
    if len(inner):
        nearest = int(inner[np.argmin(np.abs(inner - exact))])
        if abs(nearest - exact) <= (n - exact) / 2:
            return nearest
    return exact


@dataclass
class _Ledger:
    """The sizes of every piece of the corpus, in order: a few bytes per piece."""

    counts: array[int] = field(default_factory=lambda: array("q"))
    n_bytes: array[int] = field(default_factory=lambda: array("q"))
    ends: bytearray = field(default_factory=bytearray)

    def add(self, encoded: Encoded) -> None:
        self.counts.extend(encoded.counts)
        self.n_bytes.extend(encoded.n_bytes)
        self.ends.extend(encoded.ends)

    @property
    def stops(self) -> np.ndarray:
        """Return the token that each piece stops before."""
        return np.cumsum(np.array(self.counts, np.int64))


def _write(data: DataConfig, folder: Path) -> None:
    unfinished = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process: we hold the lock
    ledger = _Ledger()
    try:
        unfinished.mkdir()
        with _bar(corpora.size(data)) as start:
            _tokenise(data, unfinished, ledger, start)
        _remove(folder)
        os.replace(unfinished, folder)
    except OSError as error:
        if not disk_is_full(error):
            where = error.filename or folder.parent
            raise UserError(f"{where}: tokens cannot be written: {error.strerror}") from None
        raise UserError(
            f"{folder.parent}: no room for the tokens ({error.strerror}): this corpus needs "
            f"{_room_needed(data, ledger)}; free some space or set data.cache to another disk"
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a folder, or the file that is in its place."""
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


Start = Callable[[str], Callable[[int], None]]
"""Start a progress bar with a title; return a function that adds to the bytes done."""


def _tokenise(data: DataConfig, folder: Path, ledger: _Ledger, start: Start) -> None:
    def texts() -> Iterator[str]:
        done = start("learning the vocabulary")
        for part in parts:
            for job in jobs_of(corpora.pieces(data, part)):
                yield from (piece.text for piece in job)
                done(sum(len(piece.text) for piece in job))

    parts: tuple[Part, ...] = ("train", "validation") if _validation_split(data) else ("train",)
    tokenizer = vocabularies.build(data, texts)
    if data.end_of_text and tokenizer.end_token is None:
        raise UserError(
            f"data.end_of_text = true: the tokenizer {tokenizer.name} has no end token; set "
            "data.end_of_text = false"
        )
    tokenizers.save(tokenizer, folder / "tokenizer.json")
    done = start("tokenising")
    pieces_of_train = 0
    with (folder / "train.bin").open("wb") as file:
        for part in parts:
            jobs = jobs_of(corpora.pieces(data, part, partial(print, file=sys.stderr)))
            for encoded in encode_all(data, tokenizer, folder / "tokenizer.json", jobs):
                file.write(encoded.tokens.data)
                ledger.add(encoded)
                done(sum(encoded.n_bytes))
            pieces_of_train = pieces_of_train or len(ledger.counts)
    _divide(data, tokenizer, folder, ledger, pieces_of_train)
    for path in folder.iterdir():
        with path.open("rb") as file_to_keep:
            os.fsync(file_to_keep.fileno())


def _divide(
    data: DataConfig, tokenizer: Tokenizer, folder: Path, ledger: _Ledger, pieces_of_train: int
) -> None:
    """Move the validation tokens out of train.bin; write the starts and sizes of both splits."""
    stops = ledger.stops
    n = int(stops[-1])
    if n < 2:
        raise UserError(
            f"the corpus has {n} token(s), and 2 are the least that can be split into training "
            "and validation; give more text (data.path)"
        )
    ends = np.flatnonzero(np.frombuffer(ledger.ends, np.uint8))
    starts = np.concatenate([[0], stops[ends][:-1]]).astype(np.int64)
    if _validation_split(data):
        place = int(stops[pieces_of_train - 1])
    else:
        place = place_to_split(starts, n, data.validation_fraction)
    train_bytes = _bytes_before(place, tokenizer, folder / "train.bin", ledger)
    dtype = dtype_of(tokenizer)
    with (folder / "train.bin").open("r+b") as train:
        train.seek(place * dtype.itemsize)
        with (folder / "validation.bin").open("wb") as validation:
            shutil.copyfileobj(train, validation, 1 << 22)
        train.truncate(place * dtype.itemsize)
    np.save(folder / "train_starts.npy", starts[starts < place])
    later = starts[starts > place] - place
    np.save(folder / "validation_starts.npy", np.concatenate([[0], later]).astype(np.int64))
    meta = {
        "dtype": dtype.name,
        "train": {"tokens": place, "bytes": train_bytes},
        "validation": {"tokens": n - place, "bytes": sum(ledger.n_bytes) - train_bytes},
        "checks": {path.name: check_of(path) for path in sorted(folder.iterdir())},
    }
    (folder / "meta.json").write_text(json.dumps(sealed(meta), indent=1), encoding="utf-8")


def _bytes_before(place: int, tokenizer: Tokenizer, path: Path, ledger: _Ledger) -> int:
    """Return the bytes of text in the first `place` tokens."""
    stops, n_bytes = ledger.stops, np.array(ledger.n_bytes, np.int64)
    whole = int(np.searchsorted(stops, place, side="right"))
    total = int(n_bytes[:whole].sum())
    first = int(stops[whole - 1]) if whole else 0
    if first < place:
        # The cut is inside a piece. Divide its bytes by the lengths of its tokens, which is exact
        # unless some stand for unknown characters.
        tokens = np.memmap(path, dtype_of(tokenizer), "r")[first : int(stops[whole])]
        lengths = tokenizer.byte_lengths[tokens]
        share = int(lengths[: place - first].sum()) * int(n_bytes[whole])
        total += share // max(1, int(lengths.sum()))
    return total


def _open(folder: Path) -> Corpus | None:
    """Open the files that `_write` wrote; None if there are none, or not as they were written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        # An earlier version noted no checks.
        meta = unsealed(meta) if "digest" in meta else {"checks": {}, **meta}
        if any(check_of(folder / name) != check for name, check in meta["checks"].items()):
            return None
    except PermissionError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    except (OSError, ValueError, KeyError, RecursionError):
        return None

    def split(name: str) -> Split:
        return Split(
            tokens=np.memmap(folder / f"{name}.bin", meta["dtype"], "r"),
            starts=np.load(folder / f"{name}_starts.npy", mmap_mode="r"),
            n_bytes=meta[name]["bytes"],
        )

    tokenizer = tokenizers.load(folder / "tokenizer.json")
    return Corpus(tokenizer, split("train"), split("validation"))


def _validation_split(data: DataConfig) -> str:
    """Return the name of the source's validation split; "" if the source has no splits."""
    return data.validation_split if data.source == "huggingface" else ""


def _room_needed(data: DataConfig, ledger: _Ledger) -> str:
    """Estimate the disk space that the tokens need, from those written so far."""
    written, seen, total = sum(ledger.counts), sum(ledger.n_bytes), corpora.size(data)
    itemsize = 2 if not data.vocab_size or data.vocab_size <= 1 << 16 else 4
    if total is None:
        return f"more than {written * itemsize / 1e6:,.1f} MB"
    tokens = total * written / seen if seen else total
    # For a moment the validation tokens are stored twice.
    return f"about {tokens * itemsize * (1 + data.validation_fraction) / 1e6:,.1f} MB"


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print("another process is tokenising this corpus; waiting for it", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"data.cache = {json.dumps(str(folder.parent.parent))}: tokens cannot be written "
            f"there: {error.strerror or error}"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _bar(total: int | None) -> Iterator[Start]:
    """Show progress bars on standard error, one per title, in bytes of text."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:

        def start(title: str) -> Callable[[int], None]:
            task = bar.add_task(title, total=total)
            return partial(bar.advance, task)

        yield start
