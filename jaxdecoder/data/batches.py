"""Make batches as pure functions of the step: a `Feed` has no iterator state.

A resumed run asks for its next step and gets the same batch as an uninterrupted run. Each of
several hosts asks for its own rows of the global batch. Nothing here allocates more than the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

from jaxdecoder.config import Config, DataConfig
from jaxdecoder.data.tokens import Corpus, Split
from jaxdecoder.errors import UserError

SplitName = Literal["train", "validation"]

Told = Callable[[int, int], None]
"""Learns (batches done, of how many) before each batch, and may raise."""


def untold(done: int, of: int) -> None:
    """Take no notice."""


ROUNDS = 6
"""Rounds of the shuffling network. Four already look random; two more cost microseconds."""


class Batch(NamedTuple):
    """The input of a train step. `weights` is 0 for padding, which adds nothing to the loss."""

    inputs: Int32[np.ndarray, "*steps batch time"]
    targets: Int32[np.ndarray, "*steps batch time"]
    weights: Float32[np.ndarray, "*steps batch time"]


@dataclass(frozen=True)
class Feed:
    """Make the batches of a run from one split of a corpus, whatever the number of hosts."""

    split: Split
    data: DataConfig
    batch_size: int
    context_length: int
    seed: int
    end_token: int | None = None

    @classmethod
    def of(cls, config: Config, corpus: Corpus, split: SplitName) -> Feed:
        """Return the feed of a complete config: its training batches, or its validation batches."""
        return cls(
            split=corpus.train if split == "train" else corpus.validation,
            data=config.data,
            batch_size=config.train.batch_size,
            context_length=config.model.context_length,
            seed=config.train.seed,
            end_token=corpus.tokenizer.end_token,
        )

    def at(self, step: int, count: int = 1, rows: slice = slice(None)) -> Batch:
        """Return the batches of steps `step` to `step + count - 1`: (count, rows, context_length).

        One gather makes them all, so that fused steps of tiny models do not wait for the host.
        """
        t = self.context_length
        if self.data.mode == "packed":
            order = self._offsets(step, count, rows)
            flat = _windows(self.split, order.ravel(), t)
        else:
            order = self._order(len(self.split.starts), step, count, rows)[0]
            flat = _documents(self.split, order.ravel(), t, self._end())
        return Batch(*(array.reshape(*order.shape, t) for array in flat))

    def fixed(
        self, count: int | None, rows: slice = slice(None), told: Told = untold
    ) -> Iterator[Batch]:
        """Yield batches for a loss, (rows, context_length): all, or `count` of them spread evenly.

        In packed mode, all batches together have every token of the split as a target exactly
        once, except the first, which has no context. The last batch is filled with rows of weight
        0, so that all batches have one shape. If the split is too short for `count` batches, it
        yields as many as there are.

        Raises:
            UserError: if the split has fewer than 2 tokens.
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
            told(first // self.batch_size, -(-wanted // self.batch_size))
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
        """Return the end token, if the documents of this corpus end with one."""
        return self.end_token if self.data.end_of_text else None

    def _offsets(self, step: int, count: int, rows: slice) -> Int64[np.ndarray, "steps rows"]:
        """Return where in the split the window of each row starts."""
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
        # The number of windows per epoch is fixed, so that a division gives the epoch of a step. It
        # is one less than fit, so that the windows can start at t places or more, and every token
        # becomes a target.
        windows = max(1, (n - t) // t)
        phases = n - windows * t
        chosen, keys = self._order(windows, step, count, rows)
        return chosen * t + (keys % np.uint64(phases)).astype(np.int64)

    def _order(
        self, size: int, step: int, count: int, rows: slice
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which of `size` items each row of these steps has, and the phase key of each."""
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
        """Draw uniformly from range(size). Every host draws the whole batch and keeps its rows."""
        keys = [np.array([self.seed % 2**64, at], np.uint64) for at in range(step, step + count)]
        sources = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        draws = [source.integers(size, size=self.batch_size) for source in sources]
        return np.stack(draws)[:, rows]


def permute(
    index: Int64[np.ndarray, "n"], size: int, keys: UInt64[np.ndarray, "rounds n"]
) -> Int64[np.ndarray, "n"]:
    """Apply a pseudo-random permutation of range(size) to `index`, without a table or state.

    An index is a cell (row, column) of a nearly square grid. Each round moves the row by a hash
    of the column, or the column by a hash of the row. The key can undo that, so a round is a
    permutation of the grid (a Feistel network). A cell beyond `size` is permuted again until it is
    inside ("cycle walking", Black and Rogaway 2002). The grid has fewer than sqrt(size) of them.
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
    """Hash 64 bits bijectively (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _epoch_keys(seed: int, epoch: Int64[np.ndarray, "n"]) -> UInt64[np.ndarray, "keys n"]:
    """Return independent keys for each (seed, epoch): one per round, and one more for the phase."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    numbers = np.arange(1, ROUNDS + 2, dtype=np.uint64)[:, None]
    of_seed = _mix(np.array([seed % 2**64], np.uint64) + golden)
    return _mix(_mix(of_seed ^ (epoch.astype(np.uint64) * golden + golden)) + numbers * golden)


def _windows(split: Split, offsets: Int64[np.ndarray, "n"], context_length: int) -> Batch:
    """Return the windows that start at `offsets`. All of them must be inside the split."""
    tokens = np.asarray(split.tokens)
    # Row i of this view is the window at i. The gather then copies whole rows and needs no index
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
    """Do the same as `_windows`, but let windows run past the end of the split, with weight 0."""
    tokens = np.asarray(split.tokens)
    place = offsets[:, None] + np.arange(length + 1)
    rows = tokens[np.minimum(place, len(tokens) - 1)].astype(np.int32)
    weights = (place[:, 1:] < len(tokens)).astype(np.float32)
    return Batch(rows[:, :-1], rows[:, 1:], weights)


def _documents(
    split: Split, order: Int64[np.ndarray, "n"], context_length: int, end: int | None
) -> Batch:
    """Return one document per row, from its start, cut to the context; padding has weight 0.

    With an end token, the row starts with it, as if the previous document had just ended. It also
    ends with it, because every stored document does.
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
