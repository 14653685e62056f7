"""Judge the stories that a run tells by the grammar that its corpus comes from.

    python -m benchmarks.stories runs/stories [--stories 100 --temperature 0.4 --show 3]
    python -m benchmarks.stories runs/stories --ngram 5   # an n-gram model of the same tokens
    python -m benchmarks.stories                          # the grammar's own stories: all 100%

It prints three shares: of the sentences that the grammar could have said, of the stories whose cast
is steady, and of those that come to their end (`benchmarks.story_grammar` says what each means).
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.story_grammar import Verdict, listen
from jaxdecoder.config import DataConfig
from jaxdecoder.data.stories import tell_story, world_of
from jaxdecoder.data.tokens import prepare
from jaxdecoder.sampling import filters
from jaxdecoder.sampling.generate import encode_prompt, generate
from jaxdecoder.training.runs import Model, load_model, read_config

LONGEST = 500
"""Tokens after which a story is taken to have no end."""
AT_ONCE = 50
"""Stories told side by side."""

Told = tuple[str, bool]
"""A story, and whether it stopped by itself."""


def told_by_model(
    model: Model, prompt: str, count: int, temperature: float, seed: int
) -> Iterator[Told]:
    """Stories sampled from a run."""
    tokenizer = model.tokenizer
    start = encode_prompt(tokenizer, prompt, model.config.data)
    choose = filters.chain(filters.first(tokenizer.vocab_size), filters.temperature(temperature))
    for first in range(0, count, AT_ONCE):
        rows: list[list[int]] = [[] for _ in range(min(AT_ONCE, count - first))]
        key = jax.random.fold_in(jax.random.key(seed), first)
        chunks = generate(
            model.decoder,
            model.params,
            [start] * len(rows),
            max_new_tokens=LONGEST,
            key=key,
            choose=choose,
            end_token=tokenizer.end_token,
        )
        for chunk in chunks:
            for row, fresh in zip(rows, chunk, strict=True):
                row += fresh
        for row in rows:
            yield prompt + tokenizer.decode(row), len(row) < LONGEST


class NGram:
    """An n-gram model, all orders interpolated by Witten and Bell's method (1991)."""

    def __init__(self, tokens: Sequence[int], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for end in range(order - 1, len(tokens)):
            for length in range(order):
                self.counts[tuple(tokens[end - length : end])][tokens[end]] += 1

    def probabilities(self, past: Sequence[int]) -> np.ndarray:
        """The distribution of the next token, float64 (vocab_size,)."""
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for length in range(min(self.order, len(past) + 1)):
            seen = self.counts.get(tuple(past[len(past) - length :]))
            if seen:
                p *= len(seen)
                p[list(seen)] += list(seen.values())
                p /= p.sum()
        return p


def told_by_ngrams(
    data: DataConfig, order: int, prompt: str, count: int, temperature: float, seed: int
) -> Iterator[Told]:
    """Stories sampled from an n-gram model of a corpus's training tokens."""
    corpus = prepare(data)
    tokenizer = corpus.tokenizer
    ngrams = NGram(corpus.train.tokens.tolist(), order, tokenizer.vocab_size)
    rng = np.random.default_rng(seed)
    start = encode_prompt(tokenizer, prompt, data)
    for _ in range(count):
        row, ended = list(start), False
        while not ended and len(row) < len(start) + LONGEST:
            p = ngrams.probabilities(row) ** (1 / temperature)
            row.append(int(rng.choice(len(p), p=p / p.sum())))
            ended = row[-1] == tokenizer.end_token
        yield tokenizer.decode(row[1 : len(row) - ended]), ended


def told_by_the_grammar(data: DataConfig, count: int, seed: int) -> Iterator[Told]:
    """Stories of the corpus itself, though none that the checker has heard."""
    rng = random.Random(f"told {seed}")
    for _ in range(count):
        yield tell_story(rng, world_of(data)).text, True


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The three shares, of 1."""
    sentences = sum(verdict.sentences for verdict in verdicts)
    return {
        "well_formed": sum(verdict.well_formed for verdict in verdicts) / max(1, sentences),
        "steady": float(np.mean([verdict.steady for verdict in verdicts])),
        "ended": float(np.mean([verdict.ended for verdict in verdicts])),
    }


def main() -> None:
    """Tells, judges, prints."""
    parser = argparse.ArgumentParser(description="Judge told stories by their grammar.")
    parser.add_argument("run", nargs="?", help="run folder; without: the grammar's own stories")
    parser.add_argument("--ngram", type=int, help="tell by n-grams of the run's training tokens")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.4)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="print so many stories, verdicts too")
    options = parser.parse_args()
    sampled = (options.prompt, options.stories, options.temperature, options.seed)
    data = DataConfig() if options.run is None else read_config(Path(options.run)).data
    if options.run is None:
        told = told_by_the_grammar(data, options.stories, options.seed)
    elif options.ngram:
        told = told_by_ngrams(data, options.ngram, *sampled)
    else:
        told = told_by_model(load_model(options.run), *sampled)
    grammar = listen(world_of(data))
    verdicts = []
    for text, ended in told:
        verdicts.append(grammar.judge(text, finished=ended))
        if len(verdicts) <= options.show:
            print(f"{text}\n--- {json.dumps(verdicts[-1]._asdict())}\n")
    print(json.dumps({"stories": len(verdicts), **shares(verdicts)}))


if __name__ == "__main__":
    main()
