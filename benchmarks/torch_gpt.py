"""A plain GPT in PyTorch, the peer of the training benchmark on a card, in a child process.

    python -m benchmarks.torch_gpt '{"batch_size": 16, "context_length": 1024, "n_layers": 12, ...}'

`torch.compile`, scaled_dot_product_attention, bfloat16 by autocast with TF32 for what stays single,
fused AdamW, gradients clipped: nothing waits for the card but the end of a turn. It speaks the
protocol of `benchmarks/card/sides.py`. Without a card it runs on the CPU, for a test.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention and a feed-forward of four times the width, each after a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        of_attention, of_feed_forward = self.norms
        q, k, v = self.qkv(of_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(of_feed_forward(x)), approximate="tanh"))


class GPT(nn.Module):
    """Learned positions; the head is the embedding again if they are tied."""

    def __init__(self, shape: dict[str, Any]):
        super().__init__()
        width, vocabulary = shape["d_model"], shape["vocab_size"]
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(shape["context_length"], width) / 50)
        blocks = (Block(width, shape["n_heads"]) for _ in range(shape["n_layers"]))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        if shape.get("tie_embeddings"):
            self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.blocks(self.tokens(inputs) + self.positions[: inputs.shape[1]])
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def trainer(shape: dict[str, Any], device: str) -> Callable[[int], float]:
    """Does so many steps, waits for the card, and gives the last loss."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = GPT(shape).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    compiled = torch.compile(model)
    size = (shape["batch_size"], shape["context_length"] + 1)
    tokens = torch.randint(shape["vocab_size"], size, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def steps(count: int) -> float:
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16):
                loss = compiled(inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits

    return steps


def main() -> None:
    from benchmarks.card.sides import answering

    with answering() as answer:
        steps = trainer(json.loads(sys.argv[1]), "cuda" if torch.cuda.is_available() else "cpu")
        start = time.perf_counter()
        steps(3)
        answer(compile_seconds=time.perf_counter() - start, torch=torch.__version__)
        for line in sys.stdin:
            start = time.perf_counter()
            loss = steps(int(line))
            answer(seconds=time.perf_counter() - start, loss=loss)


if __name__ == "__main__":
    main()
