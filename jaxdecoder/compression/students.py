"""Who learns: a config's fresh student, one that starts from its teacher's layers, or a run."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecoder.compression.options import Distill
from jaxdecoder.compression.passes import corpus_of
from jaxdecoder.config import (
    Config,
    ConfigError,
    DistillationConfig,
    ModelConfig,
    differences,
    load,
    read_toml,
)
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.data.tokens import prepare
from jaxdecoder.errors import UserError
from jaxdecoder.layers import serial
from jaxdecoder.training.loop import complete
from jaxdecoder.training.runs import Model, load_model
from jaxdecoder.training.step import init_state


class Student(NamedTuple):
    """A student before its first lesson."""

    config: Config
    params: Any
    start: str
    """Where its weights come from, in words."""


def student_of(options: Distill, teacher: Model) -> Student:
    """The student that the options name. The teacher's data section names its tokenizer.json.

    Raises:
        UserError: for a student that this teacher cannot teach.
    """
    path = Path(options.student)
    return (_of_run if path.is_dir() else _of_toml)(path, options, teacher)


def check_pair(config: Config, teacher: Model, where: str) -> None:
    """Refuses models whose next tokens cannot be held against one another.

    Raises:
        ConfigError: if the vocabularies differ in size, or the teacher sees fewer tokens.
    """
    model, theirs = config.model, teacher.config.model
    if model.vocab_size != theirs.vocab_size:
        raise ConfigError(
            "model.vocab_size",
            model.vocab_size,
            f"in {where}; the teacher's is {theirs.vocab_size}, which leaving it out would give",
        )
    if model.context_length > theirs.context_length:
        raise ConfigError(
            "model.context_length",
            model.context_length,
            f"in {where}; the teacher sees {theirs.context_length} tokens, which is the most",
        )


def check_tokenizers(mine: Tokenizer, theirs: Tokenizer, student: str, teacher: str) -> None:
    """Refuses a student whose tokens mean something else.

    Raises:
        UserError: with both tokenizers, and what would do.
    """
    if (mine.vocabulary, mine.end_token) == (theirs.vocabulary, theirs.end_token):
        return

    def told(tokenizer: Tokenizer) -> str:
        return f"{tokenizer.name} of {tokenizer.vocab_size:,} entries"

    same = told(mine) == told(theirs)
    raise UserError(
        f"{student}: its tokenizer is not the teacher's: {told(mine)} there, {told(theirs)} in "
        f"{teacher}{', but other ones' if same else ''}; leave [data] out of the student's config, "
        f'or give data.tokenizer_path = "{teacher}/tokenizer.json"'
    )


def _of_run(path: Path, options: Distill, teacher: Model) -> Student:
    """A run goes on from its weights, on its own corpus."""
    if options.start_from_teacher:
        raise UserError(
            f"--start-from-teacher: {path} is a run, which starts from its own weights; leave it "
            "out, or give a config"
        )
    model = load_model(path)
    check_tokenizers(model.tokenizer, teacher.tokenizer, str(path), options.teacher)
    whole = [leaf for leaf in jax.tree.leaves(model.params) if not _trains(leaf)]
    if whole:
        raise UserError(
            f"{path}: has weights of {whole[0].dtype}, which no gradient moves; distil first, "
            "and quantize what comes of it"
        )
    config = _taught(corpus_of(model, path)[0], options)
    check_pair(config, teacher, str(path))
    return Student(config, model.params, f"the weights of {path}")


def _of_toml(path: Path, options: Distill, teacher: Model) -> Student:
    """A config's weights are fresh, but for what is taken from the teacher."""
    config = load(path)
    if config.train.init_from:
        raise UserError(
            f"{path}: train.init_from: to start from a run's weights, give the run as the student"
        )
    if config.distillation != DistillationConfig():
        raise UserError(
            f"{path}: [distillation]: give these as options; see python compress.py distill --help"
        )
    data = config.data if "data" in read_toml(path) else teacher.config.data
    corpus = prepare(data)
    check_tokenizers(corpus.tokenizer, teacher.tokenizer, str(path), options.teacher)
    model = config.model
    if model.vocab_size is None:
        model = replace(model, vocab_size=teacher.config.model.vocab_size)
    config = complete(_taught(replace(config, model=model, data=data), options), corpus)
    check_pair(config, teacher, str(path))
    # Compiled as in train.py, so that the bits are those of the student that learns alone.
    params = jax.jit(partial(init_state, config))().params
    if not options.start_from_teacher:
        return Student(config, params, "fresh weights")
    return Student(config, *start_from(teacher, config.model, params))


