"""Read data sets of the Hugging Face Hub, and folders laid out like them."""

from __future__ import annotations

import glob
import json
import re
from pathlib import Path
from typing import Any, Literal

from jaxdecoder.config import DataConfig
from jaxdecoder.data.digests import digest, file_digest, sealed, unsealed
from jaxdecoder.data.formats import (
    RECORDS,
    Documents,
    documents,
    fingerprint_of,
    kind_of,
    local,
    records,
    text_of,
    visible_files,
)
from jaxdecoder.errors import UserError, first_line
from jaxdecoder.files import write_atomically

Part = Literal["train", "validation"]


def documents_of(data: DataConfig, part: Part) -> Documents:
    """Yield the documents of a split of `data.path`; a file has no splits, and is read whole."""
    place = _place(data)
    if place is not None and place.is_file():
        if data.validation_split:
            raise UserError(
                f"data.validation_split = {json.dumps(data.validation_split)}: {data.path} is one "
                "file, which has no splits; leave it out, or name a folder or a hub id in data.path"
            )
        yield from documents(place, data.text_column)
        return
    number = 0
    try:
        for rows in _split(data, place, part).iter(batch_size=64):
            if data.text_column not in rows:
                text_of(rows, data.text_column, data.path)
            for value in rows[data.text_column]:
                number += 1
                row = {data.text_column: value}
                text = text_of(row, data.text_column, f"{data.path}: record {number:,}")
                yield None if text is None else (text,)
    except UserError:
        raise
    except Exception as error:  # those of formats and of the network have no common base
        if place is not None:
            _name_broken_line(place, data.text_column)
        advice = "try again" if place is None else "mend or replace what it names"
        raise UserError(
            f"data.path = {json.dumps(data.path)}: it cannot be read beyond record {number:,} "
            f"({first_line(error)}); {advice}"
        ) from None


def _name_broken_line(folder: Path, column: str) -> None:
    """Raise the error of the first line of a folder's files that cannot be parsed, if any."""
    for path in visible_files(folder):
        if kind_of(path)[0] in (".jsonl", ".csv"):
            for _ in records(path, column):
                pass


def _split(data: DataConfig, folder: Path | None, part: Part) -> Any:
    """Stream one split of a Hub repository, or of a local folder of parquet or jsonl files."""
    import datasets

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


def _place(data: DataConfig) -> Path | None:
    """Return the local folder or file of `data.path`; None if it is a hub id."""
    path = local("data.path", data.path)
    try:
        if path.is_dir() and glob.has_magic(str(path.resolve())):  # files of others would be read
            raise UserError(
                f"data.path = {json.dumps(data.path)}: *, ? and [ in the name of a folder of data "
                "files would be a pattern; rename it"
            )
        if path.is_dir() or path.is_file():
            return path
        meant_a_file = path.exists() or kind_of(path)[0] in (".txt", *RECORDS)
    except OSError as error:
        named = json.dumps(data.path[:200])
        raise UserError(f"data.path = {named}: {error.strerror}") from None
    if meant_a_file or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", data.path):
        raise UserError(
            f"data.path = {json.dumps(data.path)}: neither a folder or file nor a hub id such as "
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
        try:
            return str(unsealed(json.loads(note.read_bytes()))["revision"])
        except (OSError, ValueError, KeyError, RecursionError):  # none, or a damaged one
            pass
        raise UserError(
            f"data.path = {json.dumps(data.path)}: the Hugging Face Hub cannot be reached "
            f"({first_line(error)}); where there is a network, run `hf download {data.path} "
            "--repo-type dataset --local-dir FOLDER`, bring FOLDER here and set "
            'data.path = "FOLDER"'
        ) from None
    keep(note, json.dumps(sealed({"revision": revision})).encode())
    return str(revision)


def fingerprint(data: DataConfig) -> str:
    """Return a key of the content of `data.path`."""
    place = _place(data)
    if place is None:
        content: tuple[object, ...] = (data.path, _revision(data))
    elif place.is_file():
        return digest("text", fingerprint_of(place, data.text_column))
    else:
        # File names are part of it: they say which split a file belongs to.
        files = ((p.relative_to(place).as_posix(), file_digest(p)) for p in visible_files(place))
        content = tuple(part for named in files for part in named)
    return digest("huggingface", data.text_column, data.validation_split, *content)


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
