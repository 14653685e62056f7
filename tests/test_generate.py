"""Generated text is what a naive decoder would write, token by token, from each prompt alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from models import random_params, random_tokens, small

from jaxdecoder import Decoder
from jaxdecoder.errors import UserError
from jaxdecoder.sampling import filters
from jaxdecoder.sampling import generate as generation
from jaxdecoder.sampling.generate import generate

STARTS_OVER = small(vocab_size=11, position="learned")
SLIDES = small(
    vocab_size=11,
    position="rope",
    n_kv_heads=2,
    attention=("sliding_window", "full"),
    attention_window=4,
)
CONTEXT = STARTS_OVER.context_length
NEW = 14
GREEDY = filters.temperature(0.0)
# The last but one fills the context, the last is longer than it.
PROMPTS = [random_tokens(SLIDES, n, seed=n).tolist() for n in (3, 1, CONTEXT, CONTEXT + 3)]


# Parameters with which greedy text does not settle on a few tokens.
SEEDS = {STARTS_OVER: 37, SLIDES: 9}


@functools.cache
def model(config):
    return Decoder(config), random_params(config, SEEDS[config])


def texts(config, prompts, *, new=NEW, seed=0, choose=GREEDY, end_token=None):
    """The new tokens of every row, and the chunks that they came in."""
    decoder, params = model(config)
    chunks = list(
        generate(
            decoder,
            params,
            prompts,
            max_new_tokens=new,
            key=jax.random.key(seed),
            choose=choose,
            end_token=end_token,
        )
    )
    rows = zip(*chunks, strict=True)
    return [list(itertools.chain.from_iterable(parts)) for parts in rows], chunks


@functools.cache
def expected(config, prompt, new=NEW):
    """Greedy decoding by full passes of the naive decoder."""
    _, params = model(config)
    tokens = list(prompt)[-CONTEXT:]
    begun = len(tokens)
    for _ in range(new):
        if config.position == "learned":
            logits = naive.decode(config, params, tokens[-CONTEXT:])
        else:
            logits = naive.decode(config, params, tokens, window=CONTEXT)
        tokens.append(int(logits[-1].argmax()))
    return tokens[begun:]


@pytest.mark.parametrize("config", [STARTS_OVER, SLIDES], ids=["starts over", "slides"])
class TestGreedyText:
    """Prompts of different lengths in one batch, decoded until well past the context."""

    def test_is_that_of_full_passes_over_each_prompt_alone(self, config):
        rows, _ = texts(config, PROMPTS)
        assert rows == [expected(config, tuple(prompt)) for prompt in PROMPTS]
        # A model that repeats one token would pass with half the code broken.
        assert all(len(set(row)) > 4 for row in rows)

    def test_comes_in_chunks(self, config, monkeypatch):
        monkeypatch.setattr(generation, "CHUNK", 5)
        rows, chunks = texts(config, PROMPTS)
        assert [[len(row) for row in chunk] for chunk in chunks] == [[5] * 4, [5] * 4, [4] * 4]
        assert rows == [expected(config, tuple(prompt)) for prompt in PROMPTS]


class TestPadding:
    def test_does_not_change_a_row(self, monkeypatch):
        monkeypatch.setattr(generation, "BUCKETS", 2)
        prompts = PROMPTS[:2] * 2
        rows, _ = texts(SLIDES, prompts)
        assert rows == [expected(SLIDES, tuple(prompt)) for prompt in prompts]

    def test_of_a_longer_neighbour_does_not_change_what_is_drawn(self, monkeypatch):
        monkeypatch.setattr(generation, "BUCKETS", 2)
        drawn = filters.temperature(1.0)
        beside_short, _ = texts(SLIDES, PROMPTS[:2] * 2, choose=drawn)
        beside_long, _ = texts(SLIDES, PROMPTS, choose=drawn)
        assert beside_short[0] == beside_long[0]


class TestEndToken:
    def test_stops_its_row_while_others_go_on(self, monkeypatch):
        monkeypatch.setattr(generation, "CHUNK", 3)
        whole = [expected(SLIDES, tuple(prompt)) for prompt in PROMPTS]
        # A token that ends one row early, and that another row does without for longer.
        end = max(
            range(SLIDES.vocab_size),
            key=lambda token: len({row.index(token) if token in row else NEW for row in whole}),
        )
        cut = [row[: row.index(end)] if end in row else row for row in whole]
        assert len({len(row) for row in cut}) > 1
        rows, _ = texts(SLIDES, PROMPTS, end_token=end)
        assert rows == cut

    def test_of_every_row_ends_the_decoding(self, monkeypatch):
        monkeypatch.setattr(generation, "CHUNK", 2)
        prompts = [PROMPTS[2]] * 4
        whole = expected(SLIDES, tuple(PROMPTS[2]))
        end = whole[3]
        rows, chunks = texts(SLIDES, prompts, end_token=end)
        assert rows == [whole[: whole.index(end)]] * 4
        assert len(chunks) == whole.index(end) // 2 + 1


class TestDraws:
    def test_are_fixed_by_the_seed(self):
        drawn = filters.temperature(1.0)
        once, _ = texts(SLIDES, PROMPTS, choose=drawn)
        again, _ = texts(SLIDES, PROMPTS, choose=drawn)
        other, _ = texts(SLIDES, PROMPTS, choose=drawn, seed=1)
        assert once == again
        assert once != other
        assert all(0 <= token < SLIDES.vocab_size for row in once for token in row)

    def test_differ_between_rows_and_follow_the_filtered_probabilities(self):
        count = 2000
        chosen = filters.chain(filters.temperature(1.5), filters.top_k(4))
        _, params = model(SLIDES)
        logits = naive.decode(SLIDES, params, PROMPTS[0])[-1] / 1.5
        weights = np.exp(logits - logits.max()) * (logits >= np.sort(logits)[-4])
        rows, _ = texts(SLIDES, [PROMPTS[0]] * count, new=1, choose=chosen)
        shares = np.bincount([row[0] for row in rows], minlength=SLIDES.vocab_size) / count
        probability = weights / weights.sum()
        deviation = np.sqrt(probability * (1 - probability) / count)
        assert (np.abs(shares - probability) <= 4 * deviation).all()
        assert (shares > 0).sum() > 1

    def test_are_penalised_for_what_the_row_holds_its_prompt_included(self):
        """So strong a penalty that a token comes back only once all others have been there.

        The padding before a shorter prompt, which is token 0, has not been there.
        """
        prompts = [[1, 2, 3, 4], PROMPTS[2]]
        chosen = filters.chain(lifted, filters.repetition_penalty(1e6), GREEDY)
        (row, _), _ = texts(SLIDES, prompts, new=SLIDES.vocab_size - 4, choose=chosen)
        assert sorted(prompts[0] + row) == list(range(SLIDES.vocab_size))


def lifted(logits, counts):
    """Makes all logits positive, so that a penalty makes them nearly zero."""
    return logits - jnp.min(logits, axis=-1, keepdims=True) + 1.0


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(UserError, match="one token"):
        texts(SLIDES, [[1], []])
