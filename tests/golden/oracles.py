"""Whole models of torch and transformers, small, and what their parameters are called here.

A model is made by a function of no arguments; `make.py` gives it weights and runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings
from transformers.models.t5.modeling_t5 import T5Stack

VOCAB_SIZE = 11
TIME = 12
# Of every model; d_model, heads and layers are as small as its peculiarities allow.
COMMON = {"vocab_size": VOCAB_SIZE, "context_length": TIME}

Tree = dict[str, Any]


class Model(NamedTuple):
    """An oracle, and what its model is called here."""

    config: Tree
    module: nn.Module
    params: Callable[[], Tree]
    """The parameters in our layout, as they are at the time of the call."""
    logits: Callable[[torch.Tensor], torch.Tensor]
    with_gradients: bool = False


# --- Pieces of a tree -----------------------------------------------------------------------------


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Tree:
    """A dense layer of torch's weight (out, in)."""
    kernel = {"kernel": array(weight).T}
    return kernel if bias is None else {**kernel, "bias": array(bias)}


def linear(layer: nn.Linear) -> Tree:
    return dense(layer.weight, layer.bias)


def plain(up: nn.Linear, down: nn.Linear) -> Tree:
    return {"up": linear(up), "down": linear(down)}


def attention(weights: Any, out: Tree, biases: Any = (None, None, None)) -> Tree:
    """Attention of the weights of queries, keys and values."""
    layers = zip(("query", "key", "value"), weights, biases, strict=True)
    return {**{name: dense(weight, bias) for name, weight, bias in layers}, "out": out}


def norm(layer: nn.Module, plus: float = 0.0) -> Tree:
    """A norm's scale, `plus` what its owner adds to it, and its shift if it has one."""
    scale = {"scale": array(layer.weight) + plus}
    bias = getattr(layer, "bias", None)
    return scale if bias is None else {**scale, "bias": array(bias)}


def stacked(trees: list[Tree]) -> Tree:
    """The trees of layers as one, with a leading axis of layers."""
    first = trees[0]
    if not isinstance(first, dict):
        return np.stack(trees)
    return {name: stacked([tree[name] for tree in trees]) for name in first}


def decoder(
    embedding: nn.Embedding, blocks: list[Tree], final_norm: Tree, turn: int = 1, **rest: Any
) -> Tree:
    """A decoder's parameters; its layers differ in kind with a period of `turn`."""
    periods = {f"block_{i}": stacked(blocks[i::turn]) for i in range(turn)}
    body = {"blocks": periods, "final_norm": final_norm}
    return {"embedding": array(embedding.weight), "body": body, **rest}


def causal_mask(time: int) -> torch.Tensor:
    """True where a query (row) may see a key (column)."""
    return torch.ones(time, time, dtype=torch.bool).tril()


# --- Models --------------------------------------------------------------------------------------


def gpt2() -> Model:
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=11, n_positions=TIME, n_embd=8, n_layer=2, n_head=2, n_inner=16
        )
    )

    def conv(layer: Any) -> Tree:
        return dense(layer.weight.T, layer.bias)

    def block(layer: Any) -> Tree:
        weights = layer.attn.c_attn.weight.T.chunk(3)
        biases = layer.attn.c_attn.bias.chunk(3)
        return {
            "attention_norm": norm(layer.ln_1),
            "attention": attention(weights, conv(layer.attn.c_proj), biases),
            "feed_forward_norm": norm(layer.ln_2),
            "feed_forward": {"up": conv(layer.mlp.c_fc), "down": conv(layer.mlp.c_proj)},
        }

    def params() -> Tree:
        body = model.transformer
        positions = {"embedding": array(body.wpe.weight)}
        return decoder(
            body.wte, [block(layer) for layer in body.h], norm(body.ln_f), positions=positions
        )

    config = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 16}
    config |= {"tie_embeddings": True, "qkv_bias": True}
    return Model(config, model, params, lambda tokens: model(tokens).logits, with_gradients=True)


