"""Sample text from a run: python sample.py runs/stories --prompt "Once upon a time"."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from jaxdecoder.config import ModelConfig
from jaxdecoder.errors import UserError, friendly


@dataclass(frozen=True)
class Options:
    """Sample text from a run."""

    run: tyro.conf.Positional[str]
    """Run folder."""
    prompt: tuple[str, ...] = ("",)
    """Beginning of the text. Several prompts make a batch."""
    prompt_file: str = ""
    """Read the prompt from this file; - is standard input."""
    max_new_tokens: int = 500
    """Greatest number of tokens to generate."""
    temperature: float = 0.8
    """Divide the logits by this; 0 is greedy decoding."""
    top_k: int | None = None
    """Choose among the k likeliest tokens."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities sum to this."""
    min_p: float | None = None
    """Choose among tokens that are at least this many times as probable as the likeliest."""
    repetition_penalty: float | None = None
    """Make tokens that have occurred less likely, by this factor."""
    exit_threshold: float | None = None
    """For a model with early exits: the confidence above which a token stops; 1: never stop early.
    Left out: the run's own."""
    num_samples: int = 1
    """Continuations of each prompt."""
    seed: int = 0
    """The same seed gives the same text."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint of the run to load."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and compute; auto: what train.py would use for this run here."""


@friendly
def main() -> None:
    """Parse the options, load the model, generate and print."""
    options = tyro.cli(Options)
    import jax
    import jax.numpy as jnp

    from jaxdecoder.data.tokenizers import stream_decoder
    from jaxdecoder.kernels import packing
    from jaxdecoder.sampling import filters
    from jaxdecoder.sampling.generate import encode_prompt, generate
    from jaxdecoder.training.devices import keep_programs
    from jaxdecoder.training.runs import load_model, read_config

    for name in ("max_new_tokens", "num_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1")
    keep_programs(read_config(Path(options.run)).data.cache)
    model = load_model(options.run, options.checkpoint)
    decoder, params = model.decoder, model.params
    if options.exit_threshold is not None:
        decoder = decoder.clone(config=_with_threshold(model.config.model, options))
    if options.dtype != "auto":
        decoder = decoder.clone(dtype=jnp.dtype(options.dtype))
        params = packing.cast(params, decoder.dtype)
    # Spare rows of the head mean nothing.
    steps = [filters.first(model.tokenizer.vocab_size)]
    for name, make in filters.FILTERS.items():
        if (value := getattr(options, name)) is not None:
            steps.append(make(value))
    texts = [_read(options.prompt_file)] if options.prompt_file else list(options.prompt) or [""]
    texts = [text for text in texts for _ in range(options.num_samples)]
    chunks = generate(
        decoder,
        params,
        [encode_prompt(model.tokenizer, text, model.config.data) for text in texts],
        max_new_tokens=options.max_new_tokens,
        key=jax.random.key(options.seed),
        choose=filters.chain(*steps),
        end_token=model.tokenizer.end_token,
    )
    decoders = [stream_decoder(model.tokenizer) for _ in texts]
    if len(texts) == 1:
        # Print one text as it comes, several texts when they are complete.
        print(texts[0], end="", flush=True)
        for (fresh,) in chunks:
            print(decoders[0](fresh), end="", flush=True)
        print()
        return
    for chunk in chunks:
        for row, fresh in enumerate(chunk):
            texts[row] += decoders[row](fresh)
    print("\n---\n".join(texts))


def _with_threshold(config: ModelConfig, options: Options) -> ModelConfig:
    threshold = options.exit_threshold
    assert threshold is not None
    if config.depth != "early_exit":
        raise UserError(
            f'--exit-threshold: {options.run} has model.depth = "{config.depth}", not "early_exit"'
        )
    if not 0 <= threshold <= 1:
        raise UserError(f"--exit-threshold: {threshold} is no probability; 0.9 would do")
    return replace(config, exit_threshold=threshold)


def _read(path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


if __name__ == "__main__":
    main()
