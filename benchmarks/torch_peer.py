"""The peers of the CPU benchmarks, in child processes: GPT-2 of `transformers`, and a plain GPT.

    python torch_peer.py train '{"batch_size": 12, "context_length": 64, "n_layers": 4, ...}'

`train` trains that of `transformers`, `train_plain` the GPT of `torch_gpt.py`, whose attention is
one fused operation; `sample` generates with that of `transformers`.

It prints one line of JSON when ready; then, for every line n on its standard input, it does n
steps (or generates n tokens) and prints the seconds they took. Training runs under
`torch.compile`; generation is `generate` with its cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch_gpt import GPT


def gpt2(shape: dict[str, Any]) -> transformers.GPT2LMHeadModel:
    """The model of this shape, without dropout."""
    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["context_length"],
        n_embd=shape["d_model"],
        n_layer=shape["n_layers"],
        n_head=shape["n_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config)


def train(shape: dict[str, Any]) -> Callable[[int], None]:
    """Train GPT-2 of `transformers`."""
    model = gpt2(shape).train()
    compiled = torch.compile(model)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = compiled(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return _steps(shape, model, loss_of)


def train_plain(shape: dict[str, Any]) -> Callable[[int], None]:
    """Train a plain GPT, with attention in one fused operation."""
    model = GPT(shape).train()
    return _steps(shape, model, torch.compile(model))


def _steps(
    shape: dict[str, Any],
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[int], None]:
    """Forward, backward, clipping and the optimiser."""
    optimizers = optimizers_of(model, shape.get("optimizer", "adamw"))
    tokens = torch.randint(shape["vocab_size"], (shape["batch_size"], shape["context_length"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def steps(count: int) -> None:
        for _ in range(count):
            loss_of(inputs, targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)

    return steps


def optimizers_of(model: torch.nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """AdamW, fused; with Muon on the matrices of the blocks if that is asked for."""
    parameters = dict(model.named_parameters())
    moved = {}
    if name == "muon":
        moved = {
            key: p
            for key, p in parameters.items()
            if p.ndim == 2
            and not any(word in key for word in ("token", "position", "head", "wte", "wpe"))
        }
    rest = [p for key, p in parameters.items() if key not in moved]
    adam = torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if not moved:
        return [adam]
    return [torch.optim.Muon(list(moved.values()), lr=2e-2, weight_decay=0.1), adam]


def sample(shape: dict[str, Any]) -> Callable[[int], None]:
    """Sampling at temperature 1 from prompts of 8 tokens, in the dtype that is asked for."""
    model = gpt2(shape).eval().to(getattr(torch, shape["dtype"]))
    prompts = torch.randint(shape["vocab_size"], (shape["batch_size"], 8))

    def tokens(count: int) -> None:
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=count,
                min_new_tokens=count,
                use_cache=True,
            )
        assert out.shape[1] == 8 + count

    return tokens


TASKS = {"train": train, "train_plain": train_plain, "sample": sample}


def main() -> None:
    """Builds the task, then does turns as they are asked for."""
    task, shape = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    turn = TASKS[task](shape)
    turn(3)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        turn(int(line))
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