def _taught(config: Config, options: Distill) -> Config:
    """The config with what the options say of its training and its teacher."""
    train, optimizer = config.train, config.optimizer
    if options.steps is not None:
        train = replace(train, steps=options.steps)
    if options.seed is not None:
        train = replace(train, seed=options.seed)
    if not train.steps:
        raise UserError(f"{options.student}: train.steps = 0; say how many steps, as --steps 1000")
    if options.learning_rate is not None:
        optimizer = optimizer.peaking_at(options.learning_rate)
    how = {item.name: getattr(options.how, item.name) for item in dataclasses.fields(options.how)}
    distillation = DistillationConfig(**how, teacher=options.teacher)
    return replace(config, train=train, optimizer=optimizer, distillation=distillation)


def _trains(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating)) and leaf.dtype.itemsize >= 2


# --- From the teacher's layers --------------------------------------------------------------------

FREE = (
    "n_layers",
    "dropout",
    "context_length",
    "attention_implementation",
    "initializer",
    "init_std",
    "remat",
    "exit_minimum",
    "exit_every",
    "exit_confidence",
    "exit_threshold",
    "exit_loss_power",
    "mod_capacity",
    "mod_loss_weight",
)
"""Fields in which a student may differ from the teacher whose layers it starts from."""


def start_from(teacher: Model, student: ModelConfig, params: Any) -> tuple[Any, str]:
    """Weights for `student`, shaped as `params`, from some of the teacher's layers; and in words.

    Everything outside the blocks is taken as it is; of learned positions, the first. The blocks are
    evenly spaced, first and last among them (DistilBERT takes every other one, arXiv 1910.01108),
    each of the same kind as the student's in its place.

    Raises:
        UserError: with every reason why the teacher's layers do not fit.
    """
    theirs, student = teacher.config.architecture, student.resolve()
    reasons = _reasons(theirs, student)
    chosen = [] if reasons else chosen_layers(theirs, student)
    if isinstance(chosen, str):
        reasons, chosen = [chosen], []
    if reasons:
        listed = "\n  ".join(reasons)
        raise UserError(
            f"--start-from-teacher: the teacher's layers do not fit into this student:\n  {listed}"
        )
    taken = _taken(teacher.params, theirs, student, chosen)

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    if shapes(taken) != shapes(params):
        raise UserError(
            "--start-from-teacher: the teacher's weights are stored in another form than those of "
            "a model that trains; start from the run that it was made of"
        )
    listed = ", ".join(str(number + 1) for number in chosen)
    one = "block" if len(chosen) == 1 else "blocks"
    words = f"{one} {listed} of the teacher's {theirs.n_layers}, and all that is not in blocks"
    return taken, words


def chosen_layers(teacher: ModelConfig, student: ModelConfig) -> list[int] | str:
    """Of the teacher's blocks those to take, counted from 0; or why there are none.

    For each of the student's, the one nearest to an even spacing that is of the same kind (the
    attention, the router) and leaves enough above it for the others.
    """
    kinds, wanted = (serial.turn(c) * serial.periods(c) for c in (teacher, student))
    if len(wanted) > len(kinds):
        return f"model.n_layers: {len(kinds)} there, {len(wanted)} here; at most {len(kinds)} fit"
    chosen: list[int] = []
    for place, ideal in enumerate(np.linspace(0, len(kinds) - 1, len(wanted))):
        last = len(kinds) - (len(wanted) - place)
        fits = [
            number
            for number in range(chosen[-1] + 1 if chosen else 0, last + 1)
            if kinds[number] == wanted[place]
        ]
        if not fits:
            return f"no {wanted[place][0]} block is left for the student's block {place + 1}"
        chosen.append(min(fits, key=lambda number: abs(number - ideal)))
    return chosen


def _reasons(teacher: ModelConfig, student: ModelConfig) -> list[str]:
    """Why no layer of the teacher fits, whichever it is."""
    if teacher.layout != "serial" or student.layout != "serial":
        return ['model.layout: layers can be left out of "serial" only']
    adopted = {name: getattr(student, name) for name in FREE}
    if {teacher.depth, student.depth} <= {"fixed", "early_exit"}:
        adopted["depth"] = student.depth  # their weights are the same
    # The pattern is held to block by block.
    adopted["attention"] = student.attention
    adopted["mod_every"] = student.mod_every
    same_depth = replace(teacher, **adopted)
    return differences(Config(model=same_depth), Config(model=student))


def _taken(params: Any, teacher: ModelConfig, student: ModelConfig, chosen: list[int]) -> Any:
    """The teacher's weights with the chosen blocks alone."""
    length = len(serial.turn(teacher))
    blocks = [
        jax.tree.map(lambda x, at=number // length: x[at], params["body"]["blocks"])[
            f"block_{number % length}"
        ]
        for number in chosen
    ]
    length = len(serial.turn(student))
    stacked = {
        f"block_{i}": jax.tree.map(lambda *x: jnp.stack(x), *blocks[i::length])
        for i in range(length)
    }
    body = {**params["body"], "blocks": stacked}
    taken = {**params, "body": body}
    if student.position == "learned":
        rows = params["positions"]["embedding"][: student.context_length]
        taken["positions"] = {**params["positions"], "embedding": rows}
    return taken
