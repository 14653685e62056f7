"""Tables of what each component costs: a row under the name that it has in its own dict.

A new variant is a new row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxdecoder.config import ModelConfig
from jaxdecoder.kernels import masks
from jaxdecoder.layers import stacks
from jaxdecoder.layers.attention import MASKS, SLOTS
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.linformer import mask as linformer_mask

FLOAT32 = 4

POSITION_PARAMETERS: dict[str, Callable[[ModelConfig], int]] = {
    "none": lambda c: 0,
    "learned": lambda c: c.context_length * c.d_model,
    "sinusoidal": lambda c: 0,
    "rope": lambda c: 0,
    "alibi": lambda c: 0,
    "t5": lambda c: c.n_layers * c.n_heads * c.position_buckets,
}
"""Parameters of the whole model's positions."""

NORM_PARAMETERS: dict[str, Callable[[ModelConfig], int]] = {
    "layernorm": lambda c: c.d_model * (2 if c.bias else 1),
    "rmsnorm": lambda c: c.d_model,
    "none": lambda c: 0,
}
"""Parameters of one norm of the residual stream."""

PLACEMENT_NORMS: dict[str, Callable[[int], int]] = {
    "pre": lambda branches: branches,
    "post": lambda branches: branches,
    "sandwich": lambda branches: 2 * branches,
    "parallel": lambda branches: 1,
    "none": lambda branches: 0,
}
"""Norms in a block of this many branches."""

HIDDEN_MATRICES: dict[str, int] = {
    name: 2 if activation.gated else 1 for name, activation in ACTIVATIONS.items()
}
"""Matrices from d_model to d_ff; one leads back, with `feed_forward_projection`."""


class AttentionCosts(NamedTuple):
    """What one layer of an attention mechanism costs."""

    parameters: Callable[[ModelConfig], int]
    weights: Callable[[ModelConfig], int]
    """Multiply-adds that every token costs, wherever it stands."""
    mixing: Callable[[ModelConfig, int, int], int]
    """(config, queries, start) -> multiply-adds of so many queries from `start` on, at best."""
    dense: Callable[[ModelConfig, int, int], int]
    """The same as plain XLA computes it: in one pass from 0 on, and later token by token."""
    drawn: Callable[[ModelConfig, int, int], float]
    """(config, tokens, n) -> multiply-adds of n tokens drawn at random, which see one another."""
    cache: Callable[[ModelConfig, int], int]
    """(config, bytes a number) -> bytes that decoding keeps for a sequence."""


def projection_weights(c: ModelConfig) -> int:
    """The matrices of queries, keys, values and outputs."""
    _, width, kv_width = widths(c)
    return c.d_model * (width + 2 * kv_width) + c.attention_projection * width * c.d_model


def projection_parameters(c: ModelConfig) -> int:
    """Those matrices, their biases, and the scales of the norms of queries and keys."""
    d_head, width, kv_width = widths(c)
    biases = c.qkv_bias * (width + 2 * kv_width) + c.attention_projection * c.bias * c.d_model
    return projection_weights(c) + biases + c.qk_norm * 2 * d_head


def masked(mechanism: str) -> AttentionCosts:
    """Softmax attention under one of the masks of `MASKS`."""

    def mixing(c: ModelConfig, queries: int, start: int) -> int:
        pairs = masks.allowed_entries(MASKS[mechanism](c), queries, start + queries, start)
        return _multiply_adds(c, pairs)

    def dense(c: ModelConfig, queries: int, start: int) -> int:
        return _multiply_adds(c, queries * (SLOTS[mechanism](c).size if start else queries))

    def drawn(c: ModelConfig, tokens: int, n: int) -> float:
        # A token always sees itself, and another one only if that was drawn as well.
        both = n * (n - 1) / (tokens * (tokens - 1))
        itself = _multiply_adds(c, tokens)
        return _multiply_adds(c, n) + (mixing(c, tokens, 0) - itself) * both

    def cache(c: ModelConfig, number: int) -> int:
        _, _, kv_width = widths(c)
        return number * 2 * kv_width * SLOTS[mechanism](c).size

    return AttentionCosts(projection_parameters, projection_weights, mixing, dense, drawn, cache)


