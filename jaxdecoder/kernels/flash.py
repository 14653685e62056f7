"""The attention operation: any mask and score function, one signature, several implementations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxdecoder.errors import UserError
from jaxdecoder.kernels import masks, scores
from jaxdecoder.kernels.device import Device, current_device
from jaxdecoder.kernels.dropout import Rate, drops, scaled, threshold
from jaxdecoder.kernels.masks import MaskFunction
from jaxdecoder.kernels.mesh import devices_of_an_array
from jaxdecoder.kernels.problem import Implementation, LogSumExp, Operands, Problem, alike
from jaxdecoder.kernels.sharded import over_mesh
from jaxdecoder.kernels.typing import AnyArray, Unchecked


class Implementations(Mapping[str, Implementation]):
    """Modules beside this one, by name, each imported when it is first asked for.

    So a run on a CPU never imports the kernels for GPUs, which need parts of JAX that change.
    """

    def __init__(self, *names: str):
        self.names = names

    def __getitem__(self, name: str) -> Implementation:
        if name not in self.names:
            raise KeyError(name)
        found: Implementation = import_module(f"jaxdecoder.kernels.{name}").IMPLEMENTATION
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


IMPLEMENTATIONS = Implementations("reference", "rows", "chunked", "portable", "hopper", "cudnn")
# Below this length, a softmax over all scores at once is the quickest.
SHORT = 128
# The weights of this many scores, half of them seen, are 32 MiB a layer: a CPU keeps no more of
# them for the backward pass. Up to there a step is quicker without loops (docs/performance.md).
FEW_SCORES = 2**24
# More queries than these are too many blocks for a program without a loop.
MOST_ROWS = 512

log = logging.getLogger(__name__)


# Types are not checked here, because the checks below have clearer messages.
@no_type_check
def flash_attention(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    *,
    mask: masks.Mask | MaskFunction,
    score: scores.Score | scores.ScoreFunction | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | tuple[Array, Array] | None = None,
    dropout_rate: Rate = 0.0,
    dropout_seed: UInt32[Array, ""] | None = None,
    implementation: str = "auto",
    explain: bool = False,
) -> Float[Array, "batch q_time heads width"]:
    """Compute softmax(score(scale q k^T)) v over the keys that `mask` allows.

    A query without keys gives zeros. Consecutive groups of heads / kv_heads query heads share a key
    head (arXiv 2305.13245). The softmax is float32; the output has the type of q.

    Args:
        mask: a mask of `masks`, or a pure function (q_index, k_index) -> bool.
        score: a `Score` of `scores`, or a pure function (score, batch, head, q_index, k_index) ->
            score, applied to the scaled scores before the mask.
        scale: 1 / sqrt(width) when left out.
        segment_ids: integers, one a position, or a pair of such arrays for queries and for keys: a
            query sees only keys of its own segment. Unlike `masks.documents` they may be traced.
        dropout_rate: the share of attention weights to drop, if there is a `dropout_seed`. It may
            be traced. A hash of (seed, batch, head, query, key) says which, the same in every
            implementation; under `shard_map` these count from the start of the shard.
        implementation: a name of `IMPLEMENTATIONS`, or "auto", which takes the first one that
            device, shapes and mask allow.
        explain: print which implementation was chosen, and why, when the call is traced.

    Raises:
        UserError: for shapes that do not fit, types that are no floats, a mask or score that is not
            a pure function, or an `implementation` that cannot do what is asked.
    """
    problem, operands = state(q, k, v, mask, score, scale, segment_ids, dropout_rate, dropout_seed)

    def solve(problem: Problem, operands: Operands) -> jax.Array:
        choice = choose(problem, operands, implementation)
        line = f"attention: {choice.name}, because {choice.reason}"
        log.debug(line)
        if explain:
            print(line)
        if IMPLEMENTATIONS[choice.name].backward is None:
            return IMPLEMENTATIONS[choice.name].forward(problem, _freeze(problem, operands))[0]
        return _attention(choice.name, problem, alike(operands))

    out = over_mesh(solve, problem, operands)
    return scaled(out, dropout_rate) if problem.dropout else out


_Kept = tuple[Operands, jax.Array, LogSumExp]
"""Operands, output and logarithms: what the backward pass needs."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(name: str, problem: Problem, operands: Operands) -> jax.Array:
    return IMPLEMENTATIONS[name].forward(problem, operands)[0]


def _forward(name: str, problem: Problem, operands: Operands) -> tuple[jax.Array, _Kept]:
    out, logsumexp = IMPLEMENTATIONS[name].forward(problem, operands)
    assert logsumexp is not None
    return out, (operands, out, logsumexp)


