"""Distillation: a student learns a teacher's predictions of every next token (arXiv 1503.02531).

Teacher and student are any two decoders with one tokenizer. The teacher runs inside the jitted
step, with its weights beside the state, or its answers come from disk. The loss is a function of
the config alone, so that an interrupted run continues with the same losses.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxdecoder.compression import answers, matching
from jaxdecoder.compression.divergences import DIVERGENCES, at_once, over_time, soften
from jaxdecoder.compression.on_policy import sampled_or_not
from jaxdecoder.compression.options import Distill
from jaxdecoder.compression.passes import Made, run_pass
from jaxdecoder.compression.students import check_pair, check_tokenizers, student_of
from jaxdecoder.config import Config, ConfigError, from_dict, to_dict
from jaxdecoder.data.tokenizers import Tokenizer
from jaxdecoder.data.tokens import Corpus, prepare
from jaxdecoder.decoder import Decoder
from jaxdecoder.errors import UserError
from jaxdecoder.kernels.device import current_device
from jaxdecoder.sampling.generate import show_sample
from jaxdecoder.training.runs import Model, load_model
from jaxdecoder.training.step import Objective, compute_dtype, make_decoder, next_token
from jaxdecoder.typing import Params, Table


def distill(options: Distill, command: str) -> Table:
    """Make the run `options.new_run`, or continue it; return its summary."""
    return run_pass(
        options.teacher,
        options.new_run,
        command,
        functools.partial(first_lesson, options),
        sampler=show_sample,
        objective=objective,
        takes_packed=True,
    )


def first_lesson(options: Distill, teacher: Model, corpus: Corpus) -> Made:
    """Return the student of the options before it learns, with its config."""
    student = student_of(options, teacher)
    # Check it like a file: mistakes are refused before anything is written.
    config = from_dict(to_dict(student.config), "command line")
    config = _known_by(config, digest(teacher.params))
    check(config, teacher)
    print(f"the student starts from {student.start}")
    notes = {"teacher": options.teacher, "student": options.student, "start": student.start}
    return Made(config, student.params, notes)


# --- The loss -------------------------------------------------------------------------------------


class Answered(NamedTuple):
    """A batch with the teacher's answers to it."""

    inputs: Any
    targets: Any
    weights: Any
    answers: answers.Answers


def objective(config: Config) -> Objective:
    """Return what a run minimises: the teacher's lesson, or without a teacher the usual loss.

    Raises:
        UserError: if the teacher is not the one that the run began with, or cannot teach it.
    """
    d = config.distillation
    if not d.teacher:
        return next_token(config)
    corpus = prepare(config.data)
    if not d.cached_top_k:
        teacher = teacher_of(config, corpus)
        decoder = teacher.decoder.clone(dtype=compute_dtype(config))
        return Objective(lesson(config, corpus.tokenizer, decoder), teacher.params)
    if not d.teacher_digest:
        config = _known_by(config, digest(teacher_of(config, corpus).params))
    answers_to = answers.feeding(config, corpus, functools.partial(teacher_of, config, corpus))

    def feed(stacked: Any, step: int, rows: slice) -> Answered:
        said = answers_to(step, len(stacked.inputs), rows)
        return Answered(stacked.inputs, stacked.targets, stacked.weights, said)

    return Objective(lesson(config, corpus.tokenizer, None), feed=feed)


