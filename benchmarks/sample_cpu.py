"""Sampling speed on CPUs, next to `generate` of `transformers` GPT-2 with its cache.

    python -m benchmarks.sample_cpu [--peer-python .venv-torch/bin/python] [--shapes one sixteen]

Both draw at temperature 1 from the same shape after prompts of 8 tokens, with weights and compute
in the dtype that `--dtype` says on both sides. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.turns import Turn, alternate, describe, parser, peer, write

GPT = {"context_length": 256, "n_layers": 6, "n_heads": 6, "d_model": 384, "vocab_size": 65}
SHAPES = {"one": {"batch_size": 1, **GPT}, "sixteen": {"batch_size": 16, **GPT}}
NEW_TOKENS = 192


def ours(shape: dict[str, Any], dtype: str) -> Turn:
    """A turn generates that many tokens for every row."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.config import ModelConfig
    from jaxdecoder.decoder import Decoder
    from jaxdecoder.sampling.generate import generate

    shape = dict(shape)
    prompts = [[1] * 8] * shape.pop("batch_size")
    decoder = Decoder(ModelConfig(**shape), dtype=jnp.dtype(dtype))
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda x: x.astype(decoder.dtype), params)

    def turn(count: int) -> float:
        start = time.perf_counter()
        made = 0
        for chunk in generate(
            decoder, params, prompts, max_new_tokens=count, key=jax.random.key(0)
        ):
            made += len(chunk[0])
        assert made == count
        return time.perf_counter() - start

    turn(NEW_TOKENS)
    return turn


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Alternating turns of both on one shape."""
    shape = {**SHAPES[name], "dtype": options.dtype}
    mine = ours(SHAPES[name], options.dtype)
    with peer(options.peer_python, "sample", shape, options.threads) as (theirs, versions):
        sides = {"jaxdecoder": mine, "transformers": theirs}
        result = alternate(name, sides, NEW_TOKENS, options.rounds, shape["batch_size"])
    return {"shape": {"name": name, **shape}, "versions": versions, **result}


def main() -> None:
    """Reads the command line and measures."""
    options = parser(__doc__.split("\n")[0], "sample_cpu", SHAPES)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--cache-parts", type=int, help="parts of a cache, 1 for a whole one")
    chosen = options.parse_args()

    import jax

    from jaxdecoder.layers import cache

    jax.config.update("jax_platforms", "cpu")
    cache.PARTS = chosen.cache_parts or cache.PARTS
    described = describe(cache_parts=cache.PARTS)
    write(chosen.out, {**described, "results": [compare(name, chosen) for name in chosen.shapes]})


if __name__ == "__main__":
    main()