def _backward(name: str, problem: Problem, kept: _Kept, dout: jax.Array) -> tuple[Operands]:
    operands, backward = kept[0], IMPLEMENTATIONS[name].backward
    assert backward is not None
    gradients = backward(problem, *kept, dout)
    learned = scores.chosen(operands.score, problem.learned)
    found = (x.astype(like.dtype) for x, like in zip(gradients.score, learned, strict=True))
    score = scores.put_back(found, map(jnp.zeros_like, operands.score), problem.learned)
    return (Operands(q=gradients.q, k=gradients.k, v=gradients.v, score=tuple(score)),)


_attention.defvjp(_forward, _backward)


# --- The choice --------------------------------------------------------------------------------


class Choice(NamedTuple):
    name: str
    reason: str


def choose(
    problem: Problem, operands: Operands, implementation: str = "auto", device: Device | None = None
) -> Choice:
    """Choose the implementation that will run; `device` is the current one when left out."""
    device = current_device() if device is None else device

    def refusal(name: str) -> str | None:
        return IMPLEMENTATIONS[name].refuses(problem, operands, device)

    if implementation == "auto":
        refused: list[str] = []
        for name, reason in _candidates(operands, device):
            why_not = refusal(name)
            if why_not is None:
                return Choice(name, "; ".join([reason, *refused]))
            refused.append(f"{name} cannot, because {why_not}")
        raise UserError(f"attention: no implementation can do this: {'; '.join(refused)}")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"attention: there is no implementation {implementation!r}; "
            f"there are auto, {', '.join(IMPLEMENTATIONS)}"
        )
    why_not = refusal(implementation)
    if why_not is not None:
        able = [name for name in IMPLEMENTATIONS if refusal(name) is None]
        raise UserError(
            f"attention: {implementation} cannot do this, because {why_not}. "
            f"These can: {', '.join(['auto', *able])}"
        )
    return Choice(implementation, "it was asked for")


def _candidates(operands: Operands, device: Device) -> list[tuple[str, str]]:
    """Return implementations to try on a device, the best first, with a reason to take each."""
    q_time, k_time = operands.q.shape[1], operands.k.shape[1]
    if max(q_time, k_time) < SHORT or q_time == 1:
        return [("reference", f"{q_time} queries of {k_time} keys are quickest in one piece")]
    n_scores = operands.q.shape[0] * operands.q.shape[2] * q_time * k_time // devices_of_an_array()
    if device.platform == "cpu" and n_scores <= FEW_SCORES and q_time <= MOST_ROWS:
        return [("rows", f"the weights of {n_scores:,} scores are few enough to keep")]
    everywhere = "it skips empty blocks, in memory linear in the length, on any device"
    candidates = [
        ("cudnn", "NVIDIA's own kernel knows this mask"),
        ("hopper", "its kernels are made for Hopper GPUs"),
        ("portable", "its kernels fit any NVIDIA GPU"),
        ("chunked", everywhere),
    ]
    return candidates if device.platform == "gpu" else candidates[-1:]


# --- From arguments to a problem ---------------------------------------------------------------


@no_type_check
def state(
    q: Float[Array, "batch q_time heads width"],
    k: Float[Array, "batch k_time kv_heads width"],
    v: Float[Array, "batch k_time kv_heads width"],
    mask: masks.Mask | MaskFunction,
    score: scores.Score | scores.ScoreFunction | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "batch time"] | tuple[Array, Array] | None = None,
    dropout_rate: Rate = 0.0,
    dropout_seed: UInt32[Array, ""] | None = None,
) -> tuple[Problem, Operands]:
    """Check the arguments of `flash_attention`, and divide them into static and traced ones."""
    _check_shapes(q, k, v)
    batch, q_time, heads, width = q.shape
    k_time = k.shape[1]
    mask = mask if isinstance(mask, masks.Mask) else masks.from_function(mask)
    if score is not None and not isinstance(score, scores.Score):
        score = scores.from_function(score)
    for operand in () if score is None else score.operands:
        if operand.shape[0] != heads:
            raise UserError(
                f"attention: a score operand has shape {operand.shape}, but its first axis must "
                f"be the {heads} query heads"
            )
    dropout = _dropout(dropout_rate, dropout_seed)
    positional, labels = masks.split_documents(mask)
    if labels is not None and labels.size < max(q_time, k_time):
        raise UserError(
            f"attention: masks.documents has ids for {labels.size} positions, but there are "
            f"{q_time} queries and {k_time} keys"
        )
    varying = _segments(segment_ids, batch, q_time, k_time)
    constant = None if labels is None else (labels[None, :q_time], labels[None, :k_time])
    q_segments, k_segments = _joint(varying, constant)
    problem = Problem(
        mask=mask,
        positional_mask=positional,
        score=None if score is None else score.function,
        learned=() if score is None else score.learned,
        scale=width**-0.5 if scale is None else _number("scale", scale),
        dropout=dropout is not None,
        segments_vary=varying is not None,
    )
    operands = Operands(
        q=q,
        k=k,
        v=v,
        score=() if score is None else tuple(map(jnp.asarray, score.operands)),
        q_segments=q_segments,
        k_segments=k_segments,
        dropout=dropout,
    )
    return problem, operands