LLAMA = {
    "vocab_size": 11,
    "max_position_embeddings": TIME,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LIKE_LLAMA = {
    "d_model": 8,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 6,
    "d_ff": 12,
    "position": "rope",
    "norm": "rmsnorm",
    "norm_epsilon": 1e-6,
    "activation": "swiglu",
    "bias": False,
}


def llama_attention(layer: Any, qk_norm: bool = False) -> Tree:
    a = layer.self_attn
    norms = {"query_norm": norm(a.q_norm), "key_norm": norm(a.k_norm)} if qk_norm else {}
    weights = a.q_proj.weight, a.k_proj.weight, a.v_proj.weight
    return attention(weights, linear(a.o_proj)) | norms


def gated(mlp: Any) -> Tree:
    return {
        "gate": linear(mlp.gate_proj),
        "up": linear(mlp.up_proj),
        "down": linear(mlp.down_proj),
    }


def like_llama(model: Any, changes: Tree, with_gradients: bool = False) -> Model:
    qk_norm = changes.get("qk_norm", False)

    def params() -> Tree:
        blocks = [
            {
                "attention_norm": norm(layer.input_layernorm),
                "attention": llama_attention(layer, qk_norm),
                "feed_forward_norm": norm(layer.post_attention_layernorm),
                "feed_forward": gated(layer.mlp),
            }
            for layer in model.model.layers
        ]
        return decoder(
            model.model.embed_tokens, blocks, norm(model.model.norm), head=linear(model.lm_head)
        )

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens).logits

    return Model({**LIKE_LLAMA, **changes}, model, params, logits, with_gradients)


def llama() -> Model:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    return like_llama(model, {}, with_gradients=True)


def llama_stretched() -> Model:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=rope)
    model = transformers.LlamaForCausalLM(config)
    return like_llama(model, {"rope_scaling": 4.0, "rope_base": 500.0})


def mistral() -> Model:
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=4))
    return like_llama(model, {"attention": "sliding_window", "attention_window": 4})


def qwen3() -> Model:
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA))
    return like_llama(model, {"qk_norm": True})


def gemma2() -> Model:
    # A width whose root, by which Gemma multiplies embeddings, is exact.
    changes = {"hidden_size": 16, "head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Gemma2Config(
        **{**LLAMA, **changes},
        query_pre_attn_scalar=4,
        sliding_window=3,
        attn_logit_softcapping=None,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    )
    model = transformers.Gemma2ForCausalLM(config)

    def params() -> Tree:
        blocks = [
            {
                "attention_norm": norm(layer.input_layernorm, plus=1),
                "attention": llama_attention(layer),
                "attention_out_norm": norm(layer.post_attention_layernorm, plus=1),
                "feed_forward_norm": norm(layer.pre_feedforward_layernorm, plus=1),
                "feed_forward": gated(layer.mlp),
                "feed_forward_out_norm": norm(layer.post_feedforward_layernorm, plus=1),
            }
            for layer in model.model.layers
        ]
        final_norm, head = norm(model.model.norm, plus=1), linear(model.lm_head)
        tree = decoder(model.model.embed_tokens, blocks, final_norm, turn=2, head=head)
        return {**tree, "embedding": 4 * tree["embedding"]}

    config = {
        **LIKE_LLAMA,
        "d_model": 16,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_head": 4,
        "norm_placement": "sandwich",
        "activation": "geglu",
        "attention": ["sliding_window", "full"],
        "attention_window": 3,
        "logit_softcap": 3.0,
    }
    return Model(config, model, params, lambda tokens: model(tokens).logits)


