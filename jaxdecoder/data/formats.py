"""Read files as what they are: plain text or records, compressed or not.

The ending of a name says what a file is (`kind_of`). A plain text is one document. In a file of
records each record is a document, and one of its columns is the text.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

from jaxdecoder.data.digests import digest, file_digest
from jaxdecoder.errors import UserError, first_line

Documents = Iterator[Iterable[str] | None]
"""The text of each document in chunks; None for a record without text."""
Records = Iterator[tuple[str, Any]]
"""Where a record is, for errors, and what is there."""

LONGEST_CELL = 1 << 28
"""Characters of a CSV cell. A longer one is a quotation mark that nothing closes."""

UTF_16 = "it looks like UTF-16; convert it with `iconv -f UTF-16 -t UTF-8 OLD > NEW`"
LOOKS_LIKE = {
    codecs.BOM_UTF16_LE: UTF_16,
    codecs.BOM_UTF16_BE: UTF_16,
    b"\x1f\x8b": "it looks like gzip; let its name end in .gz",
    b"BZh": "it looks like bzip2; let its name end in .bz2",
    b"\xfd7zXZ": "it looks like xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "it looks like zstd; let its name end in .zst",
    b"PAR1": "it looks like parquet; let its name end in .parquet",
    b"PK\x03\x04": "it looks like a zip archive; unpack it",
    b"%PDF": "it looks like a PDF; extract its text",
}
"""What the first bytes of a file that is no text may mean, and what to do then."""

SPECIAL = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def local(key: str, path: str) -> Path:
    """Return the path that a key of the config names, with ~ replaced."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{key} = {json.dumps(path)}: there is no such home folder") from None


def text_files(path: str) -> list[Path]:
    """Return the files of `data.path`: itself, those below it, or those that a glob finds.

    Of a folder these are the files whose endings say that they hold text, or, where there are none,
    records; hidden files and folders are left out. A glob may name any file.

    Raises:
        UserError: if there is none.
    """
    named = f"data.path = {json.dumps(path[:200])}"
    root = local("data.path", path)
    try:
        if root.is_file():
            return [root]
        if root.is_dir():
            below = visible_files(root)
            # What lies beside texts is about them.
            texts = [file for file in below if kind_of(file)[0] == ".txt"]
            found = texts or [file for file in below if kind_of(file)[0] in RECORDS]
            if not found:
                endings = ", ".join(f"*{ending}" for ending in RECORDS)
                raise UserError(
                    f"{named}: no *.txt file in this folder, and none of {endings}; to read "
                    'others, give a glob such as "folder/**/*.md"'
                )
            return found
        if root.exists():
            mode = root.stat().st_mode
            what = next((name for test, name in SPECIAL.items() if test(mode)), "no file")
            raise UserError(f"{named}: this is {what}; write the text into a file and name that")
        found = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
    except OSError as error:
        raise UserError(f"{named}: {error.strerror}") from None
    if not found:
        what = "no file matches" if glob.has_magic(path) else "no such file or folder"
        raise UserError(f"{named}: {what} (seen from {Path.cwd()})")
    return found


def visible_files(folder: Path) -> list[Path]:
    """Return the files below a folder in the order of their paths, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(x.startswith(".") for x in path.relative_to(folder).parts)
    ]


def kind_of(path: Path) -> tuple[str, str]:
    """Return the ending that says what a file holds, and that of its compression; "" for none."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    compression = endings.pop() if endings and endings[-1] in COMPRESSIONS else ""
    return (endings[-1] if endings else ""), compression


def documents(path: Path, column: str) -> Documents:
    """Yield the documents of a file, as its name says what it is: `column` of each record.

    Raises:
        UserError: if there is something that cannot be read; it names the file and the place.
    """
    if kind_of(path)[0] not in RECORDS:
        yield chunks(path)
        return
    for place, record in records(path, column):
        text = text_of(record, column, place)
        yield None if text is None else (text,)


def records(path: Path, column: str) -> Records:
    """Yield the place, for errors, and the value of each record of a file of records.

    Raises:
        UserError: for a record that cannot be read, or for parquet without such a column.
    """
    kind, compression = kind_of(path)
    if kind == ".parquet" and compression:
        raise UserError(f"{path}: parquet is compressed inside; unpack this file")
    with _errors_name(path), _open(path) as file:
        yield from RECORDS[kind](file, path, column)


def fingerprint_of(path: Path, column: str) -> str:
    """Return a key of what `documents` yields."""
    kind, compression = kind_of(path)
    content = file_digest(path)
    if kind in RECORDS:
        return digest(kind + compression, column, content)
    return digest(compression, content) if compression else content


def size(paths: list[Path]) -> int | None:
    """Estimate the bytes of text in files; None if one of them is compressed."""
    if any(kind == ".parquet" or compression for kind, compression in map(kind_of, paths)):
        return None
    return sum(path.stat().st_size for path in paths)


def text_of(record: Any, column: str, place: str) -> str | None:
    """Return the text of a record; None if it has none.

    Raises:
        UserError: if it has no such column, or something else than text there; it names the place.
    """
    key = f"data.text_column = {json.dumps(column)}"
    if not isinstance(record, dict):
        raise UserError(
            f"{place}: this is {_type(record)}, not a record such as {{{json.dumps(column)}: "
            '"some text"}'
        )
    if column not in record:
        has = ", ".join(sorted(map(str, record))) or "none"
        raise UserError(f"{place}: {key}: there is no such column; it has {has}")
    text = record[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{place}: {key} holds {_type(text)} there, not text; name a column of text"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: {key} holds half a character (a surrogate) there") from None
    return text


