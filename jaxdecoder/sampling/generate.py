"""Generate tokens: prefill the cache with the prompts, then decode in one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxdecoder.config import Config, DataConfig
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.decoder import Decoder
from jaxdecoder.decoding import Session, prepare
from jaxdecoder.errors import UserError
from jaxdecoder.layers.cache import Cache
from jaxdecoder.layers.positions import POSITIONS
from jaxdecoder.sampling import filters
from jaxdecoder.training.devices import compiled_soon
from jaxdecoder.training.step import make_decoder
from jaxdecoder.typing import Index, Params

CHUNK = 16
"""Tokens that one call of the compiled loop decodes. Readers see text in portions of this size."""

BUCKETS = 16
"""Number of lengths that prompts are padded to, so that few lengths need a new compilation."""


class Decoding(NamedTuple):
    """The state of a batch of texts during decoding."""

    tokens: Int[Array, "batch room"]
    """The prompts, padded on the left, then the generated tokens."""
    length: Int[Array, ""]
    """Filled columns of `tokens`."""
    start: Int[Array, "batch"]
    """Each row's first real column."""
    done: Array
    logits: Float[Array, "batch vocab"]
    """For the column at `length`."""
    counts: Int[Array, "batch vocab"]
    cache: Cache


def generate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    key: jax.Array,
    choose: filters.Filter | None = None,
    end_token: int | None = None,
) -> Iterator[list[list[int]]]:
    """Yield the new tokens of every row, a chunk at a time, until all rows have ended.

    A row ends after `max_new_tokens` or with `end_token`, which is not returned. The tokens of a
    row depend on the key, the row's number and its prompt, but not on the lengths of other rows.
    Past the context length, the oldest tokens are forgotten. Where the positions permit it, the
    cache is a ring. Where they do not, the text is cropped and the cache is filled again.

    Raises:
        UserError: for an empty prompt.
    """
    context = decoder.config.context_length
    slides = POSITIONS[decoder.config.position].slides
    choose = choose or filters.temperature(1.0)
    if not all(len(prompt) for prompt in prompts):
        raise UserError("generate: every prompt must have one token at least; see encode_prompt")
    cropped = [np.asarray(prompt, np.int32)[-context:] for prompt in prompts]
    longest = max(len(prompt) for prompt in cropped)
    bucket = max(1, context // BUCKETS)
    width = min(context, -(-longest // bucket) * bucket)
    tokens = np.zeros((len(prompts), width + max_new_tokens), np.int32)
    start = np.array([width - len(prompt) for prompt in cropped], np.int32)
    for row, prompt in enumerate(cropped):
        tokens[row, start[row] : width] = prompt

    session = _prepare(decoder, params)
    begin, advance = _programs(jax.default_backend())
    state = begin(session, jnp.asarray(tokens), jnp.asarray(start), width)
    done, sent = np.zeros(len(prompts), bool), width
    while sent < tokens.shape[1] and not done.all():
        until = min(sent + CHUNK, tokens.shape[1])
        if sent < context and not slides:
            until = min(until, context)
        crops = sent >= context and not slides
        state = advance(session, state, until, key, choose, end_token, crops)
        fresh = np.asarray(state.tokens[:, sent : int(state.length)])
        yield [_until_end(row, end_token) if not done[i] else [] for i, row in enumerate(fresh)]
        done, sent = np.asarray(state.done), int(state.length)


def encode_prompt(tokenizer: Tokenizer, text: str, data: DataConfig) -> list[int]:
    """Return the tokens of a prompt as at the beginning of a document: after an end token.

    If documents have no end tokens, return the prompt alone; for an empty prompt, the first token
    of the vocabulary.
    """
    tokens = tokenizer.encode(text).tolist()
    if data.end_of_text and tokenizer.end_token is not None:
        return [tokenizer.end_token, *tokens]
    return tokens or [0]


def show_sample(config: Config, params: Params, tokenizer: Tokenizer) -> str:
    """Sample a short text for the training log, always with the same key."""
    new_tokens = min(256, 2 * config.model.context_length)
    chunks = generate(
        make_decoder(config),
        params,
        [encode_prompt(tokenizer, config.train.sample_prompt, config.data)],
        max_new_tokens=new_tokens,
        key=jax.random.key(config.train.seed),
        choose=filters.temperature(0.8),
        end_token=tokenizer.end_token,
    )
    tokens = [token for chunk in chunks for token in chunk[0]]
    return config.train.sample_prompt + tokenizer.decode(tokens)


_prepare = jax.jit(prepare, static_argnums=0)


def _begin(
    session: Session, tokens: Int[Array, "batch room"], start: Int[Array, "batch"], width: int
) -> Decoding:
    read = session.prefill(tokens[:, :width], start)
    logits = read.logits[:, -1]
    real = jnp.arange(width) >= start[:, None]
    rows = jnp.arange(tokens.shape[0])[:, None]
    counts = jnp.zeros(logits.shape, jnp.int32).at[rows, tokens[:, :width]].add(real)
    done = jnp.zeros(tokens.shape[0], bool)
    return Decoding(tokens, jnp.asarray(width), start, done, logits, counts, read.cache)


def _advance(
    session: Session,
    state: Decoding,
    until: Index,
    key: jax.Array,
    choose: filters.Filter,
    end_token: int | None,
    crops: bool,
) -> Decoding:
    """Fill columns up to `until`, or until every row is done."""
    context = session.decoder.config.context_length

    def key_of(row: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, row), number)

    def step(s: Decoding) -> Decoding:
        rows = jnp.arange(s.tokens.shape[0])
        # Numbered within the row, so that padding does not change what is drawn.
        keys = jax.vmap(key_of)(rows, s.length - s.start)
        token = jax.vmap(jax.random.categorical)(keys, choose(s.logits, s.counts))
        token = token.astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(s.tokens, token[:, None], (0, s.length))
        done = s.done if end_token is None else s.done | (token == end_token)
        length = s.length + 1
        if crops:
            window = jax.lax.dynamic_slice_in_dim(tokens, length - context, context, axis=1)
            start = jnp.maximum(s.start - (length - context), 0)
            logits, cache = session.prefill(window, start).logits, s.cache
        else:
            logits, cache, _ = session.extend(token[:, None], s.cache, last=True)
        counts = s.counts.at[rows, token].add(1)
        return Decoding(tokens, length, s.start, done, logits[:, -1], counts, cache)

    return jax.lax.while_loop(lambda s: (s.length < until) & ~jnp.all(s.done), step, state)


@functools.cache
def _programs(platform: str) -> tuple[Callable[..., Decoding], Callable[..., Decoding]]:
    """Return `_begin` and `_advance`, compiled; a CPU spends longer on compiling than on a text."""
    options = compiled_soon(platform)
    return (
        jax.jit(_begin, static_argnums=3, compiler_options=options),
        jax.jit(_advance, static_argnums=(4, 5, 6), donate_argnums=1, compiler_options=options),
    )


def _until_end(row: np.ndarray, end_token: int | None) -> list[int]:
    tokens = row.tolist()
    return tokens[: tokens.index(end_token)] if end_token in tokens else tokens
