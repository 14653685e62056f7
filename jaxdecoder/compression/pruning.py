"""Prune a run: set weights to zero or remove parts, then train to recover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxdecoder.compression.calibration import calibration_batches
from jaxdecoder.compression.importance import by_gates, influence
from jaxdecoder.compression.options import (
    ByCriterion,
    ByGates,
    Gradual,
    Groups,
    Part,
    Prune,
    SingleWeights,
)
from jaxdecoder.compression.parts import PARTS, going, kept
from jaxdecoder.compression.passes import Made, run_pass
from jaxdecoder.compression.sparsity import apply, mask, n_of_m, scores_by, zeros
from jaxdecoder.config import CompressionConfig, Config, ModelConfig, OptimizerConfig, differences
from jaxdecoder.config.fields import SEEDS
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.layers.tree import Matrices, body_matrices, replaced
from jaxdecoder.sampling.generate import show_sample
from jaxdecoder.training import runs
from jaxdecoder.training.checkpoints import steps_in
from jaxdecoder.training.devices import set_up
from jaxdecoder.training.runs import Model
from jaxdecoder.training.step import init_state
from jaxdecoder.typing import Params, Table


class Pruned(NamedTuple):
    """The result of a pruning method."""

    params: Params
    model: ModelConfig
    compression: CompressionConfig
    notes: Table


def prune(options: Prune, command: str) -> Table:
    """Make the run `options.out` from `options.run`; return its summary.

    Raises:
        UserError: for options that are impossible, alone, together, or for this model.
    """
    check(options)
    config = runs.read_config(Path(options.run))
    check_model(options, config)
    set_up(config)
    summary = run_pass(
        options.run, options.out, command, partial(made, options), sampler=show_sample
    )
    if not isinstance(options, SingleWeights):
        return summary
    model = runs.load_model(options.out)
    left = zeros(body_matrices(model.params, head=options.head))
    summary["compression"]["after"] = {"step": model.step, **left}
    runs.write_summary(Path(options.out), summary)
    print(f"{left['zeros']:,} of {left['weights']:,} weights of the pruned matrices are zero")
    return summary


BOUNDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sparsity": (lambda share: 0 < share < 1, "between 0 and 1"),
    "recover_steps": (lambda steps: steps >= 0, "0 or more"),
    "learning_rate": (lambda rate: rate > 0, "more than 0"),
    "m": (lambda m: m >= 2, "2 or more"),
    "seed": (lambda seed: 0 <= seed < SEEDS, f"from 0 to {SEEDS - 1}"),
    "gradual_share": (lambda share: 0 < share <= 1, "more than 0 and at most 1"),
    "gradual_every": (lambda steps: steps >= 1, "1 or more"),
    "rewind": (lambda step: step >= 0, "0 or more"),
}
"""Conditions on the values of options, for all methods."""


def check(options: Prune) -> None:
    """Refuse options that are impossible for every model."""
    for name, value in vars(options).items():
        fine, what = BOUNDS.get(name, (None, ""))
        if fine and value is not None and not fine(value):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {what}")
    if isinstance(options, Groups) and not 0 < options.n < options.m:
        raise UserError(
            f"--n {options.n}: must be between 0 and --m {options.m}; give --n as well as --m"
        )
    if isinstance(options, Gradual) and options.gradual:
        if not options.recover_steps:
            raise UserError(
                "--gradual: training makes the zeros; give --recover-steps, such as 500"
            )
        if options.rewind is not None or options.head:
            raise UserError("--gradual: goes neither with --rewind nor with --head")
    if isinstance(options, SingleWeights) and options.rewind_run and options.rewind is None:
        raise UserError("--rewind-run: give --rewind as well, the step to go back to")


def check_model(options: Prune, config: Config) -> None:
    """Refuse what this model cannot lose, or go back to, before anything is computed."""
    match options:
        case SingleWeights():
            if options.head and config.model.tie_embeddings:
                raise UserError("--head: with model.tie_embeddings the head is the embedding")
            if options.rewind is not None:
                check_rewind(options, config)
        case Part():
            part = PARTS[options.method]
            if why := part.refusal(config.architecture):
                raise UserError(f"--method {options.method}: this model has none to spare: {why}")
            going(config.architecture, part, options.sparsity)


def pruned(options: Prune, model: Model, corpus: Corpus) -> Pruned:
    """Prune a model by the method of these options."""
    match options:
        case Gradual(gradual=True):
            return gradually(options, model)
        case ByCriterion() | Groups():
            return by_weight(options, model, corpus)
        case Part():
            return by_part(options, model, corpus)
        case _:
            raise TypeError(f"{options.method}: options of no method")


def made(options: Prune, model: Model, corpus: Corpus) -> Made:
    """Prune a model, and return it with the config of its recovery."""
    left = pruned(options, model, corpus)
    config, notes = model.config, {"method": options.method, **left.notes}
    steps = options.recover_steps
    if isinstance(options, SingleWeights) and options.rewind is not None:
        source = Path(options.rewind_run or options.run)
        notes["rewound"] = {"run": str(source), "step": options.rewind}
        if steps is None:
            steps = max(0, runs.read_config(source).train.steps - options.rewind)
    config = replace(
        config,
        model=left.model,
        train=replace(config.train, steps=steps or 0),
        compression=left.compression,
        optimizer=recovery(options, config, steps or 0),
    )
    return Made(config, left.params, {"pruning": notes})


def recovery(options: Prune, config: Config, steps: int) -> OptimizerConfig:
    """Return the optimizer config of the recovery: linear from the peak rate to 0.

    A twentieth of the steps is warm-up. The peak is the full learning rate, as in learning-rate
    rewinding (arXiv 2003.02389). After --rewind, training goes as in the original run.
    """
    o = config.optimizer
    if options.learning_rate is not None:
        o = o.peaking_at(options.learning_rate)
    rewound = isinstance(options, SingleWeights) and options.rewind is not None
    if rewound or not steps:
        return o
    return replace(o, schedule="linear", warmup_steps=steps // 20, final_fraction=0.0)


# --- Single weights -------------------------------------------------------------------------------


def by_weight(options: ByCriterion | Groups, model: Model, corpus: Corpus) -> Pruned:
    """Set the weights to zero that the criterion scores lowest; rewind the others if asked to."""
    matrices = _matrices(options, model)
    criterion = options.criterion if isinstance(options, Groups) else options.method
    scores = scores_by(criterion, options, matrices, model, corpus)
    if isinstance(options, Groups):
        masks = n_of_m(matrices, scores, options.n, options.m)
        notes: Table = {"n": options.n, "m": options.m, "criterion": criterion}
    else:
        masks = mask(matrices, scores, options.sparsity, options.scope)
        notes = {"sparsity": options.sparsity, "scope": options.scope}
    params, masks = model.params, {path: masks[path] & (w != 0) for path, w in matrices.items()}
    if options.rewind is not None:
        params = weights_at(Path(options.rewind_run or options.run), options.rewind)
        matrices = body_matrices(params, head=options.head)
    matrices = apply({path: matrices[path] for path in masks}, masks)
    compression = replace(model.config.compression, keep_zeros=True)
    return Pruned(
        replaced(params, matrices), model.config.model, compression, {**notes, **zeros(matrices)}
    )


def gradually(options: Gradual, model: Model) -> Pruned:
    """Configure training to make the zeros; those there are count as part of the final sparsity."""
    assert options.recover_steps is not None
    count = zeros(_matrices(options, model))
    begin = count["zeros"] / count["weights"]
    compression = replace(
        model.config.compression,
        keep_zeros=True,
        sparsity=begin + options.sparsity * (1 - begin),
        sparsity_from=begin,
        sparsity_end=max(1, round(options.gradual_share * options.recover_steps)),
        sparsity_every=options.gradual_every,
        sparsity_scope=options.scope,
    )
    told = {"sparsity": options.sparsity, "scope": options.scope, "gradual": True, **count}
    return Pruned(model.params, model.config.model, compression, told)


def check_rewind(options: SingleWeights, config: Config) -> None:
    """Refuse a step whose weights are not on disk and cannot be drawn again."""
    source, step = Path(options.rewind_run or options.run), options.rewind
    theirs = runs.read_config(source)
    different = differences(replace(config, model=theirs.model), config)
    if different:
        listed = "\n  ".join(map(str, different))
        raise UserError(f"--rewind-run {source}: another model:\n  {listed}")
    have = sorted(steps_in(source / "checkpoints"))
    if step in have or (step == 0 and not _begun_elsewhere(theirs)):
        return
    listed = ", ".join(map(str, have)) or "none"
    why = (
        ", and its weights at step 0 came from another run, so they cannot be drawn again"
        if step == 0
        else "; 0, its weights as they were drawn, would do"
        if not _begun_elsewhere(theirs)
        else ""
    )
    raise UserError(f"--rewind {step}: {source} has checkpoints of these steps: {listed}{why}")


def weights_at(source: Path, step: int) -> Params:
    """Return the weights of a run at a step: from its checkpoint, or drawn again from the seed."""
    if step in steps_in(source / "checkpoints"):
        return runs.load_model(source, step).params
    config = runs.read_config(source)
    return jax.jit(lambda: init_state(config).params)()


def _begun_elsewhere(config: Config) -> bool:
    return bool(config.train.init_from or config.compression.recipe)


def _matrices(options: SingleWeights, model: Model) -> Matrices:
    matrices = body_matrices(model.params, head=options.head)
    if not matrices:
        raise UserError(f"{options.run}: its layers have no float matrices to prune")
    return matrices


# --- Parts ----------------------------------------------------------------------------------------


def by_part(options: Part, model: Model, corpus: Corpus) -> Pruned:
    """Remove the least important heads, neurons, features or layers."""
    part, config = PARTS[options.method], model.config.architecture
    batches = calibration_batches(model.config, corpus, options.calibration_tokens)
    if isinstance(options, ByGates):
        measure: str = options.importance
        scores = by_gates(model, part, batches, measure)
    else:
        measure, scores = "influence", influence(model, batches)
    keep = kept(scores, config, part, options.sparsity)
    params, smaller = part.remove(model.params, config, keep)
    removed = {
        "/".join(path) or "model": _missing(index, scores[path].shape[-1]).tolist()
        for path, index in keep.items()
    }
    notes = {
        "sparsity": options.sparsity,
        "importance": measure,
        "before": part.units(config),
        "after": part.units(smaller),
        "removed": removed,
    }
    return Pruned(params, smaller, model.config.compression, notes)


def _missing(index: Int[np.ndarray, "*layers kept"], count: int) -> np.ndarray:
    """Return, for each layer, the numbers below `count` that are not in `index`."""
    rows = index.reshape(-1, index.shape[-1])
    missing = [np.setdiff1d(np.arange(count), row) for row in rows]
    return np.stack(missing).reshape(*index.shape[:-1], -1)