def linformer() -> AttentionCosts:
    """Softmax attention to the own block and to compressed ones (`layers/linformer.py`)."""

    def compressing(c: ModelConfig, tokens: int) -> int:
        _, _, kv_width = widths(c)
        return 2 * c.attention_rank * kv_width * tokens

    def past(c: ModelConfig, tokens: int) -> int:
        """Tokens in blocks before that of the last one: a block is of use when it is over."""
        return (tokens - 1) // c.attention_block * c.attention_block if tokens else 0

    def mixing(c: ModelConfig, queries: int, start: int) -> int:
        end = start + queries
        keys = end + c.attention_rank * (past(c, end) // c.attention_block)
        pairs = masks.allowed_entries(linformer_mask(c, end), queries, keys, start)
        return _multiply_adds(c, pairs) + compressing(c, past(c, end) - past(c, start))

    def dense(c: ModelConfig, queries: int, start: int) -> int:
        blocks = past(c, queries) // c.attention_block
        if start == 0:
            pairs = queries * (queries + c.attention_rank * blocks)
            return _multiply_adds(c, pairs) + compressing(c, past(c, queries))
        # All compressed slots, and those of the token's own block once more as they grow.
        compressed = c.attention_rank * (c.context_length // c.attention_block + 1)
        pairs = queries * (c.attention_block + compressed)
        return _multiply_adds(c, pairs) + compressing(c, queries)

    def cache(c: ModelConfig, number: int) -> int:
        _, _, kv_width = widths(c)
        slots = c.attention_rank * (c.context_length // c.attention_block)
        return 2 * kv_width * (number * c.attention_block + FLOAT32 * slots)

    return AttentionCosts(
        lambda c: projection_parameters(c) + 2 * c.attention_rank * c.attention_block,
        projection_weights,
        mixing,
        dense,
        _refused,
        cache,
    )


def linear() -> AttentionCosts:
    """Linear attention: a state read and written (`layers/linear_attention.py`)."""

    def mixing(c: ModelConfig, queries: int, start: int) -> int:
        d_head, width, kv_width = widths(c)
        return queries * d_head * (width + kv_width)

    def dense(c: ModelConfig, queries: int, start: int) -> int:
        chunk = 1 if start else min(c.attention_block, queries)
        padded = -(-queries // chunk) * chunk
        return mixing(c, padded, start) + _multiply_adds(c, padded * chunk)

    def cache(c: ModelConfig, number: int) -> int:
        d_head, _, kv_width = widths(c)
        return FLOAT32 * kv_width * (d_head + 1)

    def drawn(c: ModelConfig, tokens: int, n: int) -> float:
        return mixing(c, n, 0)

    return AttentionCosts(projection_parameters, projection_weights, mixing, dense, drawn, cache)


def _refused(c: ModelConfig, tokens: int, n: int) -> float:
    raise AssertionError("a config that draws tokens from this mechanism is refused")


def _multiply_adds(c: ModelConfig, pairs: int) -> int:
    """A pair is one product for its score and one for its value, in every head."""
    _, width, _ = widths(c)
    return 2 * width * pairs


ATTENTION_COSTS: dict[str, AttentionCosts] = {
    "full": masked("full"),
    "sliding_window": masked("sliding_window"),
    "longformer": masked("longformer"),
    "fixed_sparse": masked("fixed_sparse"),
    "strided_sparse": masked("strided_sparse"),
    "linformer": linformer(),
    "linear": linear(),
}


def copying_weights(c: ModelConfig) -> int:
    """Multiply-adds that the copying head costs every token: its query, key and gate."""
    return 2 * c.d_model**2 + c.d_model


def copying_pairs(c: ModelConfig, queries: int, start: int, dense: bool) -> int:
    """Multiply-adds of what so many queries from `start` on point at."""
    if dense:
        keys = c.context_length if start else queries
        return 2 * c.d_model * queries * keys
    return 2 * c.d_model * masks.allowed_entries(masks.causal(), queries, start + queries, start)


class LayoutCosts(NamedTuple):
    """What a layout puts around the attention of its layers."""

    parameters: Callable[[ModelConfig], dict[str, int]]
    weights: Callable[[ModelConfig], dict[str, int]]
    """Multiply-adds a token, by part."""
    width: Callable[[ModelConfig], int]
    """Of what the head sees."""


def serial_parameters(c: ModelConfig) -> dict[str, int]:
    """A feed-forward and norms a block, and a norm before the head."""
    norms = c.n_layers * PLACEMENT_NORMS[c.norm_placement](2 if c.feed_forward else 1) + 1
    return {
        "feed_forward": c.n_layers * feed_forward(c).parameters,
        **({"convolutions": convolution_taps(c)} if c.convolution_width else {}),
        "norms": norms * NORM_PARAMETERS[c.norm](c),
    }


def serial_weights(c: ModelConfig) -> dict[str, int]:
    """A feed-forward a block."""
    return {
        "feed_forward": c.n_layers * feed_forward(c).weights,
        **({"convolutions": convolution_taps(c)} if c.convolution_width else {}),
    }


def convolution_taps(c: ModelConfig) -> int:
    """Taps of the short convolutions of all blocks; each is a multiply-add a token."""
    return c.n_layers * (2 if c.feed_forward else 1) * c.convolution_width * c.d_model


def stacks_parameters(c: ModelConfig) -> dict[str, int]:
    """A feed-forward, norms and a slice a layer; a feed-forward and two norms a stack."""
    factors = stack_widths(c)
    layer_norms = c.n_layers * PLACEMENT_NORMS[c.norm_placement](1)
    return {
        "feed_forward": c.n_layers * feed_forward(c).parameters
        + sum(feed_forward(c, factor).parameters for factor in factors),
        "slices": projections_to_slices(c) * (c.d_model + c.bias) * c.d_model * sum(factors),
        "norms": (layer_norms + c.n_stacks + sum(factors)) * NORM_PARAMETERS[c.norm](c),
    }


def stacks_weights(c: ModelConfig) -> dict[str, int]:
    """A feed-forward a layer and a stack, and the slices."""
    factors = stack_widths(c)
    return {
        "feed_forward": c.n_layers * feed_forward(c).weights
        + sum(feed_forward(c, factor).weights for factor in factors),
        "slices": projections_to_slices(c) * c.d_model * c.d_model * sum(factors),
    }


LAYOUT_COSTS: dict[str, LayoutCosts] = {
    "serial": LayoutCosts(serial_parameters, serial_weights, lambda c: c.d_model),
    "parallel_stacks": LayoutCosts(stacks_parameters, stacks_weights, stacks.width),
}


# --- Widths and matrices --------------------------------------------------------------------------


def widths(c: ModelConfig) -> tuple[int, int, int]:
    """Widths of a head, of all queries, and of all keys."""
    c = c.resolve()
    assert c.d_head is not None
    assert c.n_kv_heads is not None
    return c.d_head, c.n_heads * c.d_head, c.n_kv_heads * c.d_head


class FeedForward(NamedTuple):
    weights: int
    parameters: int


def feed_forward(c: ModelConfig, factor: int = 1) -> FeedForward:
    """A feed-forward `factor` times as wide as the config's, which may have none."""
    d_ff = c.resolve().d_ff
    assert d_ff is not None
    width, d_ff = factor * c.d_model, factor * d_ff
    hidden, down = HIDDEN_MATRICES[c.activation], c.feed_forward_projection
    weights = (hidden + down) * width * d_ff
    biases = c.bias * (hidden * d_ff + down * width)
    return FeedForward(c.feed_forward * weights, c.feed_forward * (weights + biases))


def stack_widths(c: ModelConfig) -> list[int]:
    """The widths of the stacks, in multiples of d_model."""
    return [1] * (c.n_stacks - 1) + [stacks.WIDENING]


def projections_to_slices(c: ModelConfig) -> int:
    return 2 if c.feed_forward and c.has_residual("feed_forward") else 1
