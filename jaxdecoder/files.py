"""Write files completely or not at all, make their content, and recognise a full disk."""

from __future__ import annotations

import base64
import contextlib
import csv
import errno
import io
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxdecoder.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TOLD = ("No space left", "File too large", "Disk quota")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that no reader ever sees half of it, even after a crash; text as UTF-8."""
    # The name contains the process id, so that two processes that write one file do not mix.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def plain_name(folder: Path) -> Iterator[Path]:
    """Yield a name of a folder in which no character is special in patterns: its own, or a link."""
    if not set("*?[]\\") & set(str(folder)):
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jaxdecoder-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute(), target_is_directory=True)
        yield link


def as_text(content: bytes, name: str) -> str:
    """Return a person's text: UTF-8, its line ends as they are, without a byte order mark.

    Raises:
        UserError: with the name, for bytes that are not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = len(content) - len(error.object) + error.start  # a mark is not counted
        raise UserError(
            f"{name}: not UTF-8 text: byte {at:,} (0x{content[at]:02x}) does not belong there; "
            "convert it to UTF-8"
        ) from None


def make_room(file: Path) -> None:
    """Make the folder of a file that is to be written, and try it, before any work is done.

    Raises:
        UserError: if nothing can be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a table, its heading first, completely or not at all."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    write_atomically(path, buffer.getvalue())


def as_png(figure: Figure, dpi: int = 110) -> bytes:
    """Return the content of a figure's PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, dpi=dpi)
    return buffer.getvalue()


def as_label(name: str) -> str:
    """Return a name for a picture, in which no $ begins a formula."""
    return name.replace("$", r"\$")


def as_markdown(rows: Iterable[Sequence[str]]) -> str:
    """Return a table, its heading first, as Markdown."""
    heading, *body = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    lines = [heading, ["---"] * len(heading), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_page(template: Path, **values: Any) -> str:
    """Return a web page: a Jinja template filled with values, which are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(template.name).render(values)


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is a lack of disk space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if any(text in str(error) for text in _NO_SPACE_TOLD):
            return True
        error = error.__cause__ or error.__context__
    return False
