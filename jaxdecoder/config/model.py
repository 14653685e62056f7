"""`ModelConfig`: the shape and the components of one decoder, and what cannot go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from jaxdecoder.config.checks import CHECKS
from jaxdecoder.config.fields import (
    ConfigError,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
)

Position = Literal["none", "learned", "sinusoidal", "rope", "alibi", "t5"]
Norm = Literal["layernorm", "rmsnorm", "none"]
NormPlacement = Literal["pre", "post", "sandwich", "parallel", "none"]
Activation = Literal["relu", "gelu", "gelu_exact", "swish", "relu2", "swiglu", "geglu", "reglu"]
AttentionName = Literal[
    "full", "sliding_window", "longformer", "fixed_sparse", "strided_sparse", "linformer", "linear"
]
Layout = Literal["serial", "parallel_stacks"]
Depth = Literal["fixed", "early_exit", "mixture_of_depths"]
ExitConfidence = Literal["probability", "margin"]
Initializer = Literal["normal", "uniform_fan_in", "scaled"]
Implementation = Literal["auto", "reference", "rows", "chunked", "portable", "hopper", "cudnn"]
WeightFormat = Literal["float32", "int8", "int4", "float8_e4m3fn", "float8_e5m2"]
Granularity = Literal["tensor", "channel", "group"]
ActivationFormat = Literal["float", "int8"]


def _named(remat: object) -> object:
    """Return the policy that a run of before they had names means by true or false."""
    return ("block" if remat else "none") if isinstance(remat, bool) else remat


Remat = Annotated[Literal["none", "dots", "block", "everything"], BeforeValidator(_named)]

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
    remat: Remat = "none"
    """What training computes again in the backward pass rather than keep it: none; dots, all but
    the products of linear layers; block, each block from its input; everything, also within a
    block, or of a whole stack. Each needs less memory than the one before, and more time."""

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
        object.__setattr__(self, "remat", _named(self.remat))  # made in Python, not read
        for check in CHECKS:
            for key, why in check(self):
                raise ConfigError(f"model.{key}", getattr(self, key), why)

    def __eq__(self, other: object) -> bool:
        """Say whether all fields are equal, be one of the two resolved or not."""
        return isinstance(other, ModelConfig) and vars(self) == vars(other)

    def resolve(self) -> Architecture:
        """Return this config with every derived field filled in; vocab_size must be known."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size", None, "the decoder needs to know it")
        derived = {
            "n_kv_heads": self.n_kv_heads or self.n_heads,
            "d_head": self.head_width,
            "d_ff": self.hidden_width,
        }
        if self.layout == "parallel_stacks":
            layers = self.layers_side_by_side
            derived |= {"layers_per_stack": layers, "n_layers": self.n_stacks * layers}
        return Architecture(**{**vars(self), **derived})

    @property
    def head_width(self) -> int:
        """Width of a head, given or derived."""
        return self.d_head or self.d_model // self.n_heads

    @property
    def hidden_width(self) -> int:
        """Hidden width of the feed-forward, given or derived."""
        if self.d_ff is not None:
            return self.d_ff
        if not self.feed_forward_projection:
            return self.d_model
        # A gated unit has three matrices; 8/3 keeps their parameters those of a plain one's two.
        return 8 * self.d_model // 3 if self.activation in GATED else 4 * self.d_model

    @property
    def layers_side_by_side(self) -> int:
        """Layers that read the same input: those of a stack, or 1 in the serial layout."""
        if self.layout == "serial":
            return 1
        return self.layers_per_stack or self.n_layers // self.n_stacks

    def has_residual(self, branch: str) -> bool:
        """Say whether this branch, attention or feed_forward, is added to its input."""
        return self.residual in (True, branch)

    @property
    def rope_width(self) -> int:
        """How much of a head's width rotary positions turn."""
        return round(self.head_width * self.rope_fraction)

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

    @property
    def attention_pattern(self) -> tuple[AttentionName, ...]:
        """The mechanisms of consecutive layers; it repeats over the depth."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,)


@dataclass(frozen=True, eq=False)
class Architecture(ModelConfig):
    """A config in which nothing is left to derive: what layers are made from.

    Of `layout = "serial"` layers_per_stack stays None; ask for `layers_side_by_side`.
    """

    vocab_size: Positive = field(kw_only=True)
    n_kv_heads: Positive = field(kw_only=True)
    d_head: Positive = field(kw_only=True)
    d_ff: Positive = field(kw_only=True)

    def resolve(self) -> Architecture:
        """Return it as it is."""
        return self

    @property
    def query_width(self) -> int:
        """Width of all queries of a layer together."""
        return self.n_heads * self.d_head

    @property
    def kv_width(self) -> int:
        """Width of all keys of a layer together, which is that of all values."""
        return self.n_kv_heads * self.d_head
