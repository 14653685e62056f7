"""Writes the golden files beside it: what torch and transformers make of small random weights.

    .venv-torch/bin/python tests/golden/make.py [NAME ...]

Needs torch and transformers (`make bench` installs them) and no network. `tests/test_golden.py`
says what is compared with what; it needs the files alone.

Weights are multiples of 1/64, which half a float holds exactly. A model's file has `config`, fields
of `ModelConfig`; `weights`, one row of all parameters under our names, whose paths and shapes are
in `index`; `tokens`; `logits`; and, where asked for, `gradients` of the mean next-token loss, in
the order of the weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from oracles import COMMON, MODELS, TIME, VOCAB_SIZE, Model, array, sinusoidal_table
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

FOLDER = Path(__file__).parent
# With some seeds a norm of very little magnifies the oracle's own rounding to more than 1e-5.
SEED = 1

Arrays = dict[str, Any]

# --- Whole models --------------------------------------------------------------------------------


def randomise(module: nn.Module) -> None:
    """Gives the module random weights: of mean 1 for the scales of norms, 0 otherwise."""
    generator = np.random.default_rng((SEED, 0))
    for name, parameter in module.named_parameters():
        centre = 64 * (name.endswith("weight") and parameter.ndim == 1)
        parameter.data = sixty_fourths(generator, parameter.shape, centre)


def sixty_fourths(generator: np.random.Generator, shape: Any, centre: int = 0) -> torch.Tensor:
    """Random multiples of 1/64, at most half from the centre."""
    return torch.tensor((generator.integers(-32, 33, shape) + centre) / 64, dtype=torch.float32)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a tree by their paths."""
    if not isinstance(tree, dict):
        yield path, tree
        return
    for name, branch in tree.items():
        yield from leaves(branch, f"{path}/{name}" if path else name)


def model_file(model: Model) -> Arrays:
    """Runs a model on random tokens."""
    model.module.train(False)
    randomise(model.module)
    tokens = torch.tensor(np.random.default_rng((SEED, 1)).integers(VOCAB_SIZE, size=(2, TIME)))
    logits = model.logits(tokens)
    index, weights = row(model)
    file = {
        "config": json.dumps({**COMMON, **model.config}),
        "index": json.dumps(index),
        "weights": half(weights),
        "tokens": tokens.numpy().astype(np.int8),
        "logits": array(logits),
    }
    if model.with_gradients:
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for parameter in model.module.parameters():
            parameter.data = parameter.grad
        _, file["gradients"] = row(model)
    return file


def row(model: Model) -> tuple[dict[str, Any], np.ndarray]:
    """Shapes of the parameters by path, and all their numbers."""
    arrays = dict(leaves(model.params()))
    numbers = np.concatenate([x.ravel() for x in arrays.values()])
    return {path: x.shape for path, x in arrays.items()}, numbers


def half(numbers: np.ndarray) -> np.ndarray:
    """The same numbers in half the bytes."""
    rounded = numbers.astype(np.float16)
    assert (rounded == numbers).all()
    return rounded


# --- Parts ---------------------------------------------------------------------------------------


def activations() -> Arrays:
    """Every non-linearity of a feed-forward, on both sides of 0 and at it."""
    x = torch.arange(-96, 97) / 16
    names = {"relu": "relu", "gelu": "gelu_new", "gelu_exact": "gelu", "swish": "silu"}
    functions = {name: ACT2FN[theirs] for name, theirs in {**names, "relu2": "relu2"}.items()}
    capped = 3 * torch.tanh(x / 3)
    return {
        "x": half(array(x)),
        **{name: array(function(x)) for name, function in functions.items()},
        "capped_at_3": array(capped),
    }


def norms() -> Arrays:
    """Both norms with their gradients, one row of nearly equal numbers among the inputs."""
    generator = np.random.default_rng((SEED, 2))
    x, upstream = (sixty_fourths(generator, (5, 16)) * 4 for _ in range(2))
    x[0] = 1 + x[0] / 64
    scale, bias = sixty_fourths(generator, 16, 64), sixty_fourths(generator, 16)
    file = {"x": x.clone(), "upstream": upstream, "scale": scale, "bias": bias}
    file = {name: array(value) for name, value in file.items()}
    for name, module in {"layernorm": nn.LayerNorm(16), "rmsnorm": LlamaRMSNorm(16, 1e-5)}.items():
        module.weight.data = scale
        if name == "layernorm":
            module.bias.data = bias
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        out.backward(upstream)
        file[f"{name}/out"], file[f"{name}/x"] = array(out), array(inputs.grad)
        for parameter, value in module.named_parameters():
            ours = {"weight": "scale", "bias": "bias"}[parameter]
            file[f"{name}/{ours}"] = array(value.grad)
    return file


