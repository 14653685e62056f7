"""A run is a folder: config, tokenizer, metrics, checkpoints, summary. Opened and read here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp

from jaxdecoder.config import Config, differences, from_dict, read_toml, to_toml
from jaxdecoder.data import tokenizers
from jaxdecoder.decoder import Decoder
from jaxdecoder.errors import UserError
from jaxdecoder.files import write_atomically
from jaxdecoder.training.checkpoints import restore_params, steps_in
from jaxdecoder.training.step import init_state, make_decoder
from jaxdecoder.typing import Params

# What may differ when a run goes on: none of it changes a single bit of the result.
FREE = (
    "train.out",
    "train.keep",
    "train.tensorboard",
    "train.sample_prompt",
    "data.path",
    "data.cache",
    "data.processes",
    "data.tokenizer_path",
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
    """The config a run was made with."""
    if not (run / "config.toml").is_file():
        raise UserError(f"{run}: not a run folder, it has no config.toml")
    return from_dict(read_toml(run / "config.toml"), str(run / "config.toml"))


def load_model(run: str | Path, which: str | int = "best") -> Model:
    """A run's model at its `best` or `last` checkpoint, or at that of a step.

    A model that training makes sparse is not best before it is as sparse as it is to be.
    """
    run = Path(run)
    config = read_config(run)
    tokenizer = tokenizers.load(run / "tokenizer.json")
    like = jax.eval_shape(partial(init_state, config)).params
    step, params = restore_params(run, like, which, since=config.compression.settles_at)
    params = jax.tree.map(jnp.asarray, params)
    return Model(config, make_decoder(config), params, tokenizer, step)


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keeps a second process out of a run folder; the system frees it when the process dies."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(run / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{run}: another process is training in this folder; give {ANOTHER_FOLDER}"
        ) from None
    except OSError as error:
        raise UserError(f"{run}: {error.strerror}") from None
    with held:
        yield


def check_same_config(run: Path, config: Config) -> None:
    """Refuses to go on with a run that was started with another config.

    `config` may still lack what the tokenizer and the shapes decide; those are taken over.
    """
    if not _has_results(run):
        return
    theirs = read_config(run)
    known = config.model.vocab_size or theirs.model.vocab_size
    model = dataclasses.replace(config.model, vocab_size=known).resolve()
    different = [
        line
        for line in differences(theirs, dataclasses.replace(config, model=model))
        if line.split(":")[0] not in FREE
    ]
    if different:
        listed = "\n  ".join(different)
        raise UserError(
            f"{run}: this run was started with another config:\n  {listed}\n"
            f"Give {ANOTHER_FOLDER}, or the values it was started with"
        )


def check_same_corpus(run: Path, key: str) -> None:
    """Refuses to go on with other text or another tokenizer; `key` stands for both."""
    noted = run / "corpus_key"
    if noted.exists() and _has_results(run) and noted.read_text() != key:
        raise UserError(
            f"{run}: the corpus or the tokenizer is not the one that this run was started with, "
            f"though the config is the same; give {ANOTHER_FOLDER}, or the text it had"
        )


def _has_results(run: Path) -> bool:
    """Whether there is something to lose: a checkpoint, or the summary of a run without one."""
    checkpoints, summary = run / "checkpoints", run / "summary.json"
    return (run / "config.toml").exists() and (bool(steps_in(checkpoints)) or summary.exists())


def check_same_model(config: Config, theirs: Config) -> None:
    """Refuses to start from the weights of a model that computes something else."""
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
        listed = "\n  ".join(different)
        raise UserError(
            f"train.init_from = {config.train.init_from}: its weights are those of another "
            f"model:\n  {listed}"
        )


def write_config(run: Path, config: Config, corpus_key: str) -> None:
    """Writes the complete config, and what its corpus and tokenizer are known by."""
    write_atomically(run / "config.toml", to_toml(config))
    write_atomically(run / "corpus_key", corpus_key)


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json."""
    write_atomically(run / "summary.json", json.dumps(summary, indent=2) + "\n")
