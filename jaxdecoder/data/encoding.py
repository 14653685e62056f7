"""Tokenise pieces of text in parallel: group them into jobs, and give the jobs to helper processes.

The results come in the order of the pieces.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt16, UInt32

from jaxdecoder.config import DataConfig
from jaxdecoder.data import tokenizers
from jaxdecoder.data.corpora import Piece
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.helpers import SPAWN, no_main_module, start_helper

JOB = 1 << 20
"""Characters of a job."""
JOBS_ALONE = 32
"""Jobs done before helpers start. A small corpus is ready before they could start."""

Stream = UInt16[np.ndarray, "length"] | UInt32[np.ndarray, "length"]
"""The tokens of a stretch of text."""


class Encoded(NamedTuple):
    """The tokens of consecutive pieces, and the sizes of each piece."""

    tokens: Stream
    counts: list[int]
    """Tokens of each piece, its end token included."""
    n_bytes: list[int]
    """UTF-8 bytes of each piece."""
    ends: list[bool]
    """Whether a document ends with the piece."""


def jobs_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces into jobs of at least `JOB` characters; the last may be shorter."""
    job: list[Piece] = []
    characters = 0
    for piece in pieces:
        job.append(piece)
        characters += len(piece.text)
        if characters >= JOB:
            yield job
            job, characters = [], 0
    if job:
        yield job


def _encode(tokenizer: Tokenizer, end_of_text: bool, job: list[Piece]) -> Encoded:
    end = np.array([tokenizer.end_token] if end_of_text else [], np.int32)
    parts, counts, n_bytes = [], [], []
    for text, ends in job:
        ids = tokenizer.encode(text)
        parts += [ids, end] if ends else [ids]
        counts.append(len(ids) + (len(end) if ends else 0))
        n_bytes.append(len(text) if text.isascii() else len(text.encode()))
    tokens = np.concatenate(parts).astype(dtype_of(tokenizer))
    return Encoded(tokens, counts, n_bytes, [piece.ends for piece in job])


def encode_all(
    data: DataConfig, tokenizer: Tokenizer, saved: Path, jobs: Iterator[list[Piece]]
) -> Iterator[Encoded]:
    """Encode the jobs in order; after the first `JOBS_ALONE`, in `data.processes` processes.

    `saved` is the file of the tokenizer, for the helper processes.
    """
    here = partial(_encode, tokenizer, data.end_of_text)
    processes = data.processes or os.cpu_count() or 1
    # Looking up characters or bytes is faster than sending them to a helper.
    if processes == 1 or tokenizer.kind != "bpe":
        yield from map(here, jobs)
        return
    yield from map(here, islice(jobs, JOBS_ALONE))
    first = next(jobs, None)
    if first is not None:
        there = partial(_encode_in_helper, str(saved), data.end_of_text)
        yield from _in_order(there, chain([first], jobs), processes)


def _in_order(
    function: Callable[[list[Piece]], Encoded], jobs: Iterable[list[Piece]], processes: int
) -> Iterator[Encoded]:
    """Map in helper processes, in order, with at most two jobs per helper in memory."""
    with ProcessPoolExecutor(processes, SPAWN, initializer=start_helper) as pool:
        waiting: deque[Future[Encoded]] = deque()
        for job in jobs:
            with no_main_module():
                waiting.append(pool.submit(function, job))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_load_once = lru_cache(maxsize=1)(tokenizers.load)


def _encode_in_helper(saved: str, end_of_text: bool, job: list[Piece]) -> Encoded:
    return _encode(_load_once(saved), end_of_text, job)


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest integer type for the tokenizer's ids: uint16 or uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
