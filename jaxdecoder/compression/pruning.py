"""The pass that prunes: weights become zero, or parts go, and training recovers from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdecoder.compression.calibration import calibration_batches, input_squares
from jaxdecoder.compression.importance import by_gates, influence
from jaxdecoder.compression.options import Prune
from jaxdecoder.compression.parts import PARTS, going, kept
from jaxdecoder.compression.passes import Made, run_pass
from jaxdecoder.compression.sparsity import CRITERIA, apply, mask, n_of_m, zeros
from jaxdecoder.config import CompressionConfig, Config, ModelConfig, differences
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.sampling.generate import show_sample
from jaxdecoder.training import runs
from jaxdecoder.training.checkpoints import steps_in
from jaxdecoder.training.devices import set_up
from jaxdecoder.training.runs import Model
from jaxdecoder.training.sparsity import Matrices, body_matrices, with_matrices
from jaxdecoder.training.step import init_state


class Pruned(NamedTuple):
    """What a method leaves of a model."""

    params: Any
    model: ModelConfig
    compression: CompressionConfig
    notes: dict[str, Any]


class Method(NamedTuple):
    """One way to prune.

    takes: the options it knows besides those of all.
    check: (options, config of the source) -> refuses what cannot be, before anything is computed.
    make: (options, model, corpus) -> what is left of it.
    """

    takes: tuple[str, ...]
    check: Callable[[Prune, Config], None]
    make: Callable[[Prune, Model, Corpus], Pruned]


COMMON = ("run", "out", "method", "recover_steps", "learning_rate")


def prune(options: Prune, command: str) -> dict[str, Any]:
    """Makes the run `options.out` of `options.run`; returns its summary.

    Raises:
        UserError: for options that cannot be, alone or with each other or with this model.
    """
    check(options)
    config = runs.read_config(Path(options.run))
    METHODS[options.method].check(options, config)
    set_up(config)
    summary = run_pass(
        options.run, options.out, command, partial(made, options), sampler=show_sample
    )
    if options.method in PARTS:
        return summary
    model = runs.load_model(options.out)
    left = zeros(body_matrices(model.params, head=options.head))
    summary["compression"]["after"] = {"step": model.step, **left}
    runs.write_summary(Path(options.out), summary)
    print(f"{left['zeros']:,} of {left['weights']:,} weights of the pruned matrices are zero")
    return summary


def check(options: Prune) -> None:
    """Refuses options that cannot be, whatever the model."""
    method = METHODS[options.method]
    for item in fields(Prune):
        if item.name not in (*COMMON, *method.takes) and (
            getattr(options, item.name) != item.default
        ):
            raise UserError(f"{_flag(item.name)}: not an option of --method {options.method}")
    if "sparsity" in method.takes and options.sparsity is None:
        raise UserError(f"--method {options.method}: how much? Give --sparsity, such as 0.5")
    n, m, rate = _n(options), _m(options), options.learning_rate
    fine = {
        "sparsity": (options.sparsity is None or 0 < options.sparsity < 1, "between 0 and 1"),
        "recover_steps": ((options.recover_steps or 0) >= 0, "0 or more"),
        "learning_rate": (rate is None or rate > 0, "more than 0"),
        "m": (m >= 2, "2 or more"),
        "n": (options.n is None or 0 < n < m, f"between 0 and --m {m}"),
        "seed": (options.seed >= 0, "0 or more"),
        "gradual_share": (0 < options.gradual_share <= 1, "more than 0 and at most 1"),
        "gradual_every": (options.gradual_every >= 1, "1 or more"),
        "rewind": ((options.rewind or 0) >= 0, "0 or more"),
    }
    for name, (is_fine, what) in fine.items():
        if not is_fine:
            raise UserError(f"{_flag(name)} {getattr(options, name)}: must be {what}")
    if n >= m:
        raise UserError(f"--m {m}: give --n as well, for it is 2 if left out")
    if options.gradual and not options.recover_steps:
        raise UserError("--gradual: training makes the zeros; give --recover-steps, such as 500")
    if options.gradual and (options.rewind is not None or options.head):
        raise UserError("--gradual: goes neither with --rewind nor with --head")
    if options.rewind_run and options.rewind is None:
        raise UserError("--rewind-run: give --rewind as well, the step to go back to")


def made(options: Prune, model: Model, corpus: Corpus) -> Made:
    """What the pass makes of a model: pruned, and to be trained on from there."""
    pruned = METHODS[options.method].make(options, model, corpus)
    config, notes = model.config, {"method": options.method, **pruned.notes}
    steps = options.recover_steps
    if options.rewind is not None:
        source = Path(options.rewind_run or options.run)
        notes["rewound"] = {"run": str(source), "step": options.rewind}
        if steps is None:
            steps = max(0, runs.read_config(source).train.steps - options.rewind)
    config = replace(
        config,
        model=pruned.model,
        train=replace(config.train, steps=steps or 0),
        compression=pruned.compression,
        optimizer=recovery(options, config, steps or 0),
    )
    return Made(config, pruned.params, {"pruning": notes})


def recovery(options: Prune, config: Config, steps: int) -> Any:
    """How to train on: from the peak rate straight down to 0, after a twentieth of warming up.

    The whole of the peak, as of learning-rate rewinding (arXiv 2003.02389). What is rewound trains
    as its run did.
    """
    o = config.optimizer
    if options.learning_rate is not None:
        o = o.peaking_at(options.learning_rate)
    if options.rewind is not None or not steps:
        return o
    return replace(o, schedule="linear", warmup_steps=steps // 20, final_fraction=0.0)


# --- Single weights -------------------------------------------------------------------------------


def check_matrices(options: Prune, config: Config) -> None:
    """Refuses a head that is none, and a step that there is no going back to."""
    if options.head and config.model.tie_embeddings:
        raise UserError("--head: with model.tie_embeddings the head is the embedding")
    if options.rewind is not None:
        check_rewind(options, config)


def by_criterion(criterion: str) -> Callable[[Prune, Model, Corpus], Pruned]:
    """Those go that a criterion scores lowest within a scope."""

    def make(options: Prune, model: Model, corpus: Corpus) -> Pruned:
        assert options.sparsity is not None
        default = "output" if criterion == "wanda" else "matrix"
        scope, share = options.scope or default, options.sparsity
        notes = {"sparsity": share, "scope": scope}
        if options.gradual:
            return gradually(options, model, scope, notes)
        matrices = _matrices(options, model)
        scores = _scores(criterion, options, model, corpus, matrices)
        return _cut(options, model, matrices, mask(matrices, scores, share, scope), notes)

    return make


def by_groups(options: Prune, model: Model, corpus: Corpus) -> Pruned:
    """n of every m stay."""
    n, m, criterion = _n(options), _m(options), options.criterion or "wanda"
    matrices = _matrices(options, model)
    scores = _scores(criterion, options, model, corpus, matrices)
    notes = {"n": n, "m": m, "criterion": criterion}
    return _cut(options, model, matrices, n_of_m(matrices, scores, n, m), notes)


def gradually(options: Prune, model: Model, scope: str, notes: dict[str, Any]) -> Pruned:
    """None go yet: training makes the zeros, among them those that are there."""
    assert options.sparsity is not None
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
        sparsity_scope=scope,  # type: ignore[arg-type]
    )
    told = {**notes, "gradual": True, **count}
    return Pruned(model.params, model.config.model, compression, told)


def check_rewind(options: Prune, config: Config) -> None:
    """Refuses a step whose weights are not there and cannot be drawn again."""
    source, step = Path(options.rewind_run or options.run), options.rewind
    theirs = runs.read_config(source)
    different = differences(replace(config, model=theirs.model), config)
    if different:
        raise UserError(f"--rewind-run {source}: another model:\n  " + "\n  ".join(different))
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


def weights_at(source: Path, step: int) -> Any:
    """The weights of a run at a step: from its checkpoint, or drawn again as they were."""
    if step in steps_in(source / "checkpoints"):
        return runs.load_model(source, step).params
    config = runs.read_config(source)
    return jax.jit(lambda: init_state(config).params)()


def _begun_elsewhere(config: Config) -> bool:
    return bool(config.train.init_from or config.compression.recipe)


def _matrices(options: Prune, model: Model) -> Matrices:
    matrices = body_matrices(model.params, head=options.head)
    if not matrices:
        raise UserError(f"{options.run}: its layers have no float matrices to prune")
    return matrices


def _scores(
    criterion: str, options: Prune, model: Model, corpus: Corpus, matrices: Matrices
) -> Matrices:
    measured = criterion == "wanda"
    squares = input_squares(model, corpus, options.calibration_tokens) if measured else {}
    return CRITERIA[criterion](matrices, squares, options.seed)


def _cut(
    options: Prune, model: Model, matrices: Matrices, masks: Matrices, notes: dict[str, Any]
) -> Pruned:
    """The model under these masks, its weights rewound if that was asked for."""
    params, masks = model.params, {path: masks[path] & (w != 0) for path, w in matrices.items()}
    if options.rewind is not None:
        params = weights_at(Path(options.rewind_run or options.run), options.rewind)
        own = body_matrices(params, head=options.head)
        matrices = {path: own[path] for path in matrices}
    matrices = apply(matrices, masks)
    compression = replace(model.config.compression, keep_zeros=True)
    told = {**notes, **zeros(matrices)}
    return Pruned(with_matrices(params, matrices), model.config.model, compression, told)


def _n(options: Prune) -> int:
    return 2 if options.n is None else options.n


def _m(options: Prune) -> int:
    return 4 if options.m is None else options.m


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# --- Parts ----------------------------------------------------------------------------------------


def check_part(options: Prune, config: Config) -> None:
    """Refuses what this model cannot lose."""
    assert options.sparsity is not None
    part = PARTS[options.method]
    if why := part.refusal(config.model):
        raise UserError(f"--method {options.method}: this model has none to spare: {why}")
    going(config.model, part, options.sparsity)


def by_part(options: Prune, model: Model, corpus: Corpus) -> Pruned:
    """Heads, neurons, features or layers go, the least important of each layer."""
    assert options.sparsity is not None
    name, config = options.method, model.config.model
    part = PARTS[name]
    batches = calibration_batches(model.config, corpus, options.calibration_tokens)
    measure = "influence" if name == "layers" else options.importance or "taylor"
    if name == "layers":
        scores = influence(model, batches)
    else:
        scores = by_gates(model, part, batches, measure)
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


def _missing(index: Any, count: int) -> np.ndarray:
    """Of each layer the numbers below `count` that are not among those of `index`."""
    rows = index.reshape(-1, index.shape[-1])
    missing = [np.setdiff1d(np.arange(count), row) for row in rows]
    return np.stack(missing).reshape(*index.shape[:-1], -1)


SINGLE = ("head", "rewind", "rewind_run")
GRADUAL = ("gradual", "gradual_share", "gradual_every")
METHODS: dict[str, Method] = {
    "magnitude": Method(
        ("sparsity", "scope", *SINGLE, *GRADUAL), check_matrices, by_criterion("magnitude")
    ),
    "wanda": Method(
        ("sparsity", "scope", "calibration_tokens", *SINGLE), check_matrices, by_criterion("wanda")
    ),
    "random": Method(
        ("sparsity", "scope", "seed", *SINGLE), check_matrices, by_criterion("random")
    ),
    "n-m": Method(
        ("n", "m", "criterion", "calibration_tokens", "seed", *SINGLE), check_matrices, by_groups
    ),
    "heads": Method(("sparsity", "importance", "calibration_tokens"), check_part, by_part),
    "neurons": Method(("sparsity", "importance", "calibration_tokens"), check_part, by_part),
    "width": Method(("sparsity", "importance", "calibration_tokens"), check_part, by_part),
    "layers": Method(("sparsity", "calibration_tokens"), check_part, by_part),
}
