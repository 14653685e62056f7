"""The other sections of a config: data, optimiser, training, devices, compression."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
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
    expand_home,
)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: Literal["stories", "text", "huggingface", "tiny_shakespeare"] = "stories"
    """stories: built-in generator; text: your files; huggingface: a hub id or local folder."""
    path: str = ""
    """For text: a file, folder or glob. For huggingface: a hub id, or a local folder or file."""
    text_column: str = "text"
    """Of records (jsonl, json, csv, parquet): the column that holds the text."""
    separator: str = "<|endoftext|>"
    """What divides a text into documents, with the line breaks around it; empty: nothing."""
    validation_split: str = ""
    """For huggingface: the split to validate on; empty: a share of the training split."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the corpus, at its end, kept for validation."""
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the text left for training, at its start, to train on; the tokenizer knows all."""
    stories_bytes: Positive = 10_000_000
    """For stories: how much text to generate."""
    stories_plots: tuple[str, ...] = ()
    """For stories: the plots to tell, such as "lost"; empty: all."""
    stories_names: Count = 0
    """For stories: how many names each there are of girls, boys and others; 0: all."""
    stories_paragraphs: bool = True
    """For stories: tell them in several paragraphs."""
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
        expand_home(self, "path", "tokenizer_path", "cache")
        if self.source in ("text", "huggingface") and not self.path:
            why = f"the source {self.source!r} needs a path to read from"
            raise ConfigError("data.path", self.path, why)


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

    def peaking_at(self, rate: float) -> OptimizerConfig:
        """The same at another peak rate; that of AdamW beside Muon keeps its ratio to it."""
        adam, factor = self.adam_learning_rate, rate / self.learning_rate
        adam = None if adam is None else adam * factor
        return replace(self, learning_rate=rate, adam_learning_rate=adam)


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
    cpu_devices: Count = 0
    """On the CPU: devices the cores are divided into; 0: one."""
    tune: bool = True
    """On the CPU: choose attention, passes and devices by short trials, for runs that repay them;
    only what is left at its default."""
    steps_per_call: Positive = 10
    """Optimiser steps fused into one compiled call, at most."""
    evaluate_every: Positive = 250
    """Steps between evaluations."""
    evaluation_batches: Positive = 20
    """Fixed validation batches of each evaluation."""
    final_batches: Count = 0
    """Validation batches of the evaluation at the end; 0: the whole split."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    checkpoint_minutes: PositiveFloat = 10.0
    """Minutes between checkpoints, at most."""
    best_every: Count = 0
    """Steps between two checkpoints of better models, at least, besides those of checkpoint_every;
    0: every better one is saved."""
    keep: Positive = 2
    """Last checkpoints kept, besides the best."""
    rollbacks: Count = 3
    """How often a run whose loss spikes, or is no longer finite, goes back to its last checkpoint
    and on past the batches since."""
    spike: NonNegativeFloat = 2.0
    """Nats by which the loss of a step is above the median of the last 32 logged ones when it
    counts as a spike; 0: none does."""
    watchdog_minutes: NonNegativeFloat = 0.0
    """Minutes without a sign of life after which the run says what it is waiting for; 0: never."""
    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    sample_every: Count = 0
    """Steps between printed samples; 0: only at the end."""
    sample_prompt: str = ""
    """Prompt of those samples."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    profile: bool = False
    """Trace one of the first calls, and write a page that says where a step goes (profile/)."""
    history: tuple[str, ...] = ()
    """What the run had before it went on with other values, and until which step; train.py writes
    it down."""

    def __post_init__(self) -> None:
        expand_home(self, "out", "init_from")
        if self.batch_size % self.gradient_accumulation:
            why = f"must divide train.batch_size = {self.batch_size}"
            raise ConfigError("train.gradient_accumulation", self.gradient_accumulation, why)


@dataclass(frozen=True)
class MeshConfig:
    """How a run lies on its devices; the sizes multiply to their number."""

    data: int = -1
    """Parts of the batch, each on devices that hold all of the model; -1: the devices that remain
    (at most one size may be -1)."""
    fsdp: int = 1
    """Parts of the batch, of the parameters and of the optimiser's state (arXiv 1910.02054)."""
    tensor: int = 1
    """Parts of the heads, the hidden units and the vocabulary (arXiv 1909.08053)."""
    context: int = 1
    """Parts of the sequence; keys and values are gathered from all of them."""

    def __post_init__(self) -> None:
        filled = [name for name, size in asdict(self).items() if size == -1]
        for name, size in asdict(self).items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{name}", size, "must be at least 1, or -1 for the rest")
        if len(filled) > 1:
            others = " and ".join(f"mesh.{name}" for name in filled[:-1])
            why = f"only one size can take the devices that remain; give {others} a number, as 1"
            raise ConfigError(f"mesh.{filled[-1]}", -1, why)

    def sizes(self, devices: int) -> dict[str, int]:
        """Return the size of each axis on so many devices.

        Raises:
            ConfigError: if they do not multiply to that number.
        """
        given = asdict(self)
        known = {name: size for name, size in given.items() if size != -1}
        taken, rest = math.prod(known.values()), [name for name in given if name not in known]
        if rest and devices % taken == 0:
            return given | {rest[0]: devices // taken}
        if taken == devices and not rest:
            return given
        # The largest is the likeliest mistake.
        name = max(known, key=known.__getitem__)
        others = taken // known[name]
        if devices % others:
            what = f"no size would do, for the others alone need a multiple of {others}"
        elif rest:
            fits = [n for n in range(1, devices + 1) if devices // others % n == 0]
            what = f"{' or '.join(map(str, fits))} would do"
        else:
            what = f"{devices // others} would do, or -1 for the devices that remain"
        fails = "does not divide" if rest else "is not"
        why = f"the sizes given multiply to {taken}, which {fails} {devices} devices; {what}"
        raise ConfigError(f"mesh.{name}", known[name], why)


@dataclass(frozen=True)
class CompressionConfig:
    """What a smaller model came from, and what its training keeps to."""

    recipe: tuple[str, ...] = ()
    """The commands that made the run, one after another; compress.py writes them down."""
    keep_zeros: bool = False
    """Weights of matrices that are zero stay zero: a pruned model stays pruned while it trains."""
    sparsity: Fraction = 0.0
    """Share of the weights of the body's matrices that training makes zero, the smallest first, a
    few more every sparsity_every steps (arXiv 1710.01878); 0: none."""
    sparsity_from: Fraction = 0.0
    """The share at sparsity_begin."""
    sparsity_begin: Count = 0
    """Step after which the first weights become zero."""
    sparsity_end: Count = 0
    """Step after which sparsity is reached."""
    sparsity_every: Positive = 10
    """Steps between two rounds of making zeros."""
    sparsity_scope: Literal["matrix", "output", "global"] = "matrix"
    """Among which weights the smallest are sought: each matrix's, each output unit's, or all."""

    def __post_init__(self) -> None:
        if not self.sparsity:
            return
        if not self.keep_zeros:
            why = "what compression.sparsity makes zero must stay so"
            raise ConfigError("compression.keep_zeros", False, why)
        if self.sparsity_from > self.sparsity:
            why = f"must be at most compression.sparsity = {self.sparsity}"
            raise ConfigError("compression.sparsity_from", self.sparsity_from, why)
        least = max(1, self.sparsity_begin)
        if self.sparsity_end < least:
            raise ConfigError(
                "compression.sparsity_end",
                self.sparsity_end,
                f"must be at least {least}: compression.sparsity is reached after a step, and not "
                f"before compression.sparsity_begin = {self.sparsity_begin}",
            )

    @property
    def settles_at(self) -> int:
        """The step from which on no more weights become zero."""
        return self.sparsity_end if self.sparsity else 0

    def settled(self) -> CompressionConfig:
        """The same once the share is reached: zeros stay, and no more are made."""
        return CompressionConfig(recipe=self.recipe, keep_zeros=self.keep_zeros)


Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]
Matching = Literal["none", "relations", "similarity", "cka"]


@dataclass(frozen=True)
class Teaching:
    """How a student learns from its teacher."""

    divergence: Divergence = "forward_kl"
    """How far the student's next token is from the teacher's."""
    jensen_shannon_beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """For jensen_shannon: the teacher's share of the mixture that both are held against."""
    temperature: PositiveFloat = 2.0
    """Divides both models' logits; the divergence is multiplied by its square."""
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share of the divergence in the loss; the rest is the loss of the true next token. 1: only
    the teacher counts."""
    matching: Matching = "none"
    """What of the layers is matched besides: relations, those between a layer's queries, keys and
    values; similarity, that of tokens in the residual stream; cka, the streams as a whole."""
    matching_weight: NonNegativeFloat = 1.0
    """What the matching's loss is multiplied by."""
    teacher_layer: Count = 0
    """For relations: the layer of the teacher that the student's last one is held against, counted
    from 1 (parallel stacks: the stack); 0: the last."""
    relation_heads: Count = 0
    """For relations: heads that queries, keys and values are divided into anew; 0: the most that
    divide the heads of both models."""
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of steps whose texts the student itself goes on with, for the teacher to judge."""
    on_policy_prompt: Count = 0
    """Tokens of the batch's rows that the student goes on from; 0: a quarter of the context."""
    cached_top_k: Count = 0
    """Keep so many of the teacher's likeliest tokens on disk, and the probability of the others
    together, rather than run the teacher in every step; 0: run it."""
    cached_most_gigabytes: PositiveFloat = 4.0
    """For cached_top_k: what the file may take; more is refused."""

    def __post_init__(self) -> None:
        if self.cached_top_k and (self.on_policy or self.matching != "none"):
            why = (
                f"what distillation.on_policy = {self.on_policy:g} samples is known to no cache"
                if self.on_policy
                else f'distillation.matching = "{self.matching}" looks into the teacher as it runs'
            )
            raise ConfigError("distillation.cached_top_k", self.cached_top_k, f"{why}; 0 would do")
        if not self.alpha and not self.on_policy and self.matching == "none":
            why = "nothing would be learned from the teacher; 0.5 would do, or a matching"
            raise ConfigError("distillation.alpha", self.alpha, why)


@dataclass(frozen=True)
class DistillationConfig(Teaching):
    """What a run learns from another; compress.py distill writes it down."""

    teacher: str = ""
    """Run folder of the teacher; empty: there is none."""
    teacher_digest: str = ""
    """What the teacher's weights are known by; empty: any will do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_home(self, "teacher")
