"""What a config costs, in closed form: parameters, FLOPs and bytes, with no array built.

    python -m jaxdecoder.analysis configs/shakespeare_nano.toml --model.vocab-size 65

Every component has its row in one of the tables below, under the name it has in its own dict, so a
new variant is a new row.

FLOPs are those of the matrix products alone, two for each multiply-add; lookups, norms,
activations, biases and the softmax are left out. Attention is counted over the (query, key) pairs
that its mask allows, which is what a kernel that skips the others computes at best, and linear
attention as its recurrence; the dense count is what plain XLA computes, over all pairs, all slots
of a cache and all of a chunk. The backward pass is twice the forward, one
product for the gradient of either operand; recomputation is not counted.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from jaxdecoder.config import Config, ConfigError, ModelConfig, load
from jaxdecoder.errors import UserError, friendly
from jaxdecoder.kernels import masks
from jaxdecoder.layers import stacks
from jaxdecoder.layers.attention import MASKS, SLOTS
from jaxdecoder.layers.depth import capacity, exits_of
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.linear import scheme_of
from jaxdecoder.layers.linformer import mask as linformer_mask
from jaxdecoder.layers.serial import periods, turn

FLOAT32 = 4

# --- Tables: a row for each entry of each component's dict ---------------------------------------

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
    _, width, kv_width = _widths(c)
    return c.d_model * (width + 2 * kv_width) + c.attention_projection * width * c.d_model


def projection_parameters(c: ModelConfig) -> int:
    """Those matrices, their biases, and the scales of the norms of queries and keys."""
    d_head, width, kv_width = _widths(c)
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
        _, _, kv_width = _widths(c)
        return number * 2 * kv_width * SLOTS[mechanism](c).size

    return AttentionCosts(projection_parameters, projection_weights, mixing, dense, drawn, cache)


def linformer() -> AttentionCosts:
    """Softmax attention to the own block and to compressed ones (`layers/linformer.py`)."""

    def compressing(c: ModelConfig, tokens: int) -> int:
        _, _, kv_width = _widths(c)
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
        _, _, kv_width = _widths(c)
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
        d_head, width, kv_width = _widths(c)
        return queries * d_head * (width + kv_width)

    def dense(c: ModelConfig, queries: int, start: int) -> int:
        chunk = 1 if start else min(c.attention_block, queries)
        padded = -(-queries // chunk) * chunk
        return mixing(c, padded, start) + _multiply_adds(c, padded * chunk)

    def cache(c: ModelConfig, number: int) -> int:
        d_head, _, kv_width = _widths(c)
        return FLOAT32 * kv_width * (d_head + 1)

    def drawn(c: ModelConfig, tokens: int, n: int) -> float:
        return mixing(c, n, 0)

    return AttentionCosts(projection_parameters, projection_weights, mixing, dense, drawn, cache)


def _refused(c: ModelConfig, tokens: int, n: int) -> float:
    raise AssertionError("a config that draws tokens from this mechanism is refused")


def _multiply_adds(c: ModelConfig, pairs: int) -> int:
    """A pair is one product for its score and one for its value, in every head."""
    _, width, _ = _widths(c)
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
        "feed_forward": c.n_layers * _feed_forward(c).parameters,
        "norms": norms * NORM_PARAMETERS[c.norm](c),
    }


def serial_weights(c: ModelConfig) -> dict[str, int]:
    """A feed-forward a block."""
    return {"feed_forward": c.n_layers * _feed_forward(c).weights}


def stacks_parameters(c: ModelConfig) -> dict[str, int]:
    """A feed-forward, norms and a slice a layer; a feed-forward and two norms a stack."""
    widths = _stack_widths(c)
    layer_norms = c.n_layers * PLACEMENT_NORMS[c.norm_placement](1)
    return {
        "feed_forward": c.n_layers * _feed_forward(c).parameters
        + sum(_feed_forward(c, factor).parameters for factor in widths),
        "slices": _projections_to_slices(c) * (c.d_model + c.bias) * c.d_model * sum(widths),
        "norms": (layer_norms + c.n_stacks + sum(widths)) * NORM_PARAMETERS[c.norm](c),
    }


def stacks_weights(c: ModelConfig) -> dict[str, int]:
    """A feed-forward a layer and a stack, and the slices."""
    widths = _stack_widths(c)
    return {
        "feed_forward": c.n_layers * _feed_forward(c).weights
        + sum(_feed_forward(c, factor).weights for factor in widths),
        "slices": _projections_to_slices(c) * c.d_model * c.d_model * sum(widths),
    }


LAYOUT_COSTS: dict[str, LayoutCosts] = {
    "serial": LayoutCosts(serial_parameters, serial_weights, lambda c: c.d_model),
    "parallel_stacks": LayoutCosts(stacks_parameters, stacks_weights, stacks.width),
}


# --- Counts --------------------------------------------------------------------------------------


def parameters(config: ModelConfig) -> dict[str, int]:
    """The exact parameter count by part, and the total."""
    c, vocab_size = config.resolve(), _vocab_size(config)
    layout = LAYOUT_COSTS[c.layout]
    counts = {
        "embedding": vocab_size * c.d_model,
        "positions": POSITION_PARAMETERS[c.position](c),
        "attention": _over_layers(c, lambda costs: costs.parameters(c)),
        **layout.parameters(c),
        "head": 0 if c.tie_embeddings else (layout.width(c) + c.head_bias) * vocab_size,
    }
    if routed := _routed_blocks(c):
        counts["routers"] = routed * (c.d_model + 1)
    return {**counts, "total": sum(counts.values())}


def forward_flops(
    config: ModelConfig,
    tokens: int,
    *,
    start: int = 0,
    dense: bool = False,
    training: bool = False,
) -> dict[str, float]:
    """FLOPs by part, and the total, of a forward pass over `tokens` tokens of one sequence.

    `start` tokens before them are in the cache. The head is counted for every token. In `training`
    it is asked at every exit, and a block with a router takes its capacity of tokens, whose pairs
    are counted as if it took them at random; elsewhere every token passes every block.
    """
    c, vocab_size = config.resolve(), _vocab_size(config)
    layout = LAYOUT_COSTS[c.layout]

    def mixing(costs: AttentionCosts, entering: int) -> float:
        if dense:
            return costs.dense(c, entering, start)
        if entering < tokens:
            return costs.drawn(c, tokens, entering)
        return costs.mixing(c, tokens, start)

    blocks = [
        (ATTENTION_COSTS[name], capacity(c, tokens) if routed and training else tokens)
        for name, routed in turn(c) * periods(c)
    ]
    exits = len(exits_of(c)) if training else 1
    flops = {
        "attention_projections": 2 * sum(n * costs.weights(c) for costs, n in blocks),
        "attention": 2 * sum(mixing(costs, n) for costs, n in blocks),
        **{
            part: 2 * weights * sum(n for _, n in blocks) // c.n_layers
            for part, weights in layout.weights(c).items()
        },
        "head": 2 * tokens * exits * layout.width(c) * vocab_size,
    }
    if routed := _routed_blocks(c):
        flops["routers"] = 2 * tokens * routed * c.d_model
    return {**flops, "total": sum(flops.values())}


def early_exit_flops(
    config: ModelConfig, mean_depth: float, *, start: int, dense: bool = False
) -> dict[str, float]:
    """FLOPs of decoding one token with `start` before it, by part, and the total.

    Tokens stop after `mean_depth` blocks on average. The blocks above only make keys and values.
    The head is asked at every exit up to there, between two exits in proportion.
    """
    c = config.resolve()
    _, _, kv_width = _widths(c)
    whole = forward_flops(c, 1, start=start, dense=dense)
    share = mean_depth / c.n_layers
    exits = tuple(exits_of(c))
    below = max((depth for depth in exits if depth <= mean_depth), default=exits[0])
    above = min((depth for depth in exits if depth >= mean_depth), default=exits[-1])
    asked = exits.index(below) + 1 + (mean_depth - below) / max(1, above - below)
    flops = {
        "attention_projections": share * whole["attention_projections"],
        "attention": share * whole["attention"],
        "feed_forward": share * whole["feed_forward"],
        "keys_and_values_of_skipped": 2 * (c.n_layers - mean_depth) * c.d_model * 2 * kv_width,
        "head": asked * whole["head"],
    }
    return {**flops, "total": sum(flops.values())}


class FlopsPerToken(NamedTuple):
    """FLOPs a token, by part and in total."""

    train: dict[str, float]
    """Forward and backward over a full context, averaged over its tokens."""
    prefill: dict[str, float]
    """Forward over a full context, averaged over its tokens."""
    decode: dict[str, float]
    """One token at the end of a full context."""


def flops_per_token(config: ModelConfig, *, dense: bool = False) -> FlopsPerToken:
    """FLOPs a token when training, prefilling and decoding."""
    length = config.context_length
    forward = forward_flops(config, length, dense=dense)
    train = forward_flops(config, length, dense=dense, training=True)
    decode = forward_flops(config, 1, start=length - 1, dense=dense)
    return FlopsPerToken(
        {part: 3 * flops / length for part, flops in train.items()},
        {part: flops / length for part, flops in forward.items()},
        {part: float(flops) for part, flops in decode.items()},
    )


def weight_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Bytes of the weights; they are float32 unless cast, or packed with their scales."""
    total = parameters(config)["total"]
    if not config.packed:
        return bytes_per_number * total
    scheme, packed = scheme_of(config), 0
    for count, d_in, d_out in kernels(config):
        total -= count * d_in * d_out
        scales = scheme.groups(d_in) * scheme.columns(d_out)
        each = d_in * d_out // scheme.kind.codes + scales * (FLOAT32 + (not scheme.symmetric))
        packed += count * each
    return bytes_per_number * total + packed


