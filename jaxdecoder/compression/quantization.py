"""Quantize a run: round the weights of its linear layers to codes of few bits that stay packed.

Linear quantization (arXiv 1712.05877) rounds to the nearest level, by GPTQ (arXiv 2210.17323), or
after training through the rounding with a straight-through gradient (arXiv 1308.3432).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecoder.compression.calibration import calibration_batches, widest
from jaxdecoder.compression.correction import Change, corrected
from jaxdecoder.compression.options import Dequantize, Quantize
from jaxdecoder.compression.passes import Made, run_pass
from jaxdecoder.config import Config, ModelConfig
from jaxdecoder.data.tokens import Corpus
from jaxdecoder.errors import UserError
from jaxdecoder.kernels import packing
from jaxdecoder.layers.linear import scheme_of
from jaxdecoder.layers.tree import KERNEL, Path, leaves
from jaxdecoder.sampling.generate import show_sample
from jaxdecoder.training.runs import Model
from jaxdecoder.training.step import init_state
from jaxdecoder.typing import Params, Table

FINE_TUNED = "_fine_tuned"
"""Suffix of the run that trains through the rounding, beside the new run."""


def quantize(options: Quantize, command: str) -> Table:
    """Make the new run, and first the fine-tuned run if asked for; return the new run's summary.

    Raises:
        UserError: for options that are impossible together, or for this run.
    """
    _check(options)
    source = options.run
    if options.fine_tune_steps:
        source = options.new_run.rstrip("/") + FINE_TUNED
        first = f"{command}  # its fine-tuning"
        run_pass(options.run, source, first, partial(_rounded, options), sampler=show_sample)
    make = partial(_packed, options)
    return run_pass(source, options.new_run, command, make, sampler=show_sample)


def dequantize(options: Dequantize, command: str) -> Table:
    """Make the new run with floats; return its summary."""

    def make(model: Model, corpus: Corpus) -> Made:
        old = model.config
        if not old.model.packed:
            raise UserError(f"{options.run}: its weights are floats already")
        plain = {name: default for name, default in vars(ModelConfig()).items() if _says(name)}
        config = replace(old, model=replace(old.model, **plain))
        return Made(config, unpack(model.params, config), {"from": old.model.weight_format})

    return run_pass(
        options.run, options.new_run, command, make, sampler=show_sample, takes_packed=True
    )


# --- Packing --------------------------------------------------------------------------------------


def nearest(scheme: packing.Scheme) -> Change:
    """Return a change that rounds to the nearest level."""
    return lambda path, kernel: packing.over_layers(partial(packing.quantize, scheme), kernel)


def pack(params: Params, config: Config, change: Change) -> Params:
    """Turn the parameters of a float model into those of the packed model of the config."""

    def walk(part: Any, like: Any, path: Path) -> Any:
        if not isinstance(like, dict):
            return part
        if "codes" not in like:
            return {name: walk(part[name], like[name], (*path, name)) for name in like}
        if not isinstance(part, dict):  # an embedding, whose rows are columns of a kernel
            return packing.parameters_of(nearest(scheme_of(config.model))(path, part.T))
        rest = {name: leaf for name, leaf in part.items() if name != KERNEL}
        return {**rest, **packing.parameters_of(change((*path, KERNEL), part[KERNEL]))}

    return walk(params, _shapes(config), ())


def unpack(params: Params, config: Config) -> Params:
    """Turn the parameters of a packed model into those of the float model of the config."""

    def walk(part: Any, like: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if "codes" not in part:
            return {name: walk(part[name], like[name]) for name in part}
        kernel = floats(part)
        if not isinstance(like, dict):
            return kernel.T
        rest = {name: leaf for name, leaf in part.items() if name not in packing.PARTS}
        return {**rest, KERNEL: kernel}

    return walk(params, _shapes(config))


def floats(parts: Params) -> jax.Array:
    """Return the kernel, of one or several layers, that packed parameters stand for."""
    kind = next(
        name
        for name, kind in packing.FORMATS.items()
        if jnp.dtype(kind.storage) == parts["codes"].dtype
    )
    # The shapes tell which weights share a scale; the rest of the scheme is not needed.
    scheme = packing.Scheme(kind, symmetric="zeros" not in parts)
    names = [name for name in packing.PARTS if name in parts]

    def one(*leaves: jax.Array) -> jax.Array:
        return packing.of_parameters(scheme, dict(zip(names, leaves, strict=True))).dequantized()

    return packing.over_layers(one, *(parts[name] for name in names))


def _shapes(config: Config) -> Params:
    return jax.eval_shape(partial(init_state, config)).params


def _says(name: str) -> bool:
    """Return whether a field of the model says how its weights are quantized."""
    return name.startswith("weight_") or name == "activation_format"


# --- The passes -----------------------------------------------------------------------------------


def _check(options: Quantize) -> None:
    if options.bits == 4 and options.format != "int":
        raise UserError(f"--format {options.format}: has 8 bits; --bits 8, or --format int")
    if options.fine_tune_steps < 0:
        raise UserError(f"--fine-tune-steps {options.fine_tune_steps}: must be at least 0")
    if options.fine_tune_steps and options.method == "gptq":
        raise UserError(
            "--method gptq: fine-tuning learns what is rounded to the nearest; either it or "
            "--fine-tune-steps, not both"
        )
    if options.learning_rate is not None and not options.learning_rate > 0:
        raise UserError(f"--learning-rate {options.learning_rate}: must be above 0")


def quantized(config: ModelConfig, options: Quantize) -> ModelConfig:
    """Return the model's config with packed weights in the format of the options."""
    named: Any = f"int{options.bits}" if options.format == "int" else options.format
    return replace(
        config,
        weight_format=named,
        weight_granularity=options.granularity,
        weight_group_size=options.group_size,
        weight_symmetric=options.symmetric,
        weight_head=options.include_head,
        weight_packed=True,
        activation_format="int8" if options.activations == 8 else "float",
    )