def _type(value: Any) -> str:
    return type(value).__name__


def chunks(path: Path, block: int = 1 << 20) -> Iterator[str]:
    """Read a UTF-8 text block by block, byte for byte (line ends are kept).

    Only a byte order mark at its start is left out.

    Raises:
        UserError: if it is not UTF-8, or has a NUL, which means UTF-16 or no text at all.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, beginning = 0, b""

    def refuse(at: int, what: str, otherwise: str) -> UserError:
        looks = (advice for start, advice in LOOKS_LIKE.items() if beginning.startswith(start))
        return UserError(f"{path}: not UTF-8 text: byte {at:,} {what}; {next(looks, otherwise)}")

    with _errors_name(path), _open(path) as file:
        while True:
            raw = file.read(block)
            if not offset:
                beginning = raw[:8]
            at = offset - len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise refuse(
                    at + error.start,
                    f"(0x{error.object[error.start]:02x}) does not belong there",
                    "convert the file to UTF-8 (if it is Latin-1, with "
                    "`iconv -f LATIN1 -t UTF-8 OLD > NEW`)",
                ) from None
            if "\0" in text:
                raise refuse(
                    at + len(text[: text.index("\0")].encode()),
                    "is NUL",
                    "if it is UTF-16, convert it with `iconv -f UTF-16LE -t UTF-8 OLD > NEW`; "
                    "otherwise remove what is no text (`tr -d '\\000' < OLD > NEW`)",
                )
            yield text if offset else text.removeprefix("\ufeff")
            if not raw:
                return
            offset += len(raw)


def _open_zstd(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _open(path: Path) -> io.BufferedIOBase:
    opened = COMPRESSIONS.get(kind_of(path)[1], partial(Path.open, mode="rb"))(path)
    return cast(io.BufferedIOBase, opened)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn what may happen while a file is read into an error that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: {error.strerror}") from None
        why = f"{path}: it is damaged or cut off ({first_line(error)})"
        raise UserError(f"{why}; get it again") from None


# Readers of records. None of them knows which column is the text, but parquet reads only that one.


def _lines(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers."""
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            looks = (advice for start, advice in LOOKS_LIKE.items() if raw.startswith(start))
            advice = next(looks, "") if number == 1 else ""
            raise UserError(
                f"{path}: line {number:,}: not UTF-8 text: byte {error.start:,} of the line "
                f"(0x{raw[error.start]:02x}) does not belong there; "
                + (advice or "convert the file to UTF-8, or take the line out")
            ) from None
        yield number, line


def _parsed(text: str, path: Path, first: int) -> Any:
    """Return the value of JSON text that starts at line `first`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first + getattr(error, "lineno", 1) - 1
        place = f"{path}: line {line:,}"
        why = getattr(error, "msg", first_line(error))
        raise UserError(
            f"{place}: this is not JSON, or only half of it ({why}); mend or delete it (a record "
            "is one line, or a part of one array)"
        ) from None


def _by_line(lines: Iterable[tuple[int, str]], path: Path) -> Records:
    for number, line in lines:
        if not line.isspace():
            yield f"{path}: line {number:,}", _parsed(line, path, number)


def _json_lines(file: io.BufferedIOBase, path: Path, column: str) -> Records:
    return _by_line(_lines(file, path), path)


def _json(file: io.BufferedIOBase, path: Path, column: str) -> Records:
    """Read one array of records, whole; or a record a line, which many files of this name hold."""
    lines = _lines(file, path)
    first = next((pair for pair in lines if not pair[1].isspace()), (1, "\n"))
    lines = chain([first], lines)
    if not first[1].lstrip().startswith("["):
        yield from _by_line(lines, path)
        return
    values = _parsed("".join(line for _, line in lines), path, first[0])
    for number, value in enumerate(values, 1):
        yield f"{path}: record {number:,}", value


def _csv(file: io.BufferedIOBase, path: Path, column: str) -> Records:
    csv.field_size_limit(LONGEST_CELL)
    rows = csv.reader((line for _, line in _lines(file, path)), strict=True)
    try:
        heading = next(rows, [])
        for row in rows:
            place = f"{path}: line {rows.line_num:,}"
            if row and len(row) != len(heading):
                raise UserError(
                    f"{place}: {len(row)} cell(s), where the heading has {len(heading)} "
                    f"({', '.join(heading)}); mend or delete it"
                )
            if row:
                yield place, dict(zip(heading, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {rows.line_num:,}: not CSV: {error}") from None


def _parquet(file: io.BufferedIOBase, path: Path, column: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if column not in names:
            text_of(dict.fromkeys(names), column, str(path))
        batches = table.iter_batches(batch_size=256, columns=[column])
        for number, value in enumerate(chain.from_iterable(b.column(0) for b in batches), 1):
            place = f"{path}: record {number:,}"
            try:
                yield place, {column: value.as_py()}
            except UnicodeDecodeError:
                raise UserError(f"{place}: not UTF-8 text") from None
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: it is not parquet, or damaged or cut off ({first_line(error)}); get it again"
        ) from None


RECORDS: dict[str, Callable[[io.BufferedIOBase, Path, str], Records]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
