"""What a config costs, in closed form: parameters, FLOPs and bytes, with no array built.

    python -m jaxdecoder.analysis configs/shakespeare_nano.toml --model.vocab-size 65

Every component has its row in one of the tables below, under the name it has in its own dict, so a
new variant is a new row.

FLOPs are those of the matrix products alone, two for each multiply-add; lookups, norms,
activations, biases and the softmax are left out. Attention is counted over the (query, key) pairs
that its mask allows, which is what a kernel that skips the others computes at best; the dense
count, over all pairs, is what plain XLA computes. The backward pass is twice the forward, one
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
from jaxdecoder.layers.attention import MASKS
from jaxdecoder.layers.depth import capacity, exits_of
from jaxdecoder.layers.feed_forward import ACTIVATIONS
from jaxdecoder.layers.serial import periods, turn

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
"""Matrices from d_model to d_ff; one leads back."""


class AttentionCosts(NamedTuple):
    """What one layer of an attention mechanism costs."""

    parameters: Callable[[ModelConfig], int]
    weights: Callable[[ModelConfig], int]
    """Multiply-adds that every token costs, wherever it stands."""
    pairs: Callable[[ModelConfig, int, int], int]
    """(config, queries, start) -> the (query, key) pairs of so many queries from `start` on."""
    cache: Callable[[ModelConfig], int]
    """Numbers that a sequence of context_length tokens leaves in the cache."""


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

    def pairs(c: ModelConfig, queries: int, start: int) -> int:
        return masks.allowed_entries(MASKS[mechanism](c), queries, start + queries, start)

    def cache(c: ModelConfig) -> int:
        _, _, kv_width = _widths(c)
        return 2 * kv_width * c.context_length

    return AttentionCosts(projection_parameters, projection_weights, pairs, cache)


ATTENTION_COSTS: dict[str, AttentionCosts] = {
    "full": masked("full"),
    "sliding_window": masked("sliding_window"),
    "longformer": masked("longformer"),
    "fixed_sparse": masked("fixed_sparse"),
    "strided_sparse": masked("strided_sparse"),
}


# --- Counts --------------------------------------------------------------------------------------


def parameters(config: ModelConfig) -> dict[str, int]:
    """The exact parameter count by part, and the total."""
    c, vocab_size = config.resolve(), _vocab_size(config)
    branches = 2 if c.feed_forward else 1
    block_norms = c.n_layers * PLACEMENT_NORMS[c.norm_placement](branches)
    d_ff = _d_ff(c)
    hidden = HIDDEN_MATRICES[c.activation]
    feed_forward = (hidden + 1) * c.d_model * d_ff + c.bias * (hidden * d_ff + c.d_model)
    counts = {
        "embedding": vocab_size * c.d_model,
        "positions": POSITION_PARAMETERS[c.position](c),
        "attention": _over_layers(c, lambda costs: costs.parameters(c)),
        "feed_forward": c.feed_forward * c.n_layers * feed_forward,
        "norms": (block_norms + 1) * NORM_PARAMETERS[c.norm](c),
        "head": 0 if c.tie_embeddings else (c.d_model + c.head_bias) * vocab_size,
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
    _, width, _ = _widths(c)
    feed_forward = c.feed_forward * (HIDDEN_MATRICES[c.activation] + 1) * c.d_model * _d_ff(c)

    def pairs(costs: AttentionCosts, entering: int) -> float:
        if dense:
            return entering * (start + entering)
        allowed = costs.pairs(c, tokens, start)
        if entering == tokens:
            return allowed
        # A token always sees itself, and another one only if that was chosen as well.
        both = entering * (entering - 1) / (tokens * (tokens - 1))
        return entering + (allowed - tokens) * both

    blocks = [
        (ATTENTION_COSTS[name], capacity(c, tokens) if routed and training else tokens)
        for name, routed in turn(c) * periods(c)
    ]
    exits = len(exits_of(c)) if training else 1
    flops = {
        "attention_projections": 2 * sum(n * costs.weights(c) for costs, n in blocks),
        # A pair is one product for its score and one for its value.
        "attention": 2 * 2 * width * sum(pairs(costs, n) for costs, n in blocks),
        "feed_forward": 2 * sum(n for _, n in blocks) * feed_forward,
        "head": 2 * tokens * exits * c.d_model * vocab_size,
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
    """Bytes of the weights; they are float32 unless cast."""
    return bytes_per_number * parameters(config)["total"]


def cache_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Bytes of keys and values that one sequence of context_length tokens keeps in the cache.

    A block with a router notes in one more byte a token whether it took it.
    """
    c = config.resolve()
    noted = _routed_blocks(c) * c.context_length
    return bytes_per_number * _over_layers(c, lambda costs: costs.cache(c)) + noted


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


def _d_ff(c: ModelConfig) -> int:
    d_ff = c.resolve().d_ff
    assert d_ff is not None
    return d_ff


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
    _add(table, "cache, a token", *(f"{n / config.context_length:,.0f}" for n in cache))
    _add(table, f"cache, {config.context_length} tokens", *(f"{n:,}" for n in cache))
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