def gptj() -> Model:
    model = transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            vocab_size=11,
            n_positions=TIME,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_inner=16,
            rotary_dim=4,
        )
    )

    def paired(layer: nn.Linear) -> torch.Tensor:
        """The weight with what GPT-J turns, pairs of neighbours, where we pair i with i + 2."""
        heads = layer.weight.reshape(2, 8, 16)
        return heads[:, [0, 2, 1, 3, 4, 5, 6, 7]].reshape(16, 16)

    def block(layer: Any) -> Tree:
        a = layer.attn
        weights = paired(a.q_proj), paired(a.k_proj), a.v_proj.weight
        return {
            "norm": norm(layer.ln_1),
            "attention": attention(weights, dense(a.out_proj.weight, torch.zeros(16))),
            "feed_forward": plain(layer.mlp.fc_in, layer.mlp.fc_out),
        }

    def params() -> Tree:
        body = model.transformer
        blocks = [block(layer) for layer in body.h]
        return decoder(body.wte, blocks, norm(body.ln_f), head=linear(model.lm_head))

    config = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "position": "rope"}
    config |= {"rope_fraction": 0.5, "norm_placement": "parallel", "head_bias": True}
    return Model(config, model, params, lambda tokens: model(tokens).logits)


def gpt_neox() -> Model:
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=11,
            max_position_embeddings=TIME,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            use_parallel_residual=True,
        )
    )

    def block(layer: Any) -> Tree:
        fused, out = layer.attention.query_key_value, linear(layer.attention.dense)
        # Queries, keys and values of width 8 lie side by side for each of two heads.
        weights = fused.weight.reshape(2, 3, 8, 16).unbind(1)
        biases = fused.bias.reshape(2, 3, 8).unbind(1)
        return {
            "norm": norm(layer.input_layernorm),
            "attention": attention(
                [weight.flatten(0, 1) for weight in weights],
                out,
                [bias.flatten() for bias in biases],
            ),
            "feed_forward": plain(layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h),
        }

    def params() -> Tree:
        body = model.gpt_neox
        blocks = [block(layer) for layer in body.layers]
        head = linear(model.get_output_embeddings())
        return decoder(body.embed_in, blocks, norm(body.final_layer_norm), head=head)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        # It has a norm for each branch; here one serves both.
        for layer in model.gpt_neox.layers:
            layer.post_attention_layernorm.load_state_dict(layer.input_layernorm.state_dict())
        return model(tokens).logits

    config = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 16, "position": "rope"}
    config |= {"rope_fraction": 0.5, "norm_placement": "parallel", "activation": "gelu_exact"}
    return Model({**config, "qkv_bias": True}, model, params, logits)


def falcon() -> Model:
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=11,
            hidden_size=8,
            ffn_hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TIME,
            multi_query=True,
            parallel_attn=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )

    def block(layer: Any) -> Tree:
        a, mlp, no_bias = layer.self_attention, layer.mlp, torch.zeros(8)
        weights = a.query_key_value.weight.split([8, 4, 4])
        return {
            "norm": norm(layer.input_layernorm),
            "attention": attention(weights, dense(a.dense.weight, no_bias)),
            "feed_forward": {
                "up": dense(mlp.dense_h_to_4h.weight, torch.zeros(12)),
                "down": dense(mlp.dense_4h_to_h.weight, no_bias),
            },
        }

    def params() -> Tree:
        body = model.transformer
        return decoder(body.word_embeddings, [block(layer) for layer in body.h], norm(body.ln_f))

    config = {"d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 12}
    config |= {"position": "rope", "norm_placement": "parallel", "activation": "gelu_exact"}
    return Model(
        {**config, "tie_embeddings": True}, model, params, lambda tokens: model(tokens).logits
    )


def mpt() -> Model:
    # Three heads: no power of two, for which the slopes are another series.
    model = transformers.MptForCausalLM(
        transformers.MptConfig(d_model=12, n_heads=3, n_layers=1, max_seq_len=TIME, vocab_size=11)
    )

    def block(layer: Any) -> Tree:
        weights = layer.attn.Wqkv.weight.chunk(3)
        return {
            "attention_norm": norm(layer.norm_1),
            "attention": attention(weights, linear(layer.attn.out_proj)),
            "feed_forward_norm": norm(layer.norm_2),
            "feed_forward": plain(layer.ffn.up_proj, layer.ffn.down_proj),
        }

    def params() -> Tree:
        body = model.transformer
        return decoder(body.wte, [block(layer) for layer in body.blocks], norm(body.norm_f))

    config = {"d_model": 12, "n_layers": 1, "n_heads": 3, "position": "alibi", "bias": False}
    config |= {"activation": "gelu_exact", "tie_embeddings": True}
    return Model(config, model, params, lambda tokens: model(tokens).logits)


def t5(feed_forward: str = "relu") -> Model:
    stack = T5Stack(
        transformers.T5Config(
            vocab_size=11,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=10,
            feed_forward_proj=feed_forward,
            is_decoder=True,
            use_cache=False,
        )
    )
    model = nn.ModuleDict({"stack": stack, "head": nn.Linear(8, 11, bias=False)}).eval()

    def block(layer: Any) -> Tree:
        a, last = layer.layer[0].SelfAttention, layer.layer[-1]
        ff = last.DenseReluDense
        names = {"up": ff.wi} if feed_forward == "relu" else {"gate": ff.wi_0, "up": ff.wi_1}
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        return {
            "attention_norm": norm(layer.layer[0].layer_norm),
            # T5 does not divide scores by the root of the width, here 2.
            "attention": {
                **attention((2 * a.q.weight, a.k.weight, a.v.weight), linear(a.o)),
                "positions": {"bias": array(table).T},
            },
            "feed_forward_norm": norm(last.layer_norm),
            "feed_forward": {
                name: linear(matrix) for name, matrix in {**names, "down": ff.wo}.items()
            },
        }

    def params() -> Tree:
        blocks = [block(layer) for layer in stack.block]
        final_norm, head = norm(stack.final_layer_norm), linear(model["head"])
        return decoder(stack.embed_tokens, blocks, final_norm, head=head)

    config = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 12, "position": "t5"}
    config |= {"position_buckets": 8, "position_max_distance": 10, "norm": "rmsnorm"}
    config |= {"norm_epsilon": 1e-6, "bias": False}
    config |= {"activation": {"relu": "relu", "gated-relu": "reglu"}[feed_forward]}

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model["head"](stack(tokens).last_hidden_state)

    return Model(config, model, params, logits)


