"""How fast it generates, in bfloat16: tokens/s of whole models with their caches, and the kernel
that reads a long cache beside the plain softmax.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.card.task import TRAINING_PACKAGES, Task, first_line, part
from benchmarks.card.training import shape_of

PROMPT = 8


class Generation(NamedTuple):
    """A model's shape, by its name in `training.SHAPES`, and what is asked of it."""

    shape: str
    batch: int
    new_tokens: int


class Reading(NamedTuple):
    """A cache, and one query of each row and head."""

    batch: int
    slots: int
    heads: int
    kv_heads: int
    width: int


READINGS = [
    Reading(16, 8192, 16, 4, 128),
    Reading(1, 8192, 16, 4, 128),
    Reading(16, 8192, 12, 12, 64),
]
GENERATIONS = [
    Generation("gpt2", 1, 1000),
    Generation("gpt2", 16, 1000),
    Generation("baby", 1, 240),
    Generation("baby", 16, 240),
]
QUICK_READINGS = [Reading(1, 128, 2, 1, 16)]
QUICK_GENERATIONS = [Generation("baby", 2, 20)]


def generating(g: Generation, quick: bool) -> Callable[[], None]:
    """A function that generates the tokens once."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.config import ModelConfig
    from jaxdecoder.decoder import Decoder
    from jaxdecoder.sampling.generate import generate

    shape = shape_of(g.shape, quick)
    del shape["batch_size"]
    decoder = Decoder(ModelConfig(**shape), dtype=jnp.bfloat16)

    @jax.jit
    def fresh() -> Any:
        params = decoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        return jax.tree.map(lambda x: x.astype(decoder.dtype), params)

    params, prompts = fresh(), [[1] * PROMPT] * g.batch

    def turn() -> None:
        key, made = jax.random.key(0), 0
        for chunk in generate(decoder, params, prompts, max_new_tokens=g.new_tokens, key=key):
            made += len(chunk[0])
        assert made == g.new_tokens

    return turn


def generate_all(task: Task) -> None:
    for g in QUICK_GENERATIONS if task.quick else GENERATIONS:
        if task.left() < 10:
            break
        name = f"{g.shape}, batch {g.batch}, {g.new_tokens} tokens"
        try:
            start = time.perf_counter()
            turn = generating(g, task.quick)
            turn()
            first = time.perf_counter() - start
            taken = []
            while len(taken) < 3 and (not taken or task.left() > 2 * taken[0]):
                start = time.perf_counter()
                turn()
                taken.append(time.perf_counter() - start)
        except Exception as error:
            task.row("failed", what=name, why=first_line(error))
            continue
        seconds = statistics.median(taken)
        task.row(
            "generation",
            model=name,
            tokens_per_second=g.batch * g.new_tokens / seconds,
            milliseconds_a_token=1e3 * seconds / g.new_tokens,
            first_turn_seconds=first,
        )


def reading(r: Reading, implementation: str) -> Callable[[int], None]:
    """Reads the cache so many times, and waits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxdecoder.kernels.decode import decode_attention

    random = np.random.default_rng(0)
    cache = (r.batch, r.kv_heads, r.slots, r.width)
    q = jnp.asarray(random.standard_normal((r.batch, 1, r.heads, r.width)), jnp.bfloat16)
    k, v = (jnp.asarray(random.standard_normal(cache, np.float32), jnp.bfloat16) for _ in range(2))
    allowed = jnp.ones((r.batch, 1, 1, r.slots), bool)

    @jax.jit
    def call(q: Any, k: Any, v: Any, allowed: Any) -> Any:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return decode_attention(
            q, k, v, allowed, scale=r.width**-0.5, implementation=implementation
        )

    def run(count: int) -> None:
        for _ in range(count):
            out = call(q, k, v, allowed)
        jax.block_until_ready(out)

    run(2)
    return run


def read_all(task: Task) -> None:
    for r in QUICK_READINGS if task.quick else READINGS:
        count, runs = 3 if task.quick else 100, {}
        for name in ("kernel", "reference"):
            try:
                runs[name] = reading(r, name)
            except Exception as error:
                task.row("failed", what=f"{name}, {r}", why=first_line(error))
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(5):
            for name, turn in runs.items():
                start = time.perf_counter()
                turn(count)
                taken[name].append((time.perf_counter() - start) / count)
        a_call = {name: statistics.median(times) for name, times in taken.items()}
        held = 4 * r.batch * r.kv_heads * r.slots * r.width  # bytes of keys and values
        for name, seconds in a_call.items():
            plain = a_call.get("reference")
            task.row(
                "reading a cache",
                **r._asdict(),
                implementation=name,
                microseconds=1e6 * seconds,
                gigabytes_per_second=held / seconds / 1e9,
                times_the_plain=plain / seconds if plain else None,
            )


def run(task: Task) -> None:
    read_all(task)
    generate_all(task)
    print(f"{sum(len(table['rows']) for table in task.report['tables'])} figures")


if __name__ == "__main__":
    part(run, needs=TRAINING_PACKAGES)