def lesson(
    config: Config, tokenizer: Tokenizer, teacher: Decoder | None
) -> Callable[[Any, Any, jax.Array, Any], Float[Array, ""]]:
    """Return the loss of a batch, see `Objective`; its `constants` are the teacher's weights.

    The loss of a token is alpha times the divergence from the teacher, plus 1 - alpha times the
    cross-entropy of the true next token, summed over all exits with their shares. The student's
    variants and the matching may add terms. A text that the student sampled has no true next token,
    so its loss is the divergence. Without a `teacher`, the batch has the teacher's answers.
    """
    d, student = config.distillation, make_decoder(config)
    temperature, divergence = d.temperature, DIVERGENCES[d.divergence]
    padded = config.data.mode == "padded" and config.data.end_of_text
    end_token = tokenizer.end_token if padded else None

    def loss(params: Params, batch: Any, key: jax.Array, constants: Any) -> Float[Array, ""]:
        tokens, weights = batch.inputs, batch.weights
        soft: Any = d.alpha
        hard: Any = 1.0 - d.alpha
        if d.on_policy:
            tokens, weights, sampled = sampled_or_not(
                student,
                params,
                batch,
                jax.random.fold_in(key, 1),
                share=d.on_policy,
                prompt=prompt_of(config),
                entries=tokenizer.vocab_size,
                end_token=end_token,
            )
            soft, hard = jnp.where(sampled, 1.0, soft), jnp.where(sampled, 0.0, hard)
        training: Table = {"dropout": config.model.dropout, "rngs": {"dropout": key}}
        passed, mine = look(student, params, tokens, method="passed", **training)
        said, theirs = (
            (batch.answers, [])
            if teacher is None
            else look(teacher, constants, tokens, method="features")
        )

        def judge(said: Any) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
            """Return the teacher's log-probabilities, and a function to the student's for them."""
            if teacher is None:
                return answers.told(said), lambda own: answers.outcomes(own, said.tokens)
            logits: Any = teacher.apply({"params": constants}, said, method="logits")
            return soften(logits, temperature), lambda own: own

        def mixed(part: Any) -> jax.Array:
            heads, said, targets = part
            theirs, same = judge(said)
            total = jnp.zeros(targets.shape, jnp.float32)
            for (share, _), features in zip(passed.heads, heads, strict=True):
                logits: Any = student.apply({"params": params}, features, method="logits")
                ours = same(soften(logits, temperature))
                apart = temperature**2 * divergence(ours, theirs, d.jensen_shannon_beta)
                own = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
                total += share * (soft * apart + hard * own)
            return total

        chunk = at_once(len(tokens), student.architecture.vocab_size, current_device().platform)
        heads = [features for _, features in passed.heads]
        losses = over_time(mixed, (heads, said, batch.targets), chunk) + passed.penalty
        if d.matching != "none":
            there = (weights > 0).astype(jnp.float32)
            matched = matching.MATCHINGS[d.matching](mine, theirs, there, d)
            losses += d.matching_weight * matched
        return jnp.sum(losses * weights)

    def look(decoder: Decoder, *args: Any, **kwargs: Any) -> tuple[Any, list[matching.Outputs]]:
        if d.matching != "none":
            return matching.looking(decoder, *args, **kwargs)
        params, *others = args
        return decoder.apply({"params": params}, *others, **kwargs), []

    return loss


def prompt_of(config: Config) -> int:
    """Return the number of tokens that a sampling student starts from."""
    return config.distillation.on_policy_prompt or max(1, config.model.context_length // 4)


# --- The teacher ----------------------------------------------------------------------------------


def teacher_of(config: Config, corpus: Corpus) -> Model:
    """Load the teacher of a run.

    Raises:
        UserError: if its weights are not those that the run began with, or it cannot teach the run.
    """
    d, where = config.distillation, config.train.out
    teacher = load_model(d.teacher)
    if d.teacher_digest not in ("", digest(teacher.params)):
        raise UserError(
            f"{where}: distillation.teacher = {d.teacher}: its weights are not those that this "
            "student began to learn from; put them back, or give another folder for a new run"
        )
    check_tokenizers(corpus.tokenizer, teacher.tokenizer, where, d.teacher)
    check_pair(config, teacher, where)
    check(config, teacher)
    return teacher


def check(config: Config, teacher: Model) -> None:
    """Refuse a lesson that is impossible with these two models.

    Raises:
        ConfigError: with the key and a possible value.
    """
    d, model = config.distillation, config.architecture
    matching.check(config, teacher.config.architecture)
    entries = model.vocab_size
    if d.cached_top_k >= entries:
        raise ConfigError(
            "distillation.cached_top_k",
            d.cached_top_k,
            f"the vocabulary has {entries} entries, and one at least must be left to be the rest; "
            f"{min(32, entries - 1)} would do",
        )
    prompt = prompt_of(config)
    if d.on_policy and prompt >= model.context_length:
        raise ConfigError(
            "distillation.on_policy_prompt",
            prompt,
            f"nothing is left to sample of model.context_length = {model.context_length}; "
            f"{max(1, model.context_length // 4)} would do",
        )


def digest(params: Params) -> str:
    """Hash weights: all their names, shapes and bytes."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()[:32]


def _known_by(config: Config, known: str) -> Config:
    return replace(config, distillation=replace(config.distillation, teacher_digest=known))
