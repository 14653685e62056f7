"""What cannot go together in a `ModelConfig`: a check for each family of its fields.

A check yields the fields that are wrong, each with the reason and with values that would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

# The module rather than its classes: it runs these checks, and is still loading.
from jaxdecoder.config import model
from jaxdecoder.config.fields import ConfigError, nearest_multiples

Wrong = tuple[str, str]
"""A field of a `ModelConfig`, and why its value cannot be."""

Check = Callable[["model.ModelConfig"], Iterator[Wrong]]


def heads(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that heads divide the width, and groups of keys and values the heads."""
    if c.d_head is None and c.d_model % c.n_heads:
        near = nearest_multiples(c.d_model, c.n_heads)
        why = f"not divisible by model.n_heads = {c.n_heads}; {near} would do, or give model.d_head"
        yield "d_model", why
    if c.n_kv_heads is not None and c.n_heads % c.n_kv_heads:
        one_of = divisors(c.n_heads)
        yield "n_kv_heads", f"must divide model.n_heads = {c.n_heads}: one of {one_of}"


def embedding_and_head(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that a tied head has no bias, and that copying has a tied head, asked last."""
    if c.tie_embeddings and c.head_bias:
        yield "head_bias", "a head tied to the embedding has no bias of its own"
    if c.copying and not c.tie_embeddings:
        yield (
            "copying",
            "points at rows of the embedding, which mean tokens to a head that is tied to it; "
            "model.tie_embeddings = true would do",
        )
    if c.copying and c.depth == "early_exit":
        yield (
            "copying",
            'points after all blocks, and tokens of model.depth = "early_exit" stop before; '
            "false would do",
        )


def layout(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that what needs blocks one above another has them."""
    if c.convolution_width and (c.layout != "serial" or c.depth != "fixed"):
        key, value = ("layout", c.layout) if c.depth == "fixed" else ("depth", c.depth)
        yield (
            "convolution_width",
            "convolutions run over all tokens of blocks one above another, and "
            f'model.{key} = "{value}" has others; 0 would do',
        )
    if c.depth != "fixed" and c.layout != "serial":
        yield (
            "depth",
            f"only blocks one above another have depths to choose, and model.layout = "
            f'"{c.layout}" has others; "fixed" would do',
        )


def stacks(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that layers share the stacks evenly, and the width within one."""
    layers = c.layers_side_by_side
    total = c.n_stacks * layers
    if c.layers_per_stack is None and total != c.n_layers:
        near = nearest_multiples(c.n_layers, c.n_stacks)
        yield (
            "n_layers",
            f"not divisible by model.n_stacks = {c.n_stacks}; {near} would do, "
            "or give model.layers_per_stack instead",
        )
    if c.n_layers not in (total, model.ModelConfig.n_layers):
        yield (
            "n_layers",
            f"model.n_stacks = {c.n_stacks} of model.layers_per_stack = {layers} are {total}; "
            "leave out one of them",
        )
    if c.d_model % layers:
        near = nearest_multiples(c.d_model, layers)
        yield (
            "d_model",
            f"each of model.layers_per_stack = {layers} layers gives an equal slice of it; "
            f"{near} would do",
        )
    if c.tie_embeddings:
        yield (
            "tie_embeddings",
            'the head of model.layout = "parallel_stacks" reads features 4 times as wide as '
            f"the embedding, whose width is model.d_model = {c.d_model}",
        )


def pattern(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that the mechanisms' pattern repeats a whole number of times."""
    count, layers = "n_layers", c.n_layers
    if c.layout == "parallel_stacks":
        count, layers = "layers_per_stack", c.layers_side_by_side
    if isinstance(c.attention, tuple) and (not c.attention or layers % len(c.attention)):
        yield "attention", f"a pattern's length must divide model.{count} = {layers}"


def fixed_sparse(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that a block has the tokens that later ones see."""
    if c.attention_globals > c.attention_block:
        yield (
            "attention_globals",
            "for fixed_sparse these are tokens of a block, and "
            f"model.attention_block = {c.attention_block} has no more",
        )


def linformer(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that blocks divide the context, and are no smaller than what they become."""
    block, context = c.attention_block, c.context_length
    if context % block or block == context:
        would_do = nearest(divisors(context)[:-1], block) or "nothing"
        yield (
            "attention_block",
            f"linformer's blocks must divide model.context_length = {context}, two at least; "
            f"{would_do} would do",
        )
    if c.attention_rank > block:
        yield (
            "attention_rank",
            f"linformer compresses blocks, and those of model.attention_block = {block} have "
            "no more tokens",
        )


def linear(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that positions need no score of a pair of tokens."""
    if c.position in model.PAIRED:
        would_do = ", ".join(x for x in get_args(model.Position) if x not in model.PAIRED)
        yield (
            "position",
            'changes the score of each pair of tokens, and attention = "linear" never has '
            f"one; {would_do} would do",
        )


def early_exit(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that there is an exit before the last block."""
    if c.exit_minimum >= c.n_layers:
        yield (
            "exit_minimum",
            f"with model.n_layers = {c.n_layers} no exit is left before the last block"
            + (f"; at most {c.n_layers - 1} would do" if c.n_layers > 1 else ""),
        )


def mixture_of_depths(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that routers may choose among tokens, and stand at even distances."""
    if "linformer" in c.attention_pattern:
        yield (
            "depth",
            'a router would pick tokens out of the blocks that attention = "linformer" '
            "compresses; another attention, or another depth, would do",
        )
    if c.n_layers % c.mod_every:
        one_of = divisors(c.n_layers)
        yield "mod_every", f"must divide model.n_layers = {c.n_layers}: one of {one_of}"


def rope(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that an even number of coordinates turns."""
    head = c.head_width
    exact = head * c.rope_fraction
    if c.rope_width and c.rope_width % 2 == 0 and abs(c.rope_width - exact) < 0.01:
        return
    if c.rope_fraction == 1:
        why = "rotary positions turn pairs, so the width must be even"
        raise ConfigError("model.d_head", head, why)  # which may be derived
    below, above = int(exact) // 2 * 2, int(exact) // 2 * 2 + 2
    would_do = " or ".join(f"{n / head:g}" for n in (below, above) if 0 < n <= head) or "nothing"
    yield (
        "rope_fraction",
        f"of heads {head} wide it turns {exact:g}, which must be an even number, for rotary "
        f"positions turn pairs; {would_do} would do",
    )


def t5(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that there are buckets for near distances and for far ones."""
    if c.position_buckets < 2:
        yield "position_buckets", "must be at least 2"
    least = c.position_buckets // 2 + 1
    if c.position_max_distance < least:
        yield (
            "position_max_distance",
            f"half of model.position_buckets = {c.position_buckets} hold a single distance "
            f"each, so it must be at least {least}",
        )


def projections(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that what is not projected is as wide as the stream."""
    if not c.attention_projection and c.n_heads * c.head_width != c.d_model:
        yield (
            "attention_projection",
            f"the heads are {c.n_heads} x {c.head_width} wide, and without a projection they "
            f"must be model.d_model = {c.d_model} wide together",
        )
    if not c.feed_forward_projection and c.hidden_width != c.d_model:
        yield (
            "d_ff",
            "with model.feed_forward_projection = false the hidden units are the output, and "
            f"must be model.d_model = {c.d_model} wide; that, or leaving it out, would do",
        )


def parallel(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that both branches have one residual connection."""
    if isinstance(c.residual, str):
        yield (
            "residual",
            'both branches of model.norm_placement = "parallel" are added to one input; '
            "true or false would do",
        )


def weight_levels(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that the weight format has what is asked of it, and groups fit every kernel."""
    if not c.quantized:
        if c.activation_format != "float":
            yield (
                "activation_format",
                'is for weights of few levels, and model.weight_format = "float32"; "float" '
                "would do",
            )
        return
    floats = c.weight_format.startswith("float")
    if floats and not c.weight_symmetric:
        why = f'model.weight_format = "{c.weight_format}" has no zero point; true would do'
        yield "weight_symmetric", why
    if floats and c.activation_format != "float":
        yield (
            "activation_format",
            f'is multiplied with whole numbers, and model.weight_format = "{c.weight_format}" '
            'has others; "float" would do',
        )
    # How many inputs linear layers have; those of wider stacks are multiples of these.
    fan_ins = {"model.d_model": c.d_model}
    if c.attention_projection:
        fan_ins["model.n_heads x model.d_head"] = c.n_heads * c.head_width
    if c.feed_forward and c.feed_forward_projection:
        fan_ins["model.d_ff"] = c.hidden_width
    even = c.weight_format == "int4"
    for name, width in fan_ins.items():
        if even and width % 2:
            why = f'two weights share a byte, and {name} = {width} is odd; "int8" would do'
            yield "weight_format", why
    if c.weight_granularity == "group":
        for why in _misfits(c.weight_group_size, fan_ins, even):
            yield "weight_group_size", why


def _misfits(size: int, fan_ins: dict[str, int], even: bool) -> Iterator[str]:
    if even and size % 2:
        would_do = nearest_multiples(size, 2)
        yield f"two weights of int4 share a byte, so it must be even; {would_do} would do"
    for name, width in fan_ins.items():
        if width % size:
            fitting = [n for n in divisors(width) if not (even and n % 2)]
            yield f"does not divide {name} = {width}; {nearest(fitting, size)} would"


OF_COMPONENTS: dict[str, Check] = {
    "parallel_stacks": stacks,
    "fixed_sparse": fixed_sparse,
    "linformer": linformer,
    "linear": linear,
    "early_exit": early_exit,
    "mixture_of_depths": mixture_of_depths,
    "rope": rope,
    "t5": t5,
    "parallel": parallel,
}
"""What a component asks for where it is chosen."""


def components(c: model.ModelConfig) -> Iterator[Wrong]:
    """Check that every component has what it asks for."""
    chosen = {c.layout, *c.attention_pattern, c.depth, c.position, c.norm_placement}
    for name, check in OF_COMPONENTS.items():
        if name in chosen:
            yield from check(c)


CHECKS: tuple[Check, ...] = (
    heads,
    embedding_and_head,
    layout,
    components,
    pattern,
    projections,
    weight_levels,
)
"""In the order in which mistakes are told."""


def divisors(n: int) -> list[int]:
    """Return all divisors of n, the smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest(options: list[int], to: int) -> str:
    """Return the two options that are nearest to a number, the smaller first."""
    return " or ".join(map(str, sorted(sorted(options, key=lambda n: abs(n - to))[:2])))
