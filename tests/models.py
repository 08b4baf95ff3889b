"""Tiny models with random weights for tests that need an engine but not a good answer.

Made from a seed in well under a second, without torch. The weights are large enough for greedy
output to depend on the whole prompt, so wrong KV shows as a wrong token. One token is one byte:
a prompt of n ASCII characters has n tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<s>", "</s>"
VOCABULARY = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 4, 2, 64
SLIDING_WINDOW = 256
SHARPNESS = 4.0  # of attention: each token listens to few others, and so to each of them

Weights = dict[str, npt.NDArray[np.float32]]


def tiny_llama(target: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """A Llama of about two million parameters: one cache group, full attention everywhere."""
    weights = _weights(layers, seed, norms=("input_layernorm", "post_attention_layernorm"))
    config = _config(layers) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return _write(target, config, weights)


def tiny_hybrid(target: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """A Gemma-3 text model whose layers alternate between a sliding window and full attention."""
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    weights = _weights(layers, seed, norms=norms)
    for name in [name for name in weights if "norm" in name]:
        weights[name] = np.zeros_like(weights[name])  # Gemma adds one to its norms' weights
    for layer in range(layers):
        for norm in ("q_norm", "k_norm"):
            weights[f"model.layers.{layer}.self_attn.{norm}.weight"] = _zeros(HEAD_DIM)
        weights[f"model.layers.{layer}.self_attn.q_norm.weight"] += SHARPNESS - 1
    kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    config = _config(layers) | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": HEAD_DIM,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }
    return _write(target, config, weights)


def _weights(layers: int, seed: int, *, norms: tuple[str, ...]) -> Weights:
    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> npt.NDArray[np.float32]:
        scale = gain / math.sqrt(columns)
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)

    weights: Weights = {
        "model.embed_tokens.weight": matrix(len(VOCABULARY), HIDDEN),
        "model.norm.weight": _zeros(HIDDEN) + 1,
        # Not tied to the embedding: a tied random model mostly repeats its last token.
        "lm_head.weight": matrix(len(VOCABULARY), HIDDEN),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}"
        weights[f"{at}.self_attn.q_proj.weight"] = matrix(HEADS * HEAD_DIM, HIDDEN, SHARPNESS)
        weights[f"{at}.self_attn.k_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{at}.self_attn.v_proj.weight"] = matrix(KV_HEADS * HEAD_DIM, HIDDEN)
        weights[f"{at}.self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM, 4.0)
        weights[f"{at}.mlp.gate_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[f"{at}.mlp.up_proj.weight"] = matrix(INTERMEDIATE, HIDDEN)
        weights[f"{at}.mlp.down_proj.weight"] = matrix(HIDDEN, INTERMEDIATE)
        weights |= {f"{at}.{norm}.weight": _zeros(HIDDEN) + 1 for norm in norms}
    return weights


def _zeros(size: int) -> npt.NDArray[np.float32]:
    return np.zeros(size, dtype=np.float32)


def _config(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "vocab_size": len(VOCABULARY),
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }


def _write(target: Path, config: dict[str, Any], weights: Weights) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.save(str(target / "tokenizer.json"))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "model_max_length": 8192,
            "chat_template": template,
        },
    }
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=1) + "\n")
    return target