def _rounded(options: Quantize, model: Model, corpus: Corpus) -> Made:
    """Return the same weights, with a config that trains through the rounding."""
    old = model.config
    if old.model.quantized:
        raise UserError(f"{options.run}: was trained through a rounding already")
    steps, rate = options.fine_tune_steps, options.learning_rate or old.optimizer.learning_rate / 10
    config = replace(
        old,
        model=replace(quantized(old.model, options), weight_packed=False),
        optimizer=replace(
            old.optimizer.peaking_at(rate),
            warmup_steps=min(old.optimizer.warmup_steps, steps // 10),
        ),
        train=replace(old.train, steps=steps),
    )
    return Made(config, model.params, {"method": "straight-through fine-tuning"})


def _packed(options: Quantize, model: Model, corpus: Corpus) -> Made:
    """Return the weights as codes."""
    old = model.config
    wanted = quantized(old.model, options)
    if old.model.quantized:
        if replace(wanted, weight_packed=False) != old.model:
            told = ", ".join(
                f"{name} = {value}" for name, value in vars(old.model).items() if _says(name)
            )
            raise UserError(f"{options.run}: was trained to be rounded otherwise: {told}")
        if options.method == "gptq":
            raise UserError(
                f"--method gptq: {options.run} was trained to be rounded to the nearest"
            )
    config = replace(old, model=wanted, train=replace(old.train, steps=0))
    scheme, notes = scheme_of(wanted), {"method": options.method}
    change = nearest(scheme)
    if options.method == "gptq":
        own = leaves(model.params)
        packed = ((*path[:-1], KERNEL) for path in leaves(_shapes(config)) if path[-1] == "codes")
        kernels = {path: own[path] for path in packed if path in own}
        inputs = widest(kernels)
        shown = calibration_batches(model.config, corpus, options.calibration_tokens, inputs)
        change, errors = corrected(model, shown, scheme, kernels)
        notes = {**notes, **errors}
    return Made(config, pack(model.params, config, change), notes)
