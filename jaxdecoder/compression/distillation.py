"""Distillation: a student learns what a teacher says of every next token (arXiv 1503.02531).

The two are any decoders of one tokenizer. The teacher runs within the jitted step, its weights held
beside the state, or its answers come from disk. What is minimised is a function of the config
alone, so that a run that was cut short goes on with the same losses.
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


def distill(options: Distill, command: str) -> dict[str, Any]:
    """Makes the run `options.new_run`, or goes on with it; returns its summary."""
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
    """The student that the options name as it is before it learns, and its config."""
    student = student_of(options, teacher)
    # As if from a file: what cannot be is refused before anything is written.
    config = from_dict(to_dict(student.config), "command line")
    config = _known_by(config, digest(teacher.params))
    check(config, teacher)
    print(f"the student starts from {student.start}")
    notes = {"teacher": options.teacher, "student": options.student, "start": student.start}
    return Made(config, student.params, notes)


# --- What is minimised ----------------------------------------------------------------------------


class Answered(NamedTuple):
    """A batch with the teacher's answers to it."""

    inputs: Any
    targets: Any
    weights: Any
    answers: answers.Answers


def objective(config: Config) -> Objective:
    """What a run minimises: its teacher's lesson, or where it has no teacher the next token.

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
    """The loss of a batch, see `Objective`: what is held are the teacher's weights.

    Every token's is alpha times its divergence from the teacher and 1 - alpha times the
    cross-entropy of the true next token, at all exits in their shares, and what else the student's
    variants and the matching add. Of a text that the student sampled there is no true next token:
    its loss is the divergence. Without a `teacher` the batch has its answers.
    """
    d, student = config.distillation, make_decoder(config)
    temperature, divergence = d.temperature, DIVERGENCES[d.divergence]
    padded = config.data.mode == "padded" and config.data.end_of_text
    end_token = tokenizer.end_token if padded else None

    def loss(params: Any, batch: Any, key: jax.Array, held: Any) -> Float[Array, ""]:
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
        training: dict[str, Any] = {"dropout": config.model.dropout, "rngs": {"dropout": key}}
        passed, mine = look(student, params, tokens, method="passed", **training)
        said, theirs = (
            (batch.answers, [])
            if teacher is None
            else look(teacher, held, tokens, method="features")
        )

        def judge(said: Any) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
            """The teacher's log-probabilities, and the student's of the same outcomes."""
            if teacher is None:
                return answers.told(said), lambda own: answers.outcomes(own, said.tokens)
            logits: Any = teacher.apply({"params": held}, said, method="logits")
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

    def look(decoder: Decoder, *args: Any, **kwargs: Any) -> tuple[Any, list[matching.Layer]]:
        if d.matching != "none":
            return matching.looking(decoder, *args, **kwargs)
        params, *others = args
        return decoder.apply({"params": params}, *others, **kwargs), []

    return loss


def prompt_of(config: Config) -> int:
    """Tokens that a student goes on from when it samples."""
    return config.distillation.on_policy_prompt or max(1, config.model.context_length // 4)


# --- The teacher ----------------------------------------------------------------------------------


def teacher_of(config: Config, corpus: Corpus) -> Model:
    """The teacher of a run, which must be the one that it began with."""
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
    """Refuses a lesson that these two models cannot have.

    Raises:
        ConfigError: with the key, and what would do.
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


def digest(params: Any) -> str:
    """What weights are known by: a hash of all their names, shapes and bytes."""
    whole = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        whole.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        whole.update(array.tobytes())
    return whole.hexdigest()[:32]


def _known_by(config: Config, known: str) -> Config:
    return replace(config, distillation=replace(config.distillation, teacher_digest=known))