def kernels(config: ModelConfig) -> list[tuple[int, int, int]]:
    """The kernels that a weight format is of: how many, their inputs, their outputs."""
    c = config.resolve()
    _, width, kv_width = _widths(c)
    found = [(c.n_layers, c.d_model, width), (2 * c.n_layers, c.d_model, kv_width)]
    if c.attention_projection:
        found.append((c.n_layers, width, c.d_model))
    found += _feed_forward_kernels(c, c.n_layers)
    if c.layout == "parallel_stacks":
        assert c.layers_per_stack is not None
        for factor in _stack_widths(c):
            slices = c.layers_per_stack * _projections_to_slices(c)
            found.append((slices, c.d_model, factor * c.d_model // c.layers_per_stack))
            found += _feed_forward_kernels(c, 1, factor)
    if c.quantizes_head:
        vocab_size = _vocab_size(c)
        found.append((1, c.d_model, vocab_size))
        if not c.tie_embeddings:
            found.append((1, LAYOUT_COSTS[c.layout].width(c), vocab_size))
    return found


def _feed_forward_kernels(
    c: ModelConfig, count: int, factor: int = 1
) -> list[tuple[int, int, int]]:
    d_ff = c.resolve().d_ff
    assert d_ff is not None
    width, d_ff = factor * c.d_model, factor * d_ff
    hidden = (count * HIDDEN_MATRICES[c.activation], width, d_ff)
    down = (count * c.feed_forward_projection, d_ff, width)
    return [hidden, down] if c.feed_forward else []


def cache_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Bytes that one sequence keeps in the cache; sums over tokens are float32 in any case.

    A block with a router notes in one more byte a token whether it took it.
    """
    c = config.resolve()
    noted = _routed_blocks(c) * c.context_length
    return _over_layers(c, lambda costs: costs.cache(c, bytes_per_number)) + noted


def _routed_blocks(c: ModelConfig) -> int:
    return periods(c) * sum(routed for _, routed in turn(c))


def _over_layers(c: ModelConfig, count: Callable[[AttentionCosts], int]) -> int:
    """The sum over all layers of what their attention mechanisms count."""
    pattern = c.attention_pattern
    return c.n_layers // len(pattern) * sum(count(ATTENTION_COSTS[name]) for name in pattern)


def _widths(c: ModelConfig) -> tuple[int, int, int]:
    """Widths of a head, of all queries, and of all keys."""
    c = c.resolve()
    assert c.d_head is not None
    assert c.n_kv_heads is not None
    return c.d_head, c.n_heads * c.d_head, c.n_kv_heads * c.d_head


class _FeedForward(NamedTuple):
    weights: int
    parameters: int


def _feed_forward(c: ModelConfig, factor: int = 1) -> _FeedForward:
    """A feed-forward `factor` times as wide as the config's, which may have none."""
    d_ff = c.resolve().d_ff
    assert d_ff is not None
    width, d_ff = factor * c.d_model, factor * d_ff
    hidden, down = HIDDEN_MATRICES[c.activation], c.feed_forward_projection
    weights = (hidden + down) * width * d_ff
    biases = c.bias * (hidden * d_ff + down * width)
    return _FeedForward(c.feed_forward * weights, c.feed_forward * (weights + biases))


def _stack_widths(c: ModelConfig) -> list[int]:
    """The widths of the stacks, in multiples of d_model."""
    return [1] * (c.n_stacks - 1) + [stacks.WIDENING]


def _projections_to_slices(c: ModelConfig) -> int:
    return 2 if c.feed_forward and c.has_residual("feed_forward") else 1


def _vocab_size(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size", None, "the counts depend on it")
    return config.vocab_size


# --- The command ---------------------------------------------------------------------------------

GPT2_VOCAB_SIZE = 50257


def with_vocab_size(config: Config, where: str) -> ModelConfig:
    """The config's model, its vocabulary taken from the tokenizer where that has a fixed size."""
    if config.model.vocab_size is not None:
        return config.model
    known = {
        "byte": 256 + config.data.end_of_text,
        "gpt2": GPT2_VOCAB_SIZE,
        "r50k_base": GPT2_VOCAB_SIZE,
    }
    if config.data.tokenizer not in known:
        raise UserError(
            f"{where}: model.vocab_size is not given, and the size of the tokenizer "
            f'"{config.data.tokenizer}" is known only once its data is there; '
            "give it, as in --model.vocab-size 65"
        )
    return dataclasses.replace(config.model, vocab_size=known[config.data.tokenizer])


def report(config: ModelConfig) -> list[Table]:
    """The counts as tables for a terminal."""
    return [_parameter_table(config), _flops_table(config), _bytes_table(config)]


def _parameter_table(config: ModelConfig) -> Table:
    counts = parameters(config)
    table = _table("parameters", "count", "share")
    for part, count in counts.items():
        _add(table, part, f"{count:,}", f"{count / counts['total']:.1%}")
    return table


def _flops_table(config: ModelConfig) -> Table:
    flops, dense = flops_per_token(config), flops_per_token(config, dense=True)
    table = _table("FLOPs a token", *FlopsPerToken._fields)
    for part in flops.train:
        _add(table, part, *(_short(column[part]) for column in flops))
    _add(table, "total, dense attention", *(_short(column["total"]) for column in dense))
    exits = exits_of(config)
    for depth in exits if len(exits) > 1 else ():
        early = early_exit_flops(config, depth, start=config.context_length - 1)["total"]
        _add(table, f"total, stopping at depth {depth}", "", "", _short(early))
    table.caption = (
        "Matrix products, 2 a multiply-add; attention over the pairs its mask allows; train is "
        f"forward and backward; decode is the last token of {config.context_length}."
    )
    return table


def _bytes_table(config: ModelConfig) -> Table:
    sizes = {"float32": 4, "bfloat16": 2}
    table = _table("bytes", *sizes)
    weights = [weight_bytes(config, size) for size in sizes.values()]
    cache = [cache_bytes(config, size) for size in sizes.values()]
    _add(table, "weights", *(f"{n:,}" for n in weights))
    _add(table, "cache, a sequence", *(f"{n:,}" for n in cache))
    a_token = (f"{n / config.context_length:,.0f}" for n in cache)
    _add(table, f"cache, a token of {config.context_length}", *a_token)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(caption_justify="left")
    table.add_column(first)
    for other in others:
        table.add_column(other, justify="right")
    return table


def _add(table: Table, name: str, *cells: str) -> None:
    table.add_row(name.replace("_", " "), *cells, style="bold" if name == "total" else None)


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.4g} {unit}".rstrip()
        value /= 1000
    return f"{value:.4g} P"


@friendly
def main() -> None:
    """Reads a config file and overrides, and prints the tables."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            "usage: python -m jaxdecoder.analysis CONFIG.toml [--model.field value ...]"
        )
    path = Path(arguments[0])
    model = with_vocab_size(load(path, arguments[1:]), str(path))
    console = Console()
    for table in report(model):
        console.print(table)


if __name__ == "__main__":
    main()
