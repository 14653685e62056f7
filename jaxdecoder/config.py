"""Everything a run is made of, in one value: `Config`, read from TOML and the command line.

Fields left at `None` are derived from others (see `ModelConfig.resolve`); everything else is
explicit. A mistake is refused before any compute, with the file, the key and a value that would
do.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pydantic
import tomli_w
import tyro
from pydantic import Field

from jaxdecoder.errors import UserError

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]

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


class ConfigError(UserError):
    """A value that cannot be: `key` is its dotted path, such as `model.d_model`."""

    def __init__(self, key: str, value: object, why: str):
        super().__init__(f"{key} = {_show(value)}: {why}")
        self.key, self.value, self.why = key, value, why


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

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            near = _nearest_multiples(self.d_model, self.n_heads)
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
            near = _nearest_multiples(self.n_layers, self.n_stacks)
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
            near = _nearest_multiples(self.d_model, layers)
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

    def resolve(self) -> ModelConfig:
        """This config with every derived field filled in (vocab_size stays as given)."""
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
        return dataclasses.replace(
            self,
            **stacks,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            d_head=self.d_head or self.d_model // self.n_heads,
            d_ff=self.d_ff or d_ff,
        )

    @property
    def attention_pattern(self) -> tuple[AttentionName, ...]:
        """The mechanisms of consecutive layers; it repeats over the depth."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: Literal["stories", "text", "huggingface", "tiny_shakespeare"] = "stories"
    """stories: built-in generator; text: your files; huggingface: a hub id or local folder."""
    path: str = ""
    """For text: a file, folder or glob. For huggingface: a hub id or a local folder."""
    text_column: str = "text"
    """For huggingface: the column that holds the text."""
    validation_split: str = ""
    """For huggingface: the split to validate on; empty: a share of the training split."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the corpus, at its end, kept for validation."""
    stories_bytes: Positive = 10_000_000
    """For stories: how much text to generate."""
    tokenizer: str = "char"
    """char, byte, bpe (trained on the corpus), or any tiktoken name such as gpt2."""
    tokenizer_path: str = ""
    """A tokenizer.json to use as it is, or a folder with GPT-2's vocab.json and merges.txt."""
    vocab_size: Positive | None = None
    """For bpe: entries to train (default 4096). For char: keep only the most frequent."""
    end_of_text: bool = True
    """Separate documents by an end token."""
    mode: Literal["packed", "padded"] = "packed"
    """packed: windows of one long stream; padded: one document a row, its padding masked out."""
    sampling: Literal["random", "shuffled"] = "shuffled"
    """random: independent random windows; shuffled: every window once an epoch."""
    seed: Seed = 0
    """Seed of the story generator."""
    cache: str = ".cache"
    """Folder for downloads and token files."""
    processes: Count = 0
    """Processes that tokenise; 0: one a core."""

    def __post_init__(self) -> None:
        if self.source in ("text", "huggingface") and not self.path:
            raise ConfigError(
                "data.path", self.path, f"the source {self.source!r} needs a path to read from"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "muon", "lion", "adafactor", "sgd"] = "adamw"
    """Update rule. Muon moves matrices; the rest of the parameters go to AdamW."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate."""
    adam_learning_rate: PositiveFloat | None = None
    """For muon: the peak rate of what AdamW moves. Left out: learning_rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after warm-up; wsd is warm-up, stable, decay (arXiv 2404.06395)."""
    warmup_steps: Count = 0
    """Steps of linear rise from 0."""
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Last learning rate as a share of the peak."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """For wsd: the share of all steps spent decaying."""
    beta1: Fraction = 0.9
    """Decay of the gradient mean; momentum of muon and sgd."""
    beta2: Fraction = 0.95
    """Decay of the squared gradients."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator of adamw."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, on matrices only."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the moments; bfloat16 halves them, rounding at random so that small changes count."""
    ema_decay: Fraction = 0.0
    """Exponential moving average of the weights, used for evaluation; 0 turns it off."""


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, on what, and what to write down."""

    steps: Positive = 2000
    """Optimiser steps."""
    batch_size: Positive = 32
    """Sequences in one optimiser step (B)."""
    gradient_accumulation: Positive = 1
    """Split a step's batch into this many passes, to save memory."""
    seed: Seed = 0
    """Seed of the initial weights, the batches and the dropout."""
    out: str = ""
    """Run folder. Left out: runs/ and the config file's name."""
    init_from: str = ""
    """Run folder whose weights to start from."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on the CPU. Parameters and loss stay float32."""
    fsdp: bool = False
    """Split parameters and optimiser state over the devices instead of replicating them."""
    cpu_devices: Count = 0
    """On the CPU: devices the cores are divided into; 0: one."""
    steps_per_call: Positive = 10
    """Optimiser steps fused into one compiled call."""
    evaluate_every: Positive = 250
    """Steps between evaluations."""
    evaluation_batches: Positive = 20
    """Fixed validation batches of each evaluation; the end evaluates the whole split."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 2
    """Last checkpoints kept, besides the best."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: Count = 0
    """Steps between printed samples; 0: only at the end."""
    sample_prompt: str = ""
    """Prompt of those samples."""
    tensorboard: bool = False
    """Also write TensorBoard events."""

    def __post_init__(self) -> None:
        if self.batch_size % self.gradient_accumulation:
            raise ConfigError(
                "train.gradient_accumulation",
                self.gradient_accumulation,
                f"must divide train.batch_size = {self.batch_size}",
            )


