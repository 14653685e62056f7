"""Apply GPTQ to a whole model: choose the text for its layers and the order of rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from rich.progress import track

from jaxdecoder.compression.calibration import calibrate, weighty
from jaxdecoder.compression.gptq import gptq, output_error
from jaxdecoder.data.batches import Batch
from jaxdecoder.errors import UserError
from jaxdecoder.kernels.packing import Packed, Scheme, quantize
from jaxdecoder.layers.tree import Matrices, Path, layers_of, order_of, with_layer
from jaxdecoder.training.runs import Model
from jaxdecoder.typing import Table

Change = Callable[[Path, jax.Array], Packed]
"""(path, kernel of one or several layers) -> the kernel, packed."""


def corrected(
    model: Model, shown: Sequence[Batch], scheme: Scheme, kernels: Matrices
) -> tuple[Change, Table]:
    """Round kernels by GPTQ; also return the mean error of the layers' outputs, by both roundings.

    It goes stage by stage: the inputs of a layer come from the rounded layers before it. The errors
    are those of GPTQ and of rounding to the nearest.

    Raises:
        UserError: if the inputs of a layer are too much alike.
    """
    params, layers = model.params, {path: layers_of(kernel) for path, kernel in kernels.items()}
    packed: dict[tuple[Path, int], Packed] = {}
    nearest, errors = [], []
    for stage in track(stages(kernels), description="GPTQ"):
        grams = calibrate(model.decoder, params, shown, grams=True)
        for path, layer in stage:
            kernel, gram = layers[path][layer], layers_of(grams[path])[layer]
            packed[path, layer] = gptq(scheme, kernel, gram)
            whole = packed[path, layer].dequantized()
            nearest.append(
                float(output_error(kernel, quantize(scheme, kernel).dequantized(), gram))
            )
            errors.append(float(output_error(kernel, whole, gram)))
            params = with_layer(params, path, layer, whole)
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
        for layer in range(len(layers_of(kernel))):
            found.setdefault(order_of(path, layer), []).append((path, layer))
    return [found[order] for order in sorted(found)]
