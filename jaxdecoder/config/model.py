"""`ModelConfig`: the shape and the components of one decoder, and what cannot go together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from jaxdecoder.config.fields import (
    ConfigError,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    nearest_multiples,
)
from jaxdecoder.config.levels import ActivationFormat, Granularity, WeightFormat, check_levels

Position = Literal["none", "learned", "sinusoidal", "rope", "alibi", "t5"]
Norm = Literal["layernorm", "rmsnorm", "none"]
NormPlacement = Literal["pre", "post", "sandwich", "parallel", "none"]
Activation = Literal["relu", "gelu", "gelu_exact", "swish", "relu2", "swiglu", "geglu", "reglu"]
AttentionName = Literal[
    "full",
    "sliding_window",
    "longformer",
    "fixed_sparse",
    "strided_sparse",
    "linformer",
    "linear",
]
Layout = Literal["serial", "parallel_stacks"]
Depth = Literal["fixed", "early_exit", "mixture_of_depths"]
ExitConfidence = Literal["probability", "margin"]
Initializer = Literal["normal", "uniform_fan_in", "scaled"]
Implementation = Literal["auto", "reference", "chunked", "portable", "hopper", "cudnn"]

PAIRED: tuple[Position, ...] = ("alibi", "t5")
GATED: tuple[Activation, ...] = ("swiglu", "geglu", "reglu")


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the components of one decoder."""

    vocab_size: Positive | None = None
    """Rows of the token embedding; left out, the tokenizer says."""
    context_length: Positive = 256
    """Tokens the model sees at once (T)."""
    layout: Layout = "serial"
    """How the layers are wired: serial, one block after another; parallel_stacks, n_stacks one
    after another, in each of which layers_per_stack stand side by side."""
    d_model: Positive = 384
    """Width of the residual stream (D)."""
    n_layers: Positive = 6
    """Decoder blocks (L). For parallel_stacks leave it out, or layers_per_stack."""
    n_stacks: Positive = 2
    """For parallel_stacks: how many."""
    layers_per_stack: Positive | None = None
    """For parallel_stacks: layers in each. Left out: n_layers / n_stacks."""
    depth: Depth = "fixed"
    """How many of the blocks a token passes: all of them, those up to the exit it takes when it is
    decoded, or those whose routers choose it."""
    exit_minimum: Positive = 1
    """For early_exit: blocks that every token passes."""
    exit_every: Positive = 1
    """For early_exit: blocks between one exit and the next."""
    exit_confidence: ExitConfidence = "probability"
    """For early_exit: what a threshold is held against, the probability of the likeliest token or
    its margin over the second."""
    exit_threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    """For early_exit: a token stops at the first exit that is more confident; 1: never early."""
    exit_loss_power: NonNegativeFloat = 1.0
    """For early_exit: an exit's share of the training loss goes with its depth to this power."""
    mod_every: Positive = 2
    """For mixture_of_depths: the last of every so many blocks has a router."""
    mod_capacity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.125
    """For mixture_of_depths: share of a sequence's tokens that a routed block takes in training."""
    mod_loss_weight: NonNegativeFloat = 0.01
    """For mixture_of_depths: weight of the loss that teaches routers to choose without looking
    ahead."""
    n_heads: Positive = 6
    """Query heads (H)."""
    n_kv_heads: Positive | None = None
    """Key and value heads; fewer than n_heads is grouped-query attention. Left out: n_heads."""
    d_head: Positive | None = None
    """Width of a head. Left out: d_model / n_heads."""
    d_ff: Positive | None = None
    """Hidden width of the feed-forward. Left out: 4 d_model, or 8/3 d_model for gated units, or
    d_model without a projection."""
    dropout: Fraction = 0.0
    """Dropped share of attention weights, attention outputs and feed-forward outputs."""

    position: Position = "learned"
    """How a token's place reaches the model."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary and sinusoidal wavelengths."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a head's width that rotary positions turn; the rest knows no position."""
    rope_scaling: PositiveFloat = 1.0
    """Rotary positions are divided by this; 4 for a context four times that of the training."""
    position_buckets: Positive = 32
    """For t5: distances told apart, near ones singly and far ones in groups."""
    position_max_distance: Positive = 128
    """For t5: the distance from which on all are alike."""
    norm: Norm = "layernorm"
    """Normalisation function."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the variance inside norms."""
    norm_placement: NormPlacement = "pre"
    """Where the norms stand around the residual branches."""
    activation: Activation = "gelu"
    """Feed-forward non-linearity; the last three are gated units."""
    attention: AttentionName | tuple[AttentionName, ...] = "full"
    """Attention mechanism, or a pattern of them repeated over the layers."""
    attention_window: Positive = 128
    """Tokens a window (sliding_window, longformer) holds, the token's own included."""
    attention_dilation: Positive = 1
    """For longformer: the distance between neighbours in the window."""
    attention_globals: Count = 1
    """Tokens that all later ones see: the first ones of the context (longformer), or the last
    ones of every block (fixed_sparse); 0: none."""
    attention_block: Positive = 32
    """For fixed_sparse, linformer: tokens in a block; for strided_sparse: the stride, and the
    window; for linear: tokens mixed at once, which changes nothing but the speed."""
    attention_rank: Positive = 4
    """For linformer: keys and values that a block of the past is compressed to."""
    attention_implementation: Implementation = "auto"
    """Which implementation of the attention operation runs."""

    tie_embeddings: bool = False
    """Share the token embedding with the output head."""
    bias: bool = True
    """Biases of the output projections, feed-forward and norms."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    head_bias: bool = False
    """Bias of the output head."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head (arXiv 2010.04245)."""
    logit_softcap: PositiveFloat | None = None
    """Bound logits to (-c, c) by c tanh(logits / c) (arXiv 2408.00118)."""
    convolution_width: Count = 0
    """Each branch reads its input through a causal depthwise convolution over so many tokens, which
    is added to it (Canon layers A and C, arXiv 2512.17351); 0: none."""
    copying: bool = False
    """Have a head that points at earlier tokens, so that they come again (arXiv 1609.07843); the
    embedding must be tied."""
    residual: bool | Literal["attention", "feed_forward"] = True
    """Add each branch to its input rather than replace it; or only the one named."""
    attention_projection: bool = True
    """Project the concatenated heads back to d_model."""
    feed_forward: bool = True
    """Have a feed-forward branch at all."""
    feed_forward_projection: bool = True
    """Project the feed-forward's hidden units back to d_model; without, they are d_model wide."""
    remat: bool = False
    """Compute each block's activations again in the backward pass rather than keep them."""

    initializer: Initializer = "scaled"
    """normal: N(0, init_std); scaled: GPT-2's, residual outputs divided by sqrt(2 n_layers);
    uniform_fan_in: PyTorch's default, embeddings N(0, 1)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of `normal` and `scaled`."""

    weight_format: WeightFormat = "float32"
    """What the kernels of linear layers are stored as; compress.py quantize changes it."""
    weight_granularity: Granularity = "channel"
    """For weights of few bits: those that share a scale, all of a kernel's, a column's, or
    weight_group_size of a column's."""
    weight_group_size: Positive = 64
    """For group: consecutive inputs that share a scale."""
    weight_symmetric: bool = True
    """For weights of few bits: levels on both sides of zero alike, without a zero point."""
    weight_head: bool = False
    """For weights of few bits: those of the head and of the token embedding too."""
    weight_packed: bool = True
    """For weights of few bits: hold their codes, which do not train. Without, they are held in
    float32, rounded where they are used, and train straight through the rounding."""
    activation_format: ActivationFormat = "float"
    """What enters those linear layers: floats, or int8 with a scale for each token."""

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            near = nearest_multiples(self.d_model, self.n_heads)
            raise ConfigError(
                "model.d_model",
                self.d_model,
                f"not divisible by model.n_heads = {self.n_heads}; {near} would do, "
                "or give model.d_head",
            )
        if self.n_kv_heads is not None and self.n_heads % self.n_kv_heads:
            divisors = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise ConfigError(
                "model.n_kv_heads",
                self.n_kv_heads,
                f"must divide model.n_heads = {self.n_heads}: one of {divisors}",
            )
        if self.tie_embeddings and self.head_bias:
            raise ConfigError(
                "model.head_bias", True, "a head tied to the embedding has no bias of its own"
            )
        if self.copying and not self.tie_embeddings:
            raise ConfigError(
                "model.copying",
                True,
                "points at rows of the embedding, which mean tokens to a head that is tied to it; "
                "model.tie_embeddings = true would do",
            )
        if self.copying and self.depth == "early_exit":
            raise ConfigError(
                "model.copying",
                True,
                'points after all blocks, and tokens of model.depth = "early_exit" stop before; '
                "false would do",
            )
        if self.convolution_width and (self.layout != "serial" or self.depth != "fixed"):
            key, value = ("layout", self.layout) if self.depth == "fixed" else ("depth", self.depth)
            raise ConfigError(
                "model.convolution_width",
                self.convolution_width,
                "convolutions run over all tokens of blocks one above another, and "
                f'model.{key} = "{value}" has others; 0 would do',
            )
        if self.layout == "parallel_stacks":
            self._check_stacks()
        count, layers = "n_layers", self.n_layers
        if self.layout == "parallel_stacks":
            count, layers = "layers_per_stack", self._layers_in_stack
        if isinstance(self.attention, tuple) and (
            not self.attention or layers % len(self.attention)
        ):
            raise ConfigError(
                "model.attention",
                list(self.attention),
                f"a pattern's length must divide model.{count} = {layers}",
            )
        if "fixed_sparse" in self.attention_pattern and (
            self.attention_globals > self.attention_block
        ):
            raise ConfigError(
                "model.attention_globals",
                self.attention_globals,
                "for fixed_sparse these are tokens of a block, and "
                f"model.attention_block = {self.attention_block} has no more",
            )
        if "linformer" in self.attention_pattern:
            self._check_blocks()
        if "linear" in self.attention_pattern and self.position in PAIRED:
            would_do = [name for name in get_args(Position) if name not in PAIRED]
            raise ConfigError(
                "model.position",
                self.position,
                'changes the score of each pair of tokens, and attention = "linear" never has '
                f"one; {', '.join(would_do)} would do",
            )
        if self.depth != "fixed" and self.layout != "serial":
            raise ConfigError(
                "model.depth",
                self.depth,
                f"only blocks one above another have depths to choose, and model.layout = "
                f'"{self.layout}" has others; "fixed" would do',
            )
        if self.depth == "mixture_of_depths" and "linformer" in self.attention_pattern:
            raise ConfigError(
                "model.depth",
                self.depth,
                'a router would pick tokens out of the blocks that attention = "linformer" '
                "compresses; another attention, or another depth, would do",
            )
        if self.depth == "early_exit" and self.exit_minimum >= self.n_layers:
            raise ConfigError(
                "model.exit_minimum",
                self.exit_minimum,
                f"with model.n_layers = {self.n_layers} no exit is left before the last block"
                + (f"; at most {self.n_layers - 1} would do" if self.n_layers > 1 else ""),
            )
        if self.depth == "mixture_of_depths" and self.n_layers % self.mod_every:
            divisors = [n for n in range(1, self.n_layers + 1) if self.n_layers % n == 0]
            raise ConfigError(
                "model.mod_every",
                self.mod_every,
                f"must divide model.n_layers = {self.n_layers}: one of {divisors}",
            )
        head = self.d_head or self.d_model // self.n_heads
        if self.position == "rope":
            self._check_rotary_width(head)
        if self.position == "t5" and self.position_buckets < 2:
            raise ConfigError("model.position_buckets", self.position_buckets, "must be at least 2")
        least = self.position_buckets // 2 + 1
        if self.position == "t5" and self.position_max_distance < least:
            raise ConfigError(
                "model.position_max_distance",
                self.position_max_distance,
                f"half of model.position_buckets = {self.position_buckets} hold a single distance "
                f"each, so it must be at least {least}",
            )
        if not self.attention_projection and self.n_heads * head != self.d_model:
            raise ConfigError(
                "model.attention_projection",
                False,
                f"the heads are {self.n_heads} x {head} wide, and without a projection they "
                f"must be model.d_model = {self.d_model} wide together",
            )
        if self.norm_placement == "parallel" and isinstance(self.residual, str):
            raise ConfigError(
                "model.residual",
                self.residual,
                'both branches of model.norm_placement = "parallel" are added to one input; '
                "true or false would do",
            )
        if not self.feed_forward_projection and self.d_ff not in (None, self.d_model):
            raise ConfigError(
                "model.d_ff",
                self.d_ff,
                "with model.feed_forward_projection = false the hidden units are the output, and "
                f"must be model.d_model = {self.d_model} wide; that, or leaving it out, would do",
            )
        if self.quantized:
            check_levels(self, self._fan_ins())
        elif self.activation_format != "float":
            raise ConfigError(
                "model.activation_format",
                self.activation_format,
                'is for weights of few levels, and model.weight_format = "float32"; "float" '
                "would do",
            )

    def _fan_ins(self) -> dict[str, int]:
        """How many inputs linear layers have; those of wider stacks are multiples of these."""
        derived = self._derived()
        widths = {"model.d_model": self.d_model}
        if self.attention_projection:
            widths["model.n_heads x model.d_head"] = self.n_heads * derived["d_head"]
        if self.feed_forward and self.feed_forward_projection:
            widths["model.d_ff"] = derived["d_ff"]
        return widths

    def _check_blocks(self) -> None:
        block, context = self.attention_block, self.context_length
        if context % block or block == context:
            divisors = [n for n in range(1, context) if context % n == 0]
            nearest = sorted(sorted(divisors, key=lambda n: abs(n - block))[:2])
            raise ConfigError(
                "model.attention_block",
                block,
                f"linformer's blocks must divide model.context_length = {context}, two at least; "
                + (" or ".join(map(str, nearest)) or "nothing")
                + " would do",
            )
        if self.attention_rank > block:
            raise ConfigError(
                "model.attention_rank",
                self.attention_rank,
                f"linformer compresses blocks, and those of model.attention_block = {block} have "
                "no more tokens",
            )

    def _check_stacks(self) -> None:
        layers = self._layers_in_stack
        total = self.n_stacks * layers
        if self.layers_per_stack is None and total != self.n_layers:
            near = nearest_multiples(self.n_layers, self.n_stacks)
            raise ConfigError(
                "model.n_layers",
                self.n_layers,
                f"not divisible by model.n_stacks = {self.n_stacks}; {near} would do, "
                "or give model.layers_per_stack instead",
            )
        if self.n_layers not in (total, ModelConfig.n_layers):
            raise ConfigError(
                "model.n_layers",
                self.n_layers,
                f"model.n_stacks = {self.n_stacks} of model.layers_per_stack = {layers} are "
                f"{total}; leave out one of them",
            )
        if self.d_model % layers:
            near = nearest_multiples(self.d_model, layers)
            raise ConfigError(
                "model.d_model",
                self.d_model,
                f"each of model.layers_per_stack = {layers} layers gives an equal slice of it; "
                f"{near} would do",
            )
        if self.tie_embeddings:
            raise ConfigError(
                "model.tie_embeddings",
                True,
                'the head of model.layout = "parallel_stacks" reads features 4 times as wide as '
                f"the embedding, whose width is model.d_model = {self.d_model}",
            )

    def _check_rotary_width(self, head: int) -> None:
        exact = head * self.rope_fraction
        if self.rope_width and self.rope_width % 2 == 0 and abs(self.rope_width - exact) < 0.01:
            return
        if self.rope_fraction == 1:
            raise ConfigError(
                "model.d_head", head, "rotary positions turn pairs, so the width must be even"
            )
        below, above = int(exact) // 2 * 2, int(exact) // 2 * 2 + 2
        would_do = [f"{n / head:g}" for n in (below, above) if 0 < n <= head]
        raise ConfigError(
            "model.rope_fraction",
            self.rope_fraction,
            f"of heads {head} wide it turns {exact:g}, which must be an even number, for rotary "
            "positions turn pairs; " + (" or ".join(would_do) or "nothing") + " would do",
        )

    @property
    def _layers_in_stack(self) -> int:
        return self.layers_per_stack or self.n_layers // self.n_stacks

    def has_residual(self, branch: str) -> bool:
        """Whether this branch, attention or feed_forward, is added to its input."""
        return self.residual in (True, branch)

    @property
    def rope_width(self) -> int:
        """How much of a head's width rotary positions turn."""
        return round((self.d_head or self.d_model // self.n_heads) * self.rope_fraction)

    @property
    def quantized(self) -> bool:
        """Whether the weights of linear layers have few levels."""
        return self.weight_format != "float32"

    @property
    def packed(self) -> bool:
        """Whether they are held as codes."""
        return self.quantized and self.weight_packed

    @property
    def quantizes_head(self) -> bool:
        """Whether those of the head and the token embedding are among them."""
        return self.quantized and self.weight_head

    def resolve(self) -> ModelConfig:
        """This config with every derived field filled in (vocab_size stays as given)."""
        return dataclasses.replace(self, **self._derived())

    def _derived(self) -> dict[str, Any]:
        if not self.feed_forward_projection:
            d_ff = self.d_model
        elif self.activation in GATED:
            # Three matrices; 8/3 keeps their parameters those of the two of a 4x plain one.
            d_ff = 8 * self.d_model // 3
        else:
            d_ff = 4 * self.d_model
        stacks: dict[str, Any] = {}
        if self.layout == "parallel_stacks":
            layers = self._layers_in_stack
            stacks = {"layers_per_stack": layers, "n_layers": self.n_stacks * layers}
        return {
            **stacks,
            "n_kv_heads": self.n_kv_heads or self.n_heads,
            "d_head": self.d_head or self.d_model // self.n_heads,
            "d_ff": self.d_ff or d_ff,
        }

    @property
    def attention_pattern(self) -> tuple[AttentionName, ...]:
        """The mechanisms of consecutive layers; it repeats over the depth."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,)
