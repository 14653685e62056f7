"""Run a pass of compression: measure before and after, and write a run folder like any other.

A pass writes its weights as step 0 of the new run. Training continues from there, for 0 steps if
none are asked for. So an interrupted pass continues when the command is given again, and the new
run trains, samples and compresses like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jaxdecoder.config import Config, DistillationConfig
from jaxdecoder.data.batches import Feed
from jaxdecoder.data.tokens import Corpus, prepare
from jaxdecoder.errors import UserError, shell_word
from jaxdecoder.files import write_atomically
from jaxdecoder.kernels import packing
from jaxdecoder.training import checkpoints, runs
from jaxdecoder.training.evaluation import make_evaluator
from jaxdecoder.training.single import Sampler, ToObjective, train
from jaxdecoder.training.step import make_decoder, next_token, state_of
from jaxdecoder.typing import Params, Table


class Made(NamedTuple):
    """The result of a pass.

    config: that of the new run. Its model section fits `params`, its train section says how to
        train them (0 steps: not at all), its recipe is that of the source run.
    notes: what summary.json says about the pass, under `compression`.
    """

    config: Config
    params: Params
    notes: Table


def run_pass(
    source: str,
    out: str,
    command: str,
    make: Callable[[runs.Model, Corpus], Made],
    *,
    sampler: Sampler,
    objective: ToObjective = next_token,
    takes_packed: bool = False,
) -> Table:
    """Make the run `out` from the run `source`; return its summary.

    `make` gets the source's model, without its teacher. The losses before and after are over the
    corpus of the new run. `command` is added to the recipe of the result. A pass that was begun by
    the same command continues where it stopped. `takes_packed`: the pass accepts packed weights.

    Raises:
        UserError: if `out` is another run, or the source's weights are packed and not accepted.
    """
    run = Path(out)
    if not checkpoints.steps_in(run / "checkpoints"):
        _begin(run, Path(source), command, make, sampler, takes_packed)
    config = runs.read_config(run)
    if config.compression.recipe[-1:] != (command,):
        raise UserError(
            f"{run}: this run was made by another command:\n  "
            + ("\n  ".join(config.compression.recipe) or "train.py")
            + "\nGive another folder for the new run"
        )
    summary = train(config, sampler=sampler, objective=objective)
    summary["compression"] = json.loads((run / "compression.json").read_text())
    runs.write_summary(run, summary)
    before, at_once = (summary["compression"][when] for when in ("before", "at_once"))
    old, after = before["validation_loss"], summary["validation_loss"]
    print(
        f"validation loss: {old:.4f} before, {at_once['validation_loss']:.4f} at once, "
        f"{after:.4f} after {summary['steps']} steps ({after - old:+.4f} nats a token)\n"
        f"weights: {before['nonzero']:,} in {before['bytes']:,} bytes before, "
        f"{at_once['nonzero']:,} in {at_once['bytes']:,} after"
    )
    return summary


def corpus_of(model: runs.Model, source: Path) -> tuple[Config, Corpus]:
    """Return the corpus of a run, and its config with this tokenizer and no gradual pruning."""
    path = model.config.data.tokenizer_path or str(source / "tokenizer.json")
    config = replace(
        model.config,
        data=replace(model.config.data, tokenizer_path=path),
        compression=model.config.compression.settled(),
    )
    return config, prepare(config.data)


def loss_of(config: Config, corpus: Corpus, params: Params) -> float:
    """Return the loss over the whole validation split, in nats per token."""
    evaluate = make_evaluator(make_decoder(config))
    return evaluate(params, Feed.of(config, corpus, "validation").fixed(None))


def sizes(params: Params) -> dict[str, int]:
    """Return the number of weights, of those that are not zero, and the bytes that they take."""
    return packing.size(params)._asdict()


def _begin(
    run: Path,
    source: Path,
    command: str,
    make: Callable[[runs.Model, Corpus], Made],
    sampler: Sampler,
    takes_packed: bool,
) -> None:
    """Write the new run at step 0."""
    model = runs.load_model(source)
    if model.config.model.packed and not takes_packed:
        raise UserError(
            f"{source}: its weights are quantized already, to {model.config.model.weight_format}. "
            "Give the run it was made from, or make floats of it first: "
            f"python compress.py dequantize {shell_word(source)} {shell_word(f'{source}_float')}"
        )
    config, corpus = corpus_of(model, source)
    config = replace(config, distillation=DistillationConfig())
    model = model._replace(config=config)
    made = make(model, corpus)
    config, corpus = replace(config, data=made.config.data), prepare(made.config.data)
    before = sizes(model.params) | {"validation_loss": loss_of(config, corpus, model.params)}
    text = sampler(config, model.params, model.tokenizer)
    print(f"{source}: validation {before['validation_loss']:.4f} nats a token; a sample:\n{text}\n")
    loss = loss_of(made.config, corpus, made.params)
    new = replace(
        made.config,
        train=replace(made.config.train, out=str(run), init_from=""),
        compression=replace(
            made.config.compression, recipe=(*made.config.compression.recipe, command)
        ),
    )
    told = {
        "before": before,
        "at_once": sizes(made.params) | {"validation_loss": loss},
        **made.notes,
    }
    with runs.lock(run), checkpoints.full_disk_explained(run):
        runs.begin(new, corpus)
        write_atomically(run / "samples.txt", f"--- {source} ---\n{text}\n")
        write_atomically(run / "compression.json", json.dumps(told, indent=2) + "\n")
        with checkpoints.open_checkpoints(run, keep=new.train.keep) as manager:
            checkpoints.save(manager, 0, state_of(new, made.params), loss)
