"""Write a teacher's answers to disk once: its likeliest next tokens, and all others as one more.

The batch of a step is a function of the seed and the step, so the answers are stored by step. They
belong to exactly the windows that the student sees, wherever these are in the text. A token takes
4 top_k + 2 bytes (6 top_k + 2 for vocabularies past 65,536), and a run has steps x batch_size x
context_length tokens. The size is printed, and refused if it is too large, before anything is
written.

The files are two arrays in `<data.cache>/answers/<key>`. The key stands for the teacher's weights,
the text, and all else that decides the windows. They are written to a sibling folder, under a lock,
and the folder is renamed when it is complete. A killed process continues where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.progress import track

from jaxdecoder.compression.divergences import at_once, over_time, soften
from jaxdecoder.config import Config, ConfigError
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.decoder import Decoder
from jaxdecoder.errors import UserError
from jaxdecoder.kernels.device import current_device
from jaxdecoder.training.runs import Model
from jaxdecoder.training.step import compute_dtype
from jaxdecoder.typing import Params

FORMAT = 1
"""Part of every key. Raise it when the files change, or the meaning of their content."""
LEAST = -60000.0
"""The lowest log-probability that is stored, close to the limit of float16."""
FILES = ("tokens.npy", "log_probabilities.npy")


class Answers(NamedTuple):
    """The teacher's answers to some tokens."""

    tokens: Int[Array | np.ndarray, "*rows top_k"]
    """The likeliest next tokens."""
    log_probabilities: Float[Array | np.ndarray, "*rows top_k+1"]
    """Their log-probabilities, and last that of all others together."""


