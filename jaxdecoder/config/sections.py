"""The other sections of a config: data, optimiser, training, compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from jaxdecoder.config.fields import (
    ConfigError,
    Count,
    Fraction,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seed,
)


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

    steps: Count = 2000
    """Optimiser steps; 0: evaluate what is there."""
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
class CompressionConfig:
    """What a smaller model came from, and what its training keeps to."""

    recipe: tuple[str, ...] = ()
    """The commands that made the run, one after another; compress.py writes them down."""
    keep_zeros: bool = False
    """Weights of matrices that are zero stay zero: a pruned model stays pruned while it trains."""
