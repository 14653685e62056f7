"""The peer of the CPU benchmarks: GPT-2 of `transformers`, in a child process.

    python torch_peer.py train '{"batch_size": 12, "context_length": 64, "n_layers": 4, ...}'

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
    """Forward, backward, clipping and AdamW."""
    model = gpt2(shape).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    compiled = torch.compile(model)
    tokens = torch.randint(shape["vocab_size"], (shape["batch_size"], shape["context_length"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def steps(count: int) -> None:
        for _ in range(count):
            logits = compiled(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return steps


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


TASKS = {"train": train, "sample": sample}


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
