"""Attention as Pallas Mosaic GPU kernels for Hopper cards: TMA, `wgmma`, specialised warpgroups.

`launch.py` cuts a problem into blocks and gives the warpgroups their roles. `forward.py`,
`queries.py` and `keys.py` are the kernels. Inside they share `walk.py` (the order of steps),
`memory.py` (buffers and matrix products), `tiles.py` (scores) and `lowering.py` (what Mosaic
lowers). Given `interpret`, parameters of Mosaic's interpreter, they run on a CPU; factors that the
tensor cores would take from registers then go through shared memory. The compiler may use the
card's approximate functions (2^x and log to some 2^-22); tanh is made of the first, because the
card's own is off by 2^-11.

How a kernel is cut and ordered is a `Sizes`. Which one is quickest must be measured on a card
(`benchmarks/tune_attention.py`).
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp

from jaxdecoder.kernels import masks, scores, tuning
from jaxdecoder.kernels.device import Device
from jaxdecoder.kernels.hopper import tiles
from jaxdecoder.kernels.hopper.forward import FORWARD
from jaxdecoder.kernels.hopper.keys import KEYS
from jaxdecoder.kernels.hopper.launch import REGISTERS, Interpret, Launch, Sizes
from jaxdecoder.kernels.hopper.queries import QUERIES
from jaxdecoder.kernels.hopper.tiles import ROWS
from jaxdecoder.kernels.padding import padded, round_up
from jaxdecoder.kernels.partitioning import over_devices
from jaxdecoder.kernels.problem import (
    Gradients,
    Implementation,
    Known,
    LogSumExp,
    Operands,
    Problem,
    reads_arrays,
    result,
)

# For widths up to the key, the sizes of each kernel: of the forward kernel, of the one for the
# gradient of queries, and of those for the gradients of keys and values, by what they compute.
# These are the largest blocks and rings that fit into the registers, without spills, and into the
# shared memory of a block. Plain problems are those of `is_plain`.
PLAIN = {
    64: {"forward": Sizes(128, 3), "queries": Sizes(64, 3), "kv": Sizes(64, 3)},
    128: {"forward": Sizes(128, 2), "queries": Sizes(64, 2), "kv": Sizes(64, 2)},
}
OTHERS = {
    64: {"forward": Sizes(64, 4), "queries": Sizes(64, 3), "k": Sizes(64, 3), "v": Sizes(64, 3)},
    128: {"forward": Sizes(64, 3), "queries": Sizes(64, 2), "k": Sizes(64, 2), "v": Sizes(64, 2)},
}
KERNELS = {"forward": FORWARD, "queries": QUERIES, **KEYS}
DTYPES = (jnp.bfloat16, jnp.float16)
# As much as the registers hold, beside the accumulators.
LARGEST_WIDTH = 128
MOST_NUMBERS = 1
HOPPER = {"H100", "H200", "H800", "H20", "GH200"}

# Versions of CUDA whose assembler gets such loops wrong; JAX's own kernels refuse them, too.
MISCOMPILED = range(12080, 12091)


def cuda_version() -> int | None:
    """Return the version of the GPU's runtime, such as 13000 for 13.0, if there is one."""
    if jax.default_backend() != "gpu":
        return None
    found = re.search(r"cuda (\d+)", jax.devices("gpu")[0].client.platform_version)
    return int(found[1]) if found else None


def is_plain(problem: Problem) -> bool:
    """Return whether little is to be computed but the products and the softmax."""
    return (
        problem.score is None and not problem.dropout and masks.is_simple(problem.positional_mask)
    )


def sizes(problem: Problem, operands: Operands) -> dict[str, Sizes]:
    """Return the sizes of each kernel: those measured on this card, or else the defaults."""
    plain, width = is_plain(problem), operands.q.shape[-1]
    tuned = tuning.table().get(tuning.key("hopper", problem, operands)) if plain else None
    if tuned is not None and tuned.keys() <= KERNELS.keys():
        return {kernel: Sizes(*chosen) for kernel, chosen in tuned.items()}
    table = PLAIN if plain else OTHERS
    return next(chosen for largest, chosen in table.items() if width <= largest)


def forward(
    problem: Problem, operands: Operands, interpret: Interpret = None, chosen: Sizes | None = None
) -> tuple[jax.Array, LogSumExp]:
    """See `problem.Implementation`; `chosen`, here and below, is for measurements."""
    chosen = chosen or sizes(problem, operands)["forward"]
    launch = Launch(FORWARD, problem, operands, chosen, interpret)
    arrays = launch.arrays(operands)
    sums = (launch.batch, launch.heads, launch.q_whole)
    results = [launch.like(arrays.operands.q), result(sums, jnp.float32, operands.q)]
    out, logsumexp = launch(operands, arrays, results)
    return out[:, : launch.q_time], logsumexp[:, :, : launch.q_time] * math.log(2)


def backward(
    problem: Problem,
    operands: Operands,
    out: jax.Array,
    logsumexp: jax.Array,
    dout: jax.Array,
    interpret: Interpret = None,
    chosen: dict[str, Sizes] | None = None,
) -> Gradients:
    """See `problem.Implementation`."""
    chosen = chosen or sizes(problem, operands)
    of_queries = rows_of_queries(operands, out, logsumexp, dout)
    score: list[jax.Array] = []
    found: dict[str, jax.Array] = {}
    for kernel, sizes_ in chosen.items():
        if kernel == "queries":
            found["q"], score = gradient_of_queries(
                problem, operands, dout, of_queries, interpret, sizes_
            )
        elif kernel != "forward":
            found |= gradient_of_keys(
                problem, operands, dout, of_queries, kernel, interpret, sizes_
            )
    return Gradients(**found, score=score)