def positions() -> Arrays:
    """Tables of positions: waves, slopes of ALiBi for up to 12 heads, buckets of T5."""
    slopes = [
        # Of the last two keys, of which the earlier is one step away.
        -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
        for heads in range(1, 13)
    ]
    distances = torch.arange(200)
    return {
        "sinusoidal": array(sinusoidal_table(40, 8)),
        "alibi": np.concatenate([array(of_heads) for of_heads in slopes]),
        **{
            f"t5/{buckets}/{longest}": T5Attention._relative_position_bucket(
                -distances, bidirectional=False, num_buckets=buckets, max_distance=longest
            )
            .numpy()
            .astype(np.uint8)
            for buckets, longest in ((32, 128), (8, 10), (6, 50), (2, 2))
        },
    }


VISIBLE: dict[str, Callable[[int, int], bool]] = {
    "full": lambda q, k: True,
    "sliding_window": lambda q, k: q - k < 5,
    "longformer": lambda q, k: (q - k < 6 and (q - k) % 2 == 0) or k < 2,
    "fixed_sparse": lambda q, k: q // 4 == k // 4 or k % 4 >= 2,
    "strided_sparse": lambda q, k: q - k < 4 or (q - k) % 4 == 0,
}


def attention() -> Arrays:
    """torch's attention under the mask of every pattern, with heads that share keys."""
    generator = np.random.default_rng((SEED, 3))
    shapes = {"q": (1, 4, TIME, 4), "k": (1, 2, TIME, 4), "v": (1, 2, TIME, 4)}
    inputs = {name: sixty_fourths(generator, shape) * 4 for name, shape in shapes.items()}
    file = dict(inputs)
    for name, visible in VISIBLE.items():
        allowed = [[k <= q and visible(q, k) for k in range(TIME)] for q in range(TIME)]
        file[name] = F.scaled_dot_product_attention(
            *inputs.values(), attn_mask=torch.tensor(allowed), enable_gqa=True
        )
    # (batch, heads, time, width) -> (batch, time, heads, width)
    return {name: array(value.transpose(1, 2)) for name, value in file.items()}


def longformer() -> Arrays:
    """Longformer's own code: windows of two tokens on either side, and one global token.

    The global token's own query, whose projections are others, is left out.
    """
    config = transformers.LongformerConfig(
        hidden_size=8,
        num_attention_heads=2,
        attention_window=[4],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, layer_id=0)
    randomise(layer)
    hidden = sixty_fourths(np.random.default_rng((SEED, 5)), (1, TIME, 8)) * 4
    first = (torch.arange(TIME) == 0)[None]
    (out, *_) = layer(
        hidden,
        attention_mask=first * 10000.0,
        is_index_masked=torch.zeros_like(first),
        is_index_global_attn=first,
        is_global_attn=True,
    )
    heads = {"q": layer.query(hidden), "k": layer.key(hidden), "v": layer.value(hidden), "out": out}
    file = {name: array(value).reshape(1, TIME, 2, 4) for name, value in heads.items()}
    return {**file, "out": file["out"][:, 1:]}


def cross_entropy() -> Arrays:
    """Losses of single tokens in nats, and the gradient of their weighted sum by the logits, which
    are large in one of the rows. As many tokens as the vocabulary has."""
    generator = np.random.default_rng((SEED, 4))
    vocab_size = 2 * TIME
    logits = sixty_fourths(generator, (2, TIME, vocab_size)) * 8
    logits[0] *= 16
    logits.requires_grad_()
    targets = torch.tensor(generator.integers(vocab_size, size=(2, TIME)))
    weights = torch.tensor(generator.integers(0, 3, size=(2, TIME)))
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    (losses * weights).sum().backward()
    return {
        "logits": half(array(logits)),
        "targets": targets.numpy().astype(np.int8),
        "weights": weights.numpy().astype(np.int8),
        "losses": array(losses),
        "gradient": array(logits.grad),
    }


def initial_weights() -> Arrays:
    """Standard deviation and largest size of fresh weights: torch's defaults, and GPT-2's."""
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=4, n_inner=256)
    )
    wide, embedding = nn.Linear(64, 2000), nn.Embedding(300, 64)
    layers = [(layer.attn, layer.mlp) for layer in gpt2.h]
    drawn = {
        "uniform_fan_in/kernel": wide.weight,
        "uniform_fan_in/bias": wide.bias,
        "uniform_fan_in/embedding": embedding.weight,
        "scaled/kernel": torch.stack([attention.c_attn.weight for attention, _ in layers]),
        "scaled/residual_kernel": torch.stack([mlp.c_proj.weight for _, mlp in layers]),
        "scaled/embedding": gpt2.wte.weight,
    }
    return {name: np.array([array(x).std(), np.abs(array(x)).max()]) for name, x in drawn.items()}


PARTS: dict[str, Callable[[], Arrays]] = {
    "activations": activations,
    "norms": norms,
    "positions": positions,
    "attention": attention,
    "longformer": longformer,
    "cross_entropy": cross_entropy,
    "initial_weights": initial_weights,
}


def main() -> None:
    """Writes the files asked for, or all."""
    makers = {name: lambda model=model: model_file(model()) for name, model in MODELS.items()}
    makers |= PARTS
    torch.set_num_threads(1)
    for name in sys.argv[1:] or makers:
        path = FOLDER / f"{name}.npz"
        np.savez_compressed(path, **makers[name]())
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
