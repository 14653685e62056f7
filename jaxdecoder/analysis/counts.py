"""Parameters, FLOPs and bytes of a config in closed form, with no array built.

Costs stand beside the components, in `jaxdecoder.layers`; here they are added up.

FLOPs are those of the matrix products alone, two for each multiply-add; lookups, norms,
activations, biases and the softmax are left out. Attention is counted over the (query, key) pairs
that its mask allows, which is what a kernel that skips the others computes at best, and linear
attention as its recurrence; the dense count is what plain XLA computes, over all pairs, all slots
of a cache and all of a chunk. The backward pass is twice the forward, one product for the gradient
of either operand; recomputation is not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxdecoder.config import Architecture, Config, ModelConfig
from jaxdecoder.decoder import LAYOUTS
from jaxdecoder.errors import UserError
from jaxdecoder.layers import convolution, copying, depth
from jaxdecoder.layers.attention import ATTENTIONS, projection_parameters, projections
from jaxdecoder.layers.costs import FLOAT32, Costs, Kernels, weights
from jaxdecoder.layers.costs import parameters as parameters_of
from jaxdecoder.layers.linear import scheme_of
from jaxdecoder.layers.mechanism import AttentionCosts
from jaxdecoder.layers.norms import NORMS
from jaxdecoder.layers.positions import POSITIONS
from jaxdecoder.layers.serial import n_turns, turn

ADDITIONS: dict[str, Costs] = {
    "convolutions": convolution.COSTS,
    "copying": copying.COSTS,
    "routers": depth.COSTS,
}
"""What a model may have besides embedding, attention, layout and head."""


def parameters(config: ModelConfig) -> dict[str, int]:
    """Return the exact parameter count by part, and the total."""
    c = config.resolve()
    layout = LAYOUTS[c.layout]
    counts = {
        "embedding": c.vocab_size * c.d_model,
        "positions": POSITIONS[c.position].parameters(c),
        "attention": c.n_layers * projection_parameters(c)
        + _over_layers(c, lambda costs: costs.parameters(c)),
        **{part: parameters_of(kernels, c.bias) for part, kernels in layout.kernels(c).items()},
        "norms": layout.norms(c) * NORMS[c.norm].parameters(c),
        **{part: costs.parameters(c) for part, costs in _additions(c)},
        "head": 0 if c.tie_embeddings else (layout.width(c) + c.head_bias) * c.vocab_size,
    }
    return {**counts, "total": sum(counts.values())}


def forward_flops(
    config: ModelConfig,
    tokens: int,
    *,
    start: int = 0,
    dense: bool = False,
    training: bool = False,
) -> dict[str, float]:
    """Return the FLOPs by part, and the total, of a forward pass over `tokens` tokens.

    They are one sequence, with `start` tokens before them in the cache. The head is counted for
    every token. In `training` it is asked at every exit, and a block with a router takes its
    capacity of tokens, whose pairs are counted as if it took them at random; elsewhere every token
    passes every block.
    """
    c = config.resolve()
    layout = LAYOUTS[c.layout]

    def mixing(costs: AttentionCosts, entering: int) -> float:
        if dense:
            return costs.dense(c, entering, start)
        if entering < tokens:
            return costs.drawn(c, tokens, entering)
        return costs.mixing(c, tokens, start)

    blocks = [
        (ATTENTIONS[name].costs, depth.capacity(c, tokens) if routed and training else tokens)
        for name, routed in turn(c) * n_turns(c)
    ]
    entering = sum(n for _, n in blocks)
    exits = len(depth.exits_of(c)) if training else 1
    flops = {
        "attention_projections": 2 * entering * weights(projections(c)),
        "attention": 2 * sum(mixing(costs, n) for costs, n in blocks),
        **{
            part: 2 * weights(kernels) * entering // c.n_layers
            for part, kernels in layout.kernels(c).items()
        },
        **{
            part: 2 * (tokens * costs.weights(c) + costs.pairs(c, tokens, start, dense))
            for part, costs in _additions(c)
        },
        "head": 2 * tokens * exits * layout.width(c) * c.vocab_size,
    }
    return {**flops, "total": sum(flops.values())}


def early_exit_flops(
    config: ModelConfig, mean_depth: float, *, start: int, dense: bool = False
) -> dict[str, float]:
    """Return the FLOPs of decoding one token with `start` before it, by part, and the total.

    Tokens stop after `mean_depth` blocks on average. The blocks above only make keys and values.
    The head is asked at every exit up to there, between two exits in proportion.
    """
    c = config.resolve()
    whole = forward_flops(c, 1, start=start, dense=dense)
    share = mean_depth / c.n_layers
    exits = tuple(depth.exits_of(c))
    below = max((depth for depth in exits if depth <= mean_depth), default=exits[0])
    above = min((depth for depth in exits if depth >= mean_depth), default=exits[-1])
    asked = exits.index(below) + 1 + (mean_depth - below) / max(1, above - below)
    flops = {
        "attention_projections": share * whole["attention_projections"],
        "attention": share * whole["attention"],
        "feed_forward": share * whole["feed_forward"],
        "keys_and_values_of_skipped": 2 * (c.n_layers - mean_depth) * c.d_model * 2 * c.kv_width,
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
    """Return the FLOPs a token when training, prefilling and decoding."""
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
    """Return the bytes of the weights: float32 unless cast, or packed with their scales."""
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


def kernels(config: ModelConfig) -> list[Kernels]:
    """Return the kernels that a weight format is of."""
    c = config.resolve()
    layout = LAYOUTS[c.layout]
    found = projections(c, c.n_layers)
    found += (kernel for part in layout.kernels(c).values() for kernel in part)
    found += (kernel for _, costs in _additions(c) for kernel in costs.kernels(c))
    if c.quantizes_head:
        found.append(Kernels(1, c.d_model, c.vocab_size))
        if not c.tie_embeddings:
            found.append(Kernels(1, layout.width(c), c.vocab_size))
    return found


def cache_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Return the bytes that one sequence keeps in the cache.

    Sums over tokens are float32 whatever the bytes of a number.
    """
    c = config.resolve()
    of_layers = _over_layers(c, lambda costs: costs.cache(c, bytes_per_number))
    return of_layers + sum(costs.cache(c, bytes_per_number) for _, costs in _additions(c))


def _additions(c: Architecture) -> list[tuple[str, Costs]]:
    """Return those that this model has."""
    return [(part, costs) for part, costs in ADDITIONS.items() if costs.parameters(c)]


def _over_layers(c: Architecture, count: Callable[[AttentionCosts], int]) -> int:
    """Return the sum over all layers of what their attention mechanisms count."""
    pattern = c.attention_pattern
    return c.n_layers // len(pattern) * sum(count(ATTENTIONS[name].costs) for name in pattern)


GPT2_VOCAB_SIZE = 50257


def with_vocab_size(config: Config, where: str) -> ModelConfig:
    """Return the config's model; its vocabulary is the tokenizer's where that has a fixed size."""
    if config.model.vocab_size is not None:
        return config.model
    known = dict.fromkeys(("gpt2", "r50k_base"), GPT2_VOCAB_SIZE)
    known["byte"] = 256 + config.data.end_of_text
    if config.data.tokenizer not in known:
        raise UserError(
            f"{where}: model.vocab_size is not given, and the size of the tokenizer "
            f'"{config.data.tokenizer}" is known only once its data is there; '
            "give it, as in --model.vocab-size 65"
        )
    return dataclasses.replace(config.model, vocab_size=known[config.data.tokenizer])
