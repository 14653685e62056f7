"""Decoding from packed weights on a CPU, next to decoding from floats: tokens/s at batch 1.

    python benchmarks/quantized_decoding.py [--kinds int8 int4] [--config FILE] [--rounds 11]

The shape is that of the config, with random weights; formats take turns. Results go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from turns import HERE, Turn, describe, write

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"weight_format": "int8"},
    "int8_head": {"weight_format": "int8", "weight_head": True},
    "int4": {"weight_format": "int4", "weight_granularity": "group", "weight_group_size": 64},
    "float8_e4m3fn": {"weight_format": "float8_e4m3fn"},
    "w8a8": {"weight_format": "int8", "activation_format": "int8"},
}
DEFAULT = ["int8", "int4"]
NEW_TOKENS = 192


def sampling(config: Any, kind: dict[str, Any]) -> tuple[Turn, int]:
    """A turn generates so many tokens; and the bytes of the weights."""
    import jax
    import jax.numpy as jnp

    from jaxdecoder.compression.quantization import nearest, pack
    from jaxdecoder.decoder import Decoder
    from jaxdecoder.kernels import packing
    from jaxdecoder.layers.linear import scheme_of
    from jaxdecoder.sampling.generate import generate

    params = Decoder(config.model).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    if kind:
        model = replace(config.model, **kind)
        config = replace(config, model=model, train=replace(config.train, steps=0))
        params = pack(params, config, nearest(scheme_of(model)))
    decoder = Decoder(config.model)

    def turn(count: int) -> float:
        start = time.perf_counter()
        made = 0
        key = jax.random.key(0)
        for chunk in generate(decoder, params, [[1] * 8], max_new_tokens=count, key=key):
            made += len(chunk[0])
        assert made == count
        return time.perf_counter() - start

    turn(NEW_TOKENS)
    return turn, packing.size(params, nonzero=False).bytes


def main() -> None:
    """Reads the command line and measures."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--kinds", nargs="+", choices=list(KINDS)[1:], default=DEFAULT)
    options.add_argument("--config", default=str(HERE.parent / "configs/shakespeare_baby_gpt.toml"))
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--out", type=Path, default=HERE / "results" / "quantized_decoding.json")
    chosen = options.parse_args()

    import jax

    from jaxdecoder.config import load

    jax.config.update("jax_platforms", "cpu")
    described = describe()
    config = load(chosen.config, ["--model.vocab-size", "65"])
    config = replace(config, model=config.architecture)
    sides = {name: sampling(config, KINDS[name]) for name in ["float32", *chosen.kinds]}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(chosen.rounds):
        for name, (turn, _) in sides.items():
            seconds[name].append(turn(NEW_TOKENS))
    results = {}
    for name, (_, held) in sides.items():
        low, median, high = statistics.quantiles(seconds[name], n=4)
        results[name] = {
            "bytes": held,
            "tokens_per_second": NEW_TOKENS / median,
            "quartiles": [NEW_TOKENS / high, NEW_TOKENS / low],
            # Of turns that were side by side, so that the machine's other work weighs on both.
            "ratio": statistics.median(
                a / b for a, b in zip(seconds["float32"], seconds[name], strict=True)
            ),
        }
        print(
            f"{name:14} {held:11,} bytes {NEW_TOKENS / median:8.0f} tokens/s, "
            f"{results[name]['ratio']:.2f} times float32",
            flush=True,
        )
    config_name = Path(chosen.config).stem
    write(chosen.out, {**described, "config": config_name, "rounds": chosen.rounds, **results})


if __name__ == "__main__":
    main()