def _dropout(rate: Rate, seed: Unchecked) -> UInt32[Array, "2"] | None:
    """Return seed and threshold, or None if nothing is to be dropped."""
    if not isinstance(rate, jax.Array) and not 0.0 <= rate < 1.0:
        raise UserError(f"attention: dropout_rate must lie in [0, 1), not {rate}")
    if seed is None or not drops(rate):
        return None
    if jnp.shape(seed) != () or not jnp.issubdtype(seed.dtype, jnp.integer):
        raise UserError("attention: dropout_seed must be one uint32, such as jax.random.bits(key)")
    return jnp.stack([seed.astype(jnp.uint32), threshold(rate)])


def _number(name: str, value: Unchecked) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
        raise UserError(
            f"attention: {name} must be a number known before tracing, not {value!r}"
        ) from error


def _check_shapes(q: Unchecked, k: Unchecked, v: Unchecked) -> None:
    arrays = {"q": q, "k": k, "v": v}
    for name, array in arrays.items():
        if getattr(array, "ndim", None) != 4:
            raise UserError(
                f"attention: {name} must have the axes (batch, time, heads, width), not "
                f"{getattr(array, 'shape', type(array).__name__)}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"attention: {name} must be of a floating type, not {array.dtype}")
        if 0 in array.shape:
            raise UserError(f"attention: {name} of shape {array.shape} is void")
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if len({array.dtype for array in arrays.values()}) > 1:
        types = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise UserError(f"attention: q, k and v must be of one type, not {types}")
    if k.shape != v.shape:
        raise UserError(f"attention: k and v must have the same shape, not {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise UserError(f"attention: q, k and v must agree in batch and width, not {shapes}")
    if q.shape[2] % k.shape[2]:
        raise UserError(
            f"attention: the {q.shape[2]} heads of q must be a multiple of the {k.shape[2]} heads "
            f"of k and v, which groups of them share: {shapes}"
        )


_Segments = tuple[AnyArray, AnyArray] | None
"""Segments of queries, (batch or 1, q_time), and of keys, (batch or 1, k_time)."""


def _segments(segment_ids: Unchecked, batch: int, q_time: int, k_time: int) -> _Segments:
    if segment_ids is None:
        return None
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    for ids, time in zip(pair, (q_time, k_time), strict=True):
        shape, dtype = getattr(ids, "shape", None), getattr(ids, "dtype", type(ids).__name__)
        fits = shape in ((batch, time), (1, time)) and jnp.issubdtype(dtype, jnp.integer)
        if not fits:
            raise UserError(
                f"attention: segment_ids must be integers ({batch}, {time}), not {dtype} {shape}; "
                "for queries and keys of different lengths pass a pair"
            )
    q_ids, k_ids = (jnp.asarray(ids).astype(jnp.int32) for ids in pair)
    return q_ids, k_ids


def _joint(varying: _Segments, constant: _Segments) -> tuple[jax.Array | None, jax.Array | None]:
    """Join two pairs of segments: positions share a segment if they do in both pairs."""
    if varying is None or constant is None:
        given = varying or constant
        return (None, None) if given is None else (jnp.asarray(given[0]), jnp.asarray(given[1]))
    q_time = varying[0].shape[1]
    ids = jnp.concatenate(varying, 1)
    labels = jnp.broadcast_to(np.concatenate(constant, 1), ids.shape)
    pairs = jnp.stack([ids.ravel(), labels.ravel()], 1)
    _, joint = jnp.unique(pairs, axis=0, return_inverse=True, size=pairs.shape[0])
    joint = joint.reshape(ids.shape).astype(jnp.int32)
    return joint[:, :q_time], joint[:, q_time:]


def _freeze(problem: Problem, operands: Operands) -> Operands:
    """Stop the gradients of operands that are not learned, as the custom rule does."""
    learned = scores.chosen(operands.score, problem.learned)
    stopped = map(jax.lax.stop_gradient, operands.score)
    return operands._replace(score=tuple(scores.put_back(learned, stopped, problem.learned)))
