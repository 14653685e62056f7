"""Parameters, FLOPs and bytes of a whole model, from the tables of its components."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxdecoder.analysis.components import (
    ATTENTION_COSTS,
    FLOAT32,
    HIDDEN_MATRICES,
    LAYOUT_COSTS,
    POSITION_PARAMETERS,
    AttentionCosts,
    convolution_taps,
    copying_pairs,
    copying_weights,
    projections_to_slices,
    stack_widths,
    widths,
)
from jaxdecoder.config import Config, ConfigError, ModelConfig
from jaxdecoder.errors import UserError
from jaxdecoder.layers.depth import capacity, exits_of
from jaxdecoder.layers.linear import scheme_of
from jaxdecoder.layers.serial import periods, turn


def parameters(config: ModelConfig) -> dict[str, int]:
    """The exact parameter count by part, and the total."""
    c, vocab_size = config.resolve(), _vocab_size(config)
    layout = LAYOUT_COSTS[c.layout]
    counts = {
        "embedding": vocab_size * c.d_model,
        "positions": POSITION_PARAMETERS[c.position](c),
        "attention": _over_layers(c, lambda costs: costs.parameters(c)),
        **layout.parameters(c),
        **({"copying": copying_weights(c) + 1} if c.copying else {}),
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
    if c.copying:
        flops["copying"] = 2 * (
            tokens * copying_weights(c) + copying_pairs(c, tokens, start, dense)
        )
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
    _, _, kv_width = widths(c)
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
    _, width, kv_width = widths(c)
    found = [(c.n_layers, c.d_model, width), (2 * c.n_layers, c.d_model, kv_width)]
    if c.attention_projection:
        found.append((c.n_layers, width, c.d_model))
    found += _feed_forward_kernels(c, c.n_layers)
    if c.layout == "parallel_stacks":
        assert c.layers_per_stack is not None
        for factor in stack_widths(c):
            slices = c.layers_per_stack * projections_to_slices(c)
            found.append((slices, c.d_model, factor * c.d_model // c.layers_per_stack))
            found += _feed_forward_kernels(c, 1, factor)
    if c.copying:
        found.append((2, c.d_model, c.d_model))
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
    pointed = c.copying * bytes_per_number * 2 * c.d_model * c.context_length
    convolved = 0
    if c.convolution_width:
        taps = convolution_taps(c)
        convolved = bytes_per_number * taps // c.convolution_width * (c.convolution_width - 1)
    return (
        _over_layers(c, lambda costs: costs.cache(c, bytes_per_number))
        + noted
        + pointed
        + convolved
    )


def _routed_blocks(c: ModelConfig) -> int:
    return periods(c) * sum(routed for _, routed in turn(c))


def _over_layers(c: ModelConfig, count: Callable[[AttentionCosts], int]) -> int:
    """The sum over all layers of what their attention mechanisms count."""
    pattern = c.attention_pattern
    return c.n_layers // len(pattern) * sum(count(ATTENTION_COSTS[name]) for name in pattern)


def _vocab_size(config: ModelConfig) -> int:
    if config.vocab_size is None:
        raise ConfigError("model.vocab_size", None, "the counts depend on it")
    return config.vocab_size


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
