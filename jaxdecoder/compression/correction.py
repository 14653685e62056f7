"""Apply GPTQ to a whole model: choose the text for its layers and the order of rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from jaxdecoder.compression.calibration import calibrate, weighty
from jaxdecoder.compression.gptq import gptq, output_error
from jaxdecoder.data.batches import Batch
from jaxdecoder.errors import UserError
from jaxdecoder.kernels.packing import Packed, Scheme, quantize
from jaxdecoder.training.runs import Model
from jaxdecoder.training.sparsity import Matrices, Path

Change = Callable[[Path, jax.Array], Packed]
"""(path, kernel of one or several layers) -> the kernel, packed."""


def corrected(
    model: Model, shown: Sequence[Batch], scheme: Scheme, kernels: Matrices
) -> tuple[Change, dict[str, Any]]:
    """Round kernels by GPTQ; also return the mean error of the layers' outputs, by both roundings.

    It goes stage by stage: the inputs of a layer come from the rounded layers before it. The errors
    are those of GPTQ and of rounding to the nearest.

    Raises:
        UserError: if the inputs of a layer are too much alike.
    """
    params, layers = model.params, {path: _layers(kernel) for path, kernel in kernels.items()}
    packed: dict[tuple[Path, int], Packed] = {}
    nearest, errors = [], []
    for stage in track(stages(kernels), description="GPTQ"):
        grams = calibrate(model.decoder, params, shown, grams=True)
        for path, layer in stage:
            kernel, gram = layers[path][layer], _layers(grams[path])[layer]
            packed[path, layer] = gptq(scheme, kernel, gram)
            whole = packed[path, layer].dequantized()
            nearest.append(
                float(output_error(kernel, quantize(scheme, kernel).dequantized(), gram))
            )
            errors.append(float(output_error(kernel, whole, gram)))
            params = _with_layer(params, path, layer, whole)
    if not all(map(math.isfinite, errors)):
        raise UserError(
            "--method gptq: the inputs of a layer are too much alike to correct for; "
            "more --calibration-tokens, or --method nearest, would do"
        )

    def change(path: Path, kernel: jax.Array) -> Packed:
        parts = [packed[path, layer] for layer in range(len(layers[path]))]

        def stack(*parts: jax.Array) -> jax.Array:
            return jnp.stack(parts).reshape(*kernel.shape[:-2], *parts[0].shape)

        return jax.tree.map(stack, *parts)

    return change, {
        "calibration_tokens": weighty(shown),
        "output_error_nearest": sum(nearest) / len(nearest),
        "output_error": sum(errors) / len(errors),
    }


def stages(kernels: Matrices) -> list[list[tuple[Path, int]]]:
    """Return all kernels in the order of computation, each as a path and the number of its layer.

    The kernels of a stage belong to one block, or to blocks side by side.
    """
    found: dict[tuple[int, ...], list[tuple[Path, int]]] = {}
    for path, kernel in kernels.items():
        for layer in range(len(_layers(kernel))):
            found.setdefault(_order(path, layer), []).append((path, layer))
    return [found[order] for order in sorted(found)]


def _order(path: Path, layer: int) -> tuple[int, ...]:
    """Return a sort key for the order of computation: first the body, then copying, then the head.

    Serial blocks repeat; stacks follow one another, with their layers side by side.
    """
    if path[0] != "body":
        return (1 + (path[0] == "head"),)
    if path[1] == "blocks":
        return (0, layer, _number(path[2]))
    return (0, _number(path[1]), int("blocks" not in path))


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _layers(stacked: jax.Array) -> jax.Array:
    """Return the matrices of one or several layers with one axis over the layers."""
    return stacked.reshape(-1, *stacked.shape[-2:])


def _with_layer(params: Any, path: Path, layer: int, kernel: jax.Array) -> Any:
    """Return the parameters with one layer's kernel replaced."""
    if not path:
        return _layers(params).at[layer].set(kernel).reshape(params.shape)
    return {**params, path[0]: _with_layer(params[path[0]], path[1:], layer, kernel)}
