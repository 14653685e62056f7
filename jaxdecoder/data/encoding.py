"""Tokenise pieces of text in order: gathered into jobs, and the jobs done in helper processes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt16, UInt32

from jaxdecoder.config import DataConfig
from jaxdecoder.data import tokenizers
from jaxdecoder.data.corpora import Piece
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.helpers import SPAWN, no_main_module, start_helper

JOB = 1 << 20
"""Characters that are tokenised at once."""
JOBS_ALONE = 32
"""Jobs done before helpers are called: a small corpus is ready before they could start."""

Stream = UInt16[np.ndarray, "length"] | UInt32[np.ndarray, "length"]


class Encoded(NamedTuple):
    """The tokens of some pieces in a row, and for each piece its share of tokens and of bytes."""

    tokens: Stream
    counts: list[int]
    n_bytes: list[int]
    ends: list[bool]


def jobs_of(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
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
    """Encodes the jobs in order; from `JOBS_ALONE` on in `data.processes` processes."""
    here = partial(_encode, tokenizer, data.end_of_text)
    processes = data.processes or os.cpu_count() or 1
    # Characters and bytes are looked up faster than they could be sent to a helper.
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
    """Like `map`, in helper processes, with at most two jobs a helper in memory."""
    with ProcessPoolExecutor(processes, SPAWN, initializer=start_helper) as pool:
        waiting: deque[Future[Encoded]] = deque()
        for job in jobs:
            with no_main_module():
                waiting.append(pool.submit(function, job))
            if len(waiting) >= 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _encode_in_helper(saved: str, end_of_text: bool, job: list[Piece]) -> Encoded:
    return _encode(_load_once(saved), end_of_text, job)


@lru_cache(maxsize=1)
def _load_once(saved: str) -> Tokenizer:
    return tokenizers.load(saved)


def dtype_of(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
