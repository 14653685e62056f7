"""What fills a device's memory during a training step, and the closed form of it.

The closed form is for GPUs, where attention keeps no scores; on a CPU XLA can always be asked. It
counts what is large: weights, gradients, moments, and the numbers that the backward pass finds kept
of every token. Temporaries are those of the step's two peaks, the larger one: the head's logits,
with all blocks' activations kept, or the first block's backward pass, with the gradients of all
that came after. Blocks of a mixture of depths count as if they took every token.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxdecoder.analysis import counts
from jaxdecoder.config import Architecture, Config
from jaxdecoder.config.model import GATED
from jaxdecoder.devices import Device
from jaxdecoder.layers import stacks
from jaxdecoder.layers.depth import exits_of

LOGIT = 6
"""Bytes of a kept logit and its gradient."""


class Memory(NamedTuple):
    """Bytes on each device."""

    weights: int
    moments: int
    """And whatever else the optimiser keeps."""
    average: int
    """The moving average of the weights."""
    batch: int
    """The tokens of a compiled call, which takes several steps."""
    gradients: int
    activations: int
    """What the backward pass finds kept, and all other temporaries."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def by_closed_form(config: Config, device: Device, steps: int, count: int = 1) -> Memory:
    """Return the memory of a step over `count` devices, in calls of so many steps.

    What `mesh.tensor` splits of the activations is counted whole.
    """
    t, o, c = config.train, config.optimizer, config.model.resolve()
    parts, number = counts.parameters(c), 4 if t.compute_dtype == "float32" else 2
    sizes = config.mesh.sizes(count)
    split = sizes["fsdp"] * sizes["tensor"]
    weights = 4 * parts["total"] // split
    tokens = t.batch_size * c.context_length * sizes["tensor"] // count
    a_pass = tokens // t.gradient_accumulation
    gradients = weights * (2 if t.gradient_accumulation > 1 else 1)
    kept, working = (number * a_pass * n for n in numbers_a_token(c))
    logits = min(a_pass * c.vocab_size, device.usable // 64) * len(exits_of(c))
    head, backward = kept + LOGIT * logits, kept + working + gradients
    return Memory(
        weights,
        int(moments(config) * (2 if o.state_dtype == "bfloat16" else 4)) // split,
        weights if o.ema_decay else 0,
        steps * tokens * 12,  # inputs, targets and weights, 4 bytes each
        gradients,
        max(head, backward) - gradients,
    )


def moments(config: Config) -> float:
    """Count the numbers that the optimiser keeps; those of adafactor are hardly any."""
    total = counts.parameters(config.model)["total"]
    matrices = sum(n * d_in * d_out for n, d_in, d_out in counts.kernels(config.model))
    return {
        "adamw": 2 * total,
        "muon": 2 * total - matrices,
        "lion": total,
        "adafactor": 0,
        "sgd": total if config.optimizer.beta1 else 0,
    }[config.optimizer.name]


def numbers_a_token(c: Architecture) -> tuple[int, int]:
    """Count what is kept of a token until the backward pass, and what that needs of a unit.

    By policy of `model.remat`; see `layers/remat.py`.
    """
    hidden = (2 if c.activation in GATED else 1) * c.d_ff * c.feed_forward
    attention = c.d_model + 2 * c.query_width + 2 * c.kv_width
    feed_forward = c.d_model + hidden + c.d_ff if c.feed_forward else 0
    products = c.query_width + 2 * c.kv_width + hidden + 2 * c.d_model
    block, side_by_side = 2 * c.d_model + attention + feed_forward, c.layers_side_by_side
    larger = side_by_side * max(attention, feed_forward)
    by_layer = {
        "none": (block, larger),
        "dots": (c.d_model + products, larger),
        "block": (c.d_model, block if c.layout == "serial" else larger),
        "everything": (c.d_model, larger),
    }
    kept, working = by_layer[c.remat]
    if c.layout == "serial":
        return c.n_layers * kept, working
    wide = sum(stacks.factors(c)) * (3 * c.d_model + 2 * c.d_ff)
    if c.remat == "everything":
        return c.n_stacks * c.d_model, side_by_side * kept + working + wide
    return c.n_layers * kept + wide, working
