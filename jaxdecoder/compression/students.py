"""Make the student: a new model from a config, one from its teacher's layers, or a run."""

from __future__ import annotations

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
from jaxdecoder.layers import serial, tree
from jaxdecoder.training.runs import Model, complete, load_model
from jaxdecoder.training.step import init_state
from jaxdecoder.typing import Params


class Student(NamedTuple):
    """A student before its first lesson."""

    config: Config
    params: Params
    start: str
    """Where its weights come from, as text."""


def student_of(options: Distill, teacher: Model) -> Student:
    """Return the student of the options. The teacher's data section must name its tokenizer.json.

    Raises:
        UserError: for a student that this teacher cannot teach.
    """
    path = Path(options.student)
    return (_of_run if path.is_dir() else _of_toml)(path, options, teacher)


def check_pair(config: Config, teacher: Model, where: str) -> None:
    """Refuse models whose predictions cannot be compared.

    Raises:
        ConfigError: if the vocabularies differ in size, or the teacher's context is shorter.
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
    """Refuse a student with another tokenizer than the teacher's.

    Raises:
        UserError: with both tokenizers, and a remedy.
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
    """Make a student from a run: it starts from the run's weights, on the run's corpus."""
    if options.start_from_teacher:
        raise UserError(
            f"--start-from-teacher: {path} is a run, which starts from its own weights; leave it "
            "out, or give a config"
        )
    model = load_model(path)
    check_tokenizers(model.tokenizer, teacher.tokenizer, str(path), options.teacher)
    kinds = [leaf.dtype for leaf in jax.tree.leaves(model.params)]
    fixed = [x for x in kinds if not jnp.issubdtype(x, jnp.floating) or x.itemsize < 2]
    if fixed:
        raise UserError(
            f"{path}: has weights of {fixed[0]}, which no gradient moves; distil first, "
            "and quantize what comes of it"
        )
    config = _taught(corpus_of(model, path)[0], options)
    check_pair(config, teacher, str(path))
    return Student(config, model.params, f"the weights of {path}")


def _of_toml(path: Path, options: Distill, teacher: Model) -> Student:
    """Make a student from a config: its weights are new, or come from the teacher's layers."""
    config = load(path, {} if options.steps is None else {"train.steps": options.steps})
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
    # Compiled as in train.py, so that the weights equal those of a student without a teacher.
    params = jax.jit(partial(init_state, config))().params
    if not options.start_from_teacher:
        return Student(config, params, "fresh weights")
    return Student(config, *start_from(teacher, config.model, params))


def _taught(config: Config, options: Distill) -> Config:
    """Return the config with the options' training settings and teacher."""
    train, optimizer = config.train, config.optimizer
    if options.steps is not None:
        train = replace(train, steps=options.steps)
    if options.seed is not None:
        train = replace(train, seed=options.seed)
    if not train.steps:
        raise UserError(f"{options.student}: train.steps = 0; say how many steps, as --steps 1000")
    if options.learning_rate is not None:
        optimizer = optimizer.peaking_at(options.learning_rate)
    distillation = DistillationConfig(**vars(options.how), teacher=options.teacher)
    return replace(config, train=train, optimizer=optimizer, distillation=distillation)


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


def start_from(teacher: Model, student: ModelConfig, params: Params) -> tuple[Params, str]:
    """Return weights for `student` from some of the teacher's layers, and a description of them.

    They have the shapes of `params`. Everything outside the blocks is copied (of learned positions,
    the first ones). The blocks are evenly spaced and include the first and the last (DistilBERT
    takes every other one, arXiv 1910.01108). Each block is of the same kind as the student's at its
    place.

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
    blocks = tree.blocks(teacher.params[tree.BODY])
    own = [blocks[number] for number in chosen]
    taken = tree.with_blocks(teacher.params, own, len(serial.turn(student)))
    if student.position == "learned":
        rows = tree.at(taken, tree.POSITIONS)[: student.context_length]
        taken = tree.replaced(taken, {tree.POSITIONS: rows})

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
    """Return which of the teacher's blocks to take, counted from 0; or a reason why none fit.

    For each block of the student, it is the block nearest to an even spacing that is of the same
    kind (attention, router) and leaves enough blocks above it for the rest.
    """
    kinds, wanted = (serial.turn(c) * serial.n_turns(c) for c in (teacher, student))
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
    """Return the reasons why no layer of the teacher fits."""
    if teacher.layout != "serial" or student.layout != "serial":
        return ['model.layout: layers can be left out of "serial" only']
    adopted = {name: getattr(student, name) for name in FREE}
    if {teacher.depth, student.depth} <= {"fixed", "early_exit"}:
        adopted["depth"] = student.depth  # their weights are the same
    # The pattern of blocks is compared block by block, in `chosen_layers`.
    adopted["attention"] = student.attention
    adopted["mod_every"] = student.mod_every
    same_depth = replace(teacher, **adopted)
    return [str(found) for found in differences(Config(model=same_depth), Config(model=student))]