@dataclass(frozen=True)
class Config:
    """A whole run: model, data, optimiser, training."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file, then applies command-line overrides such as `--model.n-layers 2`.

    Raises `UserError`, naming the file and the key, for anything that is not right.
    """
    path = Path(path)
    config = from_dict(read_toml(path), str(path))
    if not config.train.out:
        train = dataclasses.replace(config.train, out=str(Path("runs") / path.stem))
        config = dataclasses.replace(config, train=train)
    return override(config, overrides) if overrides else config


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, or a `UserError` that names it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def from_dict(tables: dict[str, Any], where: str) -> Config:
    """Checks the tables of a config file and builds the `Config`; `where` names them in errors."""
    _refuse_unknown_keys(tables, Config, where)
    try:
        # Strict JSON mode takes TOML's types as they are: no "3" for 3, but arrays for tuples.
        return _ADAPTER.validate_json(json.dumps(tables, default=str), strict=True)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    except pydantic.ValidationError as error:
        raise UserError("\n".join(explain(where, e) for e in _first_of_each(error))) from None


def override(config: Config, arguments: Sequence[str]) -> Config:
    """Applies command-line arguments to a config; `--help` lists every field."""
    try:
        changed = tyro.cli(
            Config,
            default=config,
            args=list(arguments),
            prog="train.py CONFIG",
            description="Train a decoder. Every field of the config can be given here.",
        )
        return from_dict(to_dict(changed), "command line")
    except ConfigError as error:
        raise UserError(f"command line: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain tables; fields that are `None` are left out, as TOML has no null."""
    tables = dataclasses.asdict(config)
    return {
        name: {key: value for key, value in table.items() if value is not None}
        for name, table in tables.items()
    }


def to_toml(config: Config) -> str:
    """The complete config as TOML text; `from_dict` of it gives the same config back."""
    return tomli_w.dumps(json.loads(json.dumps(to_dict(config))))


def differences(a: Config, b: Config) -> list[str]:
    """The dotted keys in which two configs differ, each with both values."""
    lines = []
    for section in dataclasses.fields(Config):
        left, right = getattr(a, section.name), getattr(b, section.name)
        for item in dataclasses.fields(left):
            x, y = getattr(left, item.name), getattr(right, item.name)
            if x != y:
                lines.append(f"{section.name}.{item.name}: {_show(x)} there, {_show(y)} here")
    return lines


def choices(cls: type, name: str) -> tuple[str, ...]:
    """The values a field with fixed choices can take, for example `(ModelConfig, "norm")`."""
    return tuple(get_args(get_type_hints(cls)[name]))


_ADAPTER = pydantic.TypeAdapter(Config)


def _refuse_unknown_keys(tables: dict[str, Any], cls: type, where: str, prefix: str = "") -> None:
    known = get_type_hints(cls)
    for key, value in tables.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: {prefix}{key}: unknown key; {hint}")
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} = {_show(value)}: must be a table [{key}]")
            _refuse_unknown_keys(value, known[key], where, f"{key}.")  # type: ignore[arg-type]


def _first_of_each(error: pydantic.ValidationError) -> list[Any]:
    """One complaint a key: a union reports each of its alternatives."""
    firsts: dict[tuple[str, ...], Any] = {}
    for e in error.errors():
        firsts.setdefault(tuple(str(part) for part in e["loc"][:2]), e)
    return list(firsts.values())


def explain(where: str, error: Any) -> str:
    """One of pydantic's complaints as a sentence that names file, key and value."""
    key = ".".join(str(part) for part in error["loc"][:2])
    message = error["msg"]
    value = error["input"]
    if error["type"] == "literal_error" and isinstance(value, str):
        options = [o.strip("'") for o in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(value, options, n=1, cutoff=0.5)
        message = f"must be one of {', '.join(options)}" + (f"; {near[0]}?" if near else "")
    message = message.removeprefix("Input should be").strip()
    return f"{where}: {key} = {_show(value)}: should be {message}".replace("be must be", "be")


def _neighbours(path: Path) -> str:
    names = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def _nearest_multiples(value: int, of: int) -> str:
    below, above = value // of * of, -(-value // of) * of
    return f"{below} or {above}" if below else str(above)


def _show(value: object) -> str:
    return json.dumps(value, default=str)