def outcomes(
    log_probabilities: Float[Array, "*rows vocab"], tokens: Int[Array, "*rows top_k"]
) -> Float[Array, "*rows outcomes"]:
    """Return the log-probabilities of these tokens, and last that of all others together."""
    chosen = jnp.take_along_axis(log_probabilities, tokens, axis=-1)
    others = jnp.put_along_axis(log_probabilities, tokens, -jnp.inf, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return jnp.concatenate([chosen, rest], axis=-1)


def answer(logits: Float[Array, "*rows vocab"], top_k: int, temperature: float) -> Answers:
    """Return the answers of a teacher with these logits at a temperature, in full precision."""
    log_probabilities = soften(logits, temperature)
    _, tokens = jax.lax.top_k(log_probabilities, top_k)
    return Answers(tokens, outcomes(log_probabilities, tokens))


def told(answers: Answers) -> Float[Array, "*rows outcomes"]:
    """Return the teacher's log-probabilities, normalised again after their rounding on disk."""
    return jax.nn.log_softmax(answers.log_probabilities.astype(jnp.float32), axis=-1)


def feeding(
    config: Config, corpus: Corpus, teacher: Callable[[], Model]
) -> Callable[[int, int, slice], Answers]:
    """Return a function from a step, a number of steps and this host's rows to their answers.

    It opens or writes nothing before its first call, and loads the teacher only to write.
    """

    files = functools.cache(functools.partial(prepare, config, corpus, teacher))

    def feed(step: int, count: int, rows: slice) -> Answers:
        tokens, log_probabilities = (np.asarray(x[step : step + count, rows]) for x in files())
        return Answers(tokens.astype(np.int32), log_probabilities.astype(np.float32))

    return feed


def prepare(config: Config, corpus: Corpus, teacher: Callable[[], Model]) -> Answers:
    """Return the answers to all batches of the run, memory-mapped; write them if they are missing.

    Raises:
        UserError: if they need more space than distillation.cached_most_gigabytes, or than is free.
    """
    folder = folder_of(config, corpus.key)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # another process may have been faster
                _write(config, corpus, teacher(), folder)
    return Answers(*(np.load(folder / name, mmap_mode="r") for name in FILES))


def folder_of(config: Config, corpus_key: str) -> Path:
    """Return the folder of a run's answers to a corpus, known by its key."""
    t, d = config.train, config.distillation
    settings = {
        "format": FORMAT,
        "teacher": d.teacher_digest,
        "corpus": corpus_key,
        "mode": config.data.mode,
        "sampling": config.data.sampling,
        "dtype": str(compute_dtype(config)),
        "batches": [t.seed, t.steps, t.batch_size, config.model.context_length],
        "answers": [d.cached_top_k, d.temperature],
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    return Path(config.data.cache) / "answers" / key


def shapes(config: Config) -> tuple[tuple[tuple[int, ...], np.dtype], ...]:
    """Return the shape and dtype of each of `FILES`."""
    t, k, vocab = config.train, config.distillation.cached_top_k, config.architecture.vocab_size
    tokens = (t.steps, t.batch_size, config.model.context_length)
    small = np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32)
    return ((*tokens, k), small), ((*tokens, k + 1), np.dtype(np.float16))


def needed(config: Config) -> int:
    """Return the bytes that the answers need."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes(config))


def _write(config: Config, corpus: Corpus, teacher: Model, folder: Path) -> None:
    unfinished = folder.with_name(folder.name + ".partial")
    unfinished.mkdir(exist_ok=True)
    paths, kinds = [unfinished / name for name in FILES], shapes(config)
    headers = [_header(*kind) for kind in kinds]
    step_bytes = [math.prod(shape[1:]) * dtype.itemsize for shape, dtype in kinds]
    done = _steps_written(paths, headers, step_bytes)
    _check_room(config, done, unfinished)
    k, temperature = config.distillation.cached_top_k, config.distillation.temperature
    decoder = teacher.decoder.clone(dtype=compute_dtype(config))
    ask = jax.jit(functools.partial(_ask, decoder, k, temperature))
    feed = Feed.of(config, corpus, "train")
    if done:
        print(f"going on with the teacher's answers at step {done}")
    with paths[0].open("r+b") as first, paths[1].open("r+b") as second:
        files = (first, second)
        for file, header, size in zip(files, headers, step_bytes, strict=True):
            file.truncate(len(header) + done * size)
            file.seek(0, os.SEEK_END)
        for step in track(range(done, config.train.steps), description="the teacher's answers"):
            given = ask(teacher.params, feed.at(step).inputs[0])
            for file, array, (_, dtype) in zip(files, given, kinds, strict=True):
                file.write(np.asarray(array).astype(dtype).tobytes())
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    os.replace(unfinished, folder)


def _ask(
    decoder: Decoder, top_k: int, temperature: float, params: Params, tokens: jax.Array
) -> Answers:
    features = decoder.apply({"params": params}, tokens, method="features")

    def some(features: jax.Array) -> Answers:
        logits: Any = decoder.apply({"params": params}, features, method="logits")
        return answer(logits, top_k, temperature)

    chunk = at_once(tokens.shape[0], decoder.architecture.vocab_size, current_device().platform)
    answers = over_time(some, features, chunk)
    return answers._replace(log_probabilities=jnp.maximum(answers.log_probabilities, LEAST))


def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Return the header of an .npy file of this shape."""
    buffer = io.BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def _steps_written(paths: list[Path], headers: list[bytes], step_bytes: list[int]) -> int:
    """Return the steps whose answers are in all files; begin files that are missing or empty."""
    done = []
    for path, header, size in zip(paths, headers, step_bytes, strict=True):
        if not path.exists() or path.stat().st_size < len(header):
            path.write_bytes(header)
        done.append((path.stat().st_size - len(header)) // size)
    return min(done)


def _check_room(config: Config, done: int, folder: Path) -> None:
    total, d, t = needed(config), config.distillation, config.train
    tokens = t.steps * t.batch_size * config.model.context_length
    size = f"{total / 1e9:,.3f} GB for {d.cached_top_k} answers to each of {tokens:,} tokens"
    if total > d.cached_most_gigabytes * 1e9:
        fits = int(d.cached_most_gigabytes * 1e9 * d.cached_top_k / total)
        raise ConfigError(
            "distillation.cached_top_k",
            d.cached_top_k,
            f"the teacher's answers would take {size}, and at most {d.cached_most_gigabytes:g} GB "
            f"are allowed; about {fits} would fit, or give --cached-most-gigabytes, or 0 to run "
            "the teacher in every step",
        )
    free = shutil.disk_usage(folder).free
    left = total - total * done // max(1, t.steps)
    if left > free:
        raise UserError(
            f"{folder.parent}: the teacher's answers take {size}, and {free / 1e9:,.3f} GB are "
            "free there; free some space, set data.cache to another disk, or give a lower "
            "--cached-top-k"
        )
    print(f"{folder.parent}: the teacher's answers take {size}; written once, for any student")
