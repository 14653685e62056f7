"""Sample text from a run: python sample.py runs/stories --prompt "Once upon a time"."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from jaxdecoder.config import ModelConfig
from jaxdecoder.config.fields import PathOption, check_seed
from jaxdecoder.errors import UserError, friendly, not_utf8
from jaxdecoder.files import as_text

MOST = {"max_new_tokens": 10**7, "num_samples": 10**5}
"""What fits into memory by far."""


@dataclass(frozen=True)
class Options:
    """Sample text from a run."""

    run: tyro.conf.Positional[PathOption]
    """Run folder."""
    prompt: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Beginning of the text. Several prompts make a batch. One that begins with a dash: --prompt=-5
    """
    prompt_file: PathOption = ""
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
    for name, most in MOST.items():
        if not 1 <= (value := getattr(options, name)) <= most:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from 1 to {most}")
    check_seed("--seed", options.seed)
    texts = _prompts(options)
    import jax
    import jax.numpy as jnp

    from jaxdecoder.data.tokenizers import stream_decoder
    from jaxdecoder.kernels import packing
    from jaxdecoder.sampling import filters
    from jaxdecoder.sampling.generate import encode_prompt, generate
    from jaxdecoder.training.devices import keep_programs
    from jaxdecoder.training.runs import load_model, read_config

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


def _prompts(options: Options) -> list[str]:
    """Return the prompts, each as often as it is to be continued."""
    texts = [text for some in options.prompt for text in some] or [""]
    if options.prompt_file:
        texts = [_read(options.prompt_file)]
    for text in filter(not_utf8, texts):
        raise UserError(f"--prompt {text!a}: not UTF-8 text; --prompt-file reads a file")
    return [text for text in texts for _ in range(options.num_samples)]


def _read(path: str) -> str:
    name, stdin = "standard input" if path == "-" else path, sys.stdin
    try:
        if path == "-" and stdin is None:
            raise UserError("--prompt-file -: standard input is closed")
        return as_text(stdin.buffer.read() if path == "-" else Path(path).read_bytes(), name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {error}") from None


if __name__ == "__main__":
    main()
