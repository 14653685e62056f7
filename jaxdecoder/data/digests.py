"""Digests: names of content, and proof that a file is still the one that was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxdecoder.errors import UserError
from jaxdecoder.typing import Table

WHOLE = 1 << 30
"""Bytes up to which `check_of` reads a file whole, which takes about half a second."""
BLOCKS = 1024
"""Blocks that it reads of a larger file."""
BLOCK = 1 << 20


def digest(*parts: object) -> str:
    """Return the SHA-256 of plain JSON values, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def check_of(path: Path) -> str:
    """Return a digest that another size or content changes, in bounded time.

    Of a file larger than `WHOLE` it reads `BLOCKS` evenly spread blocks, the ends among them. So a
    change of a few bytes elsewhere stays unnoticed; a truncated or replaced file does not.

    Raises:
        OSError: if the file cannot be read.
    """
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(BLOCK):
                found.update(block)
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()


def sealed(values: Table) -> Table:
    """Return a JSON object with one more entry, the digest of the others."""
    return {**values, "digest": digest(sorted(values.items()))}


def unsealed(values: Any) -> Table:
    """Return what `sealed` was given.

    Raises:
        KeyError: if there is no digest.
        ValueError: if it is not that of the other entries, or this is not a JSON object.
    """
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    rest = {name: value for name, value in values.items() if name != "digest"}
    if values["digest"] != sealed(rest)["digest"]:
        raise ValueError("its digest is not that of its content: it was damaged or edited")
    return rest
