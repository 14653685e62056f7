"""A run is a folder: config, tokenizer, metrics, checkpoints, summary. Opened and read here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
import jax
import jax.numpy as jnp

from jaxdecoder.config import (
    Config,
    ConfigError,
    Difference,
    differences,
    from_dict,
    read_toml,
    to_toml,
)
from jaxdecoder.config.sections import MeshConfig
from jaxdecoder.data import tokenizers
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.decoder import Decoder
from jaxdecoder.errors import UserError, shell_word
from jaxdecoder.files import write_atomically
from jaxdecoder.training.checkpoints import restore_params, steps_in
from jaxdecoder.training.devices import is_first_host
from jaxdecoder.training.step import init_state, make_decoder
from jaxdecoder.typing import Params, Table

# What may differ when a run goes on: none of it changes a single bit of the result, but for the
# mesh, which rounds otherwise.
FREE = (
    "train.out",
    "train.keep",
    "train.tune",
    "train.history",
    "train.checkpoint_minutes",
    "train.watchdog_minutes",
    "train.tensorboard",
    "train.profile",
    "train.sample_prompt",
    "data.path",
    "data.cache",
    "data.processes",
    "data.tokenizer_path",
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    "distillation.teacher",
    "distillation.cached_most_gigabytes",
)

ANOTHER_FOLDER = "another folder (--train.out, or --out of ablate.py)"


class Model(NamedTuple):
    """A trained model, as commands take it."""

    config: Config
    decoder: Decoder
    params: Params
    tokenizer: tokenizers.Tokenizer
    step: int


def read_config(run: Path) -> Config:
    """Return the config that a run was made with."""
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: not a run folder, it has no config.toml")
    return from_dict(read_toml(run / "config.toml"), str(run / "config.toml"))


def load_model(run: str | Path, which: str | int = "best") -> Model:
    """Load a run's model at its `best` or `last` checkpoint, or at that of a step.

    A model that training makes sparse is not best before it is as sparse as it is to be.
    """
    run = Path(os.path.expanduser(run))
    config = read_config(run)
    tokenizer = tokenizers.load(run / "tokenizer.json")
    like = jax.eval_shape(partial(init_state, config)).params
    step, params = restore_params(run, like, which, since=config.compression.settles_at)
    params = jax.tree.map(jnp.asarray, params)
    return Model(config, make_decoder(config), params, tokenizer, step)


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep a second process out of a run folder; the system frees it when the process dies."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        acquired = filelock.FileLock(run / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{run}: another process is training in this folder; give {ANOTHER_FOLDER}"
        ) from None
    except OSError as error:
        raise UserError(f"{run}: {error.strerror}") from None
    with acquired:
        yield


def check_same_config(
    run: Path, config: Config, changeable: Sequence[str] = ()
) -> list[Difference]:
    """Refuse to go on with a run that was started with another config.

    `config` may still lack what the tokenizer and the shapes decide; those are taken over. Returns
    the differences in keys that are `changeable`.
    """
    if not has_results(run):
        return []
    theirs = read_config(run)
    known = config.model.vocab_size or theirs.model.vocab_size
    model = dataclasses.replace(config.model, vocab_size=known).resolve()
    different = [
        difference
        for difference in differences(theirs, dataclasses.replace(config, model=model))
        if difference.key not in FREE
    ]
    if refused := [difference for difference in different if difference.key not in changeable]:
        listed = "\n  ".join(map(str, refused))
        raise UserError(
            f"{run}: this run was started with another config:\n  {listed}\n"
            f"Give {ANOTHER_FOLDER}, or the values it was started with. "
            f"To start another run from its weights: --train.init-from {shell_word(run)}"
        )
    return different


def check_beginning(config: Config) -> None:
    """Refuse what cannot be drawn at random and work; weights that are there are not asked.

    Raises:
        ConfigError: if embeddings of N(0, 1) would be the head, whose first loss is tens of nats.
    """
    c = config.model
    if c.tie_embeddings and c.initializer == "uniform_fan_in":
        raise ConfigError(
            "model.initializer",
            c.initializer,
            "embeddings of N(0, 1) would be a head that is far too sure at first, because "
            'model.tie_embeddings = true; set that to false, or use "scaled" or "normal"',
        )


def check_same_corpus(run: Path, key: str) -> None:
    """Refuse to go on with other text or another tokenizer; `key` stands for both."""
    noted = run / "corpus_key"
    if noted.exists() and has_results(run) and noted.read_text() != key:
        raise UserError(
            f"{run}: the corpus or the tokenizer is not the one that this run was started with, "
            f"though the config is the same; give {ANOTHER_FOLDER}, or the text it had"
        )


def has_results(run: Path) -> bool:
    """Return whether there is something to lose: a checkpoint, or a summary without one."""
    checkpoints, summary = run / "checkpoints", run / "summary.json"
    return (run / "config.toml").exists() and (bool(steps_in(checkpoints)) or summary.exists())


def check_same_model(config: Config, theirs: Config) -> None:
    """Refuse to start from the weights of a model that computes something else."""
    free = ["dropout", "attention_implementation", "initializer", "init_std", "remat"]
    if config.model.position != "learned":
        free.append("context_length")
    if not config.model.packed and not theirs.model.packed:
        # Float weights, rounded where they are used or not.
        free += [name for name in vars(config.model) if name.startswith("weight_")]
        free.append("activation_format")
    adopted = {name: getattr(config.model, name) for name in free}
    model = dataclasses.replace(theirs.model, **adopted)
    different = differences(dataclasses.replace(config, model=model), config)
    if different:
        listed = "\n  ".join(map(str, different))
        raise UserError(
            f"train.init_from = {config.train.init_from}: its weights are those of another "
            f"model:\n  {listed}"
        )


def with_source_tokenizer(config: Config) -> Config:
    """Return the config with the tokenizer of the run that it starts from, if it does from one."""
    if not config.train.init_from or config.data.tokenizer_path:
        return config
    # The weights know its tokens and no others.
    path = str(Path(config.train.init_from) / "tokenizer.json")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer_path=path))


def source_params(config: Config) -> Params:
    """Return the weights of the run that this one starts from.

    Raises:
        UserError: if they are those of another model.
    """
    source = load_model(config.train.init_from)
    check_same_model(config, source.config)
    return source.params


def complete(config: Config, corpus: Corpus) -> Config:
    """Return the config with what the tokenizer and the shapes decide filled in."""
    entries = corpus.tokenizer.vocab_size
    known = config.model.vocab_size or entries
    model = dataclasses.replace(config.model, vocab_size=known).resolve()
    if model.vocab_size < entries:
        raise ConfigError(
            "model.vocab_size",
            model.vocab_size,
            f"the tokenizer has {entries} entries; leave it out",
        )
    return dataclasses.replace(config, model=model)


def begin(config: Config, corpus: Corpus) -> None:
    """Write what a run has from its start: its complete config, its tokenizer, its corpus' key."""
    if is_first_host():
        run = Path(config.train.out)
        run.mkdir(parents=True, exist_ok=True)
        write_atomically(run / "config.toml", to_toml(config))
        write_atomically(run / "corpus_key", corpus.key)
        tokenizers.save(corpus.tokenizer, run / "tokenizer.json")


def write_summary(run: Path, summary: Table) -> None:
    """Write summary.json."""
    write_atomically(run / "summary.json", json.dumps(summary, indent=2) + "\n")
