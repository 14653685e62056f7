"""Generate text from the model of a run with one call."""

from __future__ import annotations

import jax

from jaxdecoder.config.fields import check_seed
from jaxdecoder.data.tokenizers import stream_decoder
from jaxdecoder.sampling import filters
from jaxdecoder.sampling.generate import encode_prompt
from jaxdecoder.sampling.generate import generate as generate_tokens
from jaxdecoder.training.runs import Model


def generate(
    model: Model,
    prompt: str = "",
    *,
    max_new_tokens: int = 500,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Return the prompt and its continuation, as `sample.py` prints them for these options.

    For tokens, batches and filters, use `jaxdecoder.sampling.generate`.
    """
    check_seed("seed =", seed)
    chunks = generate_tokens(
        model.decoder,
        model.params,
        [encode_prompt(model.tokenizer, prompt, model.config.data)],
        max_new_tokens=max_new_tokens,
        key=jax.random.key(seed),
        # Spare rows of the head mean nothing.
        choose=filters.chain(
            filters.first(model.tokenizer.vocab_size), filters.temperature(temperature)
        ),
        end_token=model.tokenizer.end_token,
    )
    decode = stream_decoder(model.tokenizer)  # leaves out an incomplete character at the end
    return prompt + "".join(decode(row) for (row,) in chunks)