# Queries are padded to whole blocks, whatever the number of compute warpgroups.
WHOLE = math.lcm(*(consumers * ROWS for consumers in REGISTERS))


def rows_of_queries(
    operands: Operands, out: jax.Array, logsumexp: jax.Array, dout: jax.Array
) -> jax.Array:
    """Return `launch.Arrays.of_queries`; `logsumexp` is as `forward` gives it."""
    known, whole = Known.of(out, logsumexp, dout), round_up(operands.q.shape[1], WHOLE)
    # Queries that only fill a block have no weights either, whatever the score makes of them.
    logsumexp = padded(known.logsumexp / math.log(2), 2, whole, jnp.inf)
    delta = padded(known.delta, 2, whole)
    rows = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (logsumexp, delta)]
    if operands.q_segments is not None:
        segments = padded(operands.q_segments, 1, whole)[:, None]
        rows.append(jnp.broadcast_to(segments, delta.shape))
    return jnp.stack(rows, axis=2)


def gradient_of_queries(
    problem: Problem,
    operands: Operands,
    dout: jax.Array,
    of_queries: jax.Array,
    interpret: Interpret = None,
    chosen: Sizes | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the gradients of the queries and of the score's learned operands."""
    chosen = chosen or sizes(problem, operands)["queries"]
    launch = Launch(QUERIES, problem, operands, chosen, interpret)
    arrays = launch.arrays(operands, dout, of_queries)
    results = [launch.like(arrays.operands.q)]
    n = launch.learned_numbers()
    if n:
        shape = (launch.batch, launch.heads, n, launch.q_whole)
        results.append(result(shape, jnp.float32, operands.q))
    dq, *dscore = launch(operands, arrays, results)
    score = []
    numbers = jnp.sum(dscore[0], axis=(0, 3)) if n else jnp.zeros((launch.heads, 0))
    for x in scores.chosen(operands.score, problem.learned):
        size = x.size // launch.heads
        score.append(numbers[:, :size].reshape(x.shape))
        numbers = numbers[:, size:]
    return dq[:, : launch.q_time], score


def gradient_of_keys(
    problem: Problem,
    operands: Operands,
    dout: jax.Array,
    of_queries: jax.Array,
    wanted: str,
    interpret: Interpret = None,
    chosen: Sizes | None = None,
) -> dict[str, jax.Array]:
    """Return the gradients of keys and values, or of one of them: `wanted` is kv, k or v.

    qkv gives that of the queries, too, in five products rather than seven. The card adds its parts
    in the order in which it happens to run the blocks, so the last digits differ from run to run.
    The score has no learned numbers then, and widths are multiples of 128 (two warpgroups).
    """
    chosen = chosen or sizes(problem, operands)[wanted]
    owned = wanted.replace("q", "")

    def gradients(
        operands: Operands, dout: jax.Array, of_queries: jax.Array
    ) -> dict[str, jax.Array]:
        launch = Launch(KEYS[wanted], problem, operands, chosen, interpret)
        arrays = launch.arrays(operands, dout, of_queries)
        results, sums = [launch.like(arrays.operands.k)] * len(owned), []
        if "q" in wanted:
            shape = (launch.batch, launch.q_whole, launch.heads, launch.width)
            sums = [result(shape, jnp.float32, operands.q)]
        found = launch(operands, arrays, results, sums)
        by_name = {name: x[:, : launch.k_time] for name, x in zip(owned, found, strict=False)}
        if "q" in wanted:
            by_name["q"] = found[-1][:, : launch.q_time].astype(operands.q.dtype)
        return by_name

    if "q" in wanted:  # the sums that all blocks add to cannot have another axis under vmap
        gradients = jax.custom_batching.sequential_vmap(gradients)
    found: dict[str, jax.Array] = gradients(operands, dout, of_queries)
    return found


def _refuses(problem: Problem, operands: Operands, device: Device) -> str | None:
    width, dtype = operands.q.shape[-1], operands.q.dtype
    numbers = sum(x.size // x.shape[0] for x in operands.score)
    if not HOPPER & set(re.split(r"\W+", device.kind)):
        return f"its kernels are for Hopper GPUs, not for a {device.kind}"
    if cuda_version() in MISCOMPILED:
        return "CUDA 12.8 and 12.9.0 compile it wrongly"
    if dtype not in DTYPES:
        return f"it computes in {' and '.join(jnp.dtype(d).name for d in DTYPES)}, not in {dtype}"
    if width % 16 or width > LARGEST_WIDTH:
        return f"its heads are multiples of 16 wide, up to {LARGEST_WIDTH}, not {width}"
    if numbers > MOST_NUMBERS:
        return f"its scores read at most {MOST_NUMBERS} number a head, not {numbers}"
    parameters = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands.score)
    return reads_arrays(problem, operands) or _cannot_compile(problem, parameters)


@functools.lru_cache(maxsize=256)
def _cannot_compile(problem: Problem, score: tuple[jax.ShapeDtypeStruct, ...]) -> str | None:
    """Ask Mosaic, on a small tile: which operations it lowers differs between versions of JAX."""
    try:
        tiles.try_out(problem, score)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        return f"jax {jax.__version__} cannot compile its mask and score for one: {reason}"
    return None


IMPLEMENTATION = Implementation(*over_devices(forward, backward), _refuses)