def torch_encoder(norm_first: bool) -> Model:
    """The first transformer's layers, as torch has them: post-norm with sinusoidal positions, or
    pre-norm with none."""
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(
        layer, num_layers=2, norm=nn.LayerNorm(8), enable_nested_tensor=False
    )
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(11, 8), "encoder": encoder, "head": nn.Linear(8, 11)}
    )
    table = torch.zeros(TIME, 8) if norm_first else sinusoidal_table(TIME, 8)

    def block(layer: Any) -> Tree:
        weights = layer.self_attn.in_proj_weight.chunk(3)
        biases = layer.self_attn.in_proj_bias.chunk(3)
        return {
            "attention_norm": norm(layer.norm1),
            "attention": attention(weights, linear(layer.self_attn.out_proj), biases),
            "feed_forward_norm": norm(layer.norm2),
            "feed_forward": plain(layer.linear1, layer.linear2),
        }

    def params() -> Tree:
        blocks = [block(layer) for layer in encoder.layers]
        return decoder(model["embedding"], blocks, norm(encoder.norm), head=linear(model["head"]))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        x = model["embedding"](tokens) + table
        return model["head"](encoder(x, mask=~causal_mask(TIME)))

    config = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_ff": 12, "activation": "relu"}
    config |= {"position": "none" if norm_first else "sinusoidal", "qkv_bias": True}
    config |= {"norm_placement": "pre" if norm_first else "post", "head_bias": True}
    return Model(config, model, params, logits)


def sinusoidal_table(time: int, width: int) -> torch.Tensor:
    return create_sinusoidal_embeddings(time, width, torch.empty(time, width))


MODELS: dict[str, Callable[[], Model]] = {
    "gpt2": gpt2,
    "llama": llama,
    "llama_stretched": llama_stretched,
    "mistral": mistral,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gptj": gptj,
    "gpt_neox": gpt_neox,
    "falcon": falcon,
    "mpt": mpt,
    "t5": t5,
    "t5_gated": lambda: t5("gated-relu"),
    "torch_post_norm": lambda: torch_encoder(norm_first=False),
    "torch_pre_norm": lambda: torch_encoder(norm_first=True),
}
