"""Batches as pure functions of the step: a `Feed` has no iterator state.

A resumed run asks for the next step and gets what it would have had, and a host of many asks for
its rows of the global batch. Nothing here allocates more than the batch itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

from jaxdecoder.config import Config, DataConfig
from jaxdecoder.data.tokens import Corpus, Split
from jaxdecoder.errors import UserError

SplitName = Literal["train", "validation"]

ROUNDS = 6
"""Rounds of the shuffling network; four already pass for random, two more cost microseconds."""


class Batch(NamedTuple):
    """What a train step eats. `weights` is 0 where a row is padding, which costs nothing then."""

    inputs: Int32[np.ndarray, "*steps batch time"]
    targets: Int32[np.ndarray, "*steps batch time"]
    weights: Float32[np.ndarray, "*steps batch time"]


@dataclass(frozen=True)
class Feed:
    """One split of a corpus, as batches of a run.

    A host of many asks for its `rows` of the global batch, which is the same on any number of them.
    """

    split: Split
    data: DataConfig
    batch_size: int
    context_length: int
    seed: int
    end_token: int | None = None

    @classmethod
    def of(cls, config: Config, corpus: Corpus, split: SplitName) -> Feed:
        """What a run of a complete config learns from, or what it is measured on."""
        return cls(
            split=corpus.train if split == "train" else corpus.validation,
            data=config.data,
            batch_size=config.train.batch_size,
            context_length=config.model.context_length,
            seed=config.train.seed,
            end_token=corpus.tokenizer.end_token,
        )

    def at(self, step: int, count: int = 1, rows: slice = slice(None)) -> Batch:
        """Batches of steps `step` to `step + count - 1`, (count, rows, context_length).

        One gather serves them all, so fused steps of tiny models do not wait for the host.
        """
        t = self.context_length
        if self.data.mode == "packed":
            order = self._offsets(step, count, rows)
            flat = _windows(self.split, order.ravel(), t)
        else:
            order = self._order(len(self.split.starts), step, count, rows)[0]
            flat = _documents(self.split, order.ravel(), t, self._end())
        return Batch(*(array.reshape(*order.shape, t) for array in flat))

    def fixed(self, count: int | None, rows: slice = slice(None)) -> Iterator[Batch]:
        """Batches to measure a loss on, (rows, context_length): `count` spread evenly, or all.

        Over the whole split every token but the first, which has no context, is a target exactly
        once in packed mode. A last batch is filled up with rows of weight 0, so that all have one
        shape. A split too short for `count` batches gives all it has.
        """
        split, t = self.split, self.context_length
        if len(split.tokens) < 2:
            raise UserError(
                f"this split of the data has {len(split.tokens)} token(s), and a loss needs one to "
                "see and one to predict; raise data.validation_fraction or give more text"
            )
        packed = self.data.mode == "packed"
        whole = -(-(len(split.tokens) - 1) // t) if packed else len(split.starts)
        wanted = whole if count is None else min(whole, count * self.batch_size)
        for first in range(0, wanted, self.batch_size):
            places = np.arange(first, first + self.batch_size)[rows]
            # Rows past the end repeat the last one, at weight 0.
            chosen = np.minimum(places, wanted - 1) * whole // wanted
            if packed:
                filled = _windows_to_the_end(split, chosen * t, t)
            else:
                filled = _documents(split, chosen, t, self._end())
            real = (places < wanted).astype(np.float32)
            yield filled._replace(weights=filled.weights * real[:, None])

    def _end(self) -> int | None:
        """The end token, if the documents of this corpus were given one."""
        return self.end_token if self.data.end_of_text else None

    def _offsets(self, step: int, count: int, rows: slice) -> Int64[np.ndarray, "steps rows"]:
        """Where in the stream each row's window starts."""
        n, t = len(self.split.tokens), self.context_length
        if n < t + 1:
            raise UserError(
                f"model.context_length = {t}: a window is {t + 1:,} tokens, but this split of the "
                f"data has only {n:,}; make model.context_length at most {max(1, n - 1):,} or give "
                "more text (data.path, data.stories_bytes, data.train_fraction, "
                "data.validation_fraction)"
            )
        if self.data.sampling == "random":
            return self._random(n - t, step, count, rows)
        # A fixed number of windows an epoch, so that the epoch of a step is a division; one fewer
        # than fit, so that they can start in at least t places and every token comes to be a
        # target.
        windows = max(1, (n - t) // t)
        phases = n - windows * t
        chosen, keys = self._order(windows, step, count, rows)
        return chosen * t + (keys % np.uint64(phases)).astype(np.int64)

    def _order(
        self, size: int, step: int, count: int, rows: slice
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which of `size` things stand in the rows of some steps, and the phase key of each."""
        if self.data.sampling == "random":
            chosen = self._random(size, step, count, rows)
            return chosen, np.zeros(chosen.shape, np.uint64)
        steps = np.arange(step, step + count, dtype=np.int64)
        place = (steps[:, None] * self.batch_size + np.arange(self.batch_size)[rows]).ravel()
        epoch, index = np.divmod(place, size)
        keys = _epoch_keys(self.seed, epoch)
        chosen = permute(index, size, keys[:ROUNDS])
        return chosen.reshape(count, -1), keys[ROUNDS].reshape(count, -1)

    def _random(
        self, size: int, step: int, count: int, rows: slice
    ) -> Int64[np.ndarray, "steps rows"]:
        """Uniform draws from range(size); every host draws the whole batch and keeps its rows."""
        keys = [np.array([self.seed % 2**64, at], np.uint64) for at in range(step, step + count)]
        sources = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        draws = [source.integers(size, size=self.batch_size) for source in sources]
        return np.stack(draws)[:, rows]


def permute(
    index: Int64[np.ndarray, "n"], size: int, keys: UInt64[np.ndarray, "rounds n"]
) -> Int64[np.ndarray, "n"]:
    """Where a pseudo-random permutation of range(size) sends `index`: no table, no state.

    An index is a cell (row, column) of a nearly square grid. Each round moves the row by a hash
    of the column or the column by a hash of the row, which a key can undo, so a round is a
    permutation of the grid (a Feistel network). Cells beyond `size` are sent on until they land
    inside ("cycle walking", Black and Rogaway 2002); the grid has fewer than sqrt(size) of them.
    """
    height = max(1, int(np.ceil(np.sqrt(size))))
    width = -(-size // height)
    result = index.astype(np.uint64)
    walking = np.arange(len(index))
    while len(walking):
        result[walking] = _shuffle_grid(result[walking], height, width, keys[:, walking])
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)


def _shuffle_grid(
    cell: UInt64[np.ndarray, "n"], height: int, width: int, keys: UInt64[np.ndarray, "rounds n"]
) -> UInt64[np.ndarray, "n"]:
    h, w = np.uint64(height), np.uint64(width)
    row, column = np.divmod(cell, w)
    for number, key in enumerate(keys):
        if number % 2:
            column = (column + _mix(row ^ key) % w) % w
        else:
            row = (row + _mix(column ^ key) % h) % h
    return row * w + column


def _mix(x: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """A bijective hash of 64 bits (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _epoch_keys(seed: int, epoch: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "keys n"]:
    """Independent keys for each (seed, epoch): one a round, and one more for the phase."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    numbers = np.arange(1, ROUNDS + 2, dtype=np.uint64)[:, None]
    of_seed = _mix(np.array([seed % 2**64], np.uint64) + golden)
    return _mix(_mix(of_seed ^ (epoch.astype(np.uint64) * golden + golden)) + numbers * golden)


def _windows(split: Split, offsets: Int64[np.ndarray, "n"], context_length: int) -> Batch:
    """The windows that start at `offsets`, all of them inside the split."""
    tokens = np.asarray(split.tokens)
    # A view whose row i is the window at i: the gather then copies whole rows, with no index
    # for every token.
    view = np.lib.stride_tricks.as_strided(
        tokens,
        (len(tokens) - context_length, context_length + 1),
        tokens.strides * 2,
        writeable=False,
    )
    rows = view[offsets]
    inputs, targets = rows[:, :-1].astype(np.int32), rows[:, 1:].astype(np.int32)
    return Batch(inputs, targets, np.ones(inputs.shape, np.float32))


def _windows_to_the_end(split: Split, offsets: Int64[np.ndarray, "n"], length: int) -> Batch:
    """Like `_windows`, but a window may run past the end of the split, at weight 0."""
    tokens = np.asarray(split.tokens)
    place = offsets[:, None] + np.arange(length + 1)
    rows = tokens[np.minimum(place, len(tokens) - 1)].astype(np.int32)
    weights = (place[:, 1:] < len(tokens)).astype(np.float32)
    return Batch(rows[:, :-1], rows[:, 1:], weights)


def _documents(
    split: Split, order: Int64[np.ndarray, "n"], context_length: int, end: int | None
) -> Batch:
    """One document a row, from its start, cut to the context, its padding at weight 0.

    With an end token the row starts on it (the document before has just ended) and, as the
    stored document finishes with it, ends on it.
    """
    starts = np.asarray(split.starts)
    stops = np.append(starts[1:], len(split.tokens))
    lead = 0 if end is None else 1
    places = np.arange(context_length + 1) - lead
    first, last = starts[order][:, None], stops[order][:, None] - 1
    rows = np.asarray(split.tokens)[np.clip(first + places, first, last)].astype(np.int32)
    inside = first + places <= last
    rows[~inside] = end or 0
    if end is not None:
        rows[:, 0] = end
    return Batch(rows[:, :-1], rows[:, 1:], inside[:, 1:].astype(np.float32))
